"""Pretrain the backbone of a small config by classifying generated shapes, and write its weights for MODEL.WEIGHTS.

    deqdet-pretrain-backbone --output weights/shapes_backbone.pth [--config-file CONFIG] [--iterations N]

From random weights, a detector spends much of a short training on its backbone, and the detectors of this project
differ in how soon the backbone learns anything. A common start removes this difference from a comparison. The detectors
of the paper start from ImageNet weights; this command makes a start for the quick configs in about two minutes on one
CPU core. Each image contains one shape; the images are drawn from other seeds, and at another size, than those of
shapes_train and shapes_val. Shapes are large at first and become smaller, because with only small ones the classifier
stays at chance level for a thousand iterations.

The file contains the weights and BatchNorm statistics of the part below the neck, under the names
backbone.bottom_up.*, so that every detector with this backbone can load it for training. MODEL.WEIGHTS of the config is
ignored: pretraining starts from random weights. The same seed gives the same file on the same machine with the same
number of threads. The file also records how it was made, and the accuracy of the classifier on held-out images.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from ..atomic import prepare_output
from ..checkpoints.files import AUTHOR, COUNTER, write_safetensors, write_torch
from ..checkpoints.implied import BODY
from ..data import ShapesConfig, random_state_kept, seed_all
from ..data.shapes import CLASSES, draw_scene
from ..engine import UserError, adapt_device, add_config_arguments, exit_on_user_error, load_config, parse_arguments
from ..engine.models import buildable

DEFAULT_CONFIG = "quick/deqdet_shapes"
IMAGE_SIZE, MIN_SIZE, MAX_SIZE = 64, 10.0, 60.0  # pixels: of an image's sides; of the longer side of a shape
SHRINKING = 0.6  # of the iterations, in which the smallest shape goes from MAX_SIZE to MIN_SIZE
# Seeds for draw_scene, to which --seed is added. The data sets of this project have seeds of one or two digits.
TRAINING_SEED, HELD_OUT_SEED = 10**9, 2 * 10**9
HELD_OUT = 1000  # images
BASE_LR, WEIGHT_DECAY = 1e-3, 0.05  # AdamW's, as in the quick configs


@dataclass(frozen=True)
class Pretrained:
    """The weights of a backbone, and the accuracy of its classifier."""

    weights: dict[str, Tensor]  # by the names that a detector gives them, on the CPU
    accuracy: float  # on the held-out images, 0 to 1


class ShapeClassifier(nn.Module):
    """A linear classifier on the spatial average of a backbone's coarsest level."""

    def __init__(self, bottom_up: nn.Module, *, mean: Sequence[float], std: Sequence[float], is_bgr: bool):
        """
        Args:
            bottom_up: a backbone of detectron2 without a neck.
            mean, std: per channel, 0 to 255, in the order in which the backbone reads the channels.
            is_bgr: the backbone reads blue first.
        """
        super().__init__()
        levels = bottom_up.output_shape()
        self.level = max(levels, key=lambda name: levels[name].stride)
        self.bottom_up = bottom_up
        self.head = nn.Linear(levels[self.level].channels, len(CLASSES))
        self.is_bgr = is_bgr
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits (B, K) from images (B, 3, H, W), RGB, 0 to 255."""
        images = images.flip(1) if self.is_bgr else images
        features = self.bottom_up((images - self.mean) / self.std)[self.level]  # (B, C, H / s, W / s)
        return self.head(features.mean((2, 3)))


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: the command line; by default that of the process.
    """
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        check_flags(args)
        if not args.config_file and not args.model:
            args.config_file = DEFAULT_CONFIG
        cfg = load_config(args)
        adapt_device(cfg)
        done = pretrain(cfg, iterations=args.iterations, batch=args.batch, seed=args.seed)
        print(f"accuracy {done.accuracy:.3f} on {HELD_OUT} held-out images, {len(CLASSES)} classes")
        numbers = {"iterations": args.iterations, "batch": args.batch, "seed": args.seed}
        write(done, args.output, made_by(cfg, numbers))
        print(f"wrote {len(done.weights)} tensors {BODY}* to {args.output}: load the file with MODEL.WEIGHTS")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".pth or .safetensors file to write")
    parser.add_argument(
        "--iterations", type=int, default=1500, metavar="N", help="number of training iterations (default: 1500)"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images per batch (default: 32)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the weights and the images (default: 0)"
    )
    add_config_arguments(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Check the numbers, and make the folder of the file, before any work is done.

    Raises:
        UserError: a number is out of range, the file has another suffix, or its folder cannot be created.
    """
    for flag, low, high in (("iterations", 1, 10**7), ("batch", 2, 10**5), ("seed", 0, 10**9 - 1)):
        if not low <= getattr(args, flag) <= high:
            raise UserError(f"--{flag} is {getattr(args, flag)}: it must be from {low} to {high:,}")
    if args.output.suffix not in (".pth", ".safetensors"):
        raise UserError(f"--output {args.output} must be a file whose name ends in .pth or .safetensors")
    prepare_output(args.output)


def pretrain(cfg: CfgNode, *, iterations: int, batch: int, seed: int) -> Pretrained:
    """Train the backbone of `cfg` as a classifier of shapes, on MODEL.DEVICE, and print the loss ten times.

    Args:
        batch: images per iteration; each is newly drawn.

    Raises:
        UserError: the backbone cannot be built, or has no neck.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    with random_state_kept(device):
        seed_all(seed)
        model = ShapeClassifier(
            build_bottom_up(cfg),
            mean=cfg.MODEL.PIXEL_MEAN,
            std=cfg.MODEL.PIXEL_STD,
            is_bgr=cfg.INPUT.FORMAT == "BGR",
        ).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iterations)
        for iteration in range(iterations):
            smallest = smallest_size(iteration / iterations)
            images, labels = draw_images(TRAINING_SEED + seed, iteration * batch, batch, smallest)
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (iteration + 1) % max(iterations // 10, 1) == 0:
                print(f"iteration {iteration + 1} of {iterations}: loss {loss.item():.3f}", flush=True)
        accuracy = measure_accuracy(model, HELD_OUT_SEED + seed)
    # The counters of BatchNorm are left out: nothing reads them, and frozen layers do not have them.
    states = {name: x for name, x in model.bottom_up.state_dict().items() if not name.endswith(COUNTER)}
    return Pretrained({BODY + name: x.detach().cpu().clone() for name, x in states.items()}, accuracy)


def build_bottom_up(cfg: CfgNode) -> nn.Module:
    """Build the backbone of a config without its neck, with random weights; all stages are trained, with BatchNorm.

    Raises:
        UserError: the backbone cannot be built, or has no neck.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":  # same parameter names, but FrozenBN would not be trained
        cfg.MODEL.RESNETS.NORM = "BN"
    with buildable():
        backbone = build_backbone(cfg)
    bottom_up = getattr(backbone, "bottom_up", None)
    if bottom_up is None:
        raise UserError(f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} has no `bottom_up`: choose one with a neck")
    return bottom_up


def smallest_size(progress: float) -> float:
    """Compute the size of the smallest shapes in pixels, whose logarithm falls linearly and then stays constant.

    Args:
        progress: the fraction of the iterations that is done, from 0 to 1.
    """
    return MAX_SIZE * (MIN_SIZE / MAX_SIZE) ** min(progress / SHRINKING, 1.0)


def draw_images(seed: int, first: int, count: int, smallest: float) -> tuple[Tensor, Tensor]:
    """Draw images with one shape each, on a textured and noisy background, and the classes of the shapes.

    Args:
        first: the index of the first image in the sequence that `seed` determines.
        smallest: minimum of the longer side of a shape, in pixels; the maximum is MAX_SIZE.

    Returns:
        (count, 3, IMAGE_SIZE, IMAGE_SIZE) float32, RGB, 0 to 255; and (count,) int64, indices in CLASSES.
    """
    config = ShapesConfig(
        num_images=first + count,
        seed=seed,
        image_size=IMAGE_SIZE,
        min_size=smallest,
        max_size=MAX_SIZE,
        max_objects=1,
        empty_fraction=0.0,
    )
    scenes = [draw_scene(config, first + index) for index in range(count)]
    images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes]).float()
    return images, torch.tensor([scene.shapes[0].label for scene in scenes])


@torch.no_grad()
def measure_accuracy(model: ShapeClassifier, seed: int) -> float:
    """Measure the accuracy of the classifier on HELD_OUT images, in evaluation mode."""
    model.eval()
    correct = 0
    for first in range(0, HELD_OUT, 100):
        images, labels = draw_images(seed, first, 100, MIN_SIZE)
        correct += (model(images.to(model.mean.device)).argmax(1).cpu() == labels).sum().item()
    return correct / HELD_OUT


def made_by(cfg: CfgNode, numbers: dict[str, int]) -> dict[str, object]:
    """Describe how the weights were made, for the metadata of the file."""
    return {
        "task": f"classification of generated shapes, {IMAGE_SIZE} x {IMAGE_SIZE} px: {', '.join(CLASSES)}",
        "tool": "deqdet-pretrain-backbone",
        "backbone": cfg.MODEL.BACKBONE.NAME,
        **numbers,
    }


def write(done: Pretrained, path: Path, how: dict[str, object]) -> None:
    """Write the weights atomically, with `how` they were made and their accuracy as metadata.

    Raises:
        UserError: the file cannot be written.
    """
    how = {**how, "accuracy": done.accuracy}
    if path.suffix == ".safetensors":
        write_safetensors(done.weights, path, {"author": AUTHOR, "pretraining": json.dumps(how)})
    else:
        write_torch({"model": done.weights, "__author__": AUTHOR, "pretraining": how}, path)


if __name__ == "__main__":
    main()
