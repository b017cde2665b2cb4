"""A trained detector as the demo uses it, built from a config."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from ..data import find_class_names
from ..decoders import EquilibriumDecoder
from ..detector import DEQDet
from ..engine import adapt_device, load_weights
from ..engine.models import buildable
from ..errors import UserError


@dataclass(frozen=True)
class Detections:
    """What was found in one image. `steps`: applications of f, or layers after the first of the other decoders."""

    instances: Instances  # those with at least the threshold's score, on the CPU; pixels of the image as it was given
    inputs: dict  # what the model got: "image" (3, h, w) in its own colour order and size, "height", "width"
    steps: int
    seconds: float


@dataclass(frozen=True)
class Detector:
    """detectron2's DefaultPredictor for RGB images, with the names of the classes."""

    predictor: DefaultPredictor
    class_names: Sequence[str]
    threshold: float

    @property
    def model(self) -> DEQDet:
        return self.predictor.model

    def __call__(self, image: np.ndarray) -> Detections:
        """
        Args:
            image: (H, W, 3) uint8 RGB.

        Raises:
            ValueError: the model fails on it: a side of 0 pixels after the resize, not enough memory.
        """
        inputs = []
        hook = self.model.register_forward_pre_hook(lambda module, args: inputs.extend(args[0]))
        start = time.perf_counter()
        try:
            # It takes BGR, whatever the model's order is.
            found = self.predictor(np.ascontiguousarray(image[:, :, ::-1]))
        except (ValueError, RuntimeError) as error:
            size = f"{image.shape[1]} x {image.shape[0]}"
            raise ValueError(f"the detector fails on its {size} pixels: {error}") from error
        finally:
            hook.remove()
        instances = found["instances"].to("cpu")  # waits for the device
        seconds = time.perf_counter() - start
        sure = instances[instances.scores >= self.threshold]
        return Detections(sure, inputs[0], int(found["steps"]), seconds)


def prepare_config(cfg: CfgNode, *, steps: int | None, rtol: float | None, solver: str | None) -> None:
    """Write the command line's choices, None for none, into a config, and its device if that is missing.

    Raises:
        UserError: a choice is for an EquilibriumDecoder only, or there are no weights.
    """
    deqdet = cfg.MODEL.DEQDET
    chosen = {"--steps": steps, "--rtol": rtol, "--solver": solver}
    check_equilibrium(cfg, [flag for flag, value in chosen.items() if value is not None])
    if steps is not None:
        deqdet.EQUILIBRIUM.TEST_STEPS = steps
    if rtol is not None:
        deqdet.SOLVER.RTOL = rtol
    if solver is not None:
        deqdet.SOLVER.NAME = solver
    weights = cfg.MODEL.WEIGHTS.split("?")[0]  # detectron2's ?matching_heuristics=True
    if not weights:
        raise UserError("MODEL.WEIGHTS is empty: give a trained checkpoint with --opts MODEL.WEIGHTS FILE")
    if "://" not in weights and not PathManager.isfile(weights):
        raise UserError(f"MODEL.WEIGHTS {weights} does not exist: give a trained checkpoint")
    adapt_device(cfg)


def check_equilibrium(cfg: CfgNode, flags: Sequence[str]) -> None:
    """
    Raises:
        UserError: there are flags, and the config's decoder has no equilibrium.
    """
    if flags and cfg.MODEL.DEQDET.DECODER != EquilibriumDecoder.__name__:
        raise UserError(
            f"{', '.join(flags)}: only for MODEL.DEQDET.DECODER {EquilibriumDecoder.__name__}, "
            f"but this config has {cfg.MODEL.DEQDET.DECODER}"
        )


def build_detector(cfg: CfgNode, threshold: float) -> Detector:
    """The config's model with its weights, in eval mode.

    Args:
        threshold: the lowest score of a detection, 0 to 1.

    Raises:
        UserError: the config describes no model of ours, MODEL.DEVICE is none, or the weights cannot be read.
    """
    if cfg.MODEL.META_ARCHITECTURE != DEQDet.__name__:
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: it must be {DEQDet.__name__}, as in configs/"
        )
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: it must be RGB or BGR")
    bare = cfg.clone()
    bare.defrost()
    bare.MODEL.WEIGHTS = ""  # DefaultPredictor's own checkpointer knows no .safetensors
    try:
        with buildable():
            predictor = DefaultPredictor(bare)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the model cannot be built on MODEL.DEVICE {cfg.MODEL.DEVICE}: {reason}") from error
    load_weights(predictor.model, cfg, resume=False)
    return Detector(predictor, find_class_names(cfg), threshold)
