"""The modules that are exported: a whole detector, or its encoder with g and one step of f.

Modules with image inputs take pixel values from 0 to 255, so a caller only has to resize and pad. No module reads
Python numbers from a tensor, so one graph works for every batch size and image size.

B: images, N: queries, C: channels, K: classes, D = N * (4 + C): size of a packed state, L: levels, M: detections.
"""

import copy

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from detectron2.modeling.backbone.swin import BasicLayer, SwinTransformerBlock

from ..decoders import Decoder, EquilibriumDecoder, Execution, RecurrentDecoder, StackedDecoder
from ..detector import DEQDet
from ..equilibrium import FixedPointIteration, relative_residual
from ..errors import UserError
from ..layers import SparseRCNNLayer
from ..layers.sparse_rcnn import FARTHEST
from ..structures import QueryState
from .swin import ExportedSwinBlock, ExportedSwinStage

# A coordinate in pixels so far outside the image that all of RoIAlign's samples in a box there are 0.
OUTSIDE = -1e6


class ExportedSparseRCNNLayer(SparseRCNNLayer):
    """The same layer with the same weights, which pools without ROIPooler's loops over images and levels.

    ROIPooler sorts the boxes by level and takes a list of boxes for each image; a graph would fix the numbers of both.
    Here each level pools all boxes, but those of other levels are moved outside the image, where RoIAlign reads 0, so
    the sum over the levels is the same. This costs L times the arithmetic of ROIPooler.
    """

    def _pool(self, features: list[Tensor], boxes: Tensor) -> Tensor:
        """See SparseRCNNLayer._pool; here with one state per image, from boxes (B, N, 4) to (B, N, cells, C)."""
        boxes = boxes.nan_to_num().clamp(-FARTHEST, FARTHEST)
        level = self._assign_level(boxes)[..., None]  # (B, N, 1)
        image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None]
        image = image.expand(-1, boxes.shape[1], 1)
        regions = 0
        for index, (feature, pooler) in enumerate(zip(features, self.pooler.level_poolers, strict=True)):
            moved = torch.where(level == index, boxes, OUTSIDE)
            rois = torch.cat([image, moved], dim=2).flatten(0, 1)  # (B * N, 5)
            size, scale, ratio = pooler.output_size, pooler.spatial_scale, pooler.sampling_ratio
            regions = regions + roi_align(feature, rois, size, scale, ratio, aligned=True)  # (B * N, C, side, side)
        return regions.flatten(2).transpose(1, 2).unflatten(0, (-1, boxes.shape[1]))

    def _assign_level(self, boxes: Tensor) -> Tensor:
        """Return the index of the level from which each box is pooled, (B, N) (FPN, CVPR 2017, Eq. 1)."""
        pooler = self.pooler
        area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
        octave = torch.log2(area.sqrt() / pooler.canonical_box_size + 1e-8)
        return (pooler.canonical_level + octave).floor().clamp(pooler.min_level, pooler.max_level) - pooler.min_level


# The class of a module -> the subclass that replaces it in an export, with the same parameters.
EXPORTED: dict[type[nn.Module], type[nn.Module]] = {
    SparseRCNNLayer: ExportedSparseRCNNLayer,
    SwinTransformerBlock: ExportedSwinBlock,
    BasicLayer: ExportedSwinStage,
}


class Encoder(nn.Module):
    """Backbone, neck and the initialization layer g: the part that runs once per image."""

    def __init__(self, model: DEQDet):
        """
        Args:
            model: a detector; the module holds a copy of it on the CPU, in evaluation mode.

        Raises:
            UserError: the decoder does not apply one layer repeatedly.
        """
        super().__init__()
        model = _exportable(model)
        if isinstance(model.decoder, StackedDecoder):
            raise UserError(
                f"MODEL.DEQDET.DECODER is {type(model.decoder).__name__}, whose layers have different weights: two "
                "graphs need one layer that is applied repeatedly; give --form one"
            )
        execution = _execution(model.decoder)
        self.backbone, self.in_features, self.queries = model.backbone, model.in_features, model.queries
        self.initialization, self.refinement = execution.initialization, None
        if self.initialization is None:
            self.refinement = execution.refinement  # y_0 is then read out by f
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Encode images, and compute the state from which f starts.

        Args:
            images: (B, 3, H, W) uint8, padded at the right and the bottom with any values, in the model's channel
                order; H and W are multiples of the backbone's size divisibility.
            sizes: (B, 2) int64, height and width of each image before padding.

        Returns:
            y_0 packed (B, D), its boxes (B, N, 4) xyxy in pixels of `images`, its scores (B, N, K), and the L levels
            (B, C, H_l, W_l), finest first.
        """
        features, initial = _encode(self, images, sizes)
        state = initial if self.initialization is None else self.initialization(initial, features)
        layer = self.refinement if self.initialization is None else self.initialization
        prediction = layer.predict(state)
        return state.pack(), prediction.boxes, prediction.logits.sigmoid(), *features


class Step(nn.Module):
    """One application of f with its residual and its read-out: everything that a solver outside the graph needs."""

    def __init__(self, model: DEQDet):
        super().__init__()
        model = _exportable(model)
        self.refinement = model.decoder.execution().refinement
        self.num_queries = model.queries.content.num_embeddings

    def forward(self, state: Tensor, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply f once.

        Args:
            state: (B, D) packed y.
            levels: (B, C, H_l, W_l) for each level, from the encoder.

        Returns:
            f(y) packed (B, D); ||f(y) - y|| / ||f(y)|| (B,); boxes (B, N, 4) and scores (B, N, K) of f(y).
        """
        # Both batch sizes must be one symbol: torch.export would guard two equal symbols, which excludes a batch of 1.
        state = state.reshape(levels[0].shape[0], state.shape[1])
        refined = self.refinement(QueryState.unpack(state, self.num_queries), list(levels))
        output = refined.pack()
        prediction = self.refinement.predict(refined)
        return output, relative_residual(state, output), prediction.boxes, prediction.logits.sigmoid()


class LoopBody(nn.Module):
    """One step of plain iteration, as in OneGraph: the body of an ONNX Loop."""

    def __init__(self, model: DEQDet, damping: float = 1.0):
        super().__init__()
        self.step, self.damping = Step(model), damping

    def forward(
        self, state: Tensor, boxes: Tensor, scores: Tensor, levels: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Apply f once; where f(y) is not finite, keep the state and its read-out.

        Args:
            state: (B, D) packed y.
            boxes, scores: (B, N, 4) and (B, N, K), the read-out of the last finite output.
            levels: as in Step.forward.

        Returns:
            The next iterate, boxes and scores in the shapes of the arguments, and the residual of this step (B,).
        """
        output, residual, found_boxes, found_scores = self.step(state, levels)
        usable = output.isfinite().all(dim=1)[:, None]
        proposal = output if self.damping == 1 else torch.lerp(state, output, self.damping)
        boxes = torch.where(usable[..., None], found_boxes, boxes)
        scores = torch.where(usable[..., None], found_scores, scores)
        return torch.where(usable, proposal, state), boxes, scores, residual


class Best(nn.Module):
    """Selects the best pairs of a query and a class, as inference.top_detections does."""

    def __init__(self, max_detections: int):
        super().__init__()
        self.max_detections = max_detections

    def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Select boxes (B, M, 4), scores (B, M) descending, classes (B, M) from boxes (B, N, 4), scores (B, N, K)."""
        queries, classes = scores.shape[1:]
        scores, indices = scores.flatten(1).topk(min(self.max_detections, queries * classes), dim=1)
        boxes = boxes.gather(1, (indices // classes)[..., None].expand(-1, -1, 4))
        return boxes, scores, indices % classes


class OneGraph(nn.Module):
    """A whole detector with a fixed number of plain steps, and the best pairs of a query and a class."""

    def __init__(self, model: DEQDet, steps: int | None = None, damping: float = 1.0):
        """
        Args:
            model: see Encoder.
            steps: number of applications of f, for decoders that repeat one layer; by default the decoder's own.
            damping: of the plain iteration; 1 is the paper's.

        Raises:
            UserError: steps is given but the layers have different weights, or the decoder is unknown.
        """
        super().__init__()
        model = _exportable(model)
        self.backbone, self.in_features, self.queries = model.backbone, model.in_features, model.queries
        self.register_buffer("pixel_mean", model.pixel_mean)
        self.register_buffer("pixel_std", model.pixel_std)
        self.best, self.damping = Best(model.max_detections), damping
        self.first, self.repeated, self.steps = _layers(model, steps)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detect objects.

        Args:
            images, sizes: see Encoder.forward.

        Returns:
            Boxes (B, M, 4) xyxy in pixels of `images`, descending scores (B, M), classes (B, M) int64, and the
            relative change of the state in the last layer (B,). For an equilibrium this is the residual. It is inf if
            there was no step.
        """
        features, state = _encode(self, images, sizes)
        residual = torch.full((images.shape[0],), torch.inf, device=images.device)
        flat, layer = state.pack(), self.repeated[-1]
        for layer in self.first:
            flat = layer(self._unpack(flat), features).pack()
        for step in range(self.steps):
            layer = self.repeated[step % len(self.repeated)]
            output = layer(self._unpack(flat), features).pack()
            residual = relative_residual(flat, output)
            # A state that would become infinite or NaN is kept as it was before, as in solve().
            usable = output.isfinite().all(dim=1, keepdim=True)
            # f(y) itself is read out, so the last step is not damped.
            last = self.damping == 1 or step == self.steps - 1
            flat = torch.where(usable, output if last else torch.lerp(flat, output, self.damping), flat)
        prediction = layer.predict(self._unpack(flat))
        return *self.best(prediction.boxes, prediction.logits.sigmoid()), residual

    def _unpack(self, flat: Tensor) -> QueryState:
        return QueryState.unpack(flat, self.queries.content.num_embeddings)


def check_walk(model: DEQDet, unit: int) -> None:
    """Check that the walk of a custom decoder is what two graphs compute: g once, then f repeatedly.

    Args:
        unit: the size divisibility; the sides of the example are multiples of it.

    Raises:
        UserError: the walk ends at a different state after two plain steps.
    """
    if type(model.decoder) is EquilibriumDecoder or not model.decoder.has_equilibrium:
        return
    model, encoder, step = _exportable(model), Encoder(model), Step(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 3 * unit, 4 * unit), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[3 * unit, 4 * unit]] * 2)
    with torch.no_grad():
        state, _, _, *levels = encoder(images, sizes)
        for _ in range(2):
            state = step(state, levels)[0]
        initial = encoder.queries(sizes.flip(1).to(state.dtype))
        walk = model.decoder.walk(initial, levels, steps=2, rtol=0.0, solver=FixedPointIteration())
    if not torch.allclose(walk.solution.value, state, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"MODEL.DEQDET.DECODER is {type(model.decoder).__name__}, whose walk() does not match its execution(): the "
            "export needs its initialization once, if there is one, and then plain steps of its refinement"
        )


def _layers(model: DEQDet, steps: int | None) -> tuple[nn.ModuleList, nn.ModuleList, int]:
    """Return the layers that run once, those that then run in turn, and the number of these applications."""
    decoder = model.decoder
    if isinstance(decoder, StackedDecoder):
        if steps is not None:
            raise UserError("MODEL.DEQDET.DECODER is StackedDecoder, whose number of steps is fixed: give no --steps")
        return nn.ModuleList(), decoder.layers, len(decoder.layers)
    execution = _execution(decoder)
    first = [] if execution.initialization is None else [execution.initialization]
    count = execution.steps if steps is None else steps
    if count < (0 if first else 1):
        raise UserError(f"steps must be at least {0 if first else 1}, got {count}")
    return nn.ModuleList(first), nn.ModuleList([execution.refinement]), count


def _execution(decoder: Decoder) -> Execution:
    """Return the layers of a decoder that applies one layer repeatedly."""
    if decoder.has_equilibrium or isinstance(decoder, RecurrentDecoder):
        return decoder.execution()
    raise UserError(
        f"MODEL.DEQDET.DECODER is {type(decoder).__name__}, which cannot be exported: it needs an equilibrium "
        "(has_equilibrium), or must be a RecurrentDecoder or StackedDecoder"
    )


def _exportable(model: DEQDet) -> DEQDet:
    """Copy a model to the CPU in evaluation mode, and replace modules by exportable ones where needed."""
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for module in model.modules():
        if type(module) in EXPORTED:
            module.__class__ = EXPORTED[type(module)]  # same parameters, but an exportable method
    return model


def _encode(module: Encoder | OneGraph, images: Tensor, sizes: Tensor) -> tuple[list[Tensor], QueryState]:
    """Compute pyramid and initial queries; the padding is 0 after the normalisation, as in DEQDet.preprocess."""
    rows = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]  # (B, H)
    columns = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]  # (B, W)
    normalised = (images.to(module.pixel_mean.dtype) - module.pixel_mean) / module.pixel_std
    inside = rows[:, None, :, None] & columns[:, None, None]
    levels = module.backbone(torch.where(inside, normalised, 0.0))
    initial = module.queries(sizes.flip(1).to(module.pixel_mean.dtype))  # width first
    return [levels[name] for name in module.in_features], initial
