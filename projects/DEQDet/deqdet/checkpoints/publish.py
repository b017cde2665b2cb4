"""Makes a model file from a training's checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from detectron2.config import CfgNode

from .conversion import build_empty, describe, describe_shapes
from .files import COUNTER, CheckpointError, check_finite_weights, check_target, check_weights, find_weights
from .model_file import read_entries, resolve_file, write_model_file

AVERAGE = "ema"  # the entry of a checkpoint with the exponential moving average of the weights
CHOICES = ("auto", "raw", AVERAGE)


def publish_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    cfg: CfgNode,
    class_names: Sequence[str],
    weights: str = "auto",
    half: bool = False,
) -> str:
    """Make a model file from one of our .pth or .safetensors checkpoints, and return a sentence about the result.

    Args:
        checkpoint: a file, or an hf:// name (see `resolve_file`).
        output, class_names, half: see `write_model_file`.
        cfg: the config that the checkpoint was trained with.
        weights: "ema" for the moving average of the weights, "raw" for the weights themselves, or "auto" for the
            average if the checkpoint has one.

    Raises:
        CheckpointError: a file cannot be read or written, there is no such average, or the weights do not fit the
            config's model or are infinite or NaN; names the weights that are missing, unknown or wrong.
    """
    if weights not in CHOICES:
        raise ValueError(f"weights is {weights!r}: it must be one of {', '.join(CHOICES)}")
    source, output = resolve_file(str(checkpoint)), Path(output)
    check_target(output, source)
    try:
        model = build_empty(cfg)
    except CheckpointError as error:
        raise CheckpointError(f"the config describes {error}") from error
    found, taken = _read_weights(source, weights, model)
    found = check_complete(source, found, model.state_dict())
    check_finite_weights(source, found.items())
    write_model_file(output, weights=found, cfg=cfg, class_names=class_names, half=half, notes={"weights": taken})
    return (
        f"wrote the {'averaged' if taken == AVERAGE else 'raw'} weights of {source} ({len(found)} tensors, "
        f"{'float16' if half else 'as they are'}) with their config and {len(class_names)} class names to {output}"
    )


def _read_weights(path: Path, choice: str, model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the chosen weights, and "raw" or "ema"."""
    loaded = read_entries(path)
    average = loaded.get(AVERAGE)
    if choice == AVERAGE and average is None:
        raise CheckpointError(f"{path} has no averaged weights (no entry {AVERAGE!r}): take the raw ones")
    raw = find_weights(path, {key: value for key, value in loaded.items() if key != AVERAGE})
    if choice == "raw" or average is None:
        return raw.weights, "raw"
    check_weights(path, average, [AVERAGE])
    # An average may cover the parameters only; then the buffers, such as BatchNorm's statistics, are the raw ones.
    parameters = {name for name, _ in model.named_parameters()}
    buffers = {name: value for name, value in raw.weights.items() if name not in parameters}
    return buffers | dict(average), AVERAGE


def check_complete(
    path: Path, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check that the weights are those of the model, and return them in the model's order.

    Args:
        path: where the weights come from, for the message.
        weights: the weights by name.
        expected: the model's own state dict.

    Raises:
        CheckpointError: weights are unknown, missing or of a wrong shape; names the first of them.
    """
    given = [name for name in expected if name in weights]
    misshapen = [name for name in given if weights[name].shape != expected[name].shape]
    problems = [
        describe("unknown", [name for name in weights if name not in expected and not name.endswith(COUNTER)]),
        describe("missing", [name for name in expected if name not in weights and not name.endswith(COUNTER)]),
        describe("misshapen", [describe_shapes(name, weights[name], expected[name]) for name in misshapen]),
    ]
    if any(problems):
        raise CheckpointError(
            f"{path} does not fit the config's model: {'; '.join(filter(None, problems))}. Give the config that it was "
            "trained with"
        )
    return {name: weights[name] for name in given}
