"""The rules of --data against numbers worked by hand, and against the configs that were tuned by hand."""

import pytest

from deqdet.engine.derivation import SIZES, DataFacts, choose_processes, derive_settings, measure_facts
from deqdet.model_zoo import get_config

# BCCD's 205 microscope pictures, and COCO's train2017.
CELLS = DataFacts(images=205, classes=3, width=640, height=480, objects=25, object_side=80)
COCO = DataFacts(images=118_287, classes=80, width=640, height=480, objects=39, object_side=20)


def derive(facts=CELLS, size="quick", given=None, processes=2, multi_step=False, on_cuda=False) -> dict:
    settings = derive_settings(
        facts, SIZES[size], given or {}, processes=processes, multi_step=multi_step, on_cuda=on_cuda
    )
    assert all(bool(setting.reason) == (setting.key not in (given or {})) for setting in settings)
    return {setting.key: setting.value for setting in settings}


def facts(**changes) -> DataFacts:
    return DataFacts(**{**vars(CELLS), **changes})


def test_bccd_is_near_the_config_that_was_tuned_for_it():
    cfg, found = get_config("quick/deqdet_photos"), derive()
    assert found["INPUT.MIN_SIZE_TEST"] == cfg.INPUT.MIN_SIZE_TEST == 240  # sqrt(76,800 / (4 / 3))
    assert found["INPUT.MAX_SIZE_TEST"] == cfg.INPUT.MAX_SIZE_TEST == 352  # 240 * 4 / 3 * 1.1
    assert found["INPUT.MIN_SIZE_TRAIN"] == tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (192, 208, 224, 240, 256)
    assert found["INPUT.MAX_SIZE_TRAIN"] == cfg.INPUT.MAX_SIZE_TRAIN
    assert found["INPUT.DETR_CROP.RESIZE"] == list(cfg.INPUT.DETR_CROP.RESIZE) == [200, 240, 280]
    assert found["INPUT.DETR_CROP.SIZE"] == list(cfg.INPUT.DETR_CROP.SIZE) == [160, 240]
    assert found["MODEL.DEQDET.NUM_QUERIES"] == cfg.MODEL.DEQDET.NUM_QUERIES == 40  # 37.5, in fours
    assert found["TEST.DETECTIONS_PER_IMAGE"] == cfg.TEST.DETECTIONS_PER_IMAGE
    assert found["SOLVER.IMS_PER_BATCH"] == cfg.SOLVER.IMS_PER_BATCH
    assert found["SOLVER.BASE_LR"] == cfg.SOLVER.BASE_LR
    assert found["MODEL.DEQDET.PERTURBATION.POSITION_SIZE"] == 7.5  # 25 * 240 / 800
    assert found["SOLVER.MAX_ITER"] == 2600  # 100 * 205 / 8 = 2562.5, in fifties
    assert found["SOLVER.WARMUP_ITERS"] == 50
    assert found["TEST.EVAL_PERIOD"] == found["SOLVER.CHECKPOINT_PERIOD"] == 520


def test_coco_with_the_resnet_is_the_papers_recipe():
    cfg, found = get_config("deqdet_r50_300q_2x"), derive(COCO, "r50", processes=4, multi_step=True, on_cuda=True)
    assert found["INPUT.MIN_SIZE_TEST"] == cfg.INPUT.MIN_SIZE_TEST == 800
    assert found["INPUT.MIN_SIZE_TRAIN"] == tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    assert found["INPUT.DETR_CROP.RESIZE"] == list(cfg.INPUT.DETR_CROP.RESIZE)
    assert found["INPUT.DETR_CROP.SIZE"] == list(cfg.INPUT.DETR_CROP.SIZE)
    assert found["SOLVER.IMS_PER_BATCH"] == cfg.SOLVER.IMS_PER_BATCH == 16
    assert found["SOLVER.BASE_LR"] == cfg.SOLVER.BASE_LR
    assert found["MODEL.DEQDET.PERTURBATION.POSITION_SIZE"] == cfg.MODEL.DEQDET.PERTURBATION.POSITION_SIZE == 25
    assert found["MODEL.DEQDET.NUM_QUERIES"] == 100
    assert found["SOLVER.MAX_ITER"] == 175_000  # 2,800,000 / 16
    assert found["SOLVER.STEPS"] == (116_666, 160_416)
    assert found["MODEL.DEVICE"] == "cuda"


@pytest.mark.parametrize("changes, side, longest", [
    ({"width": 480, "height": 640}, 240, 352),  # upright pictures are as those across
    ({"width": 300, "height": 300}, 272, 304),  # sqrt(76,800) = 277; 272 * 1.1 = 299
    ({"width": 1920, "height": 1080, "object_side": 200}, 208, 400),  # sqrt(43,200) = 207.8; 208 * 1.78 * 1.1 = 406.8
    ({"width": 128, "height": 96, "object_side": 16}, 160, 240),  # 5 / 3 of 96; 160 * 4 / 3 * 1.1 = 234.7
    ({"object_side": 24}, 320, 464),  # 16 / 24 of 480, above 240; 320 * 4 / 3 * 1.1 = 469
    ({"object_side": 8}, 368, 544),  # 960, but at most 360; 539.7
])  # fmt: skip
def test_image_sizes(changes, side, longest):
    found = derive(facts(**changes))
    assert (found["INPUT.MIN_SIZE_TEST"], found["INPUT.MAX_SIZE_TEST"]) == (side, longest)


@pytest.mark.parametrize("objects, queries", [(1, 16), (10.6, 16), (10.7, 20), (40, 60), (41, 64), (1000, 900)])
def test_queries(objects, queries):
    found = derive(facts(objects=objects))
    assert found["MODEL.DEQDET.NUM_QUERIES"] == found["TEST.DETECTIONS_PER_IMAGE"] == queries


@pytest.mark.parametrize("images, iterations", [
    (10, 2000),  # at least 16,000 images seen
    (237, 3000),  # 23,700 / 8 = 2962.5
    (5000, 4500),  # at most 36,000
])  # fmt: skip
def test_length_of_a_quick_training(images, iterations):
    """At 0.4 s an iteration, the longest takes 30 minutes."""
    assert derive(facts(images=images))["SOLVER.MAX_ITER"] == iterations


def test_a_rule_for_the_learning_rate_does_not_scale_it_twice():
    """The rule takes it from the reference batch, 8 here, to the batch of 32."""
    given = {"SOLVER.IMS_PER_BATCH": 32, "SOLVER.LR_RULE": "linear", "SOLVER.REFERENCE_BATCH": 8}
    assert derive(given=given)["SOLVER.BASE_LR"] == 1e-3
    assert derive(given={"SOLVER.IMS_PER_BATCH": 32})["SOLVER.BASE_LR"] == 2e-3  # 1e-3 * sqrt(32 / 8)


def test_given_values_decide_on_those_derived_from_them():
    given = {
        "INPUT.MIN_SIZE_TEST": 160, "MODEL.DEQDET.NUM_QUERIES": 25, "SOLVER.IMS_PER_BATCH": 32, "SOLVER.MAX_ITER": 40,
    }  # fmt: skip
    found = derive(given=given, multi_step=True)
    assert found | given == found
    assert found["INPUT.MAX_SIZE_TEST"] == 240  # 234.7
    assert found["MODEL.DEQDET.PERTURBATION.POSITION_SIZE"] == 5.0
    assert found["TEST.DETECTIONS_PER_IMAGE"] == 25
    assert found["SOLVER.BASE_LR"] == 0.002  # sqrt(4)
    assert found["SOLVER.WARMUP_ITERS"] == 4
    assert found["SOLVER.STEPS"] == (26, 36)
    assert found["TEST.EVAL_PERIOD"] == 200
    assert derive(given={"SOLVER.IMS_PER_BATCH": 16})["SOLVER.MAX_ITER"] == 1300  # as many images seen


def test_images_that_keep_their_size():
    found = derive(given={"INPUT.MIN_SIZE_TEST": 0})
    assert found["INPUT.MIN_SIZE_TEST"] == 0
    assert found["INPUT.MIN_SIZE_TRAIN"] == (384, 416, 448, 480, 512)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_very_short_training_has_a_possible_schedule(length):
    found = derive(given={"SOLVER.MAX_ITER": length}, multi_step=True)
    assert list(found["SOLVER.STEPS"]) == sorted(set(found["SOLVER.STEPS"]))
    assert all(0 < step < length for step in found["SOLVER.STEPS"])
    assert found["SOLVER.WARMUP_ITERS"] == 0


def test_without_labels_nothing_is_evaluated():
    assert derive(facts(evaluable=False))["TEST.EVAL_PERIOD"] == 0


@pytest.mark.parametrize("batch, cores, processes", [(8, 1, 1), (8, 2, 2), (8, 3, 2), (8, 64, 4), (6, 8, 2), (7, 8, 1)])
def test_processes(batch, cores, processes):
    assert choose_processes(batch, cores) == processes


def test_a_batch_is_divided_among_any_number_of_processes():
    assert derive(processes=3)["SOLVER.IMS_PER_BATCH"] == 9
    assert derive(size="r50", processes=3)["SOLVER.IMS_PER_BATCH"] == 12


def test_facts():
    def record(width, height, *boxes):
        return {"width": width, "height": height, "annotations": [{"bbox": x, "iscrowd": c} for x, c in boxes]}

    small, large = ([0, 0, 4, 9], 0), ([0, 0, 20, 20], 0)
    records = [record(100, 50, small), record(200, 50, large, large), record(300, 80, ([0, 0, 1, 1], 1))]
    found = measure_facts(records, 3, evaluable=True)
    assert (found.images, found.classes, found.width, found.height) == (3, 3, 200, 50)
    assert found.objects == pytest.approx(1.98)  # of 0, 1, 2; the crowd is none
    assert found.object_side == pytest.approx(6 + 0.2 * 14)  # of 6, 20, 20
