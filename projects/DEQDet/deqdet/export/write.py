"""Write a detector as ONNX graphs or torch.export programs, with the metadata that a caller needs."""

import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from onnx import ModelProto
from onnx.helper import set_model_props
from torch import nn
from torch.export import Dim, ExportedProgram

from detectron2.modeling.backbone.swin import SwinTransformerBlock

from ..atomic import replacing
from ..checkpoints.files import checksum
from ..contract import describe
from ..decoders import StackedDecoder
from ..equilibrium import Anderson, FixedPointIteration, Solver
from ..errors import UserError, one_line
from ..layers import RefinementLayer
from ..predictor import Predictor
from ..version import __version__
from .graphs import Best, Encoder, LoopBody, OneGraph, Step, check_walk
from .loop import CARRIED, join_loop

TARGETS = {"onnx": ".onnx", "torch-export": ".pt2"}
FORMS = ("one", "two")
OPSET = 18
IMAGES = ["images", "sizes"]  # the inputs of a graph that takes images
NOTES_FILE = "deqdet.json"  # the metadata in a .pt2 file
TRACED_BATCH = 2  # images in the example that is traced; torch.export treats a size of 0 or 1 as a constant


@dataclass(frozen=True)
class Exported:
    """The files of an export, and the modules that they were made from."""

    target: str  # a key of TARGETS
    form: str  # "one" or "two"
    graphs: tuple[tuple[Path, nn.Module], ...]  # one graph; or the encoder and the step
    notes: dict[str, object]  # the metadata in the files

    @property
    def files(self) -> list[Path]:
        """The files, in the order of the graphs."""
        return [path for path, _ in self.graphs]


def say_nothing(line: str) -> None:
    """Discard a progress message."""


def export_detector(
    predictor: Predictor,
    path: Path,
    *,
    target: str = "onnx",
    form: str = "two",
    steps: int | None = None,
    rtol: float | None = None,
    solver: Solver | None = None,
    say: Callable[[str], None] = say_nothing,
) -> Exported:
    """Write a detector for any batch size and image size.

    Args:
        predictor: the detector with its classes and its config.
        path: the file of one graph; two graphs are written to NAME.encoder.onnx and NAME.step.onnx beside it.
        target: "onnx" or "torch-export".
        form: "one": the whole detector with plain steps; "two": the encoder with g, and a step of f.
        steps: number of applications of f; by default the decoder's own. It can be changed when ONNX files are run, but
            is fixed in a .pt2 file of one graph.
        rtol, solver: the defaults for running two graphs; by default those of the decoder. One graph uses plain
            iteration without a tolerance.
        say: called with a message before each slow stage, for example print.

    Raises:
        UserError: the path does not have the target's suffix, the detector cannot be exported in this form or traced
            for all sizes, or a file cannot be written.
    """
    path = Path(path)
    if path.suffix != TARGETS[target]:
        raise UserError(f"{path}: the output of --to {target} must end in {TARGETS[target]}")
    if target == "torch-export" and any(isinstance(x, SwinTransformerBlock) for x in predictor.model.modules()):
        raise UserError("Swin can be exported as ONNX only: torch.export's programs would accept only few image sizes")
    notes = build_notes(predictor, form, steps, rtol, solver)
    unit = notes["size_divisibility"]
    model = predictor.model
    check_walk(model, unit)
    if form == "one":
        stacked = isinstance(model.decoder, StackedDecoder)
        module = OneGraph(model, steps if stacked else notes["steps"], notes["damping"])
        if target == "onnx" and not stacked:
            _write_loop(predictor, path, notes, say)
        else:
            say("Tracing the detector")
            program, _ = _trace_images(module, unit)
            say(f"Writing {path}")
            _write(program, path, target, notes, IMAGES, ["boxes", "scores", "classes", "residual"])
        return Exported(target, form, ((path, module),), notes)
    encoder, step = Encoder(model), Step(model)
    stem = path.name.removesuffix(path.suffix)
    files = [path.with_name(f"{stem}.{part}{path.suffix}") for part in ("encoder", "step")]
    levels = [f"level{i}" for i in range(len(notes["strides"]))]
    say("Tracing the encoder")
    program, (state, _, _, *features) = _trace_images(encoder, unit)
    say(f"Writing {files[0]}")
    _write(program, files[0], target, notes, IMAGES, ["state", "boxes", "scores", *levels])
    say("Tracing the step")
    program = _trace_step(step, [state], features)
    say(f"Writing {files[1]}")
    _write(program, files[1], target, notes, ["state", *levels], ["output", "residual", "boxes", "scores"])
    return Exported(target, form, tuple(zip(files, (encoder, step), strict=True)), notes)


def _write_loop(predictor: Predictor, path: Path, notes: dict, say: Callable[[str], None]) -> None:
    """Export encoder, step and read-out, and write them as one graph with a loop around the step."""
    model, parts = predictor.model, ["state", "boxes", "scores"]
    levels = [f"level{i}" for i in range(len(notes["strides"]))]
    say("Tracing the encoder")
    encoder, examples = _trace_images(Encoder(model), notes["size_divisibility"])
    say("Converting the encoder to ONNX")
    encoder = _to_onnx(encoder, IMAGES, [*parts, *levels])
    say("Tracing the step, and converting it to ONNX")
    body = _trace_step(LoopBody(model, notes["damping"]), examples[:3], examples[3:])
    body = _to_onnx(body, [*parts, *levels], [f"{name}.out" for name in CARRIED])
    rows = {0: Dim("batch", min=1)}
    best = _to_onnx(_export(Best(model.max_detections), tuple(examples[1:3]), (rows, rows)), parts[1:],
                    ["boxes.out", "scores.out", "classes.out"])  # fmt: skip
    say(f"Writing {path}")
    _write_onnx(join_loop(encoder, body, best, notes["steps"]), path, notes)


def build_notes(
    predictor: Predictor,
    form: str,
    steps: int | None = None,
    rtol: float | None = None,
    solver: Solver | None = None,
) -> dict[str, object]:
    """Collect the metadata that a caller needs: classes, image preprocessing, defaults of the iteration.

    Args:
        steps, rtol, solver: see `export_detector`.

    Raises:
        UserError: this form does not support the config or the options.
    """
    decoder = predictor.model.decoder
    if (rtol, solver) != (None, None) and not decoder.has_equilibrium:
        raise UserError(f"MODEL.DEQDET.DECODER is {type(decoder).__name__}, which takes no --rtol and no --solver")
    if decoder.has_equilibrium:
        _, rtol, solver = decoder.options(None, rtol, solver)
    else:
        rtol, solver = 0.0, FixedPointIteration()
    kinds = {FixedPointIteration: "plain", Anderson: "anderson"}
    name = kinds.get(type(solver))
    if name is None or (form == "one" and name != "plain"):
        possible = "FixedPointIteration" if form == "one" else "FixedPointIteration or Anderson"
        raise UserError(
            f"the solver {type(solver).__name__} cannot be exported with --form {form}: give --solver or "
            f"MODEL.DEQDET.SOLVER.NAME {possible}"
        )
    if decoder.has_equilibrium and decoder.return_best:
        raise UserError("MODEL.DEQDET.SOLVER.RETURN_BEST cannot be exported: set it to False")
    if steps is not None and steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}")
    shapes = predictor.model.backbone.output_shape()
    anderson = solver if isinstance(solver, Anderson) else Anderson()
    return {
        "deqdet": __version__,
        "form": form,
        "weights": checksum(predictor.model.state_dict()),  # the runner refuses a step of other weights
        "class_names": list(predictor.class_names),
        "pixel_format": predictor.cfg.INPUT.FORMAT,  # the order of the channels of "images", which are 0 to 255
        "min_size": predictor.cfg.INPUT.MIN_SIZE_TEST,  # of the short side, pixels; 0: images keep their size
        "max_size": predictor.cfg.INPUT.MAX_SIZE_TEST,  # maximum of the long side, pixels
        "size_divisibility": max(1, predictor.model.backbone.size_divisibility),
        "strides": [shapes[level].stride for level in predictor.model.in_features],
        "max_detections": predictor.model.max_detections,
        "steps": decoder.execution().steps if steps is None else steps,
        "rtol": rtol if form == "two" else 0.0,
        "solver": name,
        "damping": solver.damping,
        "history_size": anderson.history_size,
        "regularization": anderson.regularization,
    }


def _trace_images(module: nn.Module, unit: int) -> tuple[ExportedProgram, list[torch.Tensor]]:
    """Trace a module that takes images, and return the program and the module's outputs for the example."""
    # The sides are in units of the size divisibility, so the coarsest level has one cell per unit. With Swin, this
    # level then has three windows along each side; a single window would be traced as a constant.
    window = max((x.window_size for x in module.modules() if isinstance(x, SwinTransformerBlock)), default=1)
    batch, height, width = TRACED_BATCH, 2 * window + 1, 2 * window + 2
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, height * unit, width * unit), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[height * unit, width * unit]] * batch)
    rows = Dim("batch", min=1)
    shapes = ({0: rows, 2: unit * Dim("height", min=1), 3: unit * Dim("width", min=1)}, {0: rows})
    program = _export(module, (images, sizes), shapes)
    others = (1, 3, 2), (3, 1, 1), (1, 2, 2 * width)
    _require_free_sizes(program, module, [(b, unit * h, unit * w) for b, h, w in others])
    with torch.no_grad():
        return program, list(module(images, sizes))


def _require_free_sizes(program: ExportedProgram, module: nn.Module, others: list[tuple[int, int, int]]) -> None:
    """Check that a traced program agrees with its module at sizes other than the traced ones.

    torch.export evaluates a condition on sizes, such as height < width, once while tracing, and reports no error.

    Args:
        others: batch size, and height and width of the images in pixels.

    Raises:
        UserError: the results differ.
    """
    # The guards that torch.export recorded are disabled: they would raise before there is a result to compare.
    options = {"check_guards": False} if "check_guards" in inspect.signature(program.module).parameters else {}
    traced = program.module(**options)
    generator = torch.Generator().manual_seed(1)
    for batch, height, width in others:
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)
        inputs = images, torch.tensor([[height, width]] * batch)
        with torch.no_grad():
            want = module(*inputs)
            try:
                torch.testing.assert_close(traced(*inputs), want, rtol=1e-3, atol=1e-3, equal_nan=True)
            except (AssertionError, RuntimeError) as error:  # a different result, or a shape mismatch
                raise UserError(
                    f"torch.export cannot trace this detector for all sizes: the graph is wrong for a batch of {batch} "
                    f"and images of {height} x {width} pixels"
                ) from error


def _trace_step(module: nn.Module, states: list[torch.Tensor], levels: list[torch.Tensor]) -> ExportedProgram:
    """Trace a module whose inputs are tensors (B, ...) and the levels."""
    # The sizes of the levels depend on one another, but f does not rely on it: each size is dynamic by itself.
    rows = Dim("batch", min=1)
    shapes = (*({0: rows} for _ in states), [{0: rows, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC} for _ in levels])
    return _export(module, (*states, levels), shapes)


def _export(module: nn.Module, inputs: tuple, shapes: tuple) -> ExportedProgram:
    with torch.no_grad(), _quiet():
        # If not strict, torch.export evaluates len() of a tensor in Python, which fixes the batch size.
        try:
            return torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=True)
        except Exception as error:  # of many types, depending on the operation
            general = f"torch.export cannot trace this detector: {one_line(error)[:400]}"
            raise UserError(_explain_constant(error, module) or general) from error


def _explain_constant(error: Exception, module: nn.Module) -> str | None:
    """Explain which part of a module turned a dynamic size into a constant; return None for any other error.

    The message of torch.export names the sizes, and ends with the lines of code that were being traced.
    """
    violated = re.search(r"Constraints violated \((.*?)\)!", str(error))
    if violated is None:
        return None
    batch = "batch" in re.split(r"\W+", violated[1])
    size = "the batch size" if batch else "a size of the images or levels"
    hint = "a loop or unbind over the images" if batch else "a loop over its elements"
    lines = re.findall(r'File "(.+)", line (\d+), in ', str(error))
    part, place = _find_part(module, lines)
    return (
        f"the export must hold for all sizes, but {part} treats {size} as a constant{place}, for example by {hint} "
        "(see docs/extending.md, What the export needs)"
    )


def _find_part(module: nn.Module, lines: list[tuple[str, str]]) -> tuple[str, str]:
    """Find the innermost part of a module to which one of the lines of code belongs (outermost first), and the line."""
    files = {}
    for part in module.modules():
        with suppress(TypeError, OSError):  # a class defined in a notebook has no file
            files.setdefault(inspect.getfile(type(part)), describe(part))
    for file, line in reversed(lines):
        if file in files:
            return files[file], f" ({file}, line {line})"
    layers = {describe(part): None for part in module.modules() if isinstance(part, RefinementLayer)}
    return " or ".join(layers) or describe(module), ""


def _write(program: ExportedProgram, path: Path, target: str, notes: dict, inputs: list, outputs: list) -> None:
    if target == "torch-export":
        with replacing(path) as file, _quiet():
            torch.export.save(program, file, extra_files={NOTES_FILE: json.dumps(notes)})
    else:
        _write_onnx(_to_onnx(program, inputs, outputs), path, notes)


def _to_onnx(program: ExportedProgram, inputs: list[str], outputs: list[str]) -> ModelProto:
    with torch.no_grad(), _quiet():
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        ).model_proto


def _write_onnx(model: ModelProto, path: Path, notes: dict) -> None:
    set_model_props(model, {key: json.dumps(value) for key, value in notes.items()})
    with replacing(path) as file:
        file.write(model.SerializeToString())


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings and log messages, which are about its internals.

    Logged errors are suppressed too, since they are also raised. If TORCH_LOGS is set, torch's log is left alone.
    """
    names = ["onnxscript", "onnx_ir", *([] if "TORCH_LOGS" in os.environ else ["torch"])]
    loggers = [logging.getLogger(name) for name in names]
    # Some loggers below these have levels of their own.
    loggers += [
        logger
        for name, logger in list(logging.root.manager.loggerDict.items())
        if isinstance(logger, logging.Logger) and "." in name and name.partition(".")[0] in names
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
