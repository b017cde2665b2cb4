"""A config value of another type than its key, told in words: yacs tells it in Python's classes."""

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

TYPES = {int: "a whole number", float: "a number with a decimal point", bool: "True or False",
         str: "a text in quotes", tuple: "a tuple", list: "a list"}  # fmt: skip
MISMATCH = re.compile(r"Type mismatch \(.* vs\. <class '(.+?)'>\) with values \((.*)\) for config key: (\S+)")


def describe_mismatch(message: str, known: Mapping[str, object]) -> str | None:
    """What a key must be and an example, for yacs's message about a value of a wrong type; None for another message.

    Args:
        message: on one line.
        known: the dotted keys of the config that did not take the value, with their values and sections.
    """
    found = MISMATCH.fullmatch(message)
    if found is None:
        return None
    kind, values, key = found.groups()
    present = known[key]
    given = values[len(" ".join(str(present).split())) :].strip().removeprefix("vs. ")
    if isinstance(present, dict):
        example = next((f", such as {key}.{name}" for name in present), "")
        return f"{key} is a section, and cannot be {given} (type {kind}): set one of its keys{example}"
    example = _example(present, given, kind)
    quoted = f'"{example}"' if re.search(r"[\s('\[\"]", example) else example
    return f"{key} cannot be {given} (type {kind}): it must be {TYPES[type(present)]}, such as {key} {quoted}"


def _example(present: object, given: str, kind: str) -> str:
    """The given value in the form that the key needs, where it can be told; else the value that the key has.

    Args:
        kind: the name of the given value's type.
    """
    if isinstance(present, str):
        return repr(given)
    if isinstance(present, float) and kind == "int":
        return f"{given}.0"
    if isinstance(present, tuple | list) and kind in ("int", "float", "str"):
        return _as_sequence(type(present), given) or repr(present)
    return repr(present)


def _as_sequence(kind: type[Sequence], given: str) -> str:
    """One value as a tuple or list of it; "" where it looks like a part of something else."""
    if re.fullmatch(r"[\w./+-]+", given) is None:
        return ""
    with suppress(ValueError, SyntaxError):
        return repr(kind([ast.literal_eval(given)]))
    return repr(kind([given]))
