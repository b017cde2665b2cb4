"""Detection in a few lines of Python: a trained detector with its classes, for images of any kind.

from deqdet import Predictor

predictor = Predictor.from_file("model_final.safetensors")
found = predictor("street.jpg", steps=10)
print(found.labels, found.instances.pred_boxes, found.steps, found.residual)
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from . import drawing
from .checkpoints import ModelFile, check_complete, is_model_file, load_model_config, read_model_file, resolve_file
from .data import find_class_names, read_image
from .data.images import to_rgb, turn_upright
from .decoders import build_solver
from .detector import BatchTrajectory, DEQDet
from .engine import adapt_device, build_model, check_options, load_weights
from .engine.health import check_finite_model
from .equilibrium import Solver
from .errors import UserError, one_line
from .extras import how_to_install
from .model_zoo import get_config, put_overrides

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Detections:
    """What a Predictor found in one image."""

    # On the CPU, best first, with pred_boxes (xyxy, pixels of the original image), scores and pred_classes.
    instances: Instances
    class_names: tuple[str, ...]
    steps: int  # applications of f; for a stack of layers, the layers after the first
    residual: float | None  # ||f(y) - y|| / ||f(y)|| at the last step; None for a detector without an equilibrium

    def __len__(self) -> int:
        return len(self.instances)

    @property
    def labels(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[index] for index in self.instances.pred_classes.tolist()]

    def draw(self, image: "ImageLike", *, channels: str = "RGB", enlarge: bool = True) -> np.ndarray:
        """Draw the detections on their image, with names and scores, in one colour for each class.

        Args:
            image: what was given to the Predictor.
            channels: the order of an array or tensor, "RGB" or "BGR".
            enlarge: draw on an enlarged copy of a small image, so that the labels can be read.

        Returns:
            (H, W, 3) uint8 RGB.
        """
        picture = _to_array(image, channels)
        picture = drawing.enlarge(picture) if enlarge else picture
        return drawing.draw_detections(picture, self.instances, self.class_names)

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict]:
        """The detections in COCO's result format: image_id, category_id, bbox (x, y, width, height; pixels), score.

        Args:
            category_ids: the id of each class; by default 1, 2, ... in the order of class_names.

        Raises:
            UserError: there is not one id for each class.
        """
        ids = range(1, len(self.class_names) + 1) if category_ids is None else category_ids
        if len(ids) != len(self.class_names):
            raise UserError(f"{len(ids)} category_ids for {len(self.class_names)} classes: give one for each")
        records = instances_to_coco_json(self.instances, image_id)
        return [record | {"category_id": ids[record["category_id"]]} for record in records]

    def to_supervision(self):
        """The detections as supervision.Detections, for that library's annotators, trackers and converters.

        Raises:
            UserError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError(f"to_supervision() needs that package: {how_to_install('supervision')}") from error
        return supervision.Detections(
            xyxy=self.instances.pred_boxes.tensor.numpy().reshape(-1, 4),
            confidence=self.instances.scores.numpy(),
            class_id=self.instances.pred_classes.numpy().astype(int),
            data={"class_name": np.array(self.labels, dtype=str)},
        )


class Predictor:
    """A trained detector, ready for images: make it with `from_file` or `from_config`, then call it.

    It prepares an image as an evaluation does (MIN_SIZE_TEST, MAX_SIZE_TEST, INPUT.FORMAT), so that it finds what an
    evaluation finds. It runs on CUDA if there is one, else on the CPU, unless told otherwise.
    """

    def __init__(self, model: DEQDet, cfg: CfgNode, class_names: Sequence[str], *, threshold: float = 0.5):
        """
        Args:
            model: with its weights; it is put in evaluation mode.
            cfg: the config that the model was built from.
            class_names: of the model's K classes, in their order.
            threshold: the lowest score of a detection that is returned, 0 to 1.

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
        """Load a model file, which holds weights, config and class names: what training and tools/publish.py write.

        Args:
            path: a .safetensors file, or "hf://owner/name" on the Hugging Face Hub.
            overrides: config keys and values in turn.
            device: "cpu", "cuda", "cuda:1", ... or a torch.device; by default CUDA if there is one.

        Raises:
            UserError: the file is missing, damaged or no model file, an override is wrong, or the device is not there.
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
            overrides: config keys and values in turn.
            class_names: by default those in the checkpoint if it is a model file, else those of the first set of
                DATASETS.TRAIN, or of DATASETS.TEST, or "class 0", ... where neither has them.
            device: see `from_file`.

        Raises:
            UserError: the config is wrong, or the checkpoint is missing or does not fit it.
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
        """Detect in one image, or in a list of them.

        Args:
            images: an image or a list or tuple of images. An image is a file's path, a PIL image, an array (H, W, 3) or
                (H, W) uint8, or a tensor (3, H, W), uint8 or float from 0 to 1. Files and PIL images are turned upright
                by their EXIF data. All arrays and tensors of a call are taken as RGB, unless `channels` says "BGR"
                (OpenCV's order).
            steps: the most applications of f; by default MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS. Fewer are faster.
            rtol: stop where the relative residual falls below it; by default MODEL.DEQDET.SOLVER.RTOL; 0: never.
            solver: "plain", "anderson", "broyden", "anderson4", "Anderson(history_size=4)", a registered name of your
                own, or a solver object; by default MODEL.DEQDET.SOLVER.
            threshold: the lowest score of a detection; by default the Predictor's.
            batch_size: the most images at once. Only images that need the same padded size share a batch, so that each
                gets what it would get alone, up to rounding (see docs/equilibrium.md).

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
        """Detect in any number of images: they are read as they are needed, and results come in their order.

        The arguments are those of a call.

        Raises:
            UserError: as a call; an image without a path is named by its place, beginning with 0.
        """
        _check_batch_size(batch_size)
        lowest, options = self._lowest(threshold), self.options(steps, rtol, solver)
        numbered = enumerate(images)
        while chunk := [self._prepare_numbered(*pair, channels) for pair in islice(numbered, batch_size)]:
            yield from self._detect(chunk, options, lowest)

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
        """Detect in images that `prepare` has read already; the arguments are those of a call.

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
        """The way of one image to its equilibrium, from which states, residuals and detections of any step are read.

        Args:
            steps, rtol, solver, channels: see a call.
            record: the steps to keep, such as range(11). Step 0 is the output of the initialization layer.
            record_iterates: keep also to which iterate each of these steps applied f, for residuals by part.

        Raises:
            UserError: as a call; or the detector has no equilibrium.
            ValueError: a step to record lies beyond `steps`.
        """
        options = self.options(steps, rtol, solver)
        inputs = self.prepare(image, channels=channels)
        with _explained(inputs):
            return self.model.walk([inputs], **options, record=record, record_iterates=record_iterates)

    def prepare(self, image: ImageLike, *, channels: str = "RGB") -> dict:
        """The input that the model gets for an image.

        Returns:
            "image" (3, h, w) uint8, resized, in the order of INPUT.FORMAT; "height" and "width" of the image as it was;
            "file_name" if it is a path.

        Raises:
            UserError: the image cannot be read, or a side has no pixel left after the resize.
        """
        rgb = _to_array(image, channels)
        height, width = rgb.shape[:2]
        ordered = rgb[:, :, ::-1] if self.cfg.INPUT.FORMAT == "BGR" else rgb
        inputs = T.AugInput(np.ascontiguousarray(ordered))
        try:
            self._resize(inputs)
        except (ValueError, MemoryError) as error:
            where = f"{image}: " if _is_path(image) else ""
            size = f"{width} x {height} pixels"
            raise UserError(f"{where}an image of {size} cannot be resized: {one_line(error)}") from error
        tensor = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        named = {"file_name": str(image)} if _is_path(image) else {}
        return {"image": tensor, "height": height, "width": width, **named}

    def _prepare_numbered(self, index: int, image: ImageLike, channels: str) -> dict:
        """As `prepare`, but the errors of an image without a path give its place in the list."""
        try:
            return self.prepare(image, channels=channels)
        except UserError as error:
            if _is_path(image):
                raise
            raise UserError(f"image {index} of the list: {error}") from error

    def _lowest(self, threshold: float | None) -> float:
        return self.threshold if threshold is None else _check_threshold(threshold)

    @property
    def has_equilibrium(self) -> bool:
        """Whether steps, rtol, solver and `walk` can be used."""
        return self.model.decoder.has_equilibrium

    def options(self, steps: int | None = None, rtol: float | None = None, solver: str | Solver | None = None) -> dict:
        """Check the options of a call, before any image is read, and make a solver of its name.

        Returns:
            "steps", "rtol" and "solver", as a call, `stream`, `walk` and DEQDet.infer take them.

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
        elif solver is not None and (isinstance(solver, type) or not hasattr(solver, "step")):
            raise UserError(f"solver must be a name or an object such as Anderson(history_size=4), got {solver!r}")
        return {"steps": steps, "rtol": rtol, "solver": solver}

    @torch.no_grad()
    def _detect(
        self, chunk: list[dict], options: dict, threshold: float, batch_size: int | None = None
    ) -> Iterator[Detections]:
        """Detect in prepared images, those of one padded size at a time; the results are in their order.

        Args:
            batch_size: the most images at once; None: all of one padded size.
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
            with _explained(batch[0]):
                outputs = self.model.infer(batch, **options)
            for index, output in zip(indices, outputs, strict=True):
                instances = output["instances"].to("cpu")
                residual = output.get("residual")
                found[index] = Detections(
                    instances=instances[instances.scores >= threshold],
                    class_names=self.class_names,
                    steps=int(output["steps"]),
                    residual=None if residual is None else float(residual),
                )
        return (found[index] for index in range(len(chunk)))

    def _padded_size(self, image: Tensor) -> tuple[int, ...]:
        """Height and width to which the model would pad this image alone."""
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
    """The model file that MODEL.WEIGHTS names; None for a checkpoint of any other kind.

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
    """Load all of the model's weights; half precision becomes the model's own on the way."""
    model.load_state_dict(check_complete(path, weights, model.state_dict()), strict=False)  # without unread counters
    check_finite_model(model, str(path))


def _set_device(cfg: CfgNode, device: str | torch.device | None) -> None:
    """Put the model on the device that the caller names, or else on that of the config if it is there."""
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


def _is_path(image: ImageLike) -> bool:
    return isinstance(image, str | os.PathLike)


def _check_threshold(threshold: float) -> float:
    if not _is_number(threshold) or not 0 <= threshold <= 1:
        raise UserError(f"the threshold must lie between 0 and 1, got {threshold}")
    return threshold


def _to_array(image: ImageLike, channels: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB.

    Raises:
        UserError: the file cannot be read, or the array or tensor has another shape, type or range.
    """
    if channels not in ("RGB", "BGR"):
        raise UserError(f"channels must be RGB or BGR, got {channels!r}")
    if _is_path(image):
        return read_image(image)
    if isinstance(image, Image.Image):
        try:
            return np.array(to_rgb(turn_upright(image)))
        except (ValueError, OSError) as error:
            raise UserError(f"the PIL image cannot be converted to RGB: {one_line(error)}") from error
    if isinstance(image, Tensor):
        return _order(_tensor_to_array(image), channels)
    if isinstance(image, np.ndarray):
        return _order(_check_array(image), channels)
    raise UserError(f"an image must be a path, a PIL image, an array or a tensor, got a {type(image).__name__}")


def _tensor_to_array(image: Tensor) -> np.ndarray:
    if image.dim() != 3 or image.shape[0] != 3:
        raise UserError(f"an image tensor must have the shape (3, H, W), got {tuple(image.shape)}")
    image = image.detach().cpu()
    if image.is_floating_point():
        if not (image.numel() and 0 <= float(image.min()) and float(image.max()) <= 1):
            raise UserError("a floating-point image tensor must hold values from 0 to 1; for 0 to 255, give uint8")
        image = (255 * image).round().to(torch.uint8)
    return _check_array(image.permute(1, 2, 0).numpy())


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise UserError(
            f"an image array must be uint8 of the shape (H, W, 3) or (H, W), got {image.dtype} {tuple(image.shape)}"
        )
    return image


def _order(image: np.ndarray, channels: str) -> np.ndarray:
    return image if channels == "RGB" else np.ascontiguousarray(image[:, :, ::-1])


@contextmanager
def _explained(inputs: dict) -> Iterator[None]:
    """Turn a lack of memory within it into a UserError with the image's size; other errors are not the image's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU, torch raises a plain RuntimeError: "DefaultCPUAllocator: can't allocate memory".
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        where = f"{inputs['file_name']}: " if "file_name" in inputs else ""
        size = f"{inputs['width']} x {inputs['height']}"
        raise UserError(f"{where}there is not enough memory for {size} pixels: {one_line(error)}") from error
