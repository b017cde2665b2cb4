"""What a layer, decoder or solver of a user's own must fit, and one line that names it where it does not.

Only what is wrong between it and the package is told here. A fault within its own code keeps its traceback.
"""

import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from detectron2.config import configurable
from detectron2.structures import Boxes

from .equilibrium import is_solver
from .errors import UserError, plural
from .structures import Decoded, Prediction, QueryState

_MISSING = object()
_WALK = ("steps", "rtol", "solver", "record", "record_iterates")  # what `walk` takes by name
_DEFAULTS_OF_WALK: dict[str, tuple[Callable[[Any], bool], str]] = {
    "test_steps": (lambda x: type(x) is int and x >= 1, "a whole number of at least 1"),
    "rtol": (lambda x: type(x) in (int, float) and 0 <= x < math.inf, "0 or a positive number"),
    "solver": (is_solver, "a solver such as deqdet.equilibrium.FixedPointIteration()"),
    "return_best": (lambda x: isinstance(x, bool), "True or False"),
}


def describe(part: object) -> str:
    """The module and the class of an object, or of a class or function: "deqdet_plugin_my_layer.MyLayer"."""
    kind = part if inspect.isclass(part) or inspect.isfunction(part) else type(part)
    return f"{kind.__module__}.{kind.__qualname__}"


def raised_in(error: BaseException, *modules: str) -> bool:
    """Whether one of these modules raised an exception itself, and not what it called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") in modules


def construct(maker: Callable, arguments: tuple, base: type, methods: Mapping[str, int]) -> Any:
    """Call what a registry holds, a class with from_config or a function, and see that its object can be used.

    Args:
        arguments: for the call.
        base: the class of which the object must be.
        methods: names of its methods, each with the number of arguments that it is called with.

    Raises:
        UserError: the arguments do not fit, a key of the config is not set, an abstract method is missing, the object
            is of another class, or one of the methods takes other arguments.
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
        raise UserError(f"{describe(maker)} made a {type(built).__name__}: it must be a subclass of {base.__name__}")
    for name, count in methods.items():
        try:
            inspect.signature(getattr(built, name)).bind(*[None] * count)
        except TypeError as error:
            called = f"it is called with {plural(count, 'argument')}, see {base.__name__}.{name}"
            raise UserError(f"{describe(built)}.{name} does not fit: {error}; {called}") from error
    return built


def check_equilibrium(decoder: Any, base: type) -> None:
    """See that a decoder whose `has_equilibrium` is True has the method and the attributes that the tools need.

    Args:
        base: the class whose `walk` only says that there is no equilibrium.

    Raises:
        UserError: one is missing or no such value; says which.
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
    """See that a layer returned a state in the shapes of the one that it was given.

    Raises:
        UserError: it did not; says what it returned.
    """
    given = f"a {type(refined).__name__}"
    if isinstance(refined, QueryState):
        if refined.content.shape == state.content.shape and refined.position.shape == state.position.shape:
            return
        given = _describe_state(refined)
    raise UserError(f"{describe(layer)}.forward returned {given}: it must return {_describe_state(state)}, as it got")


def check_supervised(decoder: object, predictions: object, num_images: int, num_classes: int) -> None:
    """See that a decoder's `supervise` returned predictions by their names, of B images and K classes.

    Raises:
        UserError: it did not; says what it returned.
    """
    if not isinstance(predictions, dict) or not predictions:
        raise UserError(f"{describe(decoder)}.supervise returned a {type(predictions).__name__}: it must return a dict "
                        "of at least one Prediction by name")  # fmt: skip
    for name, prediction in predictions.items():
        _check_prediction(decoder, f"supervise, {name}", prediction, num_images, num_classes)


def check_decoded(decoder: object, decoded: object, num_images: int, num_classes: int) -> None:
    """See that a decoder's `decode` returned Decoded with a prediction of B images and K classes.

    Raises:
        UserError: it did not; says what it returned.
    """
    if not isinstance(decoded, Decoded):
        raise UserError(f"{describe(decoder)}.decode returned a {type(decoded).__name__}: it must return a Decoded")
    _check_prediction(decoder, "decode", decoded.prediction, num_images, num_classes)


@contextmanager
def finite_boxes(source: Callable[[], str]) -> Iterator[None]:
    """Turn detectron2's bare AssertionError about infinite boxes, which it tests as it clips them, into a UserError.

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
    """A decoder and the layer whose predictions it returns, for messages about these."""
    return f"{describe(decoder)} with {describe(decoder.execution().refinement)}"


def _check_prediction(decoder: Any, where: str, prediction: object, num_images: int, num_classes: int) -> None:
    given = f"a {type(prediction).__name__}"
    if isinstance(prediction, Prediction):
        logits, boxes = tuple(prediction.logits.shape), tuple(prediction.boxes.shape)
        if logits == (num_images, *logits[1:2], num_classes) and boxes == (*logits[:2], 4):
            return
        given += f" of logits {logits} and boxes {boxes}"
    want = f"a Prediction of logits ({num_images}, N, {num_classes}) and boxes ({num_images}, N, 4)"
    raise UserError(f"{describe_source(decoder)}: {where} gave {given}: it must be {want}")


def _describe_state(state: QueryState) -> str:
    return f"a QueryState of position {tuple(state.position.shape)} and content {tuple(state.content.shape)}"
