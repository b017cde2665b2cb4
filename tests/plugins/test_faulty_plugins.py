"""A user's own part that does not fit: one line names its module and class, and says what is expected."""

import importlib
import math
import re
import sys
from abc import abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry

from deqdet import Predictor, UserError
from deqdet.backbones import ChannelMapper
from deqdet.checkpoints import write_model_file
from deqdet.contract import describe, raised_in
from deqdet.decoders import (
    DECODER_REGISTRY,
    SOLVER_REGISTRY,
    Decoder,
    DecodingGraphs,
    EquilibriumDecoder,
    build_decoder,
    build_solver,
)
from deqdet.engine import Trainer, build_model
from deqdet.engine.health import FiniteGuard
from deqdet.equilibrium import FixedPointIteration
from deqdet.export.graphs import Encoder, OneGraph, check_walk
from deqdet.layers import REFINEMENT_LAYER_REGISTRY, AdaMixerLayer, SparseRCNNLayer, build_refinement_layer
from deqdet.measurement.benchmark import Setting, benchmark
from deqdet.model_zoo import put_overrides
from deqdet.plugins import import_plugins
from deqdet.structures import Decoded, Prediction, QueryState, count_images

from helpers.small_decoders import SHAPES

WHERE = f"{__name__}."
LAYER = "MODEL.DEQDET.REFINEMENT_LAYER", "Mine"
DECODER = "MODEL.DEQDET.DECODER", "Mine"


@pytest.fixture
def register(monkeypatch):
    """register(registry, object): under the name Mine, until the end of the test."""
    return lambda registry, part: monkeypatch.setitem(registry._obj_map, "Mine", part)


def refused(message: str):
    return pytest.raises(UserError, match=f"^{re.escape(message)}")


class TestImports:
    @pytest.mark.parametrize("code, message", [
        ("\nraise ValueError('two\\nlines')", "ValueError: two lines ({path}, line 2)"),
        ("import sys\nsys.exit(3)", "SystemExit: 3 ({path}, line 2)"),
        ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'"),
        ("def f(:", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("from deqdet.layers import REFINEMENT_LAYER_REGISTRY as R\n@R.register()\nclass AdaMixerLayer: pass",
         "the name AdaMixerLayer is registered in REFINEMENT_LAYER already: choose another one"),
    ])  # fmt: skip
    def test_a_file(self, tmp_path, code, message):
        path = tmp_path / "mine.py"
        path.write_text(code)
        with pytest.raises(UserError) as raised:
            import_plugins([str(path)])
        assert str(raised.value) == f"--plugin {path} cannot be imported: {message.format(path=path)}"

    def test_a_module(self):
        with refused("--plugin no.such_module cannot be imported: ModuleNotFoundError: No module named 'no'"):
            import_plugins(["no.such_module"])


class Lacking(AdaMixerLayer):
    """Its constructor has an argument more than from_config returns."""

    @configurable
    def __init__(self, *, width: int, **others):
        super().__init__(**others)


class Abstract(AdaMixerLayer):
    @abstractmethod
    def predict(self, state):
        """Not implemented."""


class OtherArguments(AdaMixerLayer):
    @classmethod
    def from_config(cls, cfg):
        return {}


class ReadsAKey(AdaMixerLayer):
    @classmethod
    def from_config(cls, cfg, input_shapes, initialization):
        return {"width": cfg.MODEL.DEQDET.PLUGIN.WIDTH}


class OneArgument(AdaMixerLayer):
    def forward(self, state):
        return state


class Faulty(AdaMixerLayer):
    @classmethod
    def from_config(cls, cfg, input_shapes, initialization):
        return len(5)


class Unrelated(torch.nn.Module):
    def __init__(self, *arguments):
        super().__init__()


class TestConstructors:
    @pytest.mark.parametrize("part, message", [
        (Lacking, "Lacking cannot be built: Lacking.__init__() missing 1 required keyword-only argument: 'width'; "
         "it is called with 3 arguments, and its from_config must return the arguments of __init__ (see"),
        (Abstract, "Abstract cannot be built: Can't instantiate abstract class Abstract with"),
        (OtherArguments, "OtherArguments cannot be built: OtherArguments.from_config() takes 2 positional"),
        (ReadsAKey, "ReadsAKey cannot be built: it reads the config key WIDTH, which is not set"),
        (Unrelated, "Unrelated built a Unrelated: it must be a subclass of RefinementLayer"),
        (OneArgument, "OneArgument.forward does not fit: too many positional arguments; it is called with 2 arguments"),
    ])  # fmt: skip
    def test_a_layer(self, small_cfg, register, part, message):
        register(REFINEMENT_LAYER_REGISTRY, part)
        with refused(WHERE + message):
            build_refinement_layer(small_cfg(*LAYER), SHAPES, initialization=False)

    def test_a_decoder(self, small_cfg, register):
        class Mine(EquilibriumDecoder):
            @classmethod
            def from_config(cls, cfg, input_shapes):
                return {"refinement": None}

        register(DECODER_REGISTRY, Mine)
        with refused(f"{WHERE}TestConstructors.test_a_decoder.<locals>.Mine cannot be built: "):
            build_decoder(small_cfg(*DECODER), SHAPES)
        register(DECODER_REGISTRY, Unrelated)
        with refused(f"{WHERE}Unrelated built a Unrelated: it must be a subclass of Decoder"):
            build_decoder(small_cfg(*DECODER), SHAPES)

    def test_a_fault_within_the_code_keeps_its_traceback(self, small_cfg, register):
        register(REFINEMENT_LAYER_REGISTRY, Faulty)
        with pytest.raises(TypeError, match="object of type 'int' has no len"):
            build_refinement_layer(small_cfg(*LAYER), SHAPES, initialization=False)

    def test_a_key_error_within_the_code_keeps_its_traceback(self, small_cfg, register):
        """It would be one word, the key, if it were taken for that of a registry."""

        def look_up_nothing(*arguments):
            return {}["width"]

        register(REFINEMENT_LAYER_REGISTRY, look_up_nothing)
        with pytest.raises(KeyError, match="width"):
            build_model(small_cfg(*LAYER))
        with refused("No object named 'Missing' found in 'META_ARCH' registry!"):
            build_model(small_cfg("MODEL.META_ARCHITECTURE", "Missing"))


class Spoiled(AdaMixerLayer):
    """Changes what AdaMixer returns; the tests say how."""

    forward_as = staticmethod(lambda state: state)
    predict_as = staticmethod(lambda prediction: prediction)

    def forward(self, state, features):
        return type(self).forward_as(super().forward(state, features))

    def predict(self, state):
        return type(self).predict_as(super().predict(state))


@pytest.fixture
def spoiled(small_cfg, register, monkeypatch):
    """spoiled(forward=..., predict=...): a model whose layer changes what AdaMixer's methods return."""
    register(REFINEMENT_LAYER_REGISTRY, Spoiled)

    def build(**changes):
        for name, change in changes.items():
            monkeypatch.setattr(Spoiled, f"{name}_as", staticmethod(change))
        torch.manual_seed(0)
        return build_model(small_cfg(*LAYER))

    return build


CONTENT, POSITION = "(2, 6, 32) float32 on cpu", "(2, 6, 4) float32 on cpu"
BOTH = f"deqdet.decoders.equilibrium.EquilibriumDecoder with {WHERE}Spoiled"


class TestLayers:
    @pytest.mark.parametrize("change, returned", [
        (lambda x: (x.position, x.content), "a tuple"),
        (lambda x: None, "a NoneType"),
    ])  # fmt: skip
    def test_another_type_than_a_state(self, spoiled, make_inputs, change, returned):
        model, inputs = spoiled(forward=change), make_inputs(2, 0)
        for mode in (True, False):
            with refused(f"{WHERE}Spoiled.forward returned {returned}: it must return a QueryState"):
                model.train(mode)(inputs)

    @pytest.mark.parametrize("change, shown, given", [
        (lambda x: QueryState(x.position, x.content[..., 1:]), f"content is {CONTENT.replace('32)', '31)')}", CONTENT),
        (lambda x: QueryState(x.position[:, 1:], x.content), f"position is {POSITION.replace('6', '5')}", POSITION),
        (lambda x: QueryState(x.position, None), "content is a NoneType", CONTENT),
        (lambda x: QueryState(x.position, x.content.double()), "content is (2, 6, 32) float64 on cpu", CONTENT),
        (lambda x: QueryState(x.position.long(), x.content), "position is (2, 6, 4) int64 on cpu", POSITION),
        (lambda x: QueryState(x.position.to("meta"), x.content), "position is (2, 6, 4) float32 on meta", POSITION),
    ])  # fmt: skip
    def test_a_state_that_does_not_fit(self, spoiled, make_inputs, change, shown, given):
        model, inputs = spoiled(forward=change), make_inputs(2, 0)
        for mode in (True, False):
            message = f"{WHERE}Spoiled.forward returned a QueryState whose {shown}: it must be as in its input, {given}"
            with refused(message):
                model.train(mode)(inputs)

    @pytest.mark.parametrize("dtype, fits", [
        (torch.float16, True), (torch.bfloat16, True), (torch.float32, True), (torch.float64, False),
        (torch.int64, False),
    ])  # fmt: skip
    def test_dtypes_of_a_content(self, spoiled, make_inputs, dtype, fits):
        """Without autocast, this layer's predict would not accept the lower precision of a state that g returned."""
        model = spoiled(forward=lambda x: QueryState(x.position, x.content.to(dtype)))
        for mode, precision in ((True, torch.bfloat16), (False, torch.bfloat16), (False, torch.float32)):
            expected = nullcontext() if fits else refused(f"{WHERE}Spoiled.forward returned a QueryState whose content")
            with expected, torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                model.train(mode)(make_inputs(2, 0))

    def test_float64_in_float64(self, spoiled, make_inputs):
        spoiled().double().train()(make_inputs(2, 0))

    @pytest.mark.parametrize("change, logits, boxes", [
        (lambda x: Prediction(x.logits[..., 1:], x.boxes), (2, 6, 2), (2, 6, 4)),
        (lambda x: Prediction(x.logits, x.boxes[..., :3]), (2, 6, 3), (2, 6, 3)),
        (lambda x: Prediction(x.logits[:, 1:], x.boxes), (2, 5, 3), (2, 6, 4)),
    ])  # fmt: skip
    def test_a_prediction_that_does_not_fit(self, spoiled, make_inputs, change, logits, boxes):
        model, inputs = spoiled(predict=change), make_inputs(2, 0)
        wrong = f"a Prediction of logits {logits} float32 on cpu and boxes {boxes} float32 on cpu"
        want = "a Prediction of logits (2, N, 3) and boxes (2, N, 4)"
        for mode, where in ((True, "supervise, init"), (False, "decode")):
            with refused(f"{BOTH}: {where} returned {wrong}: it must be {want}, floating-point tensors on one device"):
                model.train(mode)(inputs)

    def test_a_read_out_of_another_type(self, spoiled, make_inputs):
        model, inputs = spoiled(predict=lambda x: (x.logits, x.boxes)), make_inputs(2, 0)
        want = "a Prediction of logits (6, N, K) and boxes (6, N, 4), floating-point tensors on one device"
        with refused(f"{WHERE}Spoiled.predict returned a tuple: it must return {want}"):
            model.train()(inputs)
        with refused(f"{BOTH}: decode returned a tuple: it must be a Prediction of logits (2, N, 3)"):
            model.eval()(inputs)

    @pytest.mark.parametrize("change, logits", [
        (lambda x: Prediction(None, x.boxes), "a NoneType"),
        (lambda x: Prediction(x.logits.long(), x.boxes), "({}, 6, 3) int64 on cpu"),
        (lambda x: Prediction(x.logits.to("meta"), x.boxes), "({}, 6, 3) float32 on meta"),
    ])  # fmt: skip
    def test_a_read_out_of_other_tensors(self, spoiled, make_inputs, change, logits):
        """In training, the three states of each of the two images are read out together."""
        model, inputs = spoiled(predict=change), make_inputs(2, 0)
        for mode, where, rows in ((True, f"{WHERE}Spoiled.predict", 6), (False, f"{BOTH}: decode", 2)):
            with refused(f"{where} returned a Prediction of logits {logits.format(rows)} and boxes ({rows}, 6, 4)"):
                model.train(mode)(inputs)

    @pytest.mark.parametrize("changes", [
        {"forward": lambda x: QueryState(x.position + 300, x.content)},
        {"forward": lambda x: QueryState(x.position * float("nan"), x.content)},
        {"predict": lambda x: Prediction(x.logits, x.boxes * float("inf"))},
    ])  # fmt: skip
    def test_boxes_that_are_infinite_at_test_time(self, spoiled, make_inputs, changes):
        model, inputs = spoiled(**changes).eval(), make_inputs(2, 0)
        with refused(f"{BOTH} predicted a box that is infinite or NaN: "):
            model(inputs)
        with refused(f"{WHERE}Spoiled predicted a box that is infinite or NaN: "):
            model.walk(inputs, record=[1]).detections(1)

    @pytest.mark.parametrize("changes, cause", [
        ({"forward": lambda x: QueryState(x.position, x.content * float("nan"))},
         f"output of decoder.initialization in {WHERE}Spoiled"),
        ({"forward": lambda x: QueryState(x.position + 300, x.content)},  # which is too much for the next layer
         f"output of decoder.refinement.attention.attention.out_proj in {WHERE}Spoiled"),
        ({"predict": lambda x: Prediction(x.logits, x.boxes * float("inf"))}, f"prediction init of {BOTH}"),
    ])  # fmt: skip
    def test_numbers_that_are_not_finite_in_training(self, spoiled, make_inputs, tmp_path, changes, cause):
        """What the guard finds to be the cause after the matcher has refused them."""
        model, guard = spoiled(**changes), FiniteGuard(str(tmp_path), seed=1, checkpoint_period=1)
        guard.trainer, guard._batch = SimpleNamespace(model=model, iter=0), make_inputs(2, 0)
        with pytest.raises(FloatingPointError):
            model(guard._batch)
        assert guard._find_bad()[0] == cause


class OneRowForEachImage(AdaMixerLayer):
    """Inherits accepts_segments = True, and then adds (B, 1, C) to content of S * B rows."""

    def forward(self, state, features):
        refined = super().forward(state, features)
        return QueryState(refined.position, refined.content + features[0].mean(dim=(2, 3))[:, None])


class FirstState(AdaMixerLayer):
    """Returns the first state of each image alone."""

    def forward(self, state, features):
        refined, images = super().forward(state, features), len(features[0])
        return QueryState(refined.position[:images], refined.content[:images])


class OtherOrder(AdaMixerLayer):
    """Takes row b * S + s as state s of image b."""

    def forward(self, state, features):
        order = torch.arange(len(state.content)).view(count_images(features), -1).T.flatten()
        refined = super().forward(QueryState(state.position[order], state.content[order]), features)
        return QueryState(refined.position[order.argsort()], refined.content[order.argsort()])


class TestSegments:
    @pytest.mark.parametrize("layer, cause", [
        (OneRowForEachImage, "The size of tensor a (6) must match the size of tensor b (2) at non-singleton dimension"),
        (FirstState, f"{WHERE}FirstState.forward returned a QueryState whose content is {CONTENT}"),
    ])  # fmt: skip
    def test_a_forward_that_fails_on_them(self, small_cfg, register, make_inputs, layer, cause):
        register(REFINEMENT_LAYER_REGISTRY, layer)
        model, rows = build_model(small_cfg(*LAYER)), "6 rows with the features of 2 images"
        with refused(f"{describe(layer)} sets accepts_segments = True, but its forward fails on {rows} ({cause}"):
            model(make_inputs(2, 0))
        model.decoder.refinement.accepts_segments = False
        model(make_inputs(2, 0))

    @pytest.mark.parametrize("error, text, most_rows", [
        (RuntimeError, "too much", 0),
        (torch.OutOfMemoryError, "too much", 2),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory", 2),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", 2),
    ])  # fmt: skip
    def test_an_error_that_is_not_the_flag_s(self, small_cfg, monkeypatch, error, text, most_rows):
        """One that a single state raises too, or the lack of memory for all of them."""

        def forward(state, features):
            if len(state.content) > most_rows:
                raise error(text)
            return state

        layer = build_refinement_layer(small_cfg(), SHAPES, initialization=False)
        monkeypatch.setattr(layer, "forward", forward)
        with pytest.raises(error, match=f"^{re.escape(text)}$"):
            layer.refine_segments(QueryState(torch.zeros(4, 6, 4), torch.zeros(4, 6, 32)), [torch.zeros(2, 32, 8, 8)])

    def test_a_forward_that_mixes_them_up(self, small_cfg, register, make_inputs):
        """No training would notice it: a trial before the training does."""
        register(REFINEMENT_LAYER_REGISTRY, OtherOrder)
        cfg = small_cfg(*LAYER)
        build_model(cfg)(make_inputs(2, 0))
        with refused(f"{WHERE}OtherOrder sets accepts_segments = True, but its forward refines two states of each im"):
            Trainer.build_model(cfg)

    @pytest.mark.parametrize("layer", [AdaMixerLayer, SparseRCNNLayer])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_a_forward_that_keeps_them_apart(self, small_cfg, register, layer, precision):
        register(REFINEMENT_LAYER_REGISTRY, type("Mine", (layer,), {"__module__": __name__}))
        assert Trainer.build_model(small_cfg(*LAYER, "TEST.PRECISION", precision)).training

    @pytest.mark.parametrize("change", [
        lambda content, features: content + torch.randn_like(content),
        lambda content, features: content * math.nan,
        lambda content, features: content + F.max_pool2d(features[len(features) - 1], 3).mean(),
        lambda content, features: content + get_event_storage().iter,
        lambda content, features: content if torch.is_autocast_enabled("cpu") else content / "only in 16 bits",
    ], ids=["random", "nan", "pools the coarsest level", "logs", "only in 16 bits"])  # fmt: skip
    def test_a_forward_that_is_unusual(self, small_cfg, register, change):
        """It inherits accepts_segments = True, and the trial must not refuse it."""

        class Mine(AdaMixerLayer):
            def forward(self, state, features):
                refined = super().forward(state, features)
                return QueryState(refined.position, change(refined.content, features))

        register(REFINEMENT_LAYER_REGISTRY, Mine)
        assert Trainer.build_model(small_cfg(*LAYER, "TEST.PRECISION", "bfloat16")).training


class TestDecoders:
    @pytest.mark.parametrize("method, value, message", [
        ("supervise", None, "supervise returned a NoneType: it must return a dict of at least one Prediction by name"),
        ("supervise", {}, "supervise returned a dict: it must return a dict of at least one Prediction by name"),
        ("decode", None, "decode returned a NoneType: it must return a Decoded"),
        ("decode", Prediction(torch.zeros(2, 6, 3), torch.zeros(2, 6, 4)),
         "decode returned a Prediction: it must return a Decoded"),
    ])  # fmt: skip
    def test_results_that_do_not_fit(self, small_model, make_inputs, monkeypatch, method, value, message):
        model = small_model()
        monkeypatch.setattr(model.decoder, method, lambda initial, features: value)
        with refused(f"deqdet.decoders.equilibrium.EquilibriumDecoder.{message}"):
            model.train(method == "supervise")(make_inputs(2, 0))

    @pytest.mark.parametrize("value, shown", [(None, "NoneType"), (torch.zeros(2), "Tensor")])
    def test_a_walk_to_something_else(self, small_model, make_inputs, monkeypatch, value, shown):
        model, inputs = small_model().eval(), make_inputs(2, 0)
        monkeypatch.setattr(model.decoder, "walk", lambda *args, **options: value)
        message = f"deqdet.decoders.equilibrium.EquilibriumDecoder.walk returned a {shown}: it must return a Trajectory"
        for call in (model.walk, partial(model.infer, steps=2)):
            with refused(message):
                call(inputs)

    @pytest.mark.parametrize("method, kind", [("walk", "Trajectory"), ("decode", "Decoded")])
    def test_what_training_does_not_call_is_tried_before_it(self, small_cfg, register, make_inputs, method, kind):
        class Mine(EquilibriumDecoder):
            def decode(self, initial, features):
                return EquilibriumDecoder.walk(self, initial, features).decoded()

        def nothing(self, initial, features, *, steps=0, rtol=0, solver=None, record=(), record_iterates=False):
            return None

        setattr(Mine, method, nothing)
        register(DECODER_REGISTRY, Mine)
        cfg = small_cfg(*DECODER)
        build_model(cfg)(make_inputs(2, 0))
        with refused(f"{describe(Mine)}.{method} returned a NoneType: it must return a {kind}"):
            Trainer.build_model(cfg)

    def test_a_decoded_of_something_else(self, small_model, make_inputs, monkeypatch):
        model = small_model().eval()
        decoded = Decoded((1, 2), torch.ones(2), torch.ones(2, dtype=torch.bool))
        monkeypatch.setattr(model.decoder, "decode", lambda initial, features: decoded)
        with pytest.raises(UserError, match="decode returned a tuple: it must be a Prediction of logits"):
            model(make_inputs(2, 0))

    @pytest.mark.parametrize("field, value, shown", [
        ("steps", 3, "3"), ("finite", True, "True"), ("residual", 0.1, "0.1"),
        ("steps", torch.ones(3), r"of shape \(3,\)"), ("finite", torch.tensor(True), r"of shape \(\)"),
    ])  # fmt: skip
    def test_a_field_of_decoded_that_does_not_fit(self, small_model, make_inputs, monkeypatch, field, value, shown):
        model = small_model().eval()
        decode = model.decoder.decode
        monkeypatch.setattr(model.decoder, "decode", lambda *args: replace(decode(*args), **{field: value}))
        message = rf"whose {field} is {shown}: it must be a tensor \(2,\), with a number for each image"
        with pytest.raises(UserError, match=message):
            model(make_inputs(2, 0))


class TestEquilibria:
    """A decoder that sets has_equilibrium, and is no EquilibriumDecoder."""

    @pytest.fixture
    def walking(self, monkeypatch):
        monkeypatch.syspath_prepend(str(Path(__file__).parent))
        monkeypatch.setattr(DECODER_REGISTRY, "_obj_map", dict(DECODER_REGISTRY._obj_map))
        yield importlib.import_module("walking_decoder").WalkingDecoder
        del sys.modules["walking_decoder"]

    @pytest.mark.parametrize("changes, message", [
        ({"test_steps": ...}, "has no attribute test_steps: it must be a whole number of at least 1"),
        ({"test_steps": 0}, "its attribute test_steps is 0: it must be"),
        ({"rtol": -1.0}, "its attribute rtol is -1.0: it must be 0 or a positive number"),
        ({"rtol": ...}, "has no attribute rtol"),
        ({"solver": ...}, "has no attribute solver: it must be a solver such as deqdet.equilibrium.FixedPointIter"),
        ({"solver": FixedPointIteration}, "its attribute solver is <class"),
        ({"solver": "anderson"}, "its attribute solver is 'anderson'"),
        ({"return_best": None}, "its attribute return_best is None: it must be True or False"),
        ({"walk": Decoder.walk}, "implements no walk"),
        ({"walk": lambda self, initial, features, *, steps=None: None}, "its walk does not fit: got an unexpected"),
    ])  # fmt: skip
    def test_what_is_missing(self, small_cfg, register, walking, monkeypatch, changes, message):
        def make(cfg, input_shapes):
            built = walking(cfg, input_shapes)
            for name, value in changes.items():
                if value is ...:
                    delattr(built, name)
                else:
                    built.__dict__.pop(name, None)
                    monkeypatch.setattr(walking, name, value, raising=False)
            return built

        register(DECODER_REGISTRY, make)
        with refused(f"walking_decoder.WalkingDecoder sets has_equilibrium, but {message}"):
            build_decoder(small_cfg(*DECODER), SHAPES)

    def test_the_one_of_the_page(self, small_cfg, make_inputs, walking):
        """Its options hold, also where a CUDA graph would be recorded, of which replays are counted here."""
        torch.manual_seed(0)
        model = build_model(small_cfg("MODEL.DEQDET.DECODER", "WalkingDecoder", "MODEL.DEQDET.CUDA_GRAPHS", 2)).eval()
        replays = []

        def record(function):
            return function(), lambda: replays.append(1)

        model.graphs, inputs = DecodingGraphs(2, record), make_inputs(1)
        with torch.no_grad():
            assert [int(model.infer(inputs, steps=steps)[0]["steps"]) for steps in (None, 2, 3)] == [4, 2, 3]
        assert len(replays) == 2  # the third choice of options is one too many to record

    def test_its_training_memory(self, small_cfg, walking):
        """It has no Omega, over which the memory of training is measured."""
        model = build_model(small_cfg("MODEL.DEQDET.DECODER", "WalkingDecoder"))
        with refused("MODEL.DEQDET.DECODER is WalkingDecoder, which has no |Omega|: --task memory needs"):
            benchmark(model, Setting(task="memory", height=64, width=64, batch=1, precision="float32"))

    def test_an_export_of_another_walk(self, small_cfg, walking, monkeypatch, tmp_path):
        model = build_model(small_cfg("MODEL.DEQDET.DECODER", "WalkingDecoder")).eval()
        check_walk(model, 32)
        original = walking.walk
        monkeypatch.setattr(walking, "walk", lambda *given, steps, **named: original(*given, steps=steps + 1, **named))
        with refused("MODEL.DEQDET.DECODER is WalkingDecoder, whose walk() does not match its execution(): "):
            check_walk(model, 32)

    def test_an_export_without_equilibrium(self, small_cfg, walking, monkeypatch):
        model = build_model(small_cfg("MODEL.DEQDET.DECODER", "WalkingDecoder")).eval()
        monkeypatch.setattr(walking, "has_equilibrium", False)
        for graphs in (Encoder, OneGraph):
            with refused("MODEL.DEQDET.DECODER is WalkingDecoder, which cannot be exported: it needs an equilib"):
                graphs(model)


PLAIN = FixedPointIteration()


@dataclass(frozen=True)
class Momentum:
    """Plain iteration, until a test changes a method."""

    def init(self, iterate):
        return (iterate,)

    def step(self, iterate, output, state):
        return output, (iterate,)


STATE = "as state a tuple of tensors with one row for each of the iterate's"
PAIR = "the pair of the next iterate and the next state"
ITERATE = "the next iterate in the shape, dtype and device of the one that it got"


def later_in_float64(iterate, output, state):
    """A step that is at fault only from the second one on."""
    return (output.double() if state[0].shape[1] else output), (iterate,)


class TestSolvers:
    @pytest.mark.parametrize("init, step, message", [
        (None, PLAIN.step, " has no method init: see deqdet.equilibrium.Solver"),
        (PLAIN.init, None, " has no method step: see deqdet.equilibrium.Solver"),
        (lambda: (), PLAIN.step, ".init does not fit: too many positional arguments; it is called with 1 argument"),
        (PLAIN.init, lambda y, output: output, ".step does not fit: too many positional arguments; it is called with"),
        (lambda y: None, PLAIN.step, f".init must return {STATE}"),
        (lambda y: (y[:1],), PLAIN.step, f".init must return {STATE}"),
        (PLAIN.init, lambda y, output, state: output, f".step must return {PAIR}"),
        (PLAIN.init, lambda y, output, state: torch.stack([output, output]), f".step must return {PAIR}"),
        (PLAIN.init, lambda y, output, state: (output, 5), f".step must return {STATE}"),
        (PLAIN.init, lambda y, output, state: (output, (5,)), f".step must return {STATE}"),
        (PLAIN.init, lambda y, output, state: (output[:, :1], ()), f".step must return {ITERATE}"),
        (PLAIN.init, lambda y, output, state: (output.double(), ()), f".step must return {ITERATE}"),
        (PLAIN.init, lambda y, output, state: (output.to("meta"), ()), f".step must return {ITERATE}"),
        (lambda y: (y[:, :0],), later_in_float64, f".step must return {ITERATE}"),
    ])  # fmt: skip
    def test_methods_that_do_not_fit(self, small_cfg, register, monkeypatch, init, step, message):
        for name, method in (("init", init), ("step", step)):
            if method is None:
                monkeypatch.delattr(Momentum, name)
            else:
                monkeypatch.setattr(Momentum, name, staticmethod(method))
        register(SOLVER_REGISTRY, Momentum)
        for spec in (None, "mine"):
            with pytest.raises(ValueError, match=f"^{re.escape(f'{WHERE}Momentum{message}')}"):
                build_solver(small_cfg("MODEL.DEQDET.SOLVER.NAME", "Mine"), spec)
        with refused(f"{WHERE}Momentum{message}"):  # as a command tells it
            build_model(small_cfg("MODEL.DEQDET.SOLVER.NAME", "Mine"))

    def test_one_that_is_given_to_a_model(self, small_model, make_inputs, monkeypatch):
        """It was in no registry, so nothing has tried it; the step would be broadcast."""
        monkeypatch.setattr(Momentum, "step", lambda self, y, output, state: (output[:, :1], state))
        for rtol in (0.0, 1e-3):
            with pytest.raises(ValueError, match=f"^{re.escape(f'{WHERE}Momentum.step must return {ITERATE}')}"):
                small_model().eval().infer(make_inputs(2, 0), solver=Momentum(), rtol=rtol)

    @pytest.mark.parametrize("decorate", [lambda cls: cls, dataclass])
    def test_one_that_is_not_frozen(self, small_cfg, register, decorate):
        class Loose:
            init, step = PLAIN.init, PLAIN.step

        register(SOLVER_REGISTRY, decorate(Loose))
        message = "MODEL.DEQDET.SOLVER (NAME Mine): Mine must be a frozen dataclass: put @dataclass(frozen=True) above"
        with refused(message):
            build_model(small_cfg("MODEL.DEQDET.SOLVER.NAME", "Mine"))

    def test_another_solver_for_a_model_file(self, small_cfg, register, tmp_path):
        """Whose own solver has an option that the other one does not know."""

        @dataclass(frozen=True)
        class Damped(Momentum):
            start: float = 0.5

        register(SOLVER_REGISTRY, Damped)
        name = "MODEL.DEQDET.SOLVER.NAME"
        cfg, file = small_cfg(name, "Mine"), tmp_path / "a.safetensors"
        put_overrides(cfg, ["MODEL.DEQDET.SOLVER.OPTIONS.START", "0.8"])
        weights = build_model(cfg).state_dict()
        write_model_file(file, weights=weights, cfg=cfg, class_names=("ox", "ass", "hen"))
        assert Predictor.from_file(file, device="cpu").model.decoder.solver == Damped(start=0.8)
        other = Predictor.from_file(file, device="cpu", overrides=[name, "FixedPointIteration"])
        assert other.model.decoder.solver == FixedPointIteration() and other.cfg.MODEL.DEQDET.SOLVER.OPTIONS == {}

    def test_one_that_solves_equations_without_regularization(self, small_cfg, register):
        """The trial's differences of iterates must not be parallel."""

        @dataclass(frozen=True)
        class Exact:
            def init(self, iterate):
                return iterate[:, None][:, :0], iterate[:, None][:, :0]

            def step(self, iterate, output, state):
                changes = torch.cat([state[0], (output - iterate)[:, None]], dim=1)
                outputs = torch.cat([state[1], output[:, None]], dim=1)
                if changes.shape[1] == 1:
                    return output, (changes, outputs)
                differences = changes.diff(dim=1)  # (B, j, D)
                gram = differences @ differences.mT
                weights = torch.linalg.solve(gram, (differences @ changes[:, -1:].mT)[..., 0])
                return output - (weights[..., None] * outputs.diff(dim=1)).sum(dim=1), (changes, outputs)

        register(SOLVER_REGISTRY, Exact)
        assert build_solver(small_cfg("MODEL.DEQDET.SOLVER.NAME", "Mine")) == Exact()

    def test_one_that_fits(self, small_cfg, register):
        register(SOLVER_REGISTRY, Momentum)
        assert build_solver(small_cfg("MODEL.DEQDET.SOLVER.NAME", "Mine")) == Momentum()


class Patches(Backbone):
    """Levels of 32 channels and strides 4 to 32, until a test changes them."""

    change_shapes = staticmethod(lambda shapes: shapes)
    change_levels = staticmethod(lambda levels: levels)

    def __init__(self):
        super().__init__()
        self.stages = torch.nn.ModuleList(torch.nn.Conv2d(3, 32, stride, stride) for stride in (4, 8, 16, 32))

    def output_shape(self):
        return self.change_shapes({f"res{n}": ShapeSpec(channels=32, stride=2**n) for n in range(2, 6)})

    def forward(self, images):
        return self.change_levels({f"res{n}": stage(images) for n, stage in enumerate(self.stages, start=2)})


def replace_res3(value):
    return lambda levels: {**levels, "res3": value(levels["res3"])}


def through_stride_16(levels):
    """As in ViTDet: the finer levels are enlarged from that of stride 16, and have lost what it lost at the border."""
    finer = {"res2": 4, "res3": 2}
    return levels | {name: F.interpolate(levels["res4"], scale_factor=scale) for name, scale in finer.items()}


class TestBackbones:
    """With AdaMixer's neck above them, and without one."""

    @pytest.fixture(params=[True, False], ids=["neck", "bare"])
    def build(self, request, small_cfg, monkeypatch):
        def make(cfg, input_shape):
            return ChannelMapper.from_bottom_up(Patches(), cfg) if request.param else Patches()

        monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "Mine", make)
        names = [f"{'p' if request.param else 'res'}{n}" for n in range(2, 6)]
        return lambda: build_model(small_cfg("MODEL.BACKBONE.NAME", "Mine", "MODEL.DEQDET.IN_FEATURES", names))

    @pytest.mark.parametrize("change, returned", [
        (lambda shapes: None, "a NoneType"),
        (lambda shapes: list(shapes.values()), "a list"),
        (replace_res3(lambda shape: (32, 8)), "(32, 8) for level res3"),
        (replace_res3(lambda shape: ShapeSpec(stride=8)), "ShapeSpec(channels=None, height=None, width=None, stri"),
        (replace_res3(lambda shape: ShapeSpec(channels=32)), "ShapeSpec(channels=32, height=None, width=None, stride="),
    ])  # fmt: skip
    def test_an_output_shape_that_does_not_fit(self, build, monkeypatch, change, returned):
        monkeypatch.setattr(Patches, "change_shapes", staticmethod(change))
        with refused(f"{WHERE}Patches.output_shape returned {returned}"):
            build()

    def test_a_level_that_is_configured_and_missing(self, build, monkeypatch):
        monkeypatch.setattr(Patches, "change_shapes", staticmethod(lambda shapes: {"res2": shapes["res2"]}))
        with refused("MODEL.DEQDET.IN_FEATURES has ["):
            build()

    @pytest.mark.parametrize("change, returned", [
        (lambda levels: None, "a NoneType: it must return a dict of levels by name"),
        (lambda levels: list(levels.values()), "a list: it must return a dict of levels by name"),
        (lambda levels: {"res2": levels["res2"]}, "the levels res2, but its output_shape has res3 too"),
        (replace_res3(lambda x: None), "a NoneType as level res3 of images (2, 3, 64, 96): by its output_shape, with "
         "32 channels and stride 8, it must be (2, 32, 8, 12) in floating point"),
        (replace_res3(lambda x: x.long()), "(2, 32, 8, 12) int64 on cpu as level res3"),
        (replace_res3(lambda x: x[:, :16]), "(2, 16, 8, 12) float32 on cpu as level res3"),
        (replace_res3(lambda x: x.flatten(2)), "(2, 32, 96) float32 on cpu as level res3"),
        (replace_res3(lambda x: x.permute(0, 2, 3, 1)), "(2, 8, 12, 32) float32 on cpu as level res3"),
        (replace_res3(lambda x: x[:, :, ::2, ::2]), "(2, 32, 4, 6) float32 on cpu as level res3"),
    ])  # fmt: skip
    def test_levels_that_contradict_it(self, build, make_inputs, monkeypatch, change, returned):
        model = build()
        monkeypatch.setattr(Patches, "change_levels", staticmethod(change))
        for mode in (True, False):
            with refused(f"{WHERE}Patches.forward returned {returned}"):
                model.train(mode)(make_inputs(2, 0))

    @pytest.mark.parametrize("change", [lambda levels: levels, through_stride_16], ids=["each", "together"])
    def test_sides_that_are_rounded(self, build, make_inputs, monkeypatch, change):
        """A bare backbone gets images of any size; a convolution loses the rest at the border."""
        monkeypatch.setattr(Patches, "change_levels", staticmethod(change))
        build()(make_inputs(2, 0, height=75, width=107))

    def test_an_output_shape_that_is_unusual(self, small_cfg, monkeypatch, make_inputs):
        """A stride that is a float, and a level without a stride that the detector does not use."""
        monkeypatch.setattr(Patches, "change_shapes", staticmethod(
            lambda shapes: {name: ShapeSpec(channels=32, stride=float(x.stride)) for name, x in shapes.items()}
            | {"pooled": ShapeSpec(channels=8)}
        ))  # fmt: skip
        monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "Mine", lambda cfg, input_shape: Patches())
        names = [f"res{n}" for n in range(2, 6)]
        build_model(small_cfg("MODEL.BACKBONE.NAME", "Mine", "MODEL.DEQDET.IN_FEATURES", names))(make_inputs(2, 0))

    def test_one_that_is_none(self, small_cfg, monkeypatch):
        monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "Mine", Unrelated)
        with refused(f"{WHERE}Unrelated built a Unrelated: it must be a subclass of Backbone"):
            build_model(small_cfg("MODEL.BACKBONE.NAME", "Mine"))


def test_who_raised():
    registry = Registry("FEW")
    with pytest.raises(KeyError) as found:
        registry.get("none")
    assert raised_in(found.value, Registry.__module__) and not raised_in(found.value, __name__)
