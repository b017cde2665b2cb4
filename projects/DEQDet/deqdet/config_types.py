"""Explains in plain words why a config value has the wrong type; yacs's own message speaks of Python classes."""

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress

TYPES = {int: "a whole number", float: "a number with a decimal point", bool: "True or False",
         str: "a string in quotes", tuple: "a tuple", list: "a list"}  # fmt: skip
MISMATCH = re.compile(r"Type mismatch \(.* vs\. <class '(.+?)'>\) with values \((.*)\) for config key: (\S+)")


def describe_mismatch(message: str, known: Mapping[str, object]) -> str | None:
    """Translate yacs's message about a value of a wrong type, and add an example; None for any other message.

    Args:
        message: yacs's message, on one line.
        known: the dotted keys of the config that rejected the value, sections included, with their values.
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
    """Return the given value in the form that the key needs, if that can be inferred; else the key's current value.

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
    """Return a tuple or list of the one given value; "" if that looks like a part of something else."""
    if re.fullmatch(r"[\w./+-]+", given) is None:
        return ""
    with suppress(ValueError, SyntaxError):
        return repr(kind([ast.literal_eval(given)]))
    return repr(kind([given]))
