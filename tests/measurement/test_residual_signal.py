"""The residual as a signal: ranks and verdicts worked out by hand, and the tool on a small model."""

import json
import math

import cv2
import numpy as np
import pytest
import torch

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from deqdet.data import mix_seed
from deqdet.measurement.accuracy import Accuracy
from deqdet.measurement.corruptions import CONDITIONS, Condition, corrupt
from deqdet.measurement.rank_statistics import correlate, correlate_given, estimate, separate
from deqdet.measurement.residual_signal import (
    DetectionRows,
    ImageRows,
    make_groups,
    observe,
    summarize_condition,
    summarize_group,
    tabulate_images,
)
from deqdet.measurement.residual_signal_report import deciles
from deqdet.measurement.verdicts import name_mistakes
from deqdet.tools import residual_signal

from helpers.engine_toy import IN_PROCESS

NAN, INF = math.nan, math.inf
CUP, SPOON = 0, 1


def column(*values) -> np.ndarray:
    return np.array(values)


class TestStatistics:
    def test_rank_correlation_by_hand(self):
        # Ranks 1 2 3 4 against 2 1 4 3: the squared differences sum to 4, and rho = 1 - 6 * 4 / (4 * 15) = 0.6.
        assert correlate(column(0.1, 0.2, 5.0, 9.0), column(20.0, 10.0, 90.0, 80.0)) == pytest.approx(0.6)
        assert correlate(column(-INF, -2.0, -1.0), column(0.0, 5.0, 6.0)) == pytest.approx(1.0)  # inf is the last rank
        assert math.isnan(correlate(column(1.0, 1.0, 1.0), column(1.0, 2.0, 3.0)))
        assert math.isnan(correlate(column(1.0), column(1.0)))

    def test_partial_correlation_by_hand(self):
        signal, AP, known = column(1.0, 2.0, 3.0, 4.0), column(2.0, 1.0, 4.0, 3.0), column(1.0, 3.0, 2.0, 4.0)
        # r_sa = 0.6; r_sk = 1 - 6 * 2 / 60 = 0.8; of AP and known the differences are 1, -2, 2, -1: r_ak = 0.
        assert correlate_given(signal, AP, known) == pytest.approx(0.6 / 0.6)
        assert math.isnan(correlate_given(signal, AP, signal))  # a signal adds nothing to itself

    def test_a_part_of_the_correlation_is_left(self):
        """What both share with a known signal goes, and what they share beside it stays."""
        rng = np.random.default_rng(0)
        known, own = rng.normal(size=(2, 4000))
        AP = known + own + rng.normal(size=4000)
        assert abs(correlate_given(known + rng.normal(size=4000), AP, known)) < 0.05
        assert correlate_given(own, AP, known) > 0.5

    def test_separation_by_pairs(self):
        rng = np.random.default_rng(1)
        signal, right = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
        pairs = [(a, b) for a in signal[right] for b in signal[~right]]
        expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
        assert separate(signal, right) == pytest.approx(expected, abs=1e-12)
        assert separate(column(0.9, 0.8, 0.3), column(True, True, False)) == 1.0
        assert separate(column(-INF, -1.0), column(False, True)) == 1.0
        assert math.isnan(separate(column(1.0, 2.0), column(True, True)))
        assert math.isnan(separate(column(), np.zeros(0, dtype=bool)))

    def test_the_bootstrap_draws_images(self):
        """With every image's rows four times over, the interval is that of one row for each image."""
        rng = np.random.default_rng(2)
        signal = rng.normal(size=60)
        AP, image = signal + rng.normal(size=60), np.arange(60)
        once = estimate(correlate, image, signal, AP)
        repeated = estimate(correlate, *(np.tile(x, 4) for x in (image, signal, AP)))
        assert once.low < once.value < once.high and once.high - once.low > 0.15
        assert (repeated.low, repeated.high) == pytest.approx((once.low, once.high), abs=1e-9)
        assert estimate(correlate, image, signal, AP) == once  # the same numbers each time

    def test_no_interval_of_one_image_or_of_nothing(self):
        one = estimate(correlate, column(5, 5, 5), column(1.0, 2.0, 3.0), column(1.0, 2.0, 3.0))
        assert (one.value, one.low, one.high) == (pytest.approx(1.0), None, None)
        none = estimate(correlate, column(), column(), column())
        assert (none.value, none.low, none.high) == (None, None, None)

    def test_deciles(self):
        signal = np.arange(100.0)[::-1]
        medians, means = deciles(signal, np.arange(100.0) ** 2)
        assert medians.tolist() == [4.5 + 10 * i for i in range(10)]
        assert means[0] == pytest.approx(np.mean(np.arange(90.0, 100.0) ** 2))  # the lowest signals come last
        assert len(deciles(signal[:12], signal[:12])[0]) == 2  # at least five in a bin
        assert len(deciles(column(), column())[0]) == 0


def make_truth(boxes: list[list[float]], classes: list[int], crowd: list[bool]) -> Instances:
    """True boxes of an image, as data.read_truth returns them."""
    return Instances(
        (100, 100),
        gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        gt_crowd=torch.tensor(crowd, dtype=torch.bool),
    )


class TestJudge:
    OBJECTS = make_truth(
        boxes=[[0.0, 0, 40, 40], [10.0, 0, 50, 40], [60.0, 0, 100, 40]],
        classes=[CUP, CUP, SPOON],
        crowd=[False, False, True],
    )

    def found(self, *rows: tuple[tuple[float, ...], int, float]) -> Instances:
        boxes, classes, scores = zip(*rows, strict=True)
        fields = {"pred_classes": torch.tensor(classes), "scores": torch.tensor(scores)}
        return Instances((100, 100), pred_boxes=Boxes(torch.tensor(boxes)), **fields)

    def test_by_hand(self):
        verdicts = name_mistakes(self.found(
            ((0.0, 0, 40, 40), CUP, 0.9),  # takes the first cup
            ((0.0, 0, 40, 40), CUP, 0.8),  # IoU 0.6 with the second cup, which is left: right
            ((10.0, 0, 50, 40), CUP, 0.7),  # both cups are taken
            ((10.0, 0, 50, 40), SPOON, 0.6),  # the class is wrong
            ((60.0, 0, 80, 20), SPOON, 0.5),  # within a crowd of spoons, though its IoU is 0.25
            ((60.0, 0, 80, 20), CUP, 0.4),  # a cup there is wrong
            ((0.0, 0, 40, 40), CUP, 0.2),  # not confident
        ), self.OBJECTS)  # fmt: skip
        assert verdicts == ["right", "right", "double", "class", None, "nothing"]

    def test_a_bad_box(self):
        """IoU 0.25 with the first cup is near it; IoU 0.0625 is not."""
        boxes = ((0.0, 0, 20, 20), CUP, 0.9), ((0.0, 0, 10, 10), CUP, 0.8)
        assert name_mistakes(self.found(*boxes), self.OBJECTS) == ["box", "nothing"]

    def test_the_surest_takes_the_object(self):
        one = self.OBJECTS[:1]
        loose, exact = ((0.0, 0, 40, 25), CUP, 0.9), ((0.0, 0, 40, 40), CUP, 0.8)
        assert name_mistakes(self.found(loose, exact), one) == ["right", "double"]

    def test_without_objects_all_are_wrong(self):
        nothing = make_truth([], [], [])
        assert name_mistakes(self.found(((0.0, 0, 40, 40), CUP, 0.9)), nothing) == ["nothing"]


class TestRows:
    NOISE, STRONGER = CONDITIONS.index(Condition("noise", 0.05)), CONDITIONS.index(Condition("noise", 0.1))
    IMAGES = ImageRows(
        image=column(1, 2, 3, 1, 2, 3, 1),
        condition=column(0, 0, 0, NOISE, NOISE, NOISE, STRONGER),
        residual=column(0.1, 0.2, 0.3, 0.4, 0.5, INF, 0.6),
        content_residual=column(0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0),
        confidence=column(0.9, 0.7, 0.8, 0.5, 0.6, 0.4, 0.3),
        AP=column(90.0, 80.0, 70.0, NAN, 30.0, 20.0, 10.0),
    )
    DETECTIONS = DetectionRows(
        image=column(1, 1, 2, 1),
        condition=column(0, 0, 0, NOISE),
        image_residual=column(0.1, 0.1, 0.2, 0.4),
        residual=column(0.01, 0.03, 0.02, 0.5),
        score=column(0.9, 0.5, 0.6, 0.4),
        verdict=column("right", "class", "right", "nothing"),
    )
    ACCURACY = Accuracy(50.0, 60.0, 50.0, None, None, None)

    def test_one_condition(self):
        clean = summarize_condition(CONDITIONS[0], self.IMAGES, self.DETECTIONS, self.ACCURACY)
        assert clean.residual == 0.2 and clean.confidence == 0.8 and clean.precision == pytest.approx(200 / 3)
        assert clean.accuracy == self.ACCURACY
        # The residual rises where AP falls, that of the detections falls with it; the confidences have the ranks 3 1 2.
        assert clean.correlations == pytest.approx(
            {"residual": 1.0, "residual of detections": -1.0, "confidence": 1 - 6 * 2 / 24}
        )
        noisy = summarize_condition(CONDITIONS[self.NOISE], self.IMAGES, self.DETECTIONS, self.ACCURACY)
        assert (noisy.corruption, noisy.strength, noisy.residual) == ("noise", 0.05, 0.5)  # the median of 0.4, 0.5, inf
        assert noisy.correlations == {  # of the two images that have objects; their second residuals are equal
            "residual": pytest.approx(1.0), "residual of detections": None, "confidence": pytest.approx(1.0)
        }  # fmt: skip
        unseen = summarize_condition(Condition("blur", 0.01), *self.emptied(), self.ACCURACY)
        assert unseen.precision is None and unseen.residual is None

    def emptied(self):
        images = ImageRows(*(x[-1:].copy() for x in vars(self.IMAGES).values()))
        images.condition[:] = CONDITIONS.index(Condition("blur", 0.01))
        images.residual[:] = INF
        return images, DetectionRows(*(x[:0] for x in vars(self.DETECTIONS).values()))

    def test_groups(self):
        groups = make_groups()
        assert list(groups) == ["clean", "blur", "noise", "contrast", "occlusion", "all"]
        assert len(groups["all"]) == 1 + sum(len(groups[name]) for name in list(groups)[1:-1])
        everything = summarize_group("all", groups["all"], self.IMAGES, self.DETECTIONS)
        assert (everything.images, everything.right, everything.wrong) == (6, 2, 2)
        # Ranks by falling residual: 6 5 4 3 1 2 against those of AP, 6 5 4 3 2 1.
        assert everything.correlations["residual"].value == pytest.approx(1 - 6 * 2 / 210)
        assert everything.separations["residual of detections"].value == 1.0
        assert everything.separations["residual"].value == pytest.approx(2.5 / 4)  # 0.1 = 0.1, 0.1 < 0.4, 0.2 > 0.1 ...
        assert everything.separations["confidence"].value == 1.0
        cells = {name: (x.count, x.residual) for name, x in everything.verdicts.items()}
        expected = {"right": (2, 0.015), "class": (1, 0.03), "nothing": (1, 0.5), "double": (0, None), "box": (0, None)}
        assert cells == {name: (count, pytest.approx(x) if x else None) for name, (count, x) in expected.items()}
        noise = summarize_group("noise", groups["noise"], self.IMAGES, self.DETECTIONS)
        assert noise.images == 3 and noise.separations["confidence"].value is None


@torch.no_grad()
def test_signals_of_the_states(small_model_of_one_step, make_inputs):
    """The numbers of `observe` against one image at a time, and against norms that are written out."""
    model = small_model_of_one_step
    inputs = [x | {"image_id": 3 + i} for i, x in enumerate(make_inputs(0, 0))]
    seen = list(observe(model, [inputs[:1], inputs[1:]], steps=3))
    assert [(x.image_id, x.condition) for x in seen] == [(i, c) for i in (3, 4) for c in CONDITIONS]
    for x in seen[::5]:
        single = inputs[x.image_id - 3]
        single = single | {"image": corrupt(single["image"], x.condition, seed=mix_seed(x.image_id))}
        (output,) = model.infer([single], steps=3)
        assert x.residual == pytest.approx(float(output["residual"]), rel=1e-3)
        torch.testing.assert_close(x.detections[3].scores, output["instances"].scores, rtol=1e-3, atol=1e-5)
        before, after = (model.walk([single], steps=n).trajectory.state().content[0].double() for n in (2, 3))
        queries = x.detections[3].queries[x.detections[3].scores >= 0.3].tolist()
        assert len(queries) >= 1
        expected = [float((after[q] - before[q]).norm() / after[q].norm()) for q in queries]
        assert x.query_residuals.tolist() == pytest.approx(expected, rel=1e-3)
        changes = sum(float((after[q] - before[q]).square().sum()) for q in queries)
        sizes = sum(float(after[q].square().sum()) for q in queries)
        assert x.content_residual == pytest.approx(math.sqrt(changes / sizes), rel=1e-3)
        sure = x.detections[3].scores[: len(queries)]
        assert x.confidence == pytest.approx(float(sure.mean()))


@pytest.fixture
def small_model_of_one_step(small_cfg, stir):
    """A small model whose scores lie on both sides of 0.3."""
    torch.manual_seed(0)
    model = build_model(small_cfg()).eval()
    stir(model, size=0.1)
    with torch.no_grad():
        model.decoder.refinement.class_branch[-1].bias.fill_(-0.5)
    return model


def test_without_confident_detections_the_best_one_stands(small_model_of_one_step, make_inputs):
    with torch.no_grad():
        small_model_of_one_step.decoder.refinement.class_branch[-1].bias.fill_(-9.0)
    (inputs,) = make_inputs(0)
    for x in observe(small_model_of_one_step, [[inputs | {"image_id": 1}]], steps=2):
        assert len(x.query_residuals) == 0
        assert x.confidence == pytest.approx(float(x.detections[2].scores[0])) and x.confidence < 0.3
        assert 0 < x.content_residual < INF


def test_no_detection_is_no_ap(small_model_of_one_step, make_inputs):
    """detectron2 has no AP of an image without detections: with objects in it, it is 0."""
    (inputs,) = make_inputs(0)
    seen = next(observe(small_model_of_one_step, [[inputs | {"image_id": 1}]], steps=2))
    seen.detections[2] = seen.detections[2][:0]
    rows = tabulate_images([seen], lambda *_: [Accuracy(*[None] * 6)], {1: TestJudge.OBJECTS}, 2)
    assert rows.AP.tolist() == [0.0]
    bare = make_truth([], [], [])
    rows = tabulate_images([seen], lambda *_: [Accuracy(*[None] * 6)], {1: bare}, 2)
    assert math.isnan(rows.AP[0])


class TestTool:
    pytestmark = IN_PROCESS

    @pytest.fixture
    def words(self, monkeypatch, tmp_path, tmp_path_factory, small_cfg, stir) -> list[str]:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path_factory.getbasetemp() / "signal_datasets"))
        cfg = small_cfg("MODEL.DEQDET.NUM_CLASSES", 8, "DATASETS.TRAIN", (), "DATASETS.TEST", ("shapes_seed44_3",),
                        "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
                        "OUTPUT_DIR", str(tmp_path / "trained"))  # fmt: skip
        (tmp_path / "small.yaml").write_text(cfg.dump())
        (tmp_path / "trained").mkdir()
        torch.manual_seed(0)
        model = build_model(cfg)
        stir(model, size=0.01)
        torch.save({"model": model.state_dict()}, tmp_path / "trained" / "model_final.pth")
        return ["--config-file", str(tmp_path / "small.yaml"), "--output", str(tmp_path / "signal")]

    def test_end_to_end(self, words, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("deqdet.measurement.rank_statistics.RESAMPLES", 20)  # for time
        residual_signal.main([*words, "--limit", "2"])
        folder = tmp_path / "signal"
        report = json.loads((folder / "residual_signal.json").read_text())
        assert (report["images"], report["steps"], len(report["conditions"])) == (2, 4, len(CONDITIONS))
        assert len(report["each_image"]["residual"]) == 2 * len(CONDITIONS)
        assert [row["name"] for row in report["groups"]] == list(make_groups())
        assert all(0 < value < 2 for value in report["each_image"]["residual"])
        text = (folder / "residual_signal.md").read_text()
        assert text in capsys.readouterr().out
        assert f"`deqdet-residual-signal --config-file {tmp_path}/small.yaml" in text
        assert len([line for line in text.splitlines() if line.startswith("| occlusion |")]) == 3 + 4
        assert cv2.imread(str(folder / "residual_signal.png")).std() > 5
        assert not list(folder.glob(".unfinished*"))
        first = report["each_image"]
        residual_signal.main([*words, "--limit", "2"])
        assert json.loads((folder / "residual_signal.json").read_text())["each_image"] == first

    @pytest.mark.parametrize("arguments, message", [
        (["--limit", "0"], "error: --limit must be at least 1, got 0"),
        (["--steps", "0"], "error: --steps must be at least 1, got 0"),
        (["MODEL.DEQDET.SOLVER.RETURN_BEST", "True"], "error: MODEL.DEQDET.SOLVER.RETURN_BEST is True: set it"),
        (["MODEL.DEQDET.DECODER", "RecurrentDecoder"], "error: MODEL.DEQDET.DECODER RecurrentDecoder has no residual"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "error: .*nowhere.pth"),
    ])  # fmt: skip
    def test_one_line_says_what_is_wrong(self, words, arguments, message):
        with pytest.raises(SystemExit, match=message) as end:
            residual_signal.main([*words, *arguments])
        assert "\n" not in str(end.value)

    def test_an_output_that_is_a_file(self, words, tmp_path):
        (tmp_path / "signal").write_text("")
        with pytest.raises(SystemExit, match="signal"):
            residual_signal.main(words)
