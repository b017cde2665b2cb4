"""Recordings of a decode. The recorder is one of the tests' own, which runs on a CPU what CUDA would replay."""

import copy
import logging
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from deqdet.decoders import DecodingGraphs
from deqdet.decoders import graphs as module
from deqdet.equilibrium import Anderson
from deqdet.errors import UserError
from deqdet.structures import Decoded, Prediction, QueryState

from helpers.batches import strip

KEY = "MODEL.DEQDET.CUDA_GRAPHS"


class Recorder:
    """As CUDA graphs do, a replay writes into the same outputs, from what the same inputs hold."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, function):
        self.recorded += 1
        outputs = function()

        @torch.inference_mode()  # a graph on a GPU writes into its outputs in any mode, too
        def replay() -> None:
            new = function()
            outputs.prediction.boxes.copy_(new.prediction.boxes)
            outputs.prediction.logits.copy_(new.prediction.logits)
            outputs.steps.copy_(new.steps)
            outputs.finite.copy_(new.finite)

        return outputs, replay


def fail(function):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def double(initial: QueryState, features: list) -> Decoded:
    boxes = 2 * initial.position + features[0].mean()
    return Decoded(Prediction(initial.content, boxes), torch.ones(1, dtype=torch.int64), torch.ones(1).bool())


def state(value: float) -> QueryState:
    return QueryState(torch.full((1, 2, 4), value), torch.zeros(1, 2, 3))


class TestRecordings:
    def test_a_size_is_recorded_once_and_replayed_with_new_inputs(self):
        recorder = Recorder()
        graphs = DecodingGraphs(2, recorder)
        small, large = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 6)
        first = graphs(double, state(1.0), [small])
        second = graphs(double, state(5.0), [small])
        assert recorder.recorded == 1
        third = graphs(double, state(5.0), [large])
        assert recorder.recorded == 2
        found = [x.prediction.boxes.unique().tolist() for x in (first, second, third)]
        assert found == [[2.0], [10.0], [11.0]]  # the first is not overwritten by the second
        assert first.residual is None and first.steps.tolist() == [1]

    def test_sizes_beyond_the_number_are_decoded_as_usual(self):
        recorder = Recorder()
        graphs = DecodingGraphs(1, recorder)
        for width in (4, 5, 6, 4, 5):
            found = graphs(double, state(1.0), [torch.full((1, 3, 4, width), float(width))])
            assert found.prediction.boxes.unique().tolist() == [2.0 + width]
        assert recorder.recorded == 1

    def test_options_and_precision_make_another_recording(self):
        recorder = Recorder()
        graphs = DecodingGraphs(9, recorder)
        features = [torch.zeros(1, 3, 4, 4)]
        for options in ((1,), (2,), (1,)):
            graphs(double, state(1.0), features, options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            graphs(double, state(1.0), features, (1,))
        assert recorder.recorded == 3

    def test_a_recording_serves_every_mode_without_gradient(self):
        graphs, features = DecodingGraphs(1, Recorder()), [torch.zeros(1, 3, 4, 4)]
        for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode()):
            with mode:
                found = graphs(double, state(1.5), features)
            assert found.prediction.boxes.unique().tolist() == [3.0]

    def test_a_copy_has_none(self):
        def record(function):
            lock = threading.Lock()  # which cannot be copied, as a CUDA graph cannot
            return function(), lock.locked

        graphs, features = DecodingGraphs(1, record), [torch.zeros(1, 3, 4, 4)]
        graphs(double, state(1.0), features)
        copied = copy.deepcopy(graphs)
        found = copied(double, state(3.0), features)
        assert found.prediction.boxes.unique().tolist() == [6.0] and copied.replays == 1

    def test_it_is_made_on_the_gpu_of_the_inputs(self, monkeypatch):
        """Which need not be the current GPU: nothing of what runs on another one would be recorded."""
        devices = []

        def record(function, device):
            devices.append(device)
            return function(), lambda: None

        monkeypatch.setattr(module, "record_cuda_graph", record)
        with FakeTensorMode(), torch.device("cuda:1"):
            DecodingGraphs(1)(double, state(1.0), [torch.zeros(1, 3, 4, 4)])
        assert devices == [torch.device("cuda:1")]

    @pytest.mark.parametrize("record, reason", [
        (None, "CUDA graphs do not exist on the device cpu"),
        (fail, "the decoder could not be recorded: operation not permitted when stream is capturing"),
    ])  # fmt: skip
    def test_without_recordings_it_says_so_once_and_decodes(self, record, reason, caplog):
        graphs = DecodingGraphs(2, record)
        with caplog.at_level(logging.WARNING):
            for value in (1.0, 3.0):
                found = graphs(double, state(value), [torch.zeros(1, 3, 4, 4)])
                assert found.prediction.boxes.unique().tolist() == [2 * value]
        assert [x.getMessage() for x in caplog.records] == [f"{KEY} has no effect: {reason}"]


@pytest.mark.parametrize("decoder", ["EquilibriumDecoder", "RecurrentDecoder", "StackedDecoder"])
def test_a_detector_with_recordings_finds_the_same(small_model, make_inputs, decoder):
    options = ("MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.NUM_LAYERS", 3)
    torch.manual_seed(0)
    plain = small_model(*options).eval()
    graphed = small_model(*options, KEY, 2).eval()
    graphed.load_state_dict(plain.state_dict())
    recorder = Recorder()
    graphed.graphs = DecodingGraphs(2, recorder)
    batches = [strip(make_inputs(0)), strip(make_inputs(1)), strip(make_inputs(0))]
    with torch.no_grad():
        for batch in batches:
            for one, other in zip(plain(batch), graphed(batch), strict=True):
                assert torch.equal(one["instances"].pred_boxes.tensor, other["instances"].pred_boxes.tensor)
                assert torch.equal(one["instances"].scores, other["instances"].scores)
    assert 1 <= recorder.recorded <= 2


def test_a_tolerance_or_a_gradient_is_decoded_as_usual(small_model, make_inputs):
    model, recorder = small_model(KEY, 2).eval(), Recorder()
    model.graphs = DecodingGraphs(2, recorder)
    batch = strip(make_inputs(0))
    model(batch)  # with gradient
    with torch.no_grad():
        model.infer(batch, rtol=0.1)
        assert recorder.recorded == 0
        model.infer(batch, steps=2)
        model.infer(batch, steps=3)
    assert recorder.recorded == 2


@torch.no_grad()
def test_the_decoders_own_choice_may_change(small_model, make_inputs):
    model, recorder = small_model(KEY, 9).eval(), Recorder()
    model.graphs = DecodingGraphs(9, recorder)
    batch = strip(make_inputs(0))
    for key, value in (("test_steps", 3), ("test_steps", 4), ("solver", Anderson()), ("return_best", True)):
        setattr(model.decoder, key, value)
        model(batch)
        model.infer(batch, steps=model.decoder.test_steps)  # the same walk
        model.infer(batch, steps=0)
    assert recorder.recorded == 7  # four walks; without a step the first two are the same


@torch.no_grad()
def test_options_of_a_solver_are_refused_where_there_is_no_equilibrium(small_model, make_inputs):
    """Also once the decoder's own walk is recorded."""
    model, recorder = small_model(KEY, 2, "MODEL.DEQDET.DECODER", "StackedDecoder").eval(), Recorder()
    model.graphs = DecodingGraphs(2, recorder)
    batch = strip(make_inputs(0))
    model(batch)
    assert recorder.recorded == 1
    for options in ({"steps": 3}, {"rtol": 0.1}, {"solver": Anderson()}):
        with pytest.raises(UserError, match="number of steps is fixed"):
            model.infer(batch, **options)
