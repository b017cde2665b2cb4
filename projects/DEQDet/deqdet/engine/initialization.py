"""`--init`: start a training from the weights of any checkpoint, and report which of them fit.

A tensor is loaded if the model has one of the same name and shape. Two kinds of tensors are adapted if only their
number of rows differs: the last layers of the class branches, whose rows are classes, and the initial queries, whose
rows are queries. All other weights of the model keep their initial values.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detectron2.utils.file_io import PathManager

from ..checkpoints import (
    Checkpointer,
    CheckpointError,
    check_pickle,
    is_model_file,
    read_entries,
    read_model_header,
    resolve_file,
)
from ..checkpoints.checkpointer import MODEL_ZOO
from ..checkpoints.files import COUNTER, find_weights
from ..errors import UserError, list_first, one_line
from ..quiet_imports import quiet_imports
from .health import check_finite_model
from .models import unwrap

logger = logging.getLogger(__name__)

CLASSES, QUERIES = "class_branch.", "queries."  # in the names of tensors whose rows are classes or queries
_SERVER = "https://dl.fbaipublicfiles.com/detectron2/"  # what detectron2:// abbreviates
_VOTERS = 200  # number of tensor names used to infer a prefix that the file's names lack


@dataclass(frozen=True)
class Adaptation:
    """The tensors of a checkpoint that a model can load, and a report on all others."""

    weights: dict[str, Tensor]  # by the model's names, with the model's shapes
    lines: list[str]  # one log line for each kind of adaptation or mismatch


def prepare_initialization(args: argparse.Namespace) -> None:
    """Check that no other flag sets the initial weights, and append an empty MODEL.WEIGHTS to the command line.

    Raises:
        UserError: another flag or key sets the weights, or the file does not exist.
    """
    if not args.init:
        return
    for given, what in (
        (args.eval_only, "--eval-only"),
        (args.model, "--model"),
        ("MODEL.WEIGHTS" in args.opts[::2], "MODEL.WEIGHTS"),
    ):
        if given:
            raise UserError(f"--init and {what} both set the weights to start from: give only one of them")
    _locate_name(args.init)
    args.opts = [*args.opts, "MODEL.WEIGHTS", ""]


def initialize(model: nn.Module, source: str, class_names: Sequence[str], *, trust_pickle: bool = False) -> None:
    """Load all weights of a checkpoint that fit a model, in place, and log which do not.

    Args:
        model: a detector, possibly wrapped in DDP.
        source: a file, a URL, an hf:// or detectron2:// name, or a name in detectron2's model zoo.
        class_names: the model's class names.
        trust_pickle: load a .pkl file even from outside detectron2's model zoo, although that can run code.

    Raises:
        UserError: the source cannot be read or downloaded, no weight fits, or a value is infinite or NaN.
    """
    name = _locate_name(source)
    model = unwrap(model)
    with _readable(source):
        if name.startswith(MODEL_ZOO) or name.split("?")[0].endswith(".pkl"):
            check_pickle(name, trusted=trust_pickle)
            Checkpointer(model, trust_pickle=trust_pickle).load(name)  # detectron2 matches its own names
        else:
            weights, names = _read(name)
            adaptation = adapt(model.state_dict(), weights, class_names, names)
            if not adaptation.weights:
                first = next(iter(weights))
                raise UserError(
                    f"--init {source}: none of its {len(weights)} tensors fits the model (the first is {first}): "
                    "deqdet-convert-checkpoint converts those of other implementations"
                )
            model.load_state_dict(adaptation.weights, strict=False)
            for line in adaptation.lines:
                logger.info("--init %s: %s", source, line)
    check_finite_model(model, source)


def adapt(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], own: Sequence[str], others: Sequence[str]
) -> Adaptation:
    """Choose, and if necessary adapt, the weights of a checkpoint that fit a model.

    Args:
        state: the model's freshly initialised state dict, which is not modified.
        weights: the checkpoint's weights by name.
        own: the model's class names.
        others: the checkpoint's class names in the order of its outputs; empty if unknown.
    """
    weights = _with_prefix(state, {name.removeprefix("module."): x for name, x in weights.items()})
    taken, misfits, queries, class_layers = {}, [], set(), set()
    kept, classifiers = _shared_rows(own, others), _find_classifiers(state)
    for name, value in weights.items():
        wanted = state.get(name)
        if wanted is None:
            continue
        rows_only = value.dim() == wanted.dim() > 0 and value.shape[1:] == wanted.shape[1:]
        is_class = name.rpartition(".")[0] in classifiers and rows_only and wanted.shape[0] == len(own)
        if is_class and (value.shape != wanted.shape or (others and len(others) == value.shape[0])):
            if list(own) == list(others):
                taken[name] = value
                continue
            class_layers.add((name.rpartition(".")[0], value.shape[0]))
            if kept and len(others) == value.shape[0]:
                taken[name] = _put_rows(wanted, value, kept)
        elif value.shape == wanted.shape:
            taken[name] = value
        elif rows_only and name.startswith(QUERIES):
            count = min(len(value), len(wanted))
            queries.add((count, len(value), len(wanted)))
            taken[name] = _put_rows(wanted, value, [(i, i) for i in range(count)])
        else:
            misfits.append(f"{name} is {tuple(value.shape)}, not {tuple(wanted.shape)}")
    lines = [f"{len(taken)} of the model's {len(state)} tensors are taken"]
    lines += [_describe_classes(class_layers, own, others, kept)] if class_layers else []
    for count, there, here in sorted(queries):
        lines.append(f"the first {count} of its {there} initial queries are taken; the model has {here}")
    if misfits:
        lines.append(f"these do not fit and keep their initial values: {list_first(misfits, separator='; ')}")
    missing = [x for x in state if x not in weights and not x.endswith(COUNTER)]
    if missing:
        lines.append(f"it lacks {len(missing)} tensors, which keep their initial values: {_by_part(missing)}")
    unused = [x for x in weights if x not in state and not x.endswith(COUNTER)]
    if unused:
        lines.append(f"it has {len(unused)} tensors that the model lacks: {_by_part(unused)}")
    return Adaptation(taken, lines)


def _find_classifiers(state: Mapping[str, Tensor]) -> set[str]:
    """Return the name of the last layer of each class branch.

    The shape cannot tell: a hidden layer may have as many rows as there are classes.
    """
    last = {}
    for name in state:  # in the order of the layers
        branch, found, _ = name.partition(CLASSES)
        if found:
            last[branch] = name.rpartition(".")[0]
    return set(last.values())


def _shared_rows(own: Sequence[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """Return, for each class name that both have, its row in the model and its row in the checkpoint."""
    rows = {name.strip().casefold(): i for i, name in enumerate(others)}
    return [(i, rows[key]) for i, name in enumerate(own) if (key := name.strip().casefold()) in rows]


def _put_rows(wanted: Tensor, value: Tensor, rows: Sequence[tuple[int, int]]) -> Tensor:
    result = wanted.detach().clone()
    for here, there in rows:
        result[here] = value[there].to(result)
    return result


def _with_prefix(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the missing prefix to the names if the file holds only a part of the model, such as the backbone."""
    if any(name in state for name in weights):
        return dict(weights)
    votes: Counter[str] = Counter()
    for name in list(weights)[:_VOTERS]:
        votes.update(key.removesuffix(name) for key in state if key.endswith(f".{name}"))
    prefix = votes.most_common(1)[0][0] if votes else ""
    return {f"{prefix}{name}": x for name, x in weights.items()}


def _describe_classes(
    layers: set[tuple[str, int]], own: Sequence[str], others: Sequence[str], kept: Sequence[tuple[int, int]]
) -> str:
    count = max(rows for _, rows in layers)
    begins = (
        f"class layers ({', '.join(sorted(name for name, _ in layers))}): it has {count} classes, the data {len(own)}"
    )
    if not kept or len(others) != count:
        return f"{begins}: all start from initial weights"
    names = list_first([own[i] for i, _ in kept])
    return f"{begins}: {names} keep their weights, {len(own) - len(kept)} start from initial weights"


def _by_part(names: Sequence[str]) -> str:
    """Name the parts of the model that the tensors belong to, each with its number of tensors."""
    parts = Counter(".".join(name.split(".")[:2]) for name in names)
    return list_first([f"{part} ({count})" for part, count in parts.items()], most=6)


def _locate_name(source: str) -> str:
    """Turn a name in detectron2's model zoo into its detectron2:// name, and return any other source unchanged.

    Raises:
        UserError: a local file does not exist, and no model zoo has the name.
    """
    if "://" in source or Path(source.split("?")[0]).is_file():
        return source
    with quiet_imports():
        from detectron2 import model_zoo  # here, since importing it takes 0.1 s and is rarely needed
    try:
        url = model_zoo.get_checkpoint_url(source if source.endswith((".yaml", ".py")) else f"{source}.yaml")
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--init {source} is not a file, a URL or a name in detectron2's model zoo (such as "
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml)"
        ) from error
    return url.replace(_SERVER, "detectron2://") if url.startswith(_SERVER) else url


def _read(name: str) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Read the weights of a file, and its class names if it has any."""
    check_pickle(name, trusted=False)
    path = resolve_file(name) if name.startswith("hf://") else Path(PathManager.get_local_path(name))
    names = read_model_header(path).known_names if is_model_file(path) else ()
    weights = find_weights(path, read_entries(path)).weights
    return {key: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for key, x in weights.items()}, names


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Turn errors in the block, which opens the source, into a UserError."""
    try:
        yield
    except CheckpointError as error:
        raise UserError(f"--init {source}: {error}") from error
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise UserError(
            f"--init {source} cannot be read ({one_line(error)}): without network access, download it elsewhere and "
            "give the file"
        ) from error
