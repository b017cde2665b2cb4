"""torchvision's ResNets, as state dicts and under the detectors whose backbones keep these names."""

from ..renaming import Rule, under
from .base import Kind

BODY = "backbone.bottom_up."
# torchvision's ImageNet weights saw such images, and stride in their 3x3 convolutions.
IMAGES = {
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}
STRIDE = {"MODEL.RESNETS.STRIDE_IN_1X1": False}


def resnet_rules(prefix: str) -> list[Rule]:
    """For a ResNet of bottlenecks whose keys begin with `prefix`."""
    rules = [("conv1.", "stem.conv1."), ("bn1.", "stem.conv1.norm.")]
    block = [("downsample.0.", "shortcut."), ("downsample.1.", "shortcut.norm.")]
    for i in (1, 2, 3):
        block += [(f"conv{i}.", f"conv{i}."), (f"bn{i}.", f"conv{i}.norm.")]
    for stage in (1, 2, 3, 4):
        rules += under(f"layer{stage}.*.", f"res{stage + 1}.*.", block)
    return under(prefix, BODY, rules)


TORCHVISION = Kind(
    name="torchvision",
    sign="layer1.0.*",
    rules=lambda names: resnet_rules(""),
    # The classifier; BatchNorm's counters of batches, which FrozenBatchNorm would not take and nothing reads.
    dead=("fc.*", "*.num_batches_tracked"),
    backbone_only=True,
    config=IMAGES,
    resnet_config=STRIDE,
)
