"""Checks that a user's layer, decoder or solver fits the interface of the package, each with a one-line error.

They cover the interface only. An error inside the user's own code keeps its traceback.
"""

import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from detectron2.config import configurable
from detectron2.structures import Boxes

from .equilibrium import is_solver
from .errors import UserError, plural
from .structures import Decoded, Prediction, QueryState

_MISSING = object()
_WALK = ("steps", "rtol", "solver", "record", "record_iterates")  # the keyword arguments of `walk`
_DEFAULTS_OF_WALK: dict[str, tuple[Callable[[Any], bool], str]] = {
    "test_steps": (lambda x: type(x) is int and x >= 1, "a whole number of at least 1"),
    "rtol": (lambda x: type(x) in (int, float) and 0 <= x < math.inf, "0 or a positive number"),
    "solver": (is_solver, "a solver such as deqdet.equilibrium.FixedPointIteration()"),
    "return_best": (lambda x: isinstance(x, bool), "True or False"),
}


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
    for name, count in methods.items():
        try:
            inspect.signature(getattr(built, name)).bind(*[None] * count)
        except TypeError as error:
            called = f"it is called with {plural(count, 'argument')}, see {base.__name__}.{name}"
            raise UserError(f"{describe(built)}.{name} does not fit: {error}; {called}") from error
    return built


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


def check_refined(layer: object, state: QueryState, refined: object) -> None:
    """Check that a layer returned a state of the same shapes as its input.

    Raises:
        UserError: it did not; the message says what it returned.
    """
    given = f"a {type(refined).__name__}"
    if isinstance(refined, QueryState):
        if refined.content.shape == state.content.shape and refined.position.shape == state.position.shape:
            return
        given = _describe_state(refined)
    expected = _describe_state(state)
    raise UserError(f"{describe(layer)}.forward returned {given}: it must return the shapes of its input, {expected}")


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


def check_read_out(layer: object, prediction: object) -> Prediction:
    """Check that a layer's `predict` returned a Prediction, and return it.

    Raises:
        UserError: it returned an object of another type.
    """
    if not isinstance(prediction, Prediction):
        raise UserError(
            f"{describe(layer)}.predict returned a {type(prediction).__name__}: it must return a Prediction of logits "
            "(B, N, K) and boxes (B, N, 4)"
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
    given = f"a {type(prediction).__name__}"
    if isinstance(prediction, Prediction):
        logits, boxes = tuple(prediction.logits.shape), tuple(prediction.boxes.shape)
        if logits == (num_images, *logits[1:2], num_classes) and boxes == (*logits[:2], 4):
            return
        given += f" of logits {logits} and boxes {boxes}"
    want = f"a Prediction of logits ({num_images}, N, {num_classes}) and boxes ({num_images}, N, 4)"
    raise UserError(f"{describe_source(decoder)}: {where} returned {given}: it must be {want}")


def _describe_state(state: QueryState) -> str:
    return f"a QueryState of position {tuple(state.position.shape)} and content {tuple(state.content.shape)}"
