"""The meta architecture of all six detectors; the refinement layer and the decoder make the difference."""

import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList, Instances

from .contract import (
    check_decoded,
    check_levels,
    check_supervised,
    check_trajectory,
    construct,
    describe,
    describe_source,
    finite_boxes,
    read_shapes,
)
from .criterion import Criterion, mean_matches
from .decoders import Decoder, DecodingGraphs, Trajectory, build_decoder, compile_refinement
from .equilibrium import Solver
from .errors import UserError, list_first
from .inference import make_detections
from .precision import autocast
from .queries import InitialQueries
from .structures import Decoded, QueryState, Targets, move, to_device

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # TEST.PRECISION


@dataclass(frozen=True)
class BatchTrajectory:
    """The trajectory of a batch of images, from which detections are read at any recorded step."""

    trajectory: Trajectory
    images: ImageList  # the padded input of the backbone
    original_sizes: list[tuple[int, int]]  # height, width of the original images, to which detections are scaled
    max_detections: int

    @torch.no_grad()
    def detections(self, step: int | None = None) -> list[Instances]:
        """The detections of each image after `step` applications of f, or after the last one.

        Raises:
            KeyError: that step was not recorded.
            UserError: a box is infinite or NaN.
        """
        prediction = self.trajectory.predict(step)
        with finite_boxes(partial(describe, self.trajectory.refinement)):
            return make_detections(prediction, self.images.image_sizes, self.original_sizes, self.max_detections)


@META_ARCH_REGISTRY.register()
class DEQDet(nn.Module):
    """Backbone, initial queries and decoder, followed by the criterion in training or by detections at test time."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        queries: InitialQueries,
        decoder: Decoder,
        criterion: Criterion,
        max_detections: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str,
        fix_bn_statistics: bool = False,
        precision: str = "float32",
        compiled: bool = False,
        cuda_graphs: int = 0,
    ):
        """
        Args:
            in_features: names of the levels that the decoder reads, finest first.
            max_detections: the largest number of detections of an image.
            pixel_mean, pixel_std: one value for each channel, 0 to 255, in the channel order of input_format.
            input_format: "RGB" or "BGR".
            fix_bn_statistics: do not update the running statistics of the backbone's BatchNorm layers.
            precision: "float32", or "bfloat16" for autocast at test time.
            compiled: compile the refinement layers after the first.
            cuda_graphs: the number of image sizes for which the decoder is recorded as a CUDA graph at test time.

        Raises:
            ValueError: an unknown precision.
        """
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"TEST.PRECISION is {precision!r}: it must be one of {', '.join(PRECISIONS)}")
        self.backbone = backbone
        self.in_features = list(in_features)
        self.queries = queries
        self.decoder = decoder
        self.criterion = criterion
        self.max_detections = max_detections
        self.input_format = input_format
        self.fix_bn_statistics = fix_bn_statistics
        self.precision = precision
        if compiled:
            compile_refinement(decoder)
        self.graphs = DecodingGraphs(cuda_graphs) if cuda_graphs else None
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.train()  # BatchNorm's mode, see below

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        backbone = build_backbone(cfg)
        in_features = cfg.MODEL.DEQDET.IN_FEATURES
        shapes = read_shapes(backbone, in_features)
        if unknown := [name for name in in_features if name not in shapes]:
            raise ValueError(f"MODEL.DEQDET.IN_FEATURES has {unknown}, but the backbone's levels are {list(shapes)}")
        for name in in_features:
            if shapes[name].channels != cfg.MODEL.DEQDET.HIDDEN_DIM:
                raise ValueError(
                    f"the backbone's level {name} has {shapes[name].channels} channels, MODEL.DEQDET.HIDDEN_DIM is "
                    f"{cfg.MODEL.DEQDET.HIDDEN_DIM}: they must be equal (with an FPN, set MODEL.FPN.OUT_CHANNELS)"
                )
        return {
            "backbone": backbone,
            "in_features": in_features,
            "queries": InitialQueries(cfg),
            "decoder": build_decoder(cfg, [shapes[name] for name in in_features]),
            "criterion": Criterion(cfg),
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "fix_bn_statistics": cfg.MODEL.DEQDET.FIX_BN_STATISTICS,
            "precision": cfg.TEST.PRECISION,
            "compiled": cfg.MODEL.DEQDET.COMPILE,
            "cuda_graphs": cfg.MODEL.DEQDET.CUDA_GRAPHS,
        }

    @property
    def device(self) -> torch.device:
        """The device of the model, to which the images are moved."""
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> "DEQDet":
        """Switch modes as nn.Module does, but leave BatchNorm layers whose statistics are fixed in evaluation mode."""
        super().train(mode)
        self._has_warned = False  # each evaluation begins with a switch to evaluation mode
        if self.fix_bn_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(
        self, batched_inputs: list[dict], normalizer: Tensor | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """Compute losses in training, or detections at test time, in detectron2's format.

        Args:
            batched_inputs: for each image a dict with "image" (3, H, W), uint8 or float, 0 to 255, in the channel order
                of INPUT.FORMAT; in training also "instances" with gt_boxes and gt_classes; at test time "height" and
                "width" of the original image in pixels, to which detections are scaled (by default H and W).
            normalizer: in training on part of a batch, the `loss_normalizer` of the whole batch.

        Returns:
            In training the weighted losses, to be summed. At test time, see `infer`.

        Raises:
            UserError: an image has no "instances" in training, or a user's layer or decoder returned a wrong result.
        """
        if not self.training:
            outputs = self._detect(batched_inputs)
            more = " (said once for each evaluation)"
            self._has_warned = self._has_warned or _warn_of_nonfinite(batched_inputs, outputs, more)
            return outputs
        if missing := [i for i, x in enumerate(batched_inputs) if "instances" not in x]:
            raise UserError(
                f'the model is in training mode, but image {missing[0]} of the batch has no "instances" with its '
                "boxes: call model.eval() to detect"
            )
        # Start copying the targets to the device before the backbone runs, so that nothing waits for them later.
        targets = Targets.from_instances([x["instances"] for x in batched_inputs], self.device)
        features, initial = self.encode(self.preprocess(batched_inputs))
        names = [x.get("file_name", "") for x in batched_inputs]
        predictions = self.decoder.supervise(initial, features)
        check_supervised(self.decoder, predictions, len(batched_inputs), self.criterion.num_classes)
        return self.criterion(predictions, targets, names, normalizer)

    def loss_normalizer(self, batched_inputs: list[dict]) -> Tensor:
        """The divisor of a batch's losses, (): its number of matched boxes, averaged over the ranks, at least 1.

        If a batch is split, and each part goes through `forward` with this normalizer, the losses of the parts add up
        to those of the batch. This is a collective operation (see `mean_matches`).
        """
        return mean_matches(self.count_matches(batched_inputs), self.device)

    def count_matches(self, batched_inputs: list[dict]) -> int:
        """Count the ground-truth boxes of a batch that get matched, in each image at most one for each query."""
        queries = self.queries.content.num_embeddings
        return sum(min(len(x["instances"]), queries) for x in batched_inputs)

    def infer(
        self,
        batched_inputs: list[dict],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: Solver | None = None,
    ) -> list[dict]:
        """Detect objects. The number of steps, the tolerance and the solver can be chosen for this call.

        Args:
            batched_inputs: see `forward`.
            steps, rtol, solver: see EquilibriumDecoder.walk.

        Returns:
            For each image a dict with "instances": pred_boxes (xyxy, pixels of the original image), scores,
            pred_classes and queries (the query's index), sorted by falling score; "steps": () int64, the number of
            applications of f; "finite": () bool, False if a state became infinite or NaN; and, with an equilibrium,
            "residual": () the relative residual of the last iterate.

        Raises:
            UserError: an option is given, but the decoder has no equilibrium; or a user's layer or decoder returned an
                object of another type, other shapes, or a box that is infinite or NaN.
        """
        outputs = self._detect(batched_inputs, steps=steps, rtol=rtol, solver=solver)
        _warn_of_nonfinite(batched_inputs, outputs)
        return outputs

    def _detect(self, batched_inputs: list[dict], **options: object) -> list[dict]:
        decoded, found = self.decode(batched_inputs, **options)
        rows = zip(found, decoded.steps, decoded.finite, strict=True)
        outputs = [{"instances": x, "steps": steps, "finite": finite} for x, steps, finite in rows]
        if decoded.residual is not None:
            for output, residual in zip(outputs, decoded.residual, strict=True):
                output["residual"] = residual
        return outputs

    def decode(
        self,
        batched_inputs: list[dict],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: Solver | None = None,
    ) -> tuple[Decoded, list[Instances]]:
        """Return the result of the decoder and the detections made from it; the arguments are those of `infer`."""
        images = self.preprocess(batched_inputs)
        with self.autocast():
            features, initial = self.encode(images)
            decoded = self.decode_queries(initial, features, steps=steps, rtol=rtol, solver=solver)
        check_decoded(self.decoder, decoded, len(batched_inputs), self.criterion.num_classes)
        sizes = _original_sizes(batched_inputs, images.image_sizes)
        with finite_boxes(partial(describe_source, self.decoder)):
            return decoded, make_detections(decoded.prediction, images.image_sizes, sizes, self.max_detections)

    def decode_queries(
        self,
        initial: QueryState,
        features: list[Tensor],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: Solver | None = None,
    ) -> Decoded:
        """Run the decoder on initial queries and features from `encode`.

        With MODEL.DEQDET.CUDA_GRAPHS this replays a CUDA graph, unless there is a tolerance or a gradient is recorded.

        Args:
            steps, rtol, solver: see `infer`.
        """
        chosen = (steps, rtol, solver) != (None, None, None)

        def decode(initial: QueryState, features: list[Tensor]) -> Decoded:
            if not chosen:
                return self.decoder.decode(initial, features)
            trajectory = self.decoder.walk(initial, features, steps=steps, rtol=rtol, solver=solver)
            return check_trajectory(self.decoder, trajectory, Trajectory).decoded()

        refused = chosen and not self.decoder.has_equilibrium  # decode raises the error
        if self.graphs is None or torch.is_grad_enabled() or refused:
            return decode(initial, features)
        options = ()
        if self.decoder.has_equilibrium:
            # Each recording is for one choice of options. The decoder's defaults may change between two calls.
            steps, rtol, solver = self.decoder.options(steps, rtol, solver)
            if rtol > 0:
                return decode(initial, features)
            options = (steps, repr(solver), self.decoder.return_best)
        return self.graphs(decode, initial, features, options=options)

    @torch.no_grad()
    def walk(
        self,
        batched_inputs: list[dict],
        *,
        steps: int | None = None,
        rtol: float | None = None,
        solver: Solver | None = None,
        record: Collection[int] = (),
        record_iterates: bool = False,
    ) -> BatchTrajectory:
        """Solve for the fixed points of a batch of images, and return the trajectory with the recorded steps.

        Put the model in evaluation mode first. No gradient is recorded.

        Args:
            batched_inputs: see `forward`.
            steps, rtol, solver, record, record_iterates: see EquilibriumDecoder.walk.

        Raises:
            UserError: the decoder has no equilibrium, or its `walk` returned something other than a Trajectory.
            TypeError: the solver is not an object such as Anderson(), but for example a name.
        """
        images = self.preprocess(batched_inputs)
        options = {"steps": steps, "rtol": rtol, "solver": solver, "record": record, "record_iterates": record_iterates}
        with self.autocast():
            features, initial = self.encode(images)
            trajectory = self.decoder.walk(initial, features, **options)
        check_trajectory(self.decoder, trajectory, Trajectory)
        sizes = _original_sizes(batched_inputs, images.image_sizes)
        return BatchTrajectory(trajectory, images, sizes, self.max_detections)

    def autocast(self) -> AbstractContextManager:
        """Return an autocast context for TEST.PRECISION; with float32, the caller's autocast setting stays."""
        return autocast(self.device.type, PRECISIONS[self.precision])

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images, and pad them at the right and bottom to a common size that the backbone accepts.

        Raises:
            UserError: the model was converted to 16 bits.
        """
        if self.pixel_mean.dtype.itemsize < 4:  # boxes, residuals and losses need float32
            raise UserError(
                f"the model was converted to {str(self.pixel_mean.dtype).removeprefix('torch.')}, which is too coarse "
                "for boxes: load it again in float32; TEST.PRECISION and SOLVER.AMP.ENABLED compute in 16 bits"
            )
        images = [(move(x["image"], self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def encode(self, images: ImageList) -> tuple[list[Tensor], QueryState]:
        """Compute the pyramid, for each level (B, C, H_l, W_l), and the initial queries of the images."""
        sizes = to_device([(width, height) for height, width in images.image_sizes], torch.float32, self.device)
        levels = self.backbone(images.tensor)
        check_levels(self.backbone, levels, self.in_features, images.tensor)
        return [levels[name] for name in self.in_features], self.queries(sizes)


def _warn_of_nonfinite(inputs: Sequence[dict], outputs: Sequence[dict], more: str = "") -> bool:
    """Name the images of a batch whose states became infinite or NaN in a warning; return whether there is one.

    Call it last, since it waits for the device.
    """
    finite = torch.stack([output["finite"] for output in outputs]).tolist()
    failed = [x.get("file_name", f"image {i}") for i, x in enumerate(inputs) if not finite[i]]
    if failed:
        text = "The states became infinite or NaN in %d of %d images of a batch: %s%s."
        logger.warning(text, len(failed), len(inputs), list_first(failed), more)
    return bool(failed)


def build_backbone(cfg: CfgNode) -> Backbone:
    """Build the backbone that MODEL.BACKBONE.NAME names, as detectron2's build_backbone, with errors that name it.

    Raises:
        UserError: a user's backbone does not fit the interface; see `construct`.
    """
    images = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    maker = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    return construct(maker, (cfg, images), Backbone, {"forward": 1, "output_shape": 0})


def _original_sizes(batched_inputs: list[dict], image_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return height and width of each original image, by default those of the model's input."""
    return [
        (inputs.get("height", height), inputs.get("width", width))
        for inputs, (height, width) in zip(batched_inputs, image_sizes, strict=True)
    ]
