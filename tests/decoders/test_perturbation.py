import math

import pytest
import torch

from deqdet.boxes import decode_boxes, encode_boxes
from deqdet.perturbation import KINDS, Perturbation, perturb_content, perturb_position
from deqdet.structures import QueryState


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbation(probability=1.0, content_size=0.1, position_size=25.0):
    return Perturbation(
        kind="multi-step", probability=probability, content_size=content_size, position_size=position_size
    )


def small_state():
    boxes = torch.tensor([100.0, 200.0, 500.0, 400.0]).expand(2, 3, 4)
    content = torch.arange(24, dtype=torch.float32).view(2, 3, 4) / 8
    return QueryState(encode_boxes(boxes), content)


def correlation(first, second):
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


def test_content_noise_has_the_norm_of_its_query():
    # Eq. 16 with sigma_q = 0.1: queries of 16 equal channels 3 and -1/2 have norms 12 and 2.
    images, size = 6000, 0.1
    content = torch.tensor([3.0, -0.5])[:, None].expand(images, 2, 16)
    noisy = perturb_content(content, size, seeded())
    for query, (level, norm) in enumerate([(3.0, 12.0), (-0.5, 2.0)]):
        sample = noisy[:, query]  # 96,000 numbers
        error = size * norm / math.sqrt(sample.numel())  # standard error of the mean
        assert sample.mean().item() == pytest.approx((1 - size) * level, abs=4 * error)
        assert sample.std().item() == pytest.approx(size * norm, abs=4 * error)
    assert abs(correlation(noisy[::2, 0], noisy[1::2, 0])) < 0.02  # images
    assert abs(correlation(noisy[:, 0], noisy[:, 1])) < 0.02  # queries
    assert abs(correlation(noisy[..., :8][:, 0], noisy[..., 8:][:, 0])) < 0.02  # channels


def test_no_size_no_noise():
    state = small_state()
    assert torch.equal(perturb_content(state.content, 0.0, seeded()), state.content)
    position = state.position.clone()
    position[:, 0, 2] = -12.0  # a box smaller than 0.001 pixels
    assert torch.equal(perturb_position(position, 0.0, seeded()), position)


def test_corner_noise_is_in_pixels():
    # The corners are too far apart to flip.
    boxes = torch.tensor([400.0, 300.0, 2400.0, 1300.0]).expand(2000, 2, 4)
    noise = decode_boxes(perturb_position(encode_boxes(boxes), 25.0, seeded())) - boxes
    error = 25 / math.sqrt(4000)
    assert noise.std(dim=(0, 1)).tolist() == pytest.approx([25.0] * 4, abs=4 * error)
    assert noise.mean(dim=(0, 1)).tolist() == pytest.approx([0.0] * 4, abs=4 * error)
    for first in range(4):
        for second in range(first):
            assert abs(correlation(noise[..., first], noise[..., second])) < 0.06
    assert abs(correlation(noise[:, 0], noise[:, 1])) < 0.06  # queries
    assert abs(correlation(noise[::2], noise[1::2])) < 0.06  # images


def test_flipped_corners_are_reordered():
    # A point: each side becomes |n1 - n2|, half normal, of mean 25 sqrt 2 sqrt(2 / pi) = 28.21. Clamped to
    # nothing instead, half of the sides would be 0.001.
    point = encode_boxes(torch.tensor([500.0, 500.0, 500.0, 500.0]).expand(4000, 1, 4))
    boxes = decode_boxes(perturb_position(point, 25.0, seeded()))
    sides = boxes[..., 2:] - boxes[..., :2]
    assert (sides >= 0).all()
    assert sides.mean(dim=(0, 1)).tolist() == pytest.approx([28.21] * 2, abs=1.5)
    assert (sides < 0.1).float().mean() < 0.01
    centers = 0.5 * (boxes[..., 2:] + boxes[..., :2])
    assert centers.std(dim=(0, 1)).tolist() == pytest.approx([25 / math.sqrt(2)] * 2, abs=1.0)


def test_probability_and_independent_draws():
    perturb, state, generator, calls = perturbation(probability=0.2), small_state(), seeded(), 1000
    counts = {"content": 0, "position": 0, "both": 0}
    for _ in range(calls):
        noisy = perturb(state, generator)
        changed = {}
        for part in ("content", "position"):
            moved = (getattr(noisy, part) != getattr(state, part)).any(dim=2)  # (B, N)
            assert moved.any() == moved.all()  # one draw for the batch: all queries or none
            changed[part] = bool(moved.any())
        counts["content"] += changed["content"]
        counts["position"] += changed["position"]
        counts["both"] += changed["content"] and changed["position"]
    # 200 of 1,000, deviation 12.6; both: 40, deviation 6.2.
    assert counts["content"] == pytest.approx(200, abs=50)
    assert counts["position"] == pytest.approx(200, abs=50)
    assert counts["both"] == pytest.approx(40, abs=25)


def test_never_and_always():
    state, generator = small_state(), seeded()
    for _ in range(20):
        never = perturbation(probability=0.0)(state, generator)
        assert torch.equal(never.position, state.position) and torch.equal(never.content, state.content)
        always = perturbation(probability=1.0)(state, generator)
        assert (always.position != state.position).any() and (always.content != state.content).any()


def test_each_size_belongs_to_its_part():
    state = small_state()
    content_only = perturbation(position_size=0.0)(state, seeded())
    assert (content_only.content - state.content).abs().max() > 0.1
    torch.testing.assert_close(content_only.position, state.position, rtol=0, atol=1e-4)
    position_only = perturbation(content_size=0.0)(state, seeded())
    assert torch.equal(position_only.content, state.content)
    assert (decode_boxes(position_only.position) - decode_boxes(state.position)).abs().max() > 10


def test_the_generator_alone_decides():
    state, perturb = small_state(), perturbation()
    before = torch.get_rng_state()
    first, again, other = perturb(state, seeded(3)), perturb(state, seeded(3)), perturb(state, seeded(4))
    assert torch.equal(torch.get_rng_state(), before)  # torch's own generator is not touched
    assert torch.equal(first.position, again.position) and torch.equal(first.content, again.content)
    assert (first.position != other.position).any() and (first.content != other.content).any()


def test_without_a_generator_torchs_own_decides():
    state, perturb = small_state(), perturbation()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = perturb(state)
        torch.manual_seed(5)
        again = perturb(state)
        other = perturb(state)
    assert torch.equal(first.pack(), again.pack())
    assert not torch.equal(first.pack(), other.pack())


def test_the_input_is_not_written_to():
    state = small_state()
    position, content = state.position.clone(), state.content.clone()
    noisy = perturbation()(state, seeded())
    assert torch.equal(state.position, position) and torch.equal(state.content, content)
    assert noisy.position.shape == position.shape and noisy.content.shape == content.shape


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="'two-step'.*multi-step, one-step, zero-step, none"):
        Perturbation(kind="two-step", probability=0.2, content_size=0.1, position_size=25.0)
    for kind in KINDS:
        assert Perturbation(kind=kind, probability=0.2, content_size=0.1, position_size=25.0).kind == kind


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_probability_must_be_one(probability):
    with pytest.raises(ValueError, match=rf"lie in \[0, 1\], got {probability}"):
        perturbation(probability=probability)
