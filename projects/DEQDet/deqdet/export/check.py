"""Compare exported graphs with PyTorch, at batch sizes and image sizes other than those that were traced.

If the iteration does not converge on an image, it amplifies rounding errors from step to step, so two correct programs
can end at different boxes. Each comparison therefore also measures how far PyTorch's own boxes move if the state is
perturbed by one part in a million. A difference is an error only if it is far above that.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .graphs import Encoder, OneGraph, Step
from .write import Exported, say_nothing

SIZES = ((3, 5), (6, 4), (5, 8))  # height and width, in units of the size divisibility
BATCHES = (1, 3)
TOLERANCE = 1e-2  # pixels
THRESHOLD = 0.05  # minimum score of the detections that are compared
NOISE = 1e-6  # relative perturbation, about the rounding error of float32
AMPLIFIED = 10  # A non-converging iteration explains differences of up to this many times the effect of NOISE.

Graph = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Difference:
    """How far the detections of an export are from PyTorch's, for one batch."""

    batch: int
    height: int
    width: int
    detections: int  # number that are compared: PyTorch's above THRESHOLD, or else the best of an image
    boxes: float  # largest difference, pixels
    scores: float  # largest difference
    sensitivity: float  # how far PyTorch's own boxes move under NOISE, pixels; 0 without an iteration

    @property
    def is_equal(self) -> bool:
        """Whether the boxes agree up to TOLERANCE, or up to the rounding that a non-converging iteration amplifies."""
        return self.boxes <= max(TOLERANCE, AMPLIFIED * self.sensitivity)

    def __str__(self) -> str:
        unstable = "" if self.sensitivity <= TOLERANCE else "; the iteration is unstable here and amplifies rounding"
        return (
            f"batch {self.batch}, {self.height} x {self.width}: {self.detections} detections differ by up to "
            f"{self.boxes:.1e} px and {self.scores:.1e} in score (PyTorch itself by {self.sensitivity:.1e} px after a "
            f"change of {NOISE:.0e}){unstable}"
        )


def check_export(exported: Exported, say: Callable[[str], None] = say_nothing) -> list[Difference]:
    """Run the graphs and PyTorch on generated images of three sizes and with two batch sizes, and compare them.

    Args:
        say: called with a line before the comparison, and with one for each difference as soon as it is known.

    Raises:
        UserError: the boxes differ by more than TOLERANCE, and by more than AMPLIFIED times the sensitivity.
    """
    files = " and ".join(map(str, exported.files))
    say(f"Comparing {files} with PyTorch after {exported.notes['steps']} steps:")
    graphs = [_load(path, exported.target) for path in exported.files]
    modules = [module for _, module in exported.graphs]
    generator = torch.Generator().manual_seed(0)
    found = []
    with torch.inference_mode():
        for images, sizes in _batches(exported.notes["size_divisibility"], generator):
            want = _detect(modules, images, sizes, exported.notes)
            got = _detect(graphs, images, sizes, exported.notes)
            noisy = _noisy(modules, images, sizes, exported.notes, generator)
            boxes, scores, count = _compare(want, got)
            sensitivity = 0.0 if noisy is None else _compare(want, noisy)[0]
            found.append(Difference(*images.shape[:1], *images.shape[2:], count, boxes, scores, sensitivity))
            say(f"  {found[-1]}")
    if wrong := [x for x in found if not x.is_equal]:
        raise UserError(f"{exported.files[0]} differs from PyTorch: {wrong[0]}")
    return found


def _batches(unit: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate images of one colour with rectangles of other colours, and a few rows and columns of padding."""
    for height, width in SIZES:
        for batch in BATCHES:
            shape = height * unit, width * unit
            images = torch.empty(batch, 3, *shape, dtype=torch.uint8)
            for image in images:
                image[:] = torch.randint(60, 120, (3, 1, 1), generator=generator)
                for _ in range(4):
                    top, left = (int(side * torch.rand((), generator=generator) * 0.8) for side in shape)
                    low, right = (int(side * (0.1 + 0.4 * torch.rand((), generator=generator))) for side in shape)
                    color = torch.randint(0, 256, (3, 1, 1), generator=generator)
                    image[:, top : top + low, left : left + right] = color
            sizes = [[shape[0] - 3 * i, shape[1] - 5 * i] for i in range(batch)]
            yield images, torch.tensor(sizes)


def _load(path, target: str) -> Graph:
    """Load a file as a function of tensors."""
    if target == "torch-export":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; runner._load names the warning that this suppresses
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(*arguments) -> list[Tensor]:
        flat = [y for x in arguments for y in (x if isinstance(x, list) else [x])]
        return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, map(np.asarray, flat), strict=True)))]

    return run


def _detect(graphs: list[Graph], images: Tensor, sizes: Tensor, notes: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Compute boxes (B, M, 4), scores (B, M) and classes (B, M); with two graphs, by plain iteration of the step."""
    if len(graphs) == 1:
        return tuple(graphs[0](images, sizes)[:3])
    state, boxes, scores, *levels = graphs[0](images, sizes)
    return _iterate(graphs[1], state, boxes, scores, levels, notes["steps"])


def _iterate(step: Graph, state, boxes, scores, levels, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    for _ in range(steps):
        state, _, boxes, scores = step(state, levels)
    classes = scores.shape[2]
    indices = torch.arange(scores[0].numel()).expand(len(scores), -1)
    pairs = boxes.repeat_interleave(classes, dim=1)  # every pair of a query and a class
    return pairs, scores.flatten(1), indices % classes


def _noisy(modules: list, images: Tensor, sizes: Tensor, notes: dict, generator: torch.Generator):
    """Compute PyTorch's detections with the state perturbed by NOISE; None if no layer is applied repeatedly."""
    if len(modules) == 1:
        graph: OneGraph = modules[0]
        if len(graph.repeated) > 1:
            return None
        # The perturbation enters through the initial queries, which are the state before g.
        weight = graph.queries.content.weight
        original = weight.clone()
        weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=generator))
        try:
            return tuple(graph(images, sizes)[:3])
        finally:
            weight.copy_(original)
    encoder: Encoder
    step: Step
    encoder, step = modules
    state, boxes, scores, *levels = encoder(images, sizes)
    state = state * (1 + NOISE * torch.randn(state.shape, generator=generator))
    return _iterate(step, state, boxes, scores, levels, notes["steps"])


def _compare(want: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> tuple[float, float, int]:
    """Compute the largest differences in pixels and in score, and the number of compared detections.

    Detections of equal scores may change places, so each one is compared with the nearest one of its class.
    """
    pixels, scores, count = 0.0, 0.0, 0
    for boxes, score, classes, other_boxes, other_score, other_classes in zip(*want, *got, strict=True):
        kept = (score >= THRESHOLD) | (score == score.max())
        for box, value, label in zip(boxes[kept], score[kept], classes[kept], strict=True):
            same = other_classes == label
            if not same.any():
                return float("inf"), 1.0, int(kept.sum())
            distance = (other_boxes[same] - box).abs().amax(dim=1)
            pixels = max(pixels, float(distance.min()))
            scores = max(scores, float((other_score[same][distance.argmin()] - value).abs()))
        count += int(kept.sum())
    return pixels, scores, count
