"""The meta architecture: every detector of the paper, by its refinement layer and its decoder."""

import logging

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, detector_postprocess
from detectron2.structures import ImageList, Instances

from .criterion import Criterion
from .decoders import build_decoder
from .inference import top_detections
from .queries import InitialQueries
from .structures import QueryState, Targets

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class DEQDet(nn.Module):
    """Backbone and neck, initial queries, decoder; then the criterion in training, or detections."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: list[str],
        queries: InitialQueries,
        decoder: nn.Module,
        criterion: Criterion,
        max_detections: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        input_format: str,
        fix_bn_statistics: bool = False,
    ):
        """
        Args:
            in_features: names of the levels that the decoder reads, finest first.
            max_detections: the most detections of an image.
            pixel_mean, pixel_std: per channel, in the order of input_format, "RGB" or "BGR".
            fix_bn_statistics: keep the backbone's BatchNorm statistics, see MODEL.DEQDET.FIX_BN_STATISTICS.
        """
        super().__init__()
        self.backbone = backbone
        self.in_features = list(in_features)
        self.queries = queries
        self.decoder = decoder
        self.criterion = criterion
        self.max_detections = max_detections
        self.input_format = input_format
        self.fix_bn_statistics = fix_bn_statistics
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.train()  # BatchNorm's mode, see below

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        in_features = cfg.MODEL.DEQDET.IN_FEATURES
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
        }

    @property
    def device(self) -> torch.device:
        """Where the images go."""
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> "DEQDet":
        """As nn.Module's, but BatchNorm of the backbone keeps its statistics where they are fixed."""
        super().train(mode)
        if self.fix_bn_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """detectron2's protocol.

        Args:
            batched_inputs: per image "image" (3, H, W) uint8 or float, 0 to 255, in the channel order of
                INPUT.FORMAT; "instances" with gt_boxes and gt_classes (training); "height" and "width" of the
                original image in pixels, to which detections are scaled (inference, default the input's size).

        Returns:
            In training the weighted losses, to be summed; else per image "instances" with
            pred_boxes (xyxy, pixels), scores and pred_classes, best first; "steps": () int64, see Decoded.
        """
        images = self.preprocess(batched_inputs)
        features, initial = self.encode(images)
        if self.training:
            targets = Targets.from_instances([x["instances"] for x in batched_inputs], self.device)
            names = [x.get("file_name", "") for x in batched_inputs]
            return self.criterion(self.decoder.supervise(initial, features), targets, names)
        decoded = self.decoder.decode(initial, features)
        detections = top_detections(decoded.prediction, images.image_sizes, self.max_detections)
        found = [self._postprocess(*x) for x in zip(detections, batched_inputs, strict=True)]
        if failed := int((~decoded.finite).sum()):  # last, since it waits for the device
            logger.warning("The states became infinite or NaN in %d of %d images.", failed, len(found))
        return [{"instances": x, "steps": steps} for x, steps in zip(found, decoded.steps, strict=True)]

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise, and pad on the right and bottom to the backbone's size divisibility."""
        images = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def encode(self, images: ImageList) -> tuple[list[Tensor], QueryState]:
        """The pyramid, per level (B, C, H_l, W_l), and the initial queries."""
        levels = self.backbone(images.tensor)
        sizes = torch.tensor([(width, height) for height, width in images.image_sizes], dtype=torch.float32)
        return [levels[name] for name in self.in_features], self.queries(sizes.to(self.device))

    @staticmethod
    def _postprocess(detections: Instances, inputs: dict) -> Instances:
        height, width = detections.image_size
        return detector_postprocess(detections, inputs.get("height", height), inputs.get("width", width))
