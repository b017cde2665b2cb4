"""The findings of a data set check: faults that stop a run, faults that are repaired, and remarks.

All findings of one kind share a line, which counts them and names the first few. Otherwise, a fault in every annotation
of a large file would give a hundred thousand lines.
"""

from dataclasses import dataclass, field

BROKEN, REPAIRED, REMARK = "broken", "repaired", "remark"  # the levels
_SHOWN = 5  # examples named in a line


@dataclass
class Finding:
    """All findings of one kind in one data set."""

    level: str
    kind: str  # a short name, such as "missing image"
    first: str  # a description of the first one, such as "annotation 3 of a.png has bbox None"
    outcome: str  # what is done about it, or what the user can do
    count: int = 0
    examples: list[str] = field(default_factory=list)  # names of the first few images or annotations

    def line(self) -> str:
        """Describe the finding in one line, with its outcome."""
        return f"{self.facts()}: {self.outcome}"

    def facts(self) -> str:
        """Describe the first fault, with the number of others like it and the names of some."""
        more = ""
        if self.count > 1:
            names = ", ".join(self.examples[1:]) + (", ..." if self.count > len(self.examples) else "")
            more = f" (and {self.count - 1} more: {names})"
        return f"{self.first}{more}"


class Findings:
    """Collects the findings of one data set."""

    def __init__(self) -> None:
        self._by_kind: dict[tuple[str, str], Finding] = {}

    def add(self, level: str, kind: str, name: str, words: str, outcome: str) -> None:
        """Add one fault.

        Args:
            level: BROKEN, REPAIRED or REMARK.
            kind: findings of the same level and kind share a line.
            name: the image or annotation, for example "annotation 3 of a.png".
            words: the fault, as a predicate that follows the name, for example "is missing".
            outcome: what is done about it, or what the user can do.
        """
        finding = self._by_kind.get((level, kind))
        if finding is None:
            finding = self._by_kind[level, kind] = Finding(level, kind, f"{name} {words}", outcome)
        finding.count += 1
        if len(finding.examples) < _SHOWN:
            finding.examples.append(name)

    def of_level(self, level: str) -> list[Finding]:
        """Return the findings of a level, in the order in which their kinds first occurred."""
        return [finding for finding in self._by_kind.values() if finding.level == level]

    def all(self) -> list[Finding]:
        """Return all findings, in the order in which their kinds first occurred."""
        return list(self._by_kind.values())
