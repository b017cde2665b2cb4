"""Names of parameters from another implementation's to ours and back, by a table of rules."""

import re
from collections.abc import Iterable

# Their name and ours. Each * stands for a number, the same in both. A rule that ends with a dot renames whatever
# begins so; any other renames the one parameter.
Rule = tuple[str, str]


def under(theirs: str, ours: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules of a part, of names that begin with `theirs` and `ours`."""
    return [(theirs + their_part, ours + our_part) for their_part, our_part in rules]


class Renaming:
    """A table of rules, read in both directions. The longest rule that fits is taken."""

    def __init__(self, rules: Iterable[Rule]):
        rules = list(rules)
        self._forward = _compile(rules)
        self._backward = _compile((ours, theirs) for theirs, ours in rules)

    def ours(self, theirs: str) -> str | None:
        """Our name, None if no rule fits."""
        return _translate(theirs, self._forward)

    def theirs(self, ours: str) -> str | None:
        """Their name of ours, None if no rule fits."""
        return _translate(ours, self._backward)


def _compile(rules: Iterable[Rule]) -> list[tuple[re.Pattern, str]]:
    """Patterns and what `re.Match.expand` makes of them, longest first."""
    compiled = []
    for source, target in sorted(rules, key=lambda rule: len(rule[0]), reverse=True):
        if source.endswith("."):
            rest, target = "(.+)", target + "*"
        else:
            rest = ""
        for number in range(1, target.count("*") + 1):
            target = target.replace("*", rf"\g<{number}>", 1)
        compiled.append((re.compile(re.escape(source).replace(r"\*", r"(\d+)") + rest), target))
    return compiled


def _translate(name: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, target in rules:
        if match := pattern.fullmatch(name):
            return match.expand(target)
    return None
