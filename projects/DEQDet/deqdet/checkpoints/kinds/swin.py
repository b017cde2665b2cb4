"""Swin Transformers: the authors' ImageNet checkpoints, and mmdetection's names and layout."""

from torch import Tensor

from ..renaming import Rule, under
from .base import Kind
from .torchvision import BODY, IMAGES

OUTPUT_NORMS = [(f"norm{level}.", f"{BODY}norm{level}.") for level in range(4)]


def _swin_rules() -> list[Rule]:
    """detectron2 has kept the authors' names."""
    same = [("patch_embed.", "patch_embed."), ("layers.", "layers.")]
    return under("", BODY, same) + OUTPUT_NORMS


def mmdet_swin_rules(prefix: str) -> list[Rule]:
    """For mmdetection's Swin whose keys begin with `prefix`."""
    rules = [("patch_embed.projection.", "patch_embed.proj."), ("patch_embed.norm.", "patch_embed.norm.")]
    block = [
        ("norm1.", "norm1."),
        ("attn.w_msa.", "attn."),
        ("norm2.", "norm2."),
        ("ffn.layers.0.0.", "mlp.fc1."),
        ("ffn.layers.1.", "mlp.fc2."),
    ]
    rules += under("stages.*.blocks.*.", "layers.*.blocks.*.", block)
    rules += [("stages.*.downsample.", "layers.*.downsample.")]
    return under(prefix, BODY, rules) + under(prefix, "", OUTPUT_NORMS)


def reorder_patch_merging(name: str, value: Tensor) -> Tensor:
    """mmdetection's order of the 4 * C channels that patch merging reads, to the authors'.

    mmdetection unfolds: channel by channel, in each the pixels (row, column) of a 2x2 patch row by row. The authors
    concatenate: pixel by pixel, column by column, in each the channels. The norm and the reduction both read them.
    """
    if not name.startswith(f"{BODY}layers.") or ".downsample." not in name:
        return value
    by_pixel = value.unflatten(-1, (-1, 2, 2))  # (..., C, row, column)
    return by_pixel.movedim(-3, -1).transpose(-3, -2).flatten(-3)  # (..., column, row, C)


SWIN = Kind(
    name="swin",
    sign="layers.0.blocks.*",
    rules=lambda names: _swin_rules(),
    # The classifier and the norm before it; masks that detectron2 computes for each image.
    dead=("head.*", "norm.*", "*.attn_mask"),
    backbone_only=True,
    may_lack=(f"{BODY}norm?.*",),
    config=IMAGES,
)
