"""What the configs of a comparison set, key by key: one budget for all, and rows of an ablation at another scale."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import get_cfg

from ..config import add_deqdet_config
from ..engine import argument_parser, load_config, parse_arguments
from ..errors import UserError
from ..model_zoo import flatten

BUDGET = ("DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH")
OWN_KEYS = {"OUTPUT_DIR": "--output", "SEED": "--seeds", "TEST.EVAL_PERIOD": "--eval-period"}

# For ablations.
DEFAULT_ROW = "default.yaml"
SIZES_IN_PIXELS = ("MODEL.DEQDET.PERTURBATION.POSITION_SIZE",)
# For each section, the keys that decide whether the section's other keys have an effect.
SWITCHES = {
    "MODEL.DEQDET.ADAMIXER": ("MODEL.DEQDET.REFINEMENT_LAYER",),
    "MODEL.DEQDET.EQUILIBRIUM": ("MODEL.DEQDET.DECODER",),
    "MODEL.DEQDET.PERTURBATION": ("MODEL.DEQDET.DECODER", "MODEL.DEQDET.PERTURBATION.KIND"),
}


def parse_training(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse arguments of tools/train_net.py."""
    return parse_arguments(argument_parser(), arguments)


def prepare_settings(arguments: Sequence[str]) -> dict[str, object]:
    """Every dotted key of the config that tools/train_net.py gets from `arguments`, but OUTPUT_DIR, which may move.

    Raises:
        UserError: as `load_config`.
    """
    return _settings(load_config(parse_training(arguments)))


def prepare_defaults() -> dict[str, object]:
    """The settings of a config that sets nothing."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    return _settings(cfg)


def check_budgets(configs: dict[str, dict[str, object]]) -> None:
    """Check that all configs train on the same data for the same number of iterations.

    Args:
        configs: the settings of each, by its name.

    Raises:
        UserError: two differ in a key of BUDGET; there is not one test set; or detectron2 would change the budget.
    """
    (first, expected), *_ = configs.items()
    for name, settings in configs.items():
        for key in BUDGET:
            if settings[key] != expected[key]:
                raise UserError(
                    f"{key} is {expected[key]} in {first}, but {settings[key]} in {name}: "
                    "give one value for all configs at the end of the command"
                )
        if settings["SOLVER.REFERENCE_WORLD_SIZE"] > 0:
            raise UserError(f"{name}: SOLVER.REFERENCE_WORLD_SIZE rescales the budget: set it to 0")
    if len(expected["DATASETS.TEST"]) != 1:
        raise UserError(f"DATASETS.TEST is {expected['DATASETS.TEST']}: name the one set to compare on")


def carry_over(config_file: str, scale_file: str, settings: dict[str, object]) -> list[str]:
    """What a row of an ablation changes, as KEY VALUE pairs that make the same row of another config.

    A row changes the keys in which it differs from the DEFAULT_ROW beside it. SIZES_IN_PIXELS keep their ratio to the
    default row's; any other change needs the default row's value as its starting point.

    Args:
        config_file: the row.
        scale_file: the other config, for messages.
        settings: those of the other config.

    Raises:
        UserError: there is no default row, or the row means nothing on the other config.
    """
    default_file = Path(config_file).with_name(DEFAULT_ROW)
    if not default_file.is_file():
        raise UserError(f"--scale needs {default_file}, the row that {config_file} is compared with: add that file")
    row, default = (prepare_settings(["--config-file", str(file)]) for file in (config_file, default_file))
    pairs = []
    for key in row:
        if row[key] == default.get(key) or key in OWN_KEYS:
            continue
        in_pixels = key in SIZES_IN_PIXELS and default[key] > 0
        for same in (*SWITCHES.get(key.rpartition(".")[0], ()), *(() if in_pixels else (key,))):
            there, start = settings.get(same), default.get(same)  # an option of a solver may stand in one of them only
            if there != start:
                raise UserError(
                    f"{config_file} changes {key} from {default.get(key)} to {row[key]}, but {same} is {there} in "
                    f"{scale_file}, not {start}: leave that config out, or add {same} {start} at the end of the command"
                )
        value = row[key] / default[key] * settings[key] if in_pixels else row[key]
        pairs += [key, repr(value)]
    return pairs


def _settings(node: dict) -> dict[str, object]:
    keys = flatten(node)
    return {key: _as_json(value) for key, value in keys if key != "OUTPUT_DIR" and not isinstance(value, dict)}


def _as_json(value: object) -> object:
    """The same value as it comes back from a JSON file, which has no tuples."""
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
