"""Imports go one way, equilibrium/ knows no box, few functions read cfg."""

import ast
import re
import sys
from graphlib import TopologicalSorter

import pytest

from helpers.paths import ROOT

PACKAGE = ROOT / "projects" / "DEQDet" / "deqdet"

# A file or folder of deqdet/ may import those of the levels above its own, and a folder itself. The order is
# that of the design's data flow; a new module needs a place here.
LEVELS = (
    {"errors"},
    {"atomic", "extras", "version", "config", "config_keys", "equilibrium", "structures", "boxes", "quiet_imports",
     "precision"},
    {"config_file", "config_types", "contract", "drawing"},
    {"model_zoo", "plugins", "backbones", "queries", "layers", "perturbation"},
    {"decoders", "matcher"},
    {"criterion", "inference"},
    {"detector", "data"},
    {"checkpoints"},
    {"detections", "engine"},
    {"predictor"},
    {"measurement", "demo", "export"},
    {"predictions"},
    {"tools"},
    {""},  # deqdet/__init__.py
)
# Functions that may read a config.
CFG_READERS = re.compile(
    r"from_config|from_bottom_up|(add_deqdet|_add|build|register|prepare|check|find)_\w+"
    # A model file holds a config.
    r"|write_model_file|load_model_config|_portable_config|publish_checkpoint|merge_overrides"
    # A process of its own, which starts at a command line.
    r"|_measure_checkpoint"
)
CFG_ROOMS = {"engine", "config_keys", "model_zoo", "predictor", "tools"}  # whose work starts at a config


def python_files(root):
    files = sorted(root.rglob("*.py"))
    assert files, f"no Python file in {root}"
    return files


def module_name(path):
    """deqdet/layers/base.py -> deqdet.layers.base; a package is named by its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(PACKAGE)}


def imported_modules(path):
    """Absolute names of all that a file imports, anywhere in it; `from a import b` is a.b if that is ours."""
    name = module_name(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


def unit(module):
    """deqdet.layers.base -> layers; deqdet -> ''."""
    return (module.split(".") + [""])[1]


def is_ours(module):
    return module.split(".")[0] == "deqdet"


def level(module):
    return next((i for i, level in enumerate(LEVELS) if unit(module) in level), None)


def cfg_names(node):
    """Line numbers where `cfg` is named or a parameter is annotated as a config, outside the readers."""
    if isinstance(node, ast.FunctionDef) and CFG_READERS.fullmatch(node.name):
        return
    if isinstance(node, ast.Name) and node.id == "cfg":
        yield node.lineno
    if isinstance(node, ast.arg):
        annotation = ast.unparse(node.annotation) if node.annotation else ""
        if node.arg == "cfg" or re.search(r"\b(CfgNode|CN)\b", annotation):
            yield node.lineno
            return
    for child in ast.iter_child_nodes(node):
        yield from cfg_names(child)


def test_the_walk_sees_imports():
    seen = {name: set(imported_modules(path)) for name, path in MODULES.items()}
    layer = seen["deqdet.layers.adamixer"]
    assert {"torch", "detectron2.config", "deqdet.boxes", "deqdet.layers.base"} <= layer
    assert {"deqdet.layers", "deqdet.detector"} <= seen["deqdet"]
    assert "deqdet.equilibrium.solve" in seen["deqdet.equilibrium"]


def test_equilibrium_imports_torch_and_itself_only():
    foreign = []
    for path in python_files(PACKAGE / "equilibrium"):
        for name in imported_modules(path):
            top = name.split(".")[0]
            own = name == "deqdet.equilibrium" or name.startswith("deqdet.equilibrium.")
            if not own and top != "torch" and top not in sys.stdlib_module_names:
                foreign.append(f"{path.name}: {name}")
    assert not foreign, "\n".join(foreign)


def test_every_module_has_a_level():
    assert [name for name in MODULES if level(name) is None] == []


def test_imports_go_one_way():
    wrong = []
    for name, path in MODULES.items():
        for other in filter(is_ours, imported_modules(path)):
            if unit(other) != unit(name) and level(other) >= level(name):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle():
    graph = {name: set(filter(is_ours, imported_modules(path))) for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_cfg_is_read_in_few_places():
    found = []
    for name, path in MODULES.items():
        if unit(name) not in CFG_ROOMS:
            found += [f"{name}, line {line}" for line in cfg_names(ast.parse(path.read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source, lines", [
    ("def from_config(cls, cfg):\n    return [cfg.A for _ in range(3)]", []),
    ("def forward(self, x):\n    return cfg.A", [2]),
    ("def __init__(self, cfg):\n    self.a = cfg.A", [1, 2]),
    ("def encode(self, options: CfgNode):\n    pass", [1]),
    ("def rebuild_layer(\n    cfg\n):\n    pass", [2]),
    ("cfg = get_cfg()", [1]),
])  # fmt: skip
def test_the_search_for_cfg(source, lines):
    assert list(cfg_names(ast.parse(source))) == lines
