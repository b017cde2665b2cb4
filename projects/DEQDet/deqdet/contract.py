"""Checks that a user's layer, decoder, solver or backbone fits the interface, each with a one-line error.

They cover the interface only. An error inside the user's own code keeps its traceback.
"""

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes

from .equilibrium import is_solver
from .errors import UserError, is_out_of_memory, one_line, plural
from .structures import Decoded, Features, Prediction, QueryState, count_images, is_traced

_MISSING = object()
_WALK = ("steps", "rtol", "solver", "record", "record_iterates")  # the keyword arguments of `walk`
_DEFAULTS_OF_WALK: dict[str, tuple[Callable[[Any], bool], str]] = {
    "test_steps": (lambda x: type(x) is int and x >= 1, "a whole number of at least 1"),
    "rtol": (lambda x: type(x) in (int, float) and 0 <= x < math.inf, "0 or a positive number"),
    "solver": (is_solver, "a solver such as deqdet.equilibrium.FixedPointIteration()"),
    "return_best": (lambda x: isinstance(x, bool), "True or False"),
}
_EXCHANGEABLE = {torch.float32, torch.bfloat16, torch.float16}  # a layer may return one for the other


def describe(part: object) -> str:
    """Return the full name of an object's class, or of a class or function: "deqdet_plugin_my_layer.MyLayer"."""
    kind = part if inspect.isclass(part) or inspect.isfunction(part) else type(part)
    return f"{kind.__module__}.{kind.__qualname__}"


def raised_in(error: BaseException, *modules: str) -> bool:
    """Whether an exception was raised by code of one of these modules, and not by functions that it called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") in modules


def construct(maker: Callable, arguments: tuple, base: type, methods: Mapping[str, int]) -> Any:
    """Build a registered part, and check that the result fits the interface.

    Args:
        maker: the registered object, a class with from_config or a function.
        arguments: the arguments of the call.
        base: the class that the result must be an instance of.
        methods: the names of its methods, each with the number of arguments that it is called with.

    Raises:
        UserError: the arguments do not fit, a config key is not set, an abstract method is missing, the result has
            another class, or one of the methods takes other arguments.
    """
    try:
        built = maker(*arguments)
    except TypeError as error:
        if not raised_in(error, __name__, configurable.__module__):
            raise
        raise UserError(
            f"{describe(maker)} cannot be built: {error}; it is called with {plural(len(arguments), 'argument')}, and "
            "its from_config must return the arguments of __init__ (see docs/extending.md)"
        ) from error
    except AttributeError as error:
        if not raised_in(error, "yacs.config"):
            raise
        raise UserError(
            f"{describe(maker)} cannot be built: it reads the config key {error}, which is not set"
        ) from error
    if not isinstance(built, base):
        raise UserError(f"{describe(maker)} built a {type(built).__name__}: it must be a subclass of {base.__name__}")
    if (problem := misfit(built, methods, base)) is not None:
        raise UserError(problem)
    return built


def misfit(part: object, methods: Mapping[str, int], base: type) -> str | None:
    """Describe the first method that cannot be called with its number of arguments; None if there is none.

    Args:
        methods: the names of the methods, each with its number of arguments.
        base: the class whose methods of these names the user can read about.
    """
    for name, count in methods.items():
        try:
            inspect.signature(getattr(part, name)).bind(*[None] * count)
        except TypeError as error:
            called = f"it is called with {plural(count, 'argument')}, see {base.__name__}.{name}"
            return f"{describe(part)}.{name} does not fit: {error}; {called}"
    return None


def check_equilibrium(decoder: Any, base: type) -> None:
    """Check that a decoder with `has_equilibrium = True` has the method and the attributes that the tools need.

    Args:
        base: the class whose `walk` only raises an error, and must be overridden.

    Raises:
        UserError: one of them is missing or has an invalid value; the message says which.
    """
    problem = next(_faults(decoder, base), None)
    if problem is not None:
        raise UserError(f"{describe(decoder)} sets has_equilibrium, but {problem} (see docs/extending.md, A decoder)")


def _faults(decoder: Any, base: type) -> Iterator[str]:
    if type(decoder).walk is base.walk:
        yield "implements no walk"
    for name, (fits, wanted) in _DEFAULTS_OF_WALK.items():
        value = getattr(decoder, name, _MISSING)
        if value is _MISSING:
            yield f"has no attribute {name}: it must be {wanted}"
        elif not fits(value):
            yield f"its attribute {name} is {value!r}: it must be {wanted}"
    try:
        inspect.signature(decoder.walk).bind(None, None, **dict.fromkeys(_WALK))
    except TypeError as error:
        yield f"its walk does not fit: {error}; it is called with the keyword arguments {', '.join(_WALK)}"


def check_trajectory(decoder: object, trajectory: object, kind: type) -> Any:
    """Check that a decoder's `walk` returned a Trajectory, and return it.

    Args:
        kind: the class Trajectory, which this module cannot import.

    Raises:
        UserError: it returned an object of another type.
    """
    if not isinstance(trajectory, kind):
        raise UserError(
            f"{describe(decoder)}.walk returned a {type(trajectory).__name__}: it must return a {kind.__name__}"
        )
    return trajectory


def check_refined(layer: object, state: QueryState, refined: object) -> None:
    """Check that a layer returned a state with the shapes, dtypes and device of its input.

    A dtype may also be bfloat16 or float16 in place of float32, as under autocast; solvers convert it back.

    Raises:
        UserError: it did not; the message says what it returned.
    """
    if not isinstance(refined, QueryState):
        raise UserError(f"{describe(layer)}.forward returned a {type(refined).__name__}: it must return a QueryState")
    for name in ("content", "position"):
        returned, given = getattr(refined, name), getattr(state, name)
        if not _is_alike(returned, given):
            raise UserError(
                f"{describe(layer)}.forward returned a QueryState whose {name} is {_describe_tensor(returned)}: it "
                f"must be as in its input, {_describe_tensor(given)}"
            )


def _is_alike(returned: object, given: Tensor) -> bool:
    if not isinstance(returned, Tensor) or returned.shape != given.shape or returned.device != given.device:
        return False
    return returned.dtype == given.dtype or {returned.dtype, given.dtype} <= _EXCHANGEABLE


@contextmanager
def segments_together(layer: Callable, states: QueryState, features: Features) -> Iterator[None]:
    """Explain an error of the block if its cause is that the layer wrongly sets `accepts_segments = True`.

    The block refines S states of each of B images in one call. If it raises an error, the layer refines the S states
    one after the other. Where that succeeds, the flag is the cause.

    Raises:
        UserError: the flag is the cause.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, AssertionError, UserError) as error:
        rows, images = len(states.content), count_images(features)
        if is_out_of_memory(error) or not _refines_each(layer, states, features, rows // images):
            raise
        raise UserError(
            f"{describe(layer)} sets accepts_segments = True, but its forward fails on {rows} rows with the features "
            f"of {plural(images, 'image')} ({one_line(error)}), not on {plural(images, 'row')}: it must take row "
            "s * B + b as state s of image b, or set accepts_segments = False"
        ) from error


def _refines_each(layer: Callable, states: QueryState, features: Features, segments: int) -> bool:
    try:
        for segment in states.chunk(segments):
            layer(segment, features)
    except Exception:  # the layer's own error, which the caller raises
        return False
    return True


def read_shapes(backbone: Any, names: Iterable[str] | None = None) -> dict[str, ShapeSpec]:
    """Return a backbone's `output_shape()`, after a check of its levels.

    Args:
        names: the levels to check if they are there; None: all.

    Raises:
        UserError: it returned no dict, or one of these levels is no ShapeSpec with channels and a stride.
    """
    shapes, wrong = backbone.output_shape(), None
    if not isinstance(shapes, Mapping):
        wrong = f"a {type(shapes).__name__}"
    else:
        checked = [name for name in (shapes if names is None else names) if name in shapes]
        if unfit := [name for name in checked if not _has_channels_and_stride(shapes[name])]:
            wrong = f"{shapes[unfit[0]]!r} for level {unfit[0]}"
    if wrong is not None:
        raise UserError(
            f"{describe(backbone)}.output_shape returned {wrong}: it must return a dict with a ShapeSpec for each "
            "level, whose channels and stride are whole numbers above 0"
        )
    return dict(shapes)


def _has_channels_and_stride(shape: object) -> bool:
    numbers = (shape.channels, shape.stride) if isinstance(shape, ShapeSpec) else (None,)
    return all(isinstance(number, Real) and number > 0 and number == int(number) for number in numbers)


def check_levels(backbone: Any, levels: object, names: Iterable[str], images: Tensor) -> None:
    """Check that a backbone's `forward` returned levels (B, C, H / s, W / s) as its `output_shape` says.

    A side may differ by one cell, or by less than the coarsest stride in pixels: backbones round sides that are not
    multiples of a stride up or down, and may lose pixels at the border.

    Args:
        names: the levels to check.
        images: (B, 3, H, W) what `forward` got.

    Raises:
        UserError: it did not; the message names the level.
    """
    if is_traced():  # keep the check out of graphs
        return
    where = f"{describe(backbone)}.forward returned"
    if not isinstance(levels, Mapping):
        raise UserError(f"{where} a {type(levels).__name__}: it must return a dict of levels by name")
    names = list(names)
    shapes, (count, _, *sides) = read_shapes(backbone, names), images.shape
    coarsest = max((shape.stride for shape in shapes.values() if _has_channels_and_stride(shape)), default=0)
    for name in names:
        if name not in levels:
            raise UserError(f"{where} the levels {', '.join(map(str, levels))}, but its output_shape has {name} too")
        channels, stride = shapes[name].channels, shapes[name].stride
        expected = [count, channels, *(math.ceil(side / stride) for side in sides)]
        level = levels[name]
        fits = isinstance(level, Tensor) and level.is_floating_point() and len(level.shape) == len(expected)
        if not fits or not _are_alike(level.shape, expected, cells=max(1, math.ceil(coarsest / stride) - 1)):
            raise UserError(
                f"{where} {_describe_tensor(level)} as level {name} of images {tuple(images.shape)}: by its "
                f"output_shape, with {channels} channels and stride {stride}, it must be {tuple(expected)} in floating "
                "point"
            )


def _are_alike(shape: Sequence[int], expected: Sequence[int], cells: int) -> bool:
    """Whether the shape (B, C, h, w) of a level is the expected one; h and w may differ by so many cells."""
    differences = [abs(found - wanted) for found, wanted in zip(shape, expected, strict=True)]
    return max(differences[:2]) == 0 and max(differences[2:]) <= cells


def check_supervised(decoder: object, predictions: object, num_images: int, num_classes: int) -> None:
    """Check that a decoder's `supervise` returned named predictions for B images and K classes.

    Raises:
        UserError: it did not; the message says what it returned.
    """
    if not isinstance(predictions, dict) or not predictions:
        raise UserError(f"{describe(decoder)}.supervise returned a {type(predictions).__name__}: it must return a dict "
                        "of at least one Prediction by name")  # fmt: skip
    for name, prediction in predictions.items():
        _check_prediction(decoder, f"supervise, {name}", prediction, num_images, num_classes)


def check_decoded(decoder: object, decoded: object, num_images: int, num_classes: int) -> None:
    """Check that a decoder's `decode` returned a Decoded for B images and K classes.

    Raises:
        UserError: it did not; the message says what it returned.
    """
    if not isinstance(decoded, Decoded):
        raise UserError(f"{describe(decoder)}.decode returned a {type(decoded).__name__}: it must return a Decoded")
    _check_prediction(decoder, "decode", decoded.prediction, num_images, num_classes)
    for name in ("steps", "finite", *(["residual"] if decoded.residual is not None else [])):
        value = getattr(decoded, name)
        if not isinstance(value, Tensor) or value.shape != (num_images,):
            shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise UserError(
                f"{describe(decoder)}.decode returned a Decoded whose {name} is {shown}: it must be a tensor "
                f"({num_images},), with a number for each image"
            )


def check_read_out(layer: object, prediction: object, rows: int) -> Prediction:
    """Check that a layer's `predict` returned a Prediction of as many rows as its state has, and return it.

    Raises:
        UserError: it did not; the message says what it returned.
    """
    if not _has_rows(prediction, rows):
        raise UserError(
            f"{describe(layer)}.predict returned {_describe_prediction(prediction)}: it must return a Prediction of "
            f"logits ({rows}, N, K) and boxes ({rows}, N, 4), floating-point tensors on one device"
        )
    return prediction


@contextmanager
def finite_boxes(source: Callable[[], str]) -> Iterator[None]:
    """Turn the bare AssertionError with which detectron2 refuses to clip infinite boxes into a UserError.

    Args:
        source: returns the names of the parts that predicted the boxes.
    """
    try:
        yield
    except AssertionError as error:
        if not raised_in(error, Boxes.__module__):
            raise
        raise UserError(
            f"{source()} predicted a box that is infinite or NaN: a layer must return finite positions, whose z and r "
            "are so small that their boxes are finite too"
        ) from error


def describe_source(decoder: Any) -> str:
    """Return the names of a decoder and of the layer whose predictions it returns, for error messages."""
    return f"{describe(decoder)} with {describe(decoder.execution().refinement)}"


def _check_prediction(decoder: Any, where: str, prediction: object, num_images: int, num_classes: int) -> None:
    if _has_rows(prediction, num_images):
        logits, boxes = tuple(prediction.logits.shape), tuple(prediction.boxes.shape)
        if logits == (num_images, *logits[1:2], num_classes) and boxes == (*logits[:2], 4):
            return
    raise UserError(
        f"{describe_source(decoder)}: {where} returned {_describe_prediction(prediction)}: it must be a Prediction of "
        f"logits ({num_images}, N, {num_classes}) and boxes ({num_images}, N, 4), floating-point tensors on one device"
    )


def _has_rows(prediction: object, rows: int) -> bool:
    """Whether an object is a Prediction of floating-point tensors on one device, with that many rows."""
    if not isinstance(prediction, Prediction):
        return False
    parts = prediction.logits, prediction.boxes
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.shape[:1] == (rows,) for x in parts):
        return False
    return prediction.logits.device == prediction.boxes.device


def _describe_prediction(prediction: object) -> str:
    given = f"a {type(prediction).__name__}"
    if not isinstance(prediction, Prediction):
        return given
    return f"{given} of logits {_describe_tensor(prediction.logits)} and boxes {_describe_tensor(prediction.boxes)}"


def _describe_tensor(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
