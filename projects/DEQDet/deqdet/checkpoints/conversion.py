"""Converts other implementations' checkpoints: renames all weights, and compares them with the model they imply."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone

from .. import detector  # noqa: F401  registers the detector by its name
from ..config import add_deqdet_config
from ..errors import list_first, one_line, plural
from .files import COUNTER, CheckpointError, check_target, read_checkpoint, write_checkpoint
from .implied import BODY, Config, Given
from .kinds import KINDS, Kind, Rule

WITH_BACKGROUND = 81  # outputs of a softmax over COCO's classes
LISTED = 5  # names in an error
COMPUTED = ".relative_position_index"  # buffers of Swin that depend only on the window size
# Keys that affect neither names nor shapes: freeze nothing, no drop path (which needs timm), heads that divide any C.
NEUTRAL = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.SWIN.DROP_PATH_RATE": 0.0,
    "MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS": 1,
    "MODEL.DEVICE": "cpu",
}


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint, with the config that it implies and notes for the user."""

    kind: str
    guessed: bool  # whether the kind was guessed from the keys
    weights: dict[str, Tensor]
    config: Config  # all keys that the checkpoint determines
    notes: tuple[str, ...]


def convert_file(
    source: Path, target: Path, *, kind: str | None = None, num_classes: int | None = None
) -> Conversion:
    """Convert the checkpoint `source` and write it to `target`, which is unchanged after an error.

    Args:
        target: with suffix ".safetensors" for that format, with any other for a .pth file.
        kind, num_classes: see `convert`.

    Raises:
        CheckpointError: one of the files cannot be used; names it.
    """
    check_target(target, source)
    checkpoint = read_checkpoint(source)
    try:
        conversion = convert(checkpoint.weights, kind=kind, num_classes=num_classes)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    write_checkpoint(conversion.weights, target)
    ignored = (f"other entries, left out: {', '.join(checkpoint.ignored)}",) if checkpoint.ignored else ()
    return replace(conversion, notes=conversion.notes + ignored)


def convert(weights: Mapping[str, Tensor], *, kind: str | None = None, num_classes: int | None = None) -> Conversion:
    """Rename a state dict, and check that the result is complete and has the shapes of one of our models.

    Args:
        weights: the state dict of the other implementation.
        kind: a name in KINDS; None guesses it from the keys.
        num_classes: the number K of classes that the classification layers must have. None accepts any number except
            81, which is COCO's 80 classes and a background class; our layers have no background class.

    Raises:
        CheckpointError: keys are unknown, missing or of a wrong shape, or the number of classes is not K.
    """
    known = KINDS[kind] if kind else guess_kind(weights)
    renaming = Renaming(known.rules(weights.keys()))
    dead = {name: pattern for name in weights for pattern in known.dead if fnmatchcase(name, pattern)}
    ours, unknown = _rename([name for name in weights if name not in dead], renaming)
    try:
        config = known.imply_config({name: Given(x, tuple(weights[x].shape)) for name, x in ours.items()})
        _check_classes(config.get("MODEL.DEQDET.NUM_CLASSES"), num_classes)
        expected = build_structure(config, backbone_only=known.backbone_only)
    except CheckpointError as error:
        raise _refusal(known, [describe("unknown", unknown), str(error)]) from error

    lacked = [name for name in expected if name not in ours and not name.endswith((COMPUTED, COUNTER))]
    absent = [name for name in lacked if any(fnmatchcase(name, pattern) for pattern in known.may_lack)]
    given = {name: their for name, their in ours.items() if name in expected}
    misshapen = [name for name in given if weights[given[name]].shape != expected[name].shape]
    altered = [x for x in given if x.endswith(COMPUTED) and not _agree(weights[given[x]], expected[x])]
    problems = [
        describe("unknown", unknown + [their for name, their in ours.items() if name not in expected]),
        describe("missing", [renaming.theirs(name) or name for name in lacked if name not in absent]),
        describe("misshapen", [describe_shapes(given[x], weights[given[x]], expected[x]) for x in misshapen]),
        describe("differently computed", [given[name] for name in altered if name not in misshapen]),
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
    """Return the last registered kind whose sign matches one of the keys.

    Raises:
        CheckpointError: no kind matches.
    """
    names = list(names)
    for kind in reversed(KINDS.values()):
        if any(fnmatchcase(name, kind.sign) for name in names):
            return kind
    raise CheckpointError(
        f"the keys match no known kind ({', '.join(sorted(KINDS))}); the first are {', '.join(names[:3])}: use "
        "--from KIND if the checkpoint is of one nevertheless"
    )


# Names


class Renaming:
    """The renaming rules of a kind, applied in both directions. If several rules match a name, the longest applies."""

    def __init__(self, rules: Iterable[Rule]):
        rules = list(rules)
        self._forward = _compile(rules)
        self._backward = _compile((ours, theirs) for theirs, ours in rules)

    def ours(self, theirs: str) -> str | None:
        """Return our name for a name in the file, or None if no rule matches."""
        return _translate(theirs, self._forward)

    def theirs(self, ours: str) -> str | None:
        """Return the name in the file for one of our names, or None if no rule matches."""
        return _translate(ours, self._backward)


def _compile(rules: Iterable[Rule]) -> list[tuple[re.Pattern, str]]:
    """Compile rules into patterns with templates for `re.Match.expand`, longest first."""
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


def _rename(names: Iterable[str], renaming: Renaming) -> tuple[dict[str, str], list[str]]:
    """Return the file's names by ours, and those that no rule matches or that map to one of our names already taken."""
    ours, unknown = {}, []
    for their in names:
        name = renaming.ours(their)
        if name is None or name in ours:
            unknown.append(their)
        else:
            ours[name] = their
    return ours, unknown


# The model that the weights must fit


class _WithoutMemory(TorchFunctionMode):
    """Creates new parameters on the meta device: they have a shape and a dtype, but no memory and no values.

    `torch.device("meta")` would put every tensor there. But SwinTransformer reads the values of a torch.linspace, and
    we compare the values of its relative_position_index with the file's.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_structure(config: Config, *, backbone_only: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the detector, or of its bottom-up backbone under the detector's names.

    Except for some buffers, the tensors are on the meta device, without values.

    Args:
        config: the keys that differ from the defaults.
        backbone_only: build only the bottom-up backbone.

    Raises:
        CheckpointError: the detector cannot be built; says why.
    """
    cfg = get_cfg()
    add_deqdet_config(cfg)
    if backbone_only:  # the builder needs some neck; any would do
        body = "swin" if "MODEL.SWIN.DEPTHS" in config else "resnet"
        config = config | {"MODEL.BACKBONE.NAME": f"build_{body}_channel_mapper_backbone"}
    cfg.merge_from_list([x for pair in config.items() for x in pair])
    try:
        module = build_empty(cfg, backbone_only=backbone_only)
    except CheckpointError as error:
        raise CheckpointError(f"its shapes imply {error}") from error
    return module.state_dict(prefix=BODY if backbone_only else "")


def build_empty(cfg: CfgNode, *, backbone_only: bool = False) -> nn.Module:
    """Build the model that a config describes, or its bottom-up backbone, with the weights on the meta device.

    Raises:
        CheckpointError: it cannot be built; says why.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([x for pair in NEUTRAL.items() for x in pair])
    try:
        with _WithoutMemory(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch.meshgrid's, for SwinTransformer
            if backbone_only:
                return build_backbone(cfg, ShapeSpec(channels=3)).bottom_up
            return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    except (ValueError, AssertionError, ArithmeticError, RuntimeError, KeyError) as error:
        reason = one_line(error.args[0] if isinstance(error, KeyError) else error)
        raise CheckpointError(f"a detector that cannot be built: {reason}") from error


def _check_classes(found: int | None, wanted: int | None) -> None:
    if wanted is not None and found is None:
        raise CheckpointError("a backbone has no classes: omit --num-classes")
    if wanted is None and found == WITH_BACKGROUND:
        raise CheckpointError(
            f"the classification layers have {found} outputs, COCO's 80 classes and a background class: ours have one "
            f"sigmoid for each class and none for the background (if these are {found} classes, use "
            f"--num-classes {found})"
        )
    if wanted not in (None, found):
        raise CheckpointError(f"the classification layers have {found} outputs, not the {wanted} of --num-classes")


def _agree(given: Tensor, computed: Tensor) -> bool:
    """Return whether a buffer has the values that we compute; one on the meta device, without values, passes."""
    return given.is_meta or torch.equal(given, computed)


# Messages


def describe_shapes(name: str, given: Tensor, expected: Tensor) -> str:
    """Describe a weight by its name, its shape, and the expected shape."""
    return f"{name} {tuple(given.shape)} instead of {tuple(expected.shape)}"


def describe(fault: str, names: list[str]) -> str:
    """State the number of keys with a fault and the first of them; return "" if there are none."""
    if not names:
        return ""
    return f"{plural(len(names), f'{fault} key')}: {list_first(names, LISTED)}"


def _refusal(kind: Kind, problems: list[str]) -> CheckpointError:
    return CheckpointError(f"taken as {kind.name}: {'; '.join(filter(None, problems))}")


def _notes(kind: Kind, dead: Mapping[str, str], absent: list[str]) -> tuple[str, ...]:
    notes = list(kind.notes)
    if dead:
        counts = Counter(dead.values())
        notes.append(f"dropped, nothing uses them: {', '.join(f'{x} ({n} keys)' for x, n in counts.items())}")
    if absent:
        notes.append(f"not in the file, start from initial values: {', '.join(absent)}")
    if kind.backbone_only:
        notes.append("the backbone alone: the checkpointer will say that the rest of the detector is not found")
    return tuple(notes)
