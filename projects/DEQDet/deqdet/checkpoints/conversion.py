"""From a checkpoint of another implementation to ours."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from .implied import Config, Given, imply_config
from .kinds import KINDS, Kind
from .reading import ConversionError, read_checkpoint
from .renaming import Renaming
from .structure import build_structure
from .writing import check_target, write_checkpoint

WITH_BACKGROUND = 81  # outputs of a softmax over COCO's classes
LISTED = 5  # names in an error
COMPUTED = ".relative_position_index"  # buffers of Swin that depend on nothing but the window's size
COUNTER = ".num_batches_tracked"  # of BatchNorm, for an average that nobody takes


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint and what there is to say about it."""

    kind: str
    guessed: bool
    weights: dict[str, Tensor]
    config: Config  # all that the checkpoint decides
    notes: tuple[str, ...]


def convert_file(
    source: Path, target: Path, *, kind: str | None = None, num_classes: int | None = None
) -> Conversion:
    """Convert the checkpoint `source` and write it to `target`, which stays as it is on any error.

    Args:
        target: ".safetensors", or anything else for a .pth file.
        kind, num_classes: see `convert`.

    Raises:
        ConversionError: anything is wrong with either file; names it.
    """
    check_target(target, source)
    checkpoint = read_checkpoint(source)
    try:
        conversion = convert(checkpoint.weights, kind=kind, num_classes=num_classes)
    except ConversionError as error:
        raise ConversionError(f"{source}: {error}") from error
    write_checkpoint(conversion.weights, target)
    ignored = (f"left out, beside the weights: {', '.join(checkpoint.ignored)}",) if checkpoint.ignored else ()
    return replace(conversion, notes=conversion.notes + ignored)


def convert(weights: Mapping[str, Tensor], *, kind: str | None = None, num_classes: int | None = None) -> Conversion:
    """Rename a state dict, and see that it is one of ours, complete and of the right shapes.

    Args:
        kind: a name in KINDS; None guesses it from the keys.
        num_classes: K that the classification layers must have. None takes any but 81, which are COCO's 80 and a
            background class, unlike ours.

    Raises:
        ConversionError: keys are unknown, missing or misshapen, or the number of classes is not K.
    """
    known = KINDS[kind] if kind else guess_kind(weights)
    renaming = Renaming(known.rules(weights.keys()))
    dead = {name: pattern for name in weights for pattern in known.dead if fnmatchcase(name, pattern)}
    ours, unknown = _rename([name for name in weights if name not in dead], renaming)
    try:
        config = imply_config({name: Given(x, tuple(weights[x].shape)) for name, x in ours.items()}, known)
        _check_classes(config.get("MODEL.DEQDET.NUM_CLASSES"), num_classes)
        expected = build_structure(config, backbone_only=known.backbone_only)
    except ConversionError as error:
        raise _refusal(known, [_count("unknown", unknown), str(error)]) from error

    lacked = [name for name in expected if name not in ours and not name.endswith((COMPUTED, COUNTER))]
    absent = [name for name in lacked if any(fnmatchcase(name, pattern) for pattern in known.may_lack)]
    given = {name: their for name, their in ours.items() if name in expected}
    misshapen = [name for name in given if weights[given[name]].shape != expected[name].shape]
    altered = [x for x in given if x.endswith(COMPUTED) and not _agree(weights[given[x]], expected[x])]
    problems = [
        _count("unknown", unknown + [their for name, their in ours.items() if name not in expected]),
        _count("missing", [renaming.theirs(name) or name for name in lacked if name not in absent]),
        _count("misshapen", [_describe(given[x], weights[given[x]], expected[x]) for x in misshapen]),
        _count("differently computed", [given[name] for name in altered if name not in misshapen]),
    ]
    if any(problems):
        raise _refusal(known, problems)
    return Conversion(
        kind=known.name,
        guessed=kind is None,
        weights={
            name: known.convert(name, weights[given[name]]) if name in given else value
            for name, value in expected.items()
            if name not in absent
        },
        config=config,
        notes=_notes(known, dead, absent),
    )


def guess_kind(names: Iterable[str]) -> Kind:
    """The first kind of which a key is typical.

    Raises:
        ConversionError: there is none.
    """
    names = list(names)
    for kind in KINDS.values():
        if any(fnmatchcase(name, kind.sign) for name in names):
            return kind
    raise ConversionError(
        f"the keys are of no known kind ({', '.join(KINDS)}), they begin with {', '.join(names[:3])}: say --from KIND "
        "if it is one nevertheless"
    )


def _rename(names: Iterable[str], renaming: Renaming) -> tuple[dict[str, str], list[str]]:
    """Their names by ours, and those that no rule fits or for which another already stands."""
    ours, unknown = {}, []
    for their in names:
        name = renaming.ours(their)
        if name is None or name in ours:
            unknown.append(their)
        else:
            ours[name] = their
    return ours, unknown


def _check_classes(found: int | None, wanted: int | None) -> None:
    if wanted is not None and found is None:
        raise ConversionError("a backbone has no classes: leave --num-classes out")
    if wanted is None and found == WITH_BACKGROUND:
        raise ConversionError(
            f"the classification layers have {found} outputs, COCO's 80 classes and a background class: ours have one "
            f"sigmoid for each class and none for the background (if these are {found} classes, say "
            f"--num-classes {found})"
        )
    if wanted not in (None, found):
        raise ConversionError(f"the classification layers have {found} outputs, not the {wanted} of --num-classes")


def _agree(given: Tensor, computed: Tensor) -> bool:
    """Weights without values, on the meta device, are let pass."""
    return given.is_meta or torch.equal(given, computed)


def _describe(name: str, given: Tensor, expected: Tensor) -> str:
    return f"{name} {tuple(given.shape)} instead of {tuple(expected.shape)}"


def _count(fault: str, names: list[str]) -> str:
    """How many keys have a fault, and the first of them; nothing if none has."""
    if not names:
        return ""
    shown, more = names[:LISTED], len(names) - LISTED
    keys = f"{len(names)} {fault} key{'s' if len(names) > 1 else ''}: {', '.join(shown)}"
    return f"{keys} and {more} more" if more > 0 else keys


def _refusal(kind: Kind, problems: list[str]) -> ConversionError:
    return ConversionError(f"taken as {kind.name}: {'; '.join(filter(None, problems))}")


def _notes(kind: Kind, dead: Mapping[str, str], absent: list[str]) -> tuple[str, ...]:
    notes = list(kind.notes)
    if dead:
        counts = Counter(dead.values())
        notes.append(f"dropped, nothing uses them: {', '.join(f'{x} ({n} keys)' for x, n in counts.items())}")
    if absent:
        notes.append(f"not in the file, will start anew: {', '.join(absent)}")
    if kind.backbone_only:
        notes.append("the backbone alone: the checkpointer will say that the rest of the detector is not found")
    return tuple(notes)
