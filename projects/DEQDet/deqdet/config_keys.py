"""Dotted config keys, such as MODEL.DEQDET.NUM_CLASSES: list them, and find the value of one.

A config may be a CfgNode, or the dict that its YAML describes.
"""

from collections.abc import Iterator

import yaml

from detectron2.config import CfgNode


def flatten(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted keys of a config with their values, sections included."""
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")


def plain_values(cfg: CfgNode) -> dict[str, object]:
    """Return the values of a config by dotted key, without sections and as YAML has them: tuples become lists."""
    return {key: value for key, value in flatten(yaml.safe_load(cfg.dump())) if not isinstance(value, dict)}


def find_section(config: dict, key: str) -> tuple[dict, str]:
    """Return the section that contains a dotted key, and the key's last part.

    Raises:
        KeyError: there is no such section.
    """
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    return config, name


def read_key(config: dict, key: str) -> object:
    """Return the value of a dotted key.

    Raises:
        KeyError: there is no such key.
    """
    section, name = find_section(config, key)
    return section[name]
