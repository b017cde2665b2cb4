"""The settings of the configs in a comparison: check their budgets, and carry rows of an ablation over to a config."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import get_cfg

from ..config import add_deqdet_config
from ..config_keys import plain_values
from ..engine import argument_parser, load_config, parse_arguments
from ..errors import UserError

BUDGET = ("DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH")
OWN_KEYS = {"OUTPUT_DIR": "--output", "SEED": "--seeds", "TEST.EVAL_PERIOD": "--eval-period"}

# Of ablations: the row with which the others are compared, and the sizes that scale with the images.
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
    """Return the settings that `arguments` of tools/train_net.py result in, by dotted key.

    OUTPUT_DIR is left out, because the folder may be moved.

    Raises:
        UserError: see `load_config`.
    """
    return _without_folder(plain_values(load_config(parse_training(arguments))))


def prepare_defaults() -> dict[str, object]:
    """Return the default settings."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    return _without_folder(plain_values(cfg))


def check_budgets(configs: dict[str, dict[str, object]]) -> None:
    """Check that all configs train on the same data for the same number of iterations.

    Args:
        configs: the settings of each config, by its name.

    Raises:
        UserError: two configs differ in a key of BUDGET, there is not exactly one test set, or detectron2 would rescale
            the budget.
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
    """Return the changes that an ablation's row makes, as KEY VALUE pairs to be applied to another config.

    A row changes the keys in which it differs from the DEFAULT_ROW beside it. SIZES_IN_PIXELS keep their ratio to the
    default row; for any other changed key, the other config must have the value of the default row.

    Args:
        config_file: the file of the row.
        scale_file: the file of the other config, for error messages.
        settings: the settings of the other config.

    Raises:
        UserError: there is no default row, or a change cannot be applied to the other config.
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
            there, start = settings.get(same), default.get(same)  # either may lack an option of a solver
            if there != start:
                raise UserError(
                    f"{config_file} changes {key} from {default.get(key)} to {row[key]}, but {same} is {there} in "
                    f"{scale_file}, not {start}: leave that config out, or add {same} {start} at the end of the command"
                )
        value = row[key] / default[key] * settings[key] if in_pixels else row[key]
        pairs += [key, repr(value)]
    return pairs


def _without_folder(settings: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key != "OUTPUT_DIR"}
