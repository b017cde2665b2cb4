"""Derives config values from the shapes in a state dict with our names.

Each number is read from all tensors that depend on it, and the most frequent value is taken. A single tensor of a wrong
shape then disagrees with the result, and an error names it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .files import CheckpointError

Config = dict[str, object]  # KEY: VALUE

BODY = "backbone.bottom_up."  # prefix of the backbone's parameters in our names
LEVELS = ["res2", "res3", "res4", "res5"]
RESNETS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}  # blocks of each stage: depth


@dataclass(frozen=True)
class Given:
    """A tensor in the file."""

    name: str  # in the file
    shape: tuple[int, ...]


class Shapes:
    """The shapes of a file's tensors, looked up by shell patterns that match our names."""

    def __init__(self, tensors: Mapping[str, Given]):
        """
        Args:
            tensors: the file's tensors by our names.
        """
        self._tensors = tensors

    def find(self, *patterns: str, axis: int = 0) -> list[tuple[int, Given]]:
        """Return, for each matching tensor with a non-zero size along `axis`, that size and the tensor."""
        return [
            (given.shape[axis], given)
            for pattern in patterns
            for name, given in self._tensors.items()
            if fnmatchcase(name, pattern) and len(given.shape) > axis and given.shape[axis] > 0
        ]

    def size(self, *patterns: str, axis: int = 0) -> int:
        """Return the most frequent size along `axis` among the matching tensors.

        Raises:
            CheckpointError: no tensor matches, or two sizes are equally frequent; names two tensors that disagree.
        """
        found = self.find(*patterns, axis=axis)
        if not found:
            raise CheckpointError(f"no key corresponds to our {' or '.join(patterns)}")
        first, *others = Counter(size for size, _ in found).most_common(2)
        if others and others[0][1] == first[1]:
            one, other = (next(x for size, x in found if size == value) for value, _ in (first, *others))
            raise CheckpointError(f"{one.name} {one.shape} and {other.name} {other.shape} do not fit each other")
        return first[0]

    def count(self, prefix: str) -> int:
        """Return the number of modules named <prefix>0., <prefix>1. and so on, which is 1 + the highest number."""
        rests = [name[len(prefix) :].split(".")[0] for name in self._tensors if name.startswith(prefix)]
        return 1 + max((int(rest) for rest in rests if rest.isdigit()), default=-1)


# Maps the shapes, the prefixes of the decoder's layers, and C to the keys of the refinement layer.
ImplyLayers = Callable[[Shapes, list[str], int], Config]


def vote(candidates: Sequence[int], what: str) -> int:
    """Return the most frequent of the numbers that were computed from several tensors.

    Raises:
        CheckpointError: there are none; the message contains `what`.
    """
    if not candidates:
        raise CheckpointError(f"no usable key corresponds to our {what}")
    return Counter(candidates).most_common(1)[0][0]


def has_swin(look: Shapes) -> bool:
    """Return whether the backbone is a Swin Transformer; otherwise it is a ResNet."""
    return look.count(f"{BODY}layers.") > 0


def imply_resnet(look: Shapes) -> Config:
    """Return the keys of a ResNet.

    Raises:
        CheckpointError: the numbers of blocks are not those of a ResNet-50, 101 or 152.
    """
    blocks = tuple(look.count(f"{BODY}{stage}.") for stage in LEVELS)
    if blocks not in RESNETS:
        raise CheckpointError(f"its backbone is not a ResNet-50, 101 or 152: the four stages have {blocks} blocks")
    width = look.size(f"{BODY}res2.*.conv2.weight", axis=1)  # of a group
    return {
        "MODEL.RESNETS.DEPTH": RESNETS[blocks],
        "MODEL.RESNETS.OUT_FEATURES": LEVELS,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": look.size(f"{BODY}stem.conv1.*"),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": look.size(f"{BODY}res2.*.conv3.*"),
        "MODEL.RESNETS.NUM_GROUPS": look.size(f"{BODY}res2.*.conv2.*") // width,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width,
    }


def imply_swin(look: Shapes) -> Config:
    """Return the keys of a Swin Transformer."""
    stages = range(look.count(f"{BODY}layers."))
    biases = "attn.relative_position_bias_table"
    positions = look.size(f"{BODY}layers.*.{biases}")  # (2 w - 1)^2 for a window of w x w
    return {
        "MODEL.SWIN.EMBED_DIM": look.size(f"{BODY}patch_embed.*"),
        "MODEL.SWIN.DEPTHS": [look.count(f"{BODY}layers.{stage}.blocks.") for stage in stages],
        "MODEL.SWIN.NUM_HEADS": [look.size(f"{BODY}layers.{stage}.*.{biases}", axis=1) for stage in stages],
        "MODEL.SWIN.WINDOW_SIZE": (math.isqrt(positions) + 1) // 2,
    }


def imply_detector(look: Shapes, imply_layers: ImplyLayers) -> Config:
    """Return the keys of neck, queries and decoder, which is everything but the backbone."""
    # A user's own layer need not have our names.
    norms = look.find("decoder.*.feedforward_norm.*")
    dim = look.size("decoder.*.feedforward_norm.*") if norms else look.size("queries.content.weight", axis=1)
    queries = look.size("queries.*")
    if count := look.count("decoder.layers."):
        layers, decoder = [f"decoder.layers.{i}." for i in range(count)], {"MODEL.DEQDET.NUM_LAYERS": count}
    else:
        layers, decoder = ["decoder.initialization.", "decoder.refinement."], {}
    return {
        **_imply_neck(look),
        "MODEL.DEQDET.HIDDEN_DIM": dim,
        "MODEL.DEQDET.NUM_QUERIES": queries,
        "TEST.DETECTIONS_PER_IMAGE": queries,
        **decoder,
        **imply_layers(look, layers, dim),
    }


def _imply_neck(look: Shapes) -> Config:
    body = "swin" if has_swin(look) else "resnet"
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
