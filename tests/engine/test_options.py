"""Every value of a config is checked before a data set is touched, and the message names its key and its range."""

import math

import pytest
import yaml

from detectron2.config import CfgNode, get_cfg

from deqdet import Predictor, add_deqdet_config, model_zoo
from deqdet.config_keys import find_section, flatten
from deqdet.decoders import build_solver
from deqdet.engine import (
    Trainer,
    UserError,
    argument_parser,
    check_options,
    configuration,
    parse_arguments,
    run,
    setup,
    trainer,
)
from deqdet.engine.options import RANGES
from deqdet.tools import compare

from helpers.engine_toy import IN_PROCESS, parse

pytestmark = IN_PROCESS


def make_cfg():
    cfg = get_cfg()
    add_deqdet_config(cfg)
    return cfg


def leaves(cfg):
    """Keys with their values, without sections; an open section counts as a key."""
    return {
        key: value
        for key, value in flatten(cfg)
        if not isinstance(value, CfgNode) or key == "MODEL.DEQDET.SOLVER.OPTIONS"
    }


OURS = {key: value for key, value in leaves(make_cfg()).items() if key not in leaves(get_cfg())}
# Of each type of a default, values that are wrong for every key of ours.
WRONG_BY_TYPE = {
    int: [None, -1, "many", 1.5, True, [3]],
    float: [None, math.nan, math.inf, -math.inf, -1.0, "much", True],
    bool: [None, "maybe", 3, 0.0],
    str: [None, "nonsense", 3, True],
    list: [None, "p2", [None], [math.nan], [-1], [[]], {"a": 1}],
    CfgNode: [None, 3, {"WINDOW": math.nan}, {"WINDOW": [[]]}],
    type(None): [math.nan, -1.0, -1, "little", [1.0]],
}
ZERO_IS_WRONG = """
MODEL.DEQDET.NUM_CLASSES MODEL.DEQDET.NUM_QUERIES MODEL.DEQDET.HIDDEN_DIM MODEL.DEQDET.NUM_LAYERS
MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS
MODEL.DEQDET.ADAMIXER.NUM_GROUPS MODEL.DEQDET.ADAMIXER.NUM_HEADS MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM
MODEL.DEQDET.SPARSE_RCNN.POOLER_RESOLUTION MODEL.DEQDET.SPARSE_RCNN.DYNAMIC_DIM
MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS MODEL.DEQDET.SPARSE_RCNN.FEEDFORWARD_DIM
MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS MODEL.DEQDET.EQUILIBRIUM.GRADIENT_STEPS
MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL MODEL.DEQDET.SOLVER.MEMORY
MODEL.DEQDET.INSIGHT.NUM_IMAGES MODEL.DEQDET.INSIGHT.POWER_ITERATIONS
MODEL.SWIN.EMBED_DIM MODEL.SWIN.WINDOW_SIZE SOLVER.MAX_ITER SOLVER.IMS_PER_BATCH SOLVER.CHECKPOINT_PERIOD
TEST.DETECTIONS_PER_IMAGE INPUT.MAX_SIZE_TRAIN INPUT.MAX_SIZE_TEST MODEL.FPN.OUT_CHANNELS
MODEL.RESNETS.STEM_OUT_CHANNELS MODEL.RESNETS.RES2_OUT_CHANNELS SOLVER.NUM_DECAYS
""".split()
ZERO_POINT_ZERO_IS_WRONG = """
SOLVER.BASE_LR SOLVER.DECODER_LR_MULTIPLIER SOLVER.BACKBONE_LR_MULTIPLIER SOLVER.BACKBONE_NORM_LR_MULTIPLIER
SOLVER.BIAS_LR_FACTOR SOLVER.CLIP_GRADIENTS.CLIP_VALUE SOLVER.GAMMA
MODEL.DEQDET.SOLVER.DAMPING MODEL.DEQDET.EQUILIBRIUM.GRADIENT_DAMPING
""".split()
MORE = [
    ("MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 10_001), ("MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS", 10_001),
    ("MODEL.DEQDET.PERTURBATION.PROBABILITY", 1.1), ("MODEL.DEQDET.LOSS.FOCAL_ALPHA", 1.5),
    ("MODEL.DEQDET.SOLVER.DAMPING", 1.5), ("MODEL.DEQDET.EQUILIBRIUM.GRADIENT_DAMPING", 1.01),
    ("MODEL.DEQDET.NUM_QUERIES", 10**9), ("MODEL.DEQDET.NUM_CLASSES", 10**9), ("MODEL.DEQDET.HIDDEN_DIM", 10**9),
    ("MODEL.DEQDET.ADAMIXER.NUM_HEADS", 10**9), ("MODEL.DEQDET.INSIGHT.POWER_ITERATIONS", 1),
    ("SOLVER.AMP.PRECISION", "float32"), ("SOLVER.AMP.PRECISION", "half"), ("SOLVER.EMA.DECAY", 1.0),
    ("SOLVER.EMA.DECAY", -0.1), ("SOLVER.ACCUMULATION_STEPS", 0), ("SOLVER.LR_RULE", "root"),
    ("SOLVER.REFERENCE_BATCH", -16),
    ("MODEL.DEQDET.NECK.KERNEL_SIZE", 2), ("MODEL.SWIN.DROP_PATH_RATE", 1.0), ("MODEL.SWIN.DEPTHS", [2, 0]),
    ("MODEL.DEQDET.IN_FEATURES", []), ("MODEL.DEQDET.IN_FEATURES", ["p2", "p2"]),
    ("MODEL.RESNETS.BASIC_BLOCKS", [1, 1, 1, 1, 1]), ("MODEL.RESNETS.BASIC_BLOCKS", []),
    ("MODEL.RESNETS.NORM", "BatchNorm"), ("MODEL.RESNETS.NORM", None), ("MODEL.FPN.NORM", "Group"),
    ("MODEL.RESNETS.DEPTH", 42), ("MODEL.RESNETS.OUT_FEATURES", ["res9"]), ("MODEL.RESNETS.RES5_DILATION", 3),
    ("MODEL.BACKBONE.NAME", "resnet50"), ("MODEL.BACKBONE.FREEZE_AT", -1), ("MODEL.FPN.FUSE_TYPE", "max"),
    ("MODEL.META_ARCHITECTURE", "DETR"), ("MODEL.WEIGHTS", None), ("MODEL.MASK_ON", True), ("MODEL.KEYPOINT_ON", True),
    ("MODEL.DEVICE", "gpu"), ("MODEL.DEVICE", "cuda:-1"), ("MODEL.DEVICE", "cuda:x"), ("MODEL.DEVICE", ""),
    ("MODEL.DEVICE", "meta"), ("MODEL.DEVICE", None), ("MODEL.DEVICE", "cpu:0 "),
    ("MODEL.LOAD_PROPOSALS", True), ("DATASETS.PROPOSAL_FILES_TRAIN", ["a.pkl"]),
    ("DATASETS.PROPOSAL_FILES_TEST", ["a.pkl"]), ("DATASETS.REGISTER", [["name", "file.json"]]),
    ("DATASETS.REGISTER", [["", "file.json", "images"]]), ("DATASETS.REGISTER", ["name"]),
    ("DATASETS.TRAIN", "name"), ("DATASETS.TRAIN", [3]), ("DATASETS.TEST", [[]]),
    ("MODEL.PIXEL_MEAN", [0.0]), ("MODEL.PIXEL_MEAN", [math.nan, 0.0, 0.0]), ("MODEL.PIXEL_STD", [1.0, 1.0]),
    ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0]), ("MODEL.PIXEL_STD", [1.0, math.inf, 1.0]),
    ("INPUT.FORMAT", "rgb"), ("INPUT.FORMAT", "L"), ("INPUT.AUGMENTATION", "3x"), ("INPUT.RANDOM_FLIP", "diagonal"),
    ("INPUT.CROP.ENABLED", True), ("INPUT.DETR_CROP.SIZE", [384]), ("INPUT.DETR_CROP.SIZE", [0, 600]),
    ("INPUT.DETR_CROP.RESIZE", []), ("INPUT.DETR_CROP.RESIZE", [400, -1]), ("INPUT.MIN_SIZE_TRAIN", []),
    ("INPUT.MIN_SIZE_TRAIN", [0]), ("INPUT.MIN_SIZE_TRAIN", [800.5]), ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "all"),
    ("INPUT.MIN_SIZE_TEST", -1), ("INPUT.MAX_SIZE_TEST", 10**9), ("INPUT.MAX_SIZE_TRAIN", None),
    ("SOLVER.BASE_LR", -0.1), ("SOLVER.BASE_LR", math.nan), ("SOLVER.BASE_LR", math.inf), ("SOLVER.BASE_LR", None),
    ("SOLVER.WEIGHT_DECAY", -0.1), ("SOLVER.WEIGHT_DECAY", math.nan), ("SOLVER.WEIGHT_DECAY_BIAS", -1.0),
    ("SOLVER.GAMMA", -0.1), ("SOLVER.WARMUP_FACTOR", 1.5), ("SOLVER.WARMUP_FACTOR", math.nan),
    ("SOLVER.WARMUP_ITERS", -1), ("SOLVER.WARMUP_METHOD", "quadratic"), ("SOLVER.LR_SCHEDULER_NAME", "Cosine"),
    ("SOLVER.STEPS", [0]), ("SOLVER.STEPS", [1.5]), ("SOLVER.STEPS", ["a"]), ("SOLVER.MAX_ITER", -5),
    ("SOLVER.MAX_ITER", None), ("SOLVER.IMS_PER_BATCH", -2), ("SOLVER.CHECKPOINT_PERIOD", -1),
    ("SOLVER.CHECKPOINT_PERIOD", None), ("SOLVER.REFERENCE_WORLD_SIZE", -1),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"), ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", -1.0),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", math.nan), ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 0.0),
    ("TEST.EVAL_PERIOD", -1), ("TEST.EVAL_PERIOD", None), ("TEST.DETECTIONS_PER_IMAGE", -1),
    ("TEST.EXPECTED_RESULTS", [["bbox", "AP"]]), ("TEST.PRECISE_BN.NUM_ITER", 0),
    ("DATALOADER.NUM_WORKERS", -1), ("DATALOADER.SAMPLER_TRAIN", "Sampler"), ("DATALOADER.REPEAT_THRESHOLD", -1.0),
    ("OUTPUT_DIR", ""), ("OUTPUT_DIR", None), ("SEED", 2**40), ("SEED", None), ("VIS_PERIOD", -1),
    ("FLOAT32_PRECISION", "low"), ("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler"),
    ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"),
]  # fmt: skip
WRONG = [
    *((key, value) for key, default in OURS.items() for value in WRONG_BY_TYPE[type(default)]),
    *((key, 0) for key in ZERO_IS_WRONG),
    *((key, 0.0) for key in ZERO_POINT_ZERO_IS_WRONG),
    *MORE,
]
# Values that are wrong together, upon the small detector of quick/deqdet_shapes; the key that the message names first.
TOGETHER = [
    ("MODEL.DEQDET.HIDDEN_DIM", {"MODEL.DEQDET.HIDDEN_DIM": 72}),  # the channel mapper's 32
    ("MODEL.DEQDET.HIDDEN_DIM", {"MODEL.DEQDET.ADAMIXER.NUM_GROUPS": 5}),
    ("MODEL.DEQDET.HIDDEN_DIM", {"MODEL.DEQDET.ADAMIXER.NUM_HEADS": 3}),
    ("MODEL.DEQDET.HIDDEN_DIM", {
        "MODEL.DEQDET.REFINEMENT_LAYER": "SparseRCNNLayer", "MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS": 5,
    }),
    ("MODEL.DEQDET.HIDDEN_DIM", {
        "MODEL.DEQDET.REFINEMENT_LAYER": "SparseRCNNLayer", "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.DEQDET.SPARSE_RCNN.ATTENTION": "embedding", "MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS": 4,
        "MODEL.DEQDET.HIDDEN_DIM": 68, "MODEL.FPN.OUT_CHANNELS": 68,
    }),
    ("MODEL.DEQDET.IN_FEATURES", {"MODEL.DEQDET.IN_FEATURES": ["p2", "p9"]}),
    ("MODEL.DEQDET.IN_FEATURES", {"MODEL.RESNETS.OUT_FEATURES": ["res2", "res3"]}),
    ("MODEL.RESNETS.OUT_FEATURES", {"MODEL.RESNETS.BASIC_BLOCKS": [1, 1]}),
    ("MODEL.FPN.OUT_CHANNELS", {"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}),
    ("MODEL.FPN.IN_FEATURES", {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS": 64, "MODEL.RESNETS.DEPTH": 50,
    }),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", {
        "MODEL.BACKBONE.NAME": "build_resnet_channel_mapper_backbone", "MODEL.RESNETS.DEPTH": 18,
    }),
    ("MODEL.SWIN.NUM_HEADS", {
        "MODEL.BACKBONE.NAME": "build_swin_channel_mapper_backbone", "MODEL.SWIN.DEPTHS": [2, 2],
    }),
    ("MODEL.SWIN.NUM_HEADS", {
        "MODEL.BACKBONE.NAME": "build_swin_channel_mapper_backbone", "MODEL.SWIN.EMBED_DIM": 32,
    }),
    ("MODEL.TIMM.NAME", {"MODEL.BACKBONE.NAME": "build_timm_channel_mapper_backbone"}),
    ("MODEL.TIMM.NAME", {"MODEL.TIMM.NAME": "resnet50"}),
    ("MODEL.TIMM.PRETRAINED", {
        "MODEL.BACKBONE.NAME": "build_timm_channel_mapper_backbone", "MODEL.TIMM.NAME": "resnet50",
        "MODEL.TIMM.PRETRAINED": True, "MODEL.TIMM.WEIGHTS": "resnet50.safetensors",
    }),
    ("MODEL.TIMM.OUT_INDICES", {
        "MODEL.BACKBONE.NAME": "build_timm_channel_mapper_backbone", "MODEL.TIMM.NAME": "resnet50",
        "MODEL.TIMM.OUT_INDICES": [3, 2],
    }),
    ("MODEL.BACKBONE.FREEZE_AT", {"MODEL.BACKBONE.FREEZE_AT": 6}),
    ("MODEL.DEQDET.FIX_BN_STATISTICS", {"MODEL.DEQDET.FIX_BN_STATISTICS": True, "MODEL.RESNETS.NORM": "GN"}),
    ("MODEL.DEQDET.NUM_LAYERS", {"MODEL.DEQDET.DECODER": "RecurrentDecoder", "MODEL.DEQDET.NUM_LAYERS": 1}),
    ("MODEL.DEQDET.INSIGHT.PERIOD", {"MODEL.DEQDET.DECODER": "StackedDecoder", "MODEL.DEQDET.INSIGHT.PERIOD": 5}),
    ("MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT", {"MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS": 2}),
    ("MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION", {
        "MODEL.DEQDET.EQUILIBRIUM.USE_INIT_LAYER": False, "MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION": 0,
    }),
    ("MODEL.DEQDET.SOLVER.MEMORY", {"MODEL.DEQDET.SOLVER.NAME": "Anderson", "MODEL.DEQDET.SOLVER.MEMORY": 1}),
    ("MODEL.DEQDET.SOLVER.OPTIONS", {"MODEL.DEQDET.SOLVER.OPTIONS.WINDOW": 3}),
    ("MODEL.DEQDET.SOLVER.OPTIONS", {"MODEL.DEQDET.SOLVER.OPTIONS.DAMPING": 2.0}),
    ("MODEL.DEQDET.SOLVER.OPTIONS", {"MODEL.DEQDET.SOLVER.OPTIONS.DAMPING": "much"}),
    ("SOLVER.STEPS", {"SOLVER.STEPS": (8, 4)}),
    ("SOLVER.STEPS", {"SOLVER.STEPS": (100,), "SOLVER.MAX_ITER": 100, "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR"}),
    ("SOLVER.BASE_LR_END", {"SOLVER.BASE_LR_END": 1.0}),
    ("SOLVER.ACCUMULATION_STEPS", {"SOLVER.ACCUMULATION_STEPS": 3, "SOLVER.IMS_PER_BATCH": 16}),
    ("SOLVER.LR_RULE", {"SOLVER.LR_RULE": "linear", "SOLVER.REFERENCE_BATCH": 0}),
    ("SOLVER.LR_RULE", {
        "SOLVER.LR_RULE": "sqrt", "SOLVER.REFERENCE_BATCH": 16, "SOLVER.REFERENCE_WORLD_SIZE": 2,
    }),
    ("INPUT.DETR_CROP.SIZE", {"INPUT.DETR_CROP.SIZE": [600, 384]}),
    ("INPUT.MIN_SIZE_TRAIN", {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """Whoever touches a data set fails, with no UserError."""

    def touch(*_, **__):
        raise AssertionError("a data set was touched")

    monkeypatch.setattr(configuration, "prepare_datasets", touch)
    monkeypatch.setattr(configuration, "check_datasets", touch)
    monkeypatch.setattr(trainer, "prepare_datasets", touch)


def nested(key, value):
    """{"A": {"B": value}} of "A.B"."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def message_of(args):
    with pytest.raises(UserError) as error:
        setup(args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_key_of_ours_has_a_range():
    assert set(OURS) <= set(RANGES)
    assert set(RANGES) <= set(leaves(make_cfg()))


def test_the_table_of_wrong_values_is_large():
    assert len(WRONG) >= 400 and {key for key, _ in WRONG} >= set(OURS)


@pytest.mark.parametrize("key, value", WRONG, ids=lambda x: str(x)[-40:])
def test_a_wrong_value_is_one_line(tmp_path, key, value):
    config = tmp_path / "wrong.yaml"
    config.write_text(yaml.safe_dump(nested(key, value) | {"VERSION": 2}))
    assert key in message_of(parse(str(config), "OUTPUT_DIR", tmp_path / "out" if key != "OUTPUT_DIR" else value))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key, values", TOGETHER, ids=lambda x: str(x)[-40:])
def test_values_that_do_not_fit_together(tmp_path, key, values):
    pairs = [str(word) for pair in values.items() for word in pair]
    message = message_of(parse("quick/deqdet_shapes", *pairs, "OUTPUT_DIR", tmp_path / "out"))
    assert message.startswith(key)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "value", ["nan", "float('nan')", ".nan", "NaN", "1e999", "-1e999", "inf", "-inf", "1e400", "None"]
)
def test_no_way_to_say_nan_on_the_command_line(value):
    for key in ("SOLVER.BASE_LR", "MODEL.DEQDET.PERTURBATION.POSITION_SIZE", "SOLVER.WEIGHT_DECAY_NORM"):
        if (key, value) == ("SOLVER.WEIGHT_DECAY_NORM", "None"):
            continue
        assert key in message_of(parse("quick/deqdet_shapes", key, value))


@pytest.mark.parametrize("key, value, message", [
    ("MODEL.DEQDET.NUM_QUERIES", "0", "is 0: it must be an integer from 1 to 100,000"),
    ("MODEL.DEQDET.PERTURBATION.PROBABILITY", "-0.5", "is -0.5: it must be a finite number of at least 0 "
     "and at most 1"),
    ("SOLVER.BASE_LR", "-1.0", "is -1.0: it must be a finite number above 0"),
    ("MODEL.DEQDET.IN_FEATURES", "[]", "is []: it must be a list of at least 1 value, each a non-empty string, "
     "without duplicates"),
    ("MODEL.PIXEL_STD", "[1.0]", "is [1.0]: it must be a list of 3 values, each a finite number above 0"),
    ("MODEL.DEQDET.PERTURBATION.KIND", "more", "is 'more': it must be one of multi-step, one-step, zero-step, none"),
    ("MODEL.LOAD_PROPOSALS", "True", "is True: it must be False: files of proposals are pickles, which can run code"),
    ("MODEL.DEVICE", "gpu", "is 'gpu': it must be cpu, cuda, cuda:N with N below the number of GPUs, or mps on a "
     "machine with it"),
])  # fmt: skip
def test_the_message_says_the_range(key, value, message):
    assert message_of(parse("quick/deqdet_shapes", key, value)) == f"{key} {message}"


def test_the_message_lists_what_plugins_may_add_to():
    message = message_of(parse("quick/deqdet_shapes", "MODEL.DEQDET.SOLVER.NAME", "Newton"))
    assert message.startswith("MODEL.DEQDET.SOLVER.NAME is 'Newton': it must be one of Anderson, Broyden, Fixed")
    assert message.endswith("(or a part of your own, given by --plugin)")


@pytest.mark.parametrize("spec, keys", [
    ("anderson4", "NAME Anderson MODEL.DEQDET.SOLVER.MEMORY 4"),
    ("broyden", "NAME Broyden"),
    ("plain(damping=0.5)", "NAME FixedPointIteration MODEL.DEQDET.SOLVER.DAMPING 0.5"),
])  # fmt: skip
def test_a_short_form_of_a_solver_is_told_as_keys(spec, keys):
    """What the message says to write is what --solver takes the short form for."""
    message = message_of(parse("quick/deqdet_shapes", "MODEL.DEQDET.SOLVER.NAME", spec))
    assert message.startswith(f"MODEL.DEQDET.SOLVER.NAME is '{spec}': it must be one of Anderson, Broyden, Fixed")
    assert message.endswith(f"; for {spec}, write MODEL.DEQDET.SOLVER.{keys}")
    cfg = model_zoo.get_config("quick/deqdet_shapes", message.partition("write ")[2].split())
    check_options(cfg)
    assert build_solver(cfg) == build_solver(make_cfg(), spec)


@pytest.mark.parametrize("name", model_zoo.list_configs())
def test_every_config_of_the_model_zoo_passes(name):
    check_options(model_zoo.get_config(name))


def test_values_at_the_ends_of_their_ranges_pass():
    check_options(model_zoo.get_config("quick/deqdet_shapes", [
        "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", "10000", "MODEL.DEQDET.PERTURBATION.PROBABILITY", "1.0",
        "MODEL.DEQDET.PERTURBATION.POSITION_SIZE", "0.0", "MODEL.DEQDET.EQUILIBRIUM.GRADIENT_DAMPING", "1.0",
        "SOLVER.WEIGHT_DECAY", "0.0", "SOLVER.WEIGHT_DECAY_NORM", "None", "TEST.EVAL_PERIOD", "0", "SEED", "-1",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "1e999", "INPUT.MIN_SIZE_TEST", "0", "MODEL.DEQDET.NUM_LAYERS", "1",
        "MODEL.DEVICE", "cuda", "MODEL.DEQDET.SOLVER.MEMORY", "1",
    ]))  # fmt: skip


def test_the_predictor_checks_too():
    overrides = ["MODEL.WEIGHTS", "gone.pth", "MODEL.DEQDET.SOLVER.RTOL", "-1.0"]
    with pytest.raises(UserError, match="MODEL.DEQDET.SOLVER.RTOL is -1.0: it must be a finite number of at least 0"):
        Predictor.from_config("quick/deqdet_shapes", overrides=overrides)


@pytest.mark.parametrize("key, value, allowed", [
    ("MODEL.DEQDET.INSIGHT.PERIOD", -1, "an integer of at least 0"),
    ("MODEL.DEQDET.INSIGHT.NUM_IMAGES", 0, "an integer of at least 1"),
    ("MODEL.DEQDET.INSIGHT.POWER_ITERATIONS", 1, "an integer from 2 to 1,000"),
    ("MODEL.DEQDET.SOLVER.NAME", "Newton", "one of Anderson, Broyden, FixedPointIteration .*"),
    ("MODEL.DEQDET.SOLVER.DAMPING", 1.5, "a finite number above 0 and at most 1"),
    ("MODEL.DEQDET.SOLVER.DAMPING", math.nan, "a finite number above 0 and at most 1"),
    ("MODEL.DEQDET.SOLVER.MEMORY", -5, "an integer from 1 to 10,000"),  # which the chosen solver does not read
    ("MODEL.DEQDET.SOLVER.REGULARIZATION", -1.0, "a finite number of at least 0"),
    ("INPUT.MAX_IMAGE_PIXELS", 0, "an integer from 1 to 178,956,970"),
    ("INPUT.MAX_IMAGE_PIXELS", 200_000_000, "an integer from 1 to 178,956,970"),
    ("INPUT.AUGMENTATION", "4x", "1x or 2x"),
    ("INPUT.RANDOM_FLIP", "up", "one of none, horizontal, vertical, both"),
    ("INPUT.CROP.ENABLED", True, "False: use INPUT.AUGMENTATION and INPUT.DETR_CROP"),
    ("DATASETS.BOX_FORMAT", "cxcywh", "one of check, xywh, xyxy, xywh_relative, xyxy_relative"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full", "one of full_model, value, norm"),
])  # fmt: skip
def test_the_trainer_checks_too(key, value, allowed):
    """In a script, no command line has checked the config."""
    cfg = model_zoo.get_config("quick/deqdet_shapes")
    section, name = find_section(cfg, key)
    section[name] = value
    with pytest.raises(UserError, match=f"^{key} is {value!r}: it must be {allowed}$"):
        Trainer(cfg)


@pytest.mark.parametrize("words, message", [
    (["--num-gpus", "0"], "--num-gpus is 0: it must be an integer of at least 1"),
    (["--num-gpus", "-1"], "--num-gpus is -1: it must be an integer of at least 1"),
    (["--num-machines", "0"], "--num-machines is 0: it must be an integer of at least 1"),
    (["--machine-rank", "1"], "--machine-rank is 1: it must be from 0 to 0, below --num-machines"),
    (["--machine-rank", "-1"], "--machine-rank is -1: it must be from 0 to 0, below --num-machines"),
    (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank is 2: it must be from 0 to 1"),
])  # fmt: skip
def test_numbers_of_processes(words, message):
    args = parse_arguments(argument_parser(), ["--config-file", "quick/deqdet_shapes", *words])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(setup, args)


def test_numbers_of_processes_of_a_comparison(tmp_path):
    message = "^error: --num-gpus is 0: it must be an integer of at least 1"
    with pytest.raises(SystemExit, match=message):
        compare.main(["quick/deqdet_shapes", "--num-gpus", "0", "--output", str(tmp_path / "out")])
