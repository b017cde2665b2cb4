"""What the shapes of a state dict, in our names, imply for the config.

C: hidden dimension, G: groups, P: points, P_out: mixed points. Each number is read at several places and the most
frequent one is taken, so that a wrong shape is found out by the right ones.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .kinds import Kind
from .kinds.torchvision import BODY
from .reading import ConversionError

Shape = tuple[int, ...]
Config = dict[str, object]  # KEY: VALUE

RESNETS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}  # blocks of each stage: depth
LEVELS = ["res2", "res3", "res4", "res5"]


@dataclass(frozen=True)
class Given:
    """A tensor of the file."""

    name: str  # theirs
    shape: Shape


class Shapes:
    """Looks up sizes by shell patterns of our names."""

    def __init__(self, tensors: Mapping[str, Given]):
        self._tensors = tensors

    def find(self, *patterns: str, axis: int = 0) -> list[tuple[int, Given]]:
        """All tensors that match and have that axis, with its size, unless it is 0."""
        return [
            (given.shape[axis], given)
            for pattern in patterns
            for name, given in self._tensors.items()
            if fnmatchcase(name, pattern) and len(given.shape) > axis and given.shape[axis] > 0
        ]

    def size(self, *patterns: str, axis: int = 0) -> int:
        """The most frequent size.

        Raises:
            ConversionError: no tensor has one, or two sizes are as frequent: names two tensors that disagree.
        """
        found = self.find(*patterns, axis=axis)
        first, *others = Counter(size for size, _ in found).most_common(2) or [(0, 0)]
        if not found:
            raise ConversionError(f"no key stands for our {' or '.join(patterns)}")
        if others and others[0][1] == first[1]:
            one, other = (next(x for size, x in found if size == value) for value, _ in (first, *others))
            raise ConversionError(f"{one.name} {one.shape} and {other.name} {other.shape} do not fit each other")
        return first[0]

    def count(self, prefix: str) -> int:
        """Modules numbered <prefix>0., <prefix>1., ..., up to the last."""
        rests = [name[len(prefix) :].split(".")[0] for name in self._tensors if name.startswith(prefix)]
        return 1 + max((int(rest) for rest in rests if rest.isdigit()), default=-1)


def imply_config(tensors: Mapping[str, Given], kind: Kind) -> Config:
    """The config of the detector, or of the backbone alone, that has such tensors, given by our names.

    Every key is listed that the file decides, whether or not its value is the default.

    Raises:
        ConversionError: they are no detector's; says why.
    """
    look = Shapes(tensors)
    is_swin = look.count(f"{BODY}layers.") > 0
    body = _imply_swin(look) if is_swin else _imply_resnet(look) | dict(kind.resnet_config)
    if kind.backbone_only:
        return dict(kind.config) | body
    return {"MODEL.META_ARCHITECTURE": "DEQDet", "MODEL.MASK_ON": False} | dict(kind.config) | body | _imply_rest(
        look, "swin" if is_swin else "resnet"
    )


def _imply_resnet(look: Shapes) -> Config:
    blocks = tuple(look.count(f"{BODY}{stage}.") for stage in LEVELS)
    if blocks not in RESNETS:
        raise ConversionError(f"its backbone is no ResNet-50, 101 or 152: the four stages have {blocks} blocks")
    width = look.size(f"{BODY}res2.*.conv2.weight", axis=1)  # of a group
    return {
        "MODEL.RESNETS.DEPTH": RESNETS[blocks],
        "MODEL.RESNETS.OUT_FEATURES": LEVELS,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": look.size(f"{BODY}stem.conv1.*"),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": look.size(f"{BODY}res2.*.conv3.*"),
        "MODEL.RESNETS.NUM_GROUPS": look.size(f"{BODY}res2.*.conv2.*") // width,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
    }


def _imply_swin(look: Shapes) -> Config:
    stages = range(look.count(f"{BODY}layers."))
    biases = "attn.relative_position_bias_table"
    # A window of w x w has (2 w - 1)^2 relative positions.
    positions = look.size(f"{BODY}layers.*.{biases}")
    return {
        "MODEL.SWIN.EMBED_DIM": look.size(f"{BODY}patch_embed.*"),
        "MODEL.SWIN.DEPTHS": [look.count(f"{BODY}layers.{stage}.blocks.") for stage in stages],
        "MODEL.SWIN.NUM_HEADS": [look.size(f"{BODY}layers.{stage}.*.{biases}", axis=1) for stage in stages],
        "MODEL.SWIN.WINDOW_SIZE": (math.isqrt(positions) + 1) // 2,
    }


def _imply_rest(look: Shapes, body: str) -> Config:
    """Neck, queries and decoder."""
    dim = look.size("decoder.*.feedforward_norm.*")
    queries = look.size("queries.*")
    count = look.count("decoder.layers.")
    if count:
        layers, decoder = [f"decoder.layers.{i}." for i in range(count)], {"MODEL.DEQDET.NUM_LAYERS": count}
    else:
        layers, decoder = ["decoder.initialization.", "decoder.refinement."], {}
    imply_layers = _imply_sparse_rcnn if look.find("decoder.*.dynamic_conv.*") else _imply_adamixer
    return {
        **_imply_neck(look, body),
        "MODEL.DEQDET.HIDDEN_DIM": dim,
        "MODEL.DEQDET.NUM_QUERIES": queries,
        "TEST.DETECTIONS_PER_IMAGE": queries,
        **decoder,
        **imply_layers(look, layers, dim),
    }


def _imply_neck(look: Shapes, body: str) -> Config:
    if look.find("backbone.fpn_*"):
        return {
            "MODEL.BACKBONE.NAME": f"build_{body}_fpn_backbone",
            "MODEL.FPN.IN_FEATURES": LEVELS if body == "resnet" else [],
            "MODEL.FPN.OUT_CHANNELS": look.size("backbone.fpn_*"),
        }
    return {
        "MODEL.BACKBONE.NAME": f"build_{body}_channel_mapper_backbone",
        "MODEL.DEQDET.NECK.KERNEL_SIZE": look.size("backbone.convs.*.weight", axis=2),
    }


def _imply_adamixer(look: Shapes, layers: list[str], dim: int) -> Config:
    out_points = max(1, look.size("decoder.*.mixing.out.weight", axis=1) // dim)
    groups = _count_groups(look, dim, out_points)

    def count_points(layer: str) -> int:
        offsets = [rows // (3 * groups) for rows, _ in look.find(f"{layer}points.offsets.*")]
        mixed = [rows // groups - (dim // groups) ** 2 for rows, _ in look.find(f"{layer}mixing.generator.*")]
        return _vote(offsets + [rows // out_points for rows in mixed], f"{layer}points.offsets")

    return {
        "MODEL.DEQDET.NUM_CLASSES": look.size("decoder.*.class_branch.3.*"),
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT": count_points(layers[0]),
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE": count_points(layers[-1]),
        "MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS": out_points,
        "MODEL.DEQDET.ADAMIXER.NUM_GROUPS": groups,
        "MODEL.DEQDET.ADAMIXER.NUM_HEADS": look.size("decoder.*.attention.iof_scale"),
        "MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM": look.size("decoder.*.feedforward.0.*"),
    }


def _count_groups(look: Shapes, dim: int, out_points: int) -> int:
    """G from the rows of a layer's generators: 3 G P of offsets, G ((C / G)^2 + P_out P) = C^2 / G + P_out G P of
    mixing.
    """
    candidates = []
    for leaf in ("weight", "bias"):
        offsets = look.find(f"decoder.*.points.offsets.{leaf}")
        mixed = look.find(f"decoder.*.mixing.generator.{leaf}")
        for (rows, _), (mixed_rows, _) in zip(offsets, mixed, strict=False):  # both in the order of the layers
            rest = mixed_rows - out_points * rows // 3
            if rest > 0 and dim**2 % rest == 0:
                candidates.append(dim**2 // rest)
    return _vote(candidates, "mixing.generator and points.offsets")


def _vote(candidates: list[int], what: str) -> int:
    if not candidates:
        raise ConversionError(f"no usable key stands for our {what}")
    return Counter(candidates).most_common(1)[0][0]


def _imply_sparse_rcnn(look: Shapes, layers: list[str], dim: int) -> Config:
    class_layers, box_layers = (
        max(look.count(f"{layer}{tower}.") - 1 for layer in layers) // 3 for tower in ("class_branch", "box_branch")
    )
    return {
        "MODEL.DEQDET.NUM_CLASSES": look.size(f"decoder.*.class_branch.{3 * class_layers}.*"),
        "MODEL.DEQDET.SPARSE_RCNN.POOLER_RESOLUTION": math.isqrt(
            look.size("decoder.*.dynamic_conv.out.weight", axis=1) // dim
        ),
        "MODEL.DEQDET.SPARSE_RCNN.DYNAMIC_DIM": look.size("decoder.*.dynamic_conv.hidden_norm.*"),
        "MODEL.DEQDET.SPARSE_RCNN.NUM_CLASS_LAYERS": class_layers,
        "MODEL.DEQDET.SPARSE_RCNN.NUM_BOX_LAYERS": box_layers,
        "MODEL.DEQDET.SPARSE_RCNN.FEEDFORWARD_DIM": look.size("decoder.*.feedforward.0.*"),
    }
