import pytest

from deqdet.decoders import Supervision


@pytest.mark.parametrize(
    "train_steps, count, interval, expected",
    [
        (20, 4, 3, [1, 3, 6, 9, 12, 20]),
        (20, 0, 3, [1, 20]),
        (6, 1, 3, [1, 3, 6]),
        (12, 4, 3, [1, 3, 6, 9, 12]),
        (5, 2, 1, [1, 2, 5]),
        (1, 0, 1, [1]),
        (1, 1, 1, [1]),
    ],
)
def test_omega(train_steps, count, interval, expected):
    assert Supervision(train_steps=train_steps, extra=2, count=count, interval=interval).steps == expected


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"train_steps": 0, "count": 0}, "TRAIN_STEPS"),
        ({"interval": 0}, "SUPERVISION_INTERVAL"),
        ({"extra": -1}, "EXTRA_SUPERVISION"),
        ({"count": -1}, "SUPERVISION_COUNT"),
        ({"train_steps": 11}, r"4 \* 3, beyond TRAIN_STEPS = 11"),
    ],
)
def test_bad_supervision_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        Supervision(**({"train_steps": 20, "extra": 2, "count": 4, "interval": 3} | changed))
