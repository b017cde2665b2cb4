"""Corruptions, against what each strength means."""

import math

import pytest
import torch

from deqdet.measurement.corruptions import CLEAN, CONDITIONS, CORRUPTIONS, Condition, blur, corrupt


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randint(0, 256, (3, 120, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_each_kind_rises(image):
    for name, kind in CORRUPTIONS.items():
        changed = [corrupt(image, Condition(name, strength), seed=1) for strength in kind.strengths]
        assert all(x.dtype == torch.uint8 and x.shape == image.shape for x in changed)
        changes = [float((x.double() - image.double()).abs().mean()) for x in changed]
        assert 3 <= len(changes) <= 5 and changes[0] > 1 and changes == sorted(set(changes)), name
    assert [x for x in CONDITIONS if not x.strength] == [CLEAN]
    assert corrupt(image, CLEAN, seed=1) is image


@pytest.mark.parametrize("name", ["noise", "occlusion"])
def test_the_seed_of_the_image_decides_alone(image, name):
    condition = Condition(name, 0.2)
    state = torch.get_rng_state()
    first = corrupt(image, condition, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(corrupt(image, condition, seed=1), first)
    assert not torch.equal(corrupt(image, condition, seed=2), first)


def test_noise_has_its_standard_deviation():
    grey = torch.full((3, 100, 100), 128, dtype=torch.uint8)
    changed = corrupt(grey, Condition("noise", 0.05), seed=3).double() - 128
    assert float(changed.std()) == pytest.approx(0.05 * 255, rel=0.02)
    assert abs(float(changed.mean())) < 0.5


def test_contrast_goes_towards_the_mean_grey():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[:, 0] = 200  # half of the image is 200, half 0: the mean grey is 100
    changed = corrupt(image, Condition("contrast", 0.8), seed=0)
    assert (changed[:, 0].int() - 120).abs().max() <= 1  # 0.2 * 200 + 0.8 * 100
    assert (changed[:, 1].int() - 80).abs().max() <= 1  # 0.8 * 100


def test_occlusion_hides_its_share():
    image = torch.zeros(3, 50, 100, dtype=torch.uint8)
    hidden = corrupt(image, Condition("occlusion", 0.25), seed=4) == 127
    assert int(hidden[0].sum()) == 25 * 50  # half of each side
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])
    rows, columns = hidden[0].nonzero(as_tuple=True)
    assert int(rows.max() - rows.min()) == 24 and int(columns.max() - columns.min()) == 49  # one rectangle


def test_blur_spreads_a_point_by_its_standard_deviation():
    image = torch.zeros(3, 81, 101)
    image[:, 40, 50] = 1
    spread = blur(image, 0.025)[0].double()
    offsets = torch.arange(81).double() - 40
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    deviation = math.sqrt(float((spread.sum(1) * offsets**2).sum()))
    assert deviation == pytest.approx(0.025 * 81, rel=0.03)  # cut off at three standard deviations


def test_blur_of_tiny_images():
    for height, width in ((1, 5), (2, 2)):
        assert blur(torch.full((3, height, width), 0.5), 0.5).allclose(torch.tensor(0.5))
