"""Numbers of parameters of the full-size models, counted by hand from docs/design.md, "Refinement layers"."""

from pathlib import Path

import pytest

from helpers.config_files import COMPLETE, build

DIM, HIDDEN, CLASSES = 256, 2048, 80
R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)  # bottlenecks in res2..res5
SWIN_S = {96: (2, 3), 192: (2, 6), 384: (18, 12), 768: (2, 24)}  # channels: blocks, heads
WIDTHS = (64, 128, 256, 512)  # of the bottlenecks in res2..res5
LEVELS = {"r50": (256, 512, 1024, 2048), "r101": (256, 512, 1024, 2048), "swin_s": tuple(SWIN_S)}

# By file: P of each layer with weights of its own (Sparse R-CNN's layer has none); the paper's millions, truncated
# (None: not there), and those of docs/design.md ("Parameter counts and costs"), which has the paper's 110 for Sparse
# R-CNN as one that does not come out.
MODELS = {
    "adamixer_r50_100q_1x": ([32] * 6, 134, 134.8),
    "adamixer_r50_100q_1x_p64": ([64] * 6, 160, 160.6),
    "adamixer_r50_300q_1x": ([64] + [32] * 5, 139, 139.2),
    "adamixer_r50_300q_2x": ([64] + [32] * 5, 139, 139.2),
    "adamixer_r50_300q_3x": ([64] + [32] * 5, 139, 139.2),
    "adamixer_r101_300q_3x": ([64] + [32] * 5, 158, 158.1),
    "adamixer_swin_s_300q_3x": ([64] + [32] * 5, None, 163.9),  # the paper has 164, which is rounded
    "rnndet_r50_100q_1x": ([32, 32], 61, 61.3),
    "rnndet_r50_300q_3x": ([64, 32], 65, 65.6),
    "rnndet_r50_300q_3x_p64": ([64, 64], 69, 69.9),
    "deqdet_r50_100q_1x": ([32, 32], 61, 61.3),
    "deqdet_r50_100q_1x_p64": ([64, 64], 69, 69.9),
    "deqdet_r50_300q_1x": ([64, 32], 65, 65.6),
    "deqdet_r50_300q_2x": ([64, 32], 65, 65.6),
    "deqdet_r50_300q_2x_p64": ([64, 64], 69, 69.9),
    "deqdet_r101_300q_2x": ([64, 32], 84, 84.6),
    "deqdet_r101_300q_2x_p64": ([64, 64], 88, 88.9),
    "deqdet_swin_s_300q_2x": ([64, 32], 90, 90.3),
    "sparse_rcnn_r50_100q_1x": ([None] * 6, None, 106.3),
    "sparse_rcnn_r50_100q_3x": ([None] * 6, None, 106.3),
    "sparse_rcnn_r50_300q_3x": ([None] * 6, None, 106.3),
    "sparse_rcnn_r101_300q_3x": ([None] * 6, 125, 125.2),
    "rnn_sparse_rcnn_r50_300q_3x": ([None] * 2, None, 53.3),
    "sparse_rcnn_positional_r50_300q_3x": ([None] * 6, None, 106.3),
    "rnn_sparse_rcnn_positional_r50_300q_3x": ([None] * 2, None, 53.3),
    "deq_sparse_rcnn_positional_r50_300q_2x": ([None] * 2, None, 53.3),
    "deq_sparse_rcnn_positional_r50_300q_3x": ([None] * 2, None, 53.3),
    "deq_sparse_rcnn_r50_300q_2x": ([None] * 2, 53, 53.3),
    "deq_sparse_rcnn_r50_300q_3x": ([None] * 2, 53, 53.3),
}
# Table 4's rows, which the paper gives no millions for: P of each layer that is there.
ABLATIONS = {Path(path).stem: [64, 32] for path in COMPLETE if Path(path).parent.name == "ablations"}
ABLATIONS |= {"init_layer_none": [32], "init_layer_p32": [32, 32]}


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def norm(channels: int) -> int:
    return 2 * channels


def resnet_norms(blocks: tuple[int, ...]) -> list[int]:
    """Parameters of BatchNorm in the stem and in res2..res5: three a bottleneck, and one of the shortcut."""
    return [norm(64), *(norm((6 * count + 4) * width) for count, width in zip(blocks, WIDTHS, strict=True))]


def resnet_convolutions(blocks: tuple[int, ...]) -> int:
    """Without biases: 7x7; then 1x1, 3x3 and 1x1 to four times the width a bottleneck, and 1x1 in the shortcut."""
    total, channels = 3 * 64 * 49, 64
    for count, width in zip(blocks, WIDTHS, strict=True):
        total += channels * 4 * width
        for _ in range(count):
            total += channels * width + 9 * width**2 + width * 4 * width
            channels = 4 * width
    return total


def swin(stages: dict[int, tuple[int, int]], window: int = 7) -> int:
    """4 x 4 patches; blocks of attention and a perceptron of width 4; merging between stages; norms at the outputs."""
    total = linear(3 * 16, 96) + norm(96)
    for dim, (blocks, heads) in stages.items():
        attention = linear(dim, 3 * dim) + linear(dim, dim) + (2 * window - 1) ** 2 * heads
        total += blocks * (2 * norm(dim) + attention + linear(dim, 4 * dim) + linear(4 * dim, dim))
        total += norm(dim)
    return total + sum(norm(4 * dim) + 4 * dim * 2 * dim for dim in list(stages)[:-1])


def fpn(levels: tuple[int, ...]) -> int:
    return sum(linear(channels, DIM) + linear(9 * DIM, DIM) for channels in levels)


def channel_mapper(levels: tuple[int, ...]) -> int:
    return sum(linear(channels, DIM) for channels in levels) + norm(DIM)


def adamixer_layer(points: int, groups: int = 4, points_out: int = 128) -> int:
    attention = linear(DIM, 3 * DIM) + linear(DIM, DIM) + 8
    offsets = linear(DIM, groups * points * 3)
    generator = linear(DIM, groups * ((DIM // groups) ** 2 + points_out * points))
    mixing = generator + linear(DIM * points_out, DIM)
    feedforward = linear(DIM, HIDDEN) + linear(HIDDEN, DIM)
    branches = 2 * (linear(DIM, DIM) + norm(DIM)) + linear(DIM, 4) + linear(DIM, CLASSES)
    return attention + offsets + mixing + feedforward + branches + 3 * norm(DIM)


def sparse_rcnn_layer(dynamic: int = 64, cells: int = 49) -> int:
    attention = linear(DIM, 3 * DIM) + linear(DIM, DIM)
    generator = linear(DIM, DIM * dynamic + dynamic * DIM)
    dynamic_conv = generator + norm(dynamic) + norm(DIM) + linear(cells * DIM, DIM) + norm(DIM)
    feedforward = linear(DIM, HIDDEN) + linear(HIDDEN, DIM)
    branches = (1 + 3) * (DIM * DIM + norm(DIM)) + linear(DIM, CLASSES) + linear(DIM, 4)
    return attention + dynamic_conv + feedforward + branches + 3 * norm(DIM)


def count_by_hand(name: str, points: list[int | None]) -> int:
    backbone = next(backbone for backbone in LEVELS if f"_{backbone}_" in name)
    queries = 300 if "_300q_" in name else 100
    blocks = {"r50": R50, "r101": R101}.get(backbone)
    if "sparse_rcnn" in name:  # every BatchNorm frozen; boxes learned
        body, neck = resnet_convolutions(blocks), fpn(LEVELS[backbone])
        layer = sparse_rcnn_layer() + (8 if "_positional_" in name else 0)  # a strength of the overlaps for each head
        return body + neck + queries * (DIM + 4) + len(points) * layer
    # BatchNorm of the stem and res2 is frozen: its numbers are buffers.
    body = resnet_convolutions(blocks) + sum(resnet_norms(blocks)[2:]) if blocks else swin(SWIN_S)
    return body + channel_mapper(LEVELS[backbone]) + queries * DIM + sum(map(adamixer_layer, points))


def test_the_hand_counts_of_backbones():
    """The published totals of their classifiers: torchvision's and timm's model pages."""
    for blocks, total in ((R50, 25_557_032), (R101, 44_549_160)):
        assert resnet_convolutions(blocks) + sum(resnet_norms(blocks)) + linear(2048, 1000) == total
    output_norms = sum(map(norm, SWIN_S))
    assert swin(SWIN_S) - output_norms + norm(768) + linear(768, 1000) == 49_606_258


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    points, truncated, design = MODELS[name]
    count = sum(p.numel() for p in build(f"configs/{name}.yaml").parameters())
    assert count == count_by_hand(name, points)
    assert count / 1e6 == pytest.approx(design, abs=0.1)
    assert truncated is None or count // 10**6 == truncated


@pytest.mark.parametrize("name", ABLATIONS)
def test_parameters_of_an_ablation(name):
    count = sum(p.numel() for p in build(f"configs/ablations/{name}.yaml").parameters())
    assert count == count_by_hand("deqdet_r50_100q_1x", ABLATIONS[name])
