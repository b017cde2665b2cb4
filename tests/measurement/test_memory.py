"""What autograd keeps for the backward pass, counted by hand and for a small decoder."""

import json

import pytest
import torch

from deqdet.errors import UserError
from deqdet.measurement.memory import saved_bytes, training_memory
from deqdet.tools import benchmark as tool

COUNTS = ("MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS", 6, "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT", 4,
          "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL", 1)  # fmt: skip


def test_saved_bytes_by_hand():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    assert saved_bytes(lambda: a * b) == 2 * 3 * 4  # each factor is the other one's derivative
    assert saved_bytes(lambda: a * b, without=[a]) == 3 * 4
    assert saved_bytes(lambda: a + b) == 0
    assert saved_bytes(lambda: (a.exp(), a.view(3, 1).sin())) == 2 * 3 * 4  # a result; and a, whatever its shape
    assert saved_bytes(lambda: [a.sin(), a.cos()]) == 3 * 4  # a storage counts once


def test_segments_keep_memory_from_growing_with_omega(small_model, make_inputs):
    """Recomputed, a supervised state costs no more than itself, its position and content of 6 x 36 numbers."""
    model = small_model(*COUNTS).train()
    with torch.no_grad():
        features, initial = model.encode(model.preprocess(make_inputs(1)))
    found = training_memory(model.decoder, initial, features, counts=(0, 2, 4))
    assert [(x.points, x.recomputed) for x in found] == [(n, flag) for flag in (False, True) for n in (2, 3, 5)]
    kept, recomputed = found[:3], found[3:]
    per_state = (kept[2].saved - kept[0].saved) / 3
    assert per_state > 20 * 6 * 36 * 4
    assert kept[2].peak - kept[0].peak > 0.9 * 3 * per_state
    assert recomputed[2].saved - recomputed[0].saved <= 3 * 2 * 6 * 36 * 4
    assert recomputed[2].peak - recomputed[0].peak < 0.5 * per_state
    assert recomputed[2].saved < kept[0].saved
    assert model.decoder.supervision.count == 4 and not model.decoder.checkpoint_segments
    assert all(x.grad is None for x in model.parameters())
    counted = training_memory(model.decoder, initial, features, counts=(0, 2, 4), compute=False)
    assert [(x.points, x.recomputed, x.peak) for x in counted] == [(x.points, x.recomputed, None) for x in found]
    # A few small tensors differ: some kernels of the CPU save others than the general form of their operation.
    assert [x.saved for x in counted] == pytest.approx([x.saved for x in found], abs=4096)


def test_a_decoder_without_omega(small_model, make_inputs):
    model = small_model("MODEL.DEQDET.DECODER", "StackedDecoder", "MODEL.DEQDET.NUM_LAYERS", 2)
    with pytest.raises(UserError, match="StackedDecoder, which has no .Omega.: --task memory needs"):
        training_memory(model.decoder, *reversed(model.encode(model.preprocess(make_inputs(1)))), counts=(0,))


def test_the_command(tmp_path, small_cfg, capsys):
    (tmp_path / "small.yaml").write_text(small_cfg().dump())
    words = ["--config-file", str(tmp_path / "small.yaml"), "--height", "64", "--width", "96", "--task", "memory"]
    tool.main([*words, "--output", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["memory"]
    assert [row["points"] for row in rows] == [2, 3, 2, 3]
    table = capsys.readouterr().out.strip().splitlines()[-4:]
    assert table[0].startswith("| points in Omega | saved |") and table[2].startswith("| 2 | ")
    assert table[3].count("|") == 6 and f"| {rows[1]['saved_mb']:.1f} |" in table[3]
    tool.main([*words, "--count-only"])
    assert "| points in Omega | saved | saved, recomputed |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--count-only is for --task memory, not for step"):
        tool.main([*words, "--task", "step", "--count-only"])
