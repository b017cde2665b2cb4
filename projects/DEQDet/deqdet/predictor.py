"""Detect objects with a trained detector in a few lines of Python.

from deqdet import Predictor

predictor = Predictor.from_file("model_final.safetensors")
found = predictor("street.jpg", steps=10)
print(found.labels, found.instances.pred_boxes, found.steps, found.residual)
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.evaluation import inference_context
from detectron2.utils.file_io import PathManager

from .checkpoints import ModelFile, check_complete, is_model_file, load_model_config, read_model_file, resolve_file
from .data import find_class_names
from .data.image_input import ImageLike, is_path, to_array
from .decoders import build_solver
from .detections import Detections
from .detector import BatchTrajectory, DEQDet
from .engine import adapt_device, build_model, check_options, load_weights
from .engine.health import check_finite_model
from .equilibrium import Solver, is_solver
from .errors import UserError, is_out_of_memory, one_line
from .model_zoo import get_config, put_overrides


class Predictor:
    """A trained detector that can be called on images. Build it with `from_file` or `from_config`.

    Images are prepared as in an evaluation (MIN_SIZE_TEST, MAX_SIZE_TEST, INPUT.FORMAT), so the detections are the
    same. By default, the detector runs on CUDA if it is available, and otherwise on the CPU.
    """

    def __init__(self, model: DEQDet, cfg: CfgNode, class_names: Sequence[str], *, threshold: float = 0.5):
        """
        Args:
            model: the detector with its weights; it is put into evaluation mode.
            cfg: the config that the model was built from.
            class_names: the names of the model's K classes, in their order.
            threshold: minimum score of a detection that is returned, 0 to 1.

        Raises:
            UserError: the number of names is not K, or the threshold or INPUT.FORMAT is not valid.
        """
        if len(class_names) != (expected := cfg.MODEL.DEQDET.NUM_CLASSES):
            raise UserError(f"{len(class_names)} class names for a model of {expected} classes: give one for each")
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: it must be RGB or BGR")
        self.model = model.eval()
        self.cfg = cfg
        self.class_names = tuple(class_names)
        self.threshold = _check_threshold(threshold)
        self._resize = T.AugmentationList(detection_utils.build_augmentation(cfg, is_train=False))

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        *,
        overrides: Sequence[str] = (),
        device: str | torch.device | None = None,
        threshold: float = 0.5,
    ) -> "Predictor":
        """Load a model file (weights, config and class names), as written by training and tools/publish.py.

        Args:
            path: a .safetensors file, or "hf://owner/name" on the Hugging Face Hub.
            overrides: alternating config keys and values.
            device: "cpu", "cuda", "cuda:1", ... or a torch.device; by default CUDA if available.

        Raises:
            UserError: the file is missing, damaged or not a model file, an override is invalid, or the device is not
                available.
        """
        file = read_model_file(resolve_file(os.fspath(path)))
        cfg = load_model_config(file)
        put_overrides(cfg, [str(word) for word in overrides])
        _set_device(cfg, device)
        check_options(cfg)
        model = _build(cfg)
        _load_state(model, file.weights, path)
        return cls(model, cfg, file.class_names, threshold=threshold)

    @classmethod
    def from_config(
        cls,
        config: str | os.PathLike | CfgNode,
        weights: str | os.PathLike | None = None,
        *,
        overrides: Sequence[str] = (),
        class_names: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        threshold: float = 0.5,
    ) -> "Predictor":
        """Build a detector from a config, and load a checkpoint.

        Args:
            config: the name of a config in the model zoo, a YAML file, or a config.
            weights: the checkpoint (.pth, .safetensors); by default the config's MODEL.WEIGHTS.
            overrides: alternating config keys and values.
            class_names: by default those in the checkpoint if it is a model file, else those of the first set of
                DATASETS.TRAIN, or else of DATASETS.TEST, or "class 0", ... if neither has names.
            device: see `from_file`.

        Raises:
            UserError: the config is invalid, or the checkpoint is missing or does not fit it.
        """
        if isinstance(config, CfgNode):
            cfg = config.clone()
            cfg.defrost()
            put_overrides(cfg, [str(word) for word in overrides])
        else:
            cfg = get_config(config, overrides)
        if weights is not None:
            cfg.MODEL.WEIGHTS = os.fspath(weights)
        _set_device(cfg, device)
        check_options(cfg)
        file = _find_weights(cfg)
        model = _build(cfg)
        if file is None:
            load_weights(model, cfg, resume=False)
        else:
            _load_state(model, file.weights, cfg.MODEL.WEIGHTS)
        if class_names is None:
            class_names = find_class_names(cfg) if file is None else file.class_names
        return cls(model, cfg, class_names, threshold=threshold)

    def __call__(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: str | Solver | None = None,
        threshold: float | None = None,
        channels: str = "RGB",
        batch_size: int = 8,
    ) -> Detections | list[Detections]:
        """Detect objects in one image, or in a list of images.

        Args:
            images: an image, or a list or tuple of images. An image is the path of a file, a PIL image, an array
                (H, W, 3) or (H, W) uint8, or a tensor (3, H, W), uint8 or float from 0 to 1. Files and PIL images are
                rotated according to their EXIF data.
            steps: maximum number of applications of f; by default MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS.
            rtol: stop when the relative residual falls below it; by default MODEL.DEQDET.SOLVER.RTOL; 0: never.
            solver: "plain", "anderson", "broyden", "anderson4", "Anderson(history_size=4)", the name of a solver that
                you registered, or a solver object; by default MODEL.DEQDET.SOLVER.
            threshold: minimum score of a detection; by default the Predictor's.
            channels: the channel order of all arrays and tensors, "RGB" or "BGR" (OpenCV's order).
            batch_size: maximum number of images per batch. Only images with the same padded size share a batch, so each
                gets the detections that it would get alone, up to rounding (see docs/equilibrium.md).

        Returns:
            Detections for one image; for a list, a list of them.

        Raises:
            UserError: an image cannot be read or is too small or too large, or an option does not fit the detector.
        """
        _check_batch_size(batch_size)
        if isinstance(images, list | tuple):
            return list(
                self.stream(
                    images,
                    steps=steps,
                    rtol=rtol,
                    solver=solver,
                    threshold=threshold,
                    channels=channels,
                    batch_size=batch_size,
                )
            )
        inputs = self.prepare(images, channels=channels)
        return next(self._detect([inputs], self.options(steps, rtol, solver), self._lowest(threshold)))

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: str | Solver | None = None,
        threshold: float | None = None,
        channels: str = "RGB",
        batch_size: int = 8,
    ) -> Iterator[Detections]:
        """Detect objects in any number of images, which are read only when needed; the results keep their order.

        The arguments are those of a call.

        Raises:
            UserError: at once if an option is wrong, and as a call; an image without a path is named by its index.
        """
        _check_batch_size(batch_size)
        lowest, options = self._lowest(threshold), self.options(steps, rtol, solver)
        if is_path(images):
            raise UserError(f"stream takes an iterable of images, got the single path {images}: give [{str(images)!r}]")

        def detect_all() -> Iterator[Detections]:
            numbered = enumerate(images)
            while chunk := [self._prepare_numbered(*pair, channels) for pair in islice(numbered, batch_size)]:
                yield from self._detect(chunk, options, lowest)

        return detect_all()

    def detect(
        self,
        prepared: Sequence[dict],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: str | Solver | None = None,
        threshold: float | None = None,
        batch_size: int = 8,
    ) -> list[Detections]:
        """Detect objects in images that `prepare` has read; the other arguments are those of a call.

        Raises:
            UserError: an option does not fit the detector, or there is not enough memory.
        """
        _check_batch_size(batch_size)
        options = self.options(steps, rtol, solver)
        return list(self._detect(list(prepared), options, self._lowest(threshold), batch_size))

    def walk(
        self,
        image: ImageLike,
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: str | Solver | None = None,
        record: Collection[int] = (),
        record_iterates: bool = False,
        channels: str = "RGB",
    ) -> BatchTrajectory:
        """Solve for the equilibrium of one image; the result gives states, residuals and detections by step.

        Args:
            steps, rtol, solver, channels: see a call.
            record: the steps to keep, such as range(11). Step 0 is the output of the initialization layer.
            record_iterates: also keep the iterate to which each of these steps applied f, for residuals by part.

        Raises:
            UserError: as a call; or the detector has no equilibrium.
            ValueError: a step to record lies beyond `steps`.
        """
        options = self.options(steps, rtol, solver)
        inputs = self.prepare(image, channels=channels)
        with _explained(inputs), self._evaluating():
            return self.model.walk([inputs], **options, record=record, record_iterates=record_iterates)

    def prepare(self, image: ImageLike, *, channels: str = "RGB") -> dict:
        """Convert an image to the model's input.

        Returns:
            "image" (3, h, w) uint8, resized, in the order of INPUT.FORMAT; "height" and "width" of the original image;
            "file_name" if it is a path.

        Raises:
            UserError: the image cannot be read, or a side would have no pixels after resizing.
        """
        rgb = to_array(image, channels)
        height, width = rgb.shape[:2]
        ordered = rgb[:, :, ::-1] if self.cfg.INPUT.FORMAT == "BGR" else rgb
        inputs = T.AugInput(np.ascontiguousarray(ordered))
        try:
            self._resize(inputs)
        except (ValueError, MemoryError) as error:
            where = f"{image}: " if is_path(image) else ""
            size = f"{width} x {height} pixels"
            raise UserError(f"{where}an image of {size} cannot be resized: {one_line(error)}") from error
        tensor = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        named = {"file_name": str(image)} if is_path(image) else {}
        return {"image": tensor, "height": height, "width": width, **named}

    def _prepare_numbered(self, index: int, image: ImageLike, channels: str) -> dict:
        """Like `prepare`, but errors about an image without a path name its index in the list."""
        try:
            return self.prepare(image, channels=channels)
        except UserError as error:
            if is_path(image):
                raise
            raise UserError(f"image {index} of the list: {error}") from error

    def _lowest(self, threshold: float | None) -> float:
        return self.threshold if threshold is None else _check_threshold(threshold)

    @property
    def has_equilibrium(self) -> bool:
        """Whether steps, rtol, solver and `walk` can be used."""
        return self.model.decoder.has_equilibrium

    def options(self, steps: int | None = None, rtol: float | None = None, solver: str | Solver | None = None) -> dict:
        """Check the options of a call before any image is read, and build the solver from its name.

        Returns:
            A dict with "steps", "rtol" and "solver", as accepted by a call, `stream`, `walk` and DEQDet.infer.

        Raises:
            UserError: a number is out of range, or the solver is unknown.
        """
        if steps is not None and not (isinstance(steps, int | np.integer) and steps >= 1):
            raise UserError(f"steps must be at least 1 and a whole number, got {steps!r}")
        if rtol is not None and not (_is_number(rtol) and 0 <= rtol < float("inf")):
            raise UserError(f"rtol must be 0 or a positive number, got {rtol!r}")
        if isinstance(solver, str):
            try:
                solver = build_solver(self.cfg, solver)
            except ValueError as error:
                raise UserError(one_line(error)) from error
        elif solver is not None and not is_solver(solver):
            raise UserError(f"solver must be a name or an object such as Anderson(history_size=4), got {solver!r}")
        return {"steps": steps, "rtol": rtol, "solver": solver}

    @torch.no_grad()
    def _detect(
        self, chunk: list[dict], options: dict, threshold: float, batch_size: int | None = None
    ) -> Iterator[Detections]:
        """Detect objects in prepared images, batched by their padded size; the results keep the order of the images.

        Args:
            batch_size: maximum number of images per batch; None: all images of the same padded size.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, inputs in enumerate(chunk):
            groups.setdefault(self._padded_size(inputs["image"]), []).append(index)
        found: dict[int, Detections] = {}
        parts = (
            indices[start : start + (batch_size or len(indices))]
            for indices in groups.values()
            for start in range(0, len(indices), batch_size or len(indices))
        )
        for indices in parts:
            batch = [chunk[index] for index in indices]
            with _explained(batch[0]), self._evaluating():
                outputs = self.model.infer(batch, **options)
            for index, output in zip(indices, outputs, strict=True):
                instances = output["instances"].to("cpu")
                residual = output.get("residual")
                found[index] = Detections(
                    instances=instances[instances.scores >= threshold],
                    class_names=self.class_names,
                    steps=int(output["steps"]),
                    residual=None if residual is None else float(residual),
                    finite=bool(output["finite"]),
                )
        return (found[index] for index in range(len(chunk)))

    def _evaluating(self) -> AbstractContextManager:
        """Put the model into evaluation mode for the block, in case a training that shares it has changed that."""
        return inference_context(self.model) if self.model.training else nullcontext()

    def _padded_size(self, image: Tensor) -> tuple[int, ...]:
        """Return the height and width to which the model would pad this image alone."""
        unit = max(1, self.model.backbone.size_divisibility)
        return tuple(-(-side // unit) * unit for side in image.shape[1:])


def _build(cfg: CfgNode) -> DEQDet:
    if cfg.MODEL.META_ARCHITECTURE != DEQDet.__name__:
        raise UserError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: it must be {DEQDet.__name__}")
    try:
        return build_model(cfg)
    except RuntimeError as error:
        raise UserError(f"the model cannot be built on MODEL.DEVICE {cfg.MODEL.DEVICE}: {one_line(error)}") from error


def _find_weights(cfg: CfgNode) -> ModelFile | None:
    """Read the model file that MODEL.WEIGHTS names; return None for any other kind of checkpoint.

    Raises:
        UserError: MODEL.WEIGHTS is empty, or the file does not exist or is damaged.
    """
    path = cfg.MODEL.WEIGHTS
    if not path:
        raise UserError("MODEL.WEIGHTS is empty: give the checkpoint of a trained model")
    if path.startswith("hf://"):
        path = cfg.MODEL.WEIGHTS = str(resolve_file(path))
    file = path.split("?")[0]  # detectron2 allows ?matching_heuristics=True
    if "://" not in file and not PathManager.isfile(file):
        raise UserError(f"MODEL.WEIGHTS {file} does not exist: give the checkpoint of a trained model")
    return read_model_file(file) if is_model_file(file) else None


def _load_state(model: DEQDet, weights: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Load all weights of the model; half-precision weights are converted to the model's dtype."""
    model.load_state_dict(check_complete(path, weights, model.state_dict()), strict=False)  # without unread counters
    check_finite_model(model, str(path))


def _set_device(cfg: CfgNode, device: str | torch.device | None) -> None:
    """Choose the device that the caller names, or else that of the config if it is available."""
    if device is None:
        adapt_device(cfg)
        return
    cfg.MODEL.DEVICE = str(device)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: this machine has no CUDA; leave device out to detect on the CPU")


def _check_batch_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise UserError(f"batch_size must be at least 1 and a whole number, got {size!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_threshold(threshold: float) -> float:
    if not _is_number(threshold) or not 0 <= threshold <= 1:
        raise UserError(f"the threshold must lie between 0 and 1, got {threshold!r}")
    return threshold


@contextmanager
def _explained(inputs: dict) -> Iterator[None]:
    """Turn out-of-memory errors into a UserError with the image's size; other errors pass through."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        where = f"{inputs['file_name']}: " if "file_name" in inputs else ""
        size = f"{inputs['width']} x {inputs['height']}"
        raise UserError(f"{where}there is not enough memory for {size} pixels: {one_line(error)}") from error
