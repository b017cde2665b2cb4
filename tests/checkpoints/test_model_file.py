"""One file is a model: what is written comes back, and nothing else is taken for a model."""

import json
import re
import struct
import sys
from functools import reduce
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from detectron2.config import get_cfg

from deqdet import UserError, add_deqdet_config
from deqdet.checkpoints import (
    Checkpointer,
    CheckpointError,
    CompleteCheckpointer,
    is_model_file,
    load_model_config,
    read_entries,
    read_model_file,
    read_model_header,
    resolve_file,
    write_model_file,
)
from deqdet.checkpoints.model_file import LOCAL_KEYS, _checksum
from deqdet.extras import how_to_install
from deqdet.version import __version__

NAMES = ["cat", "Hündin", "a b"]


@pytest.fixture
def written(small_cfg, small_model, tmp_path):
    """The path of the small model's file, and its weights."""
    path, weights = tmp_path / "model.safetensors", small_model().state_dict()
    write_model_file(path, weights=weights, cfg=small_cfg(), class_names=NAMES, notes={"trained on": "noise"})
    return path, weights


READERS = [read_model_file, read_model_header]


def edit(path, **changes: str | None) -> None:
    """Write the file again with other metadata and a checksum that fits it."""
    with safe_open(path, "pt") as file:
        metadata, weights = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changed = metadata | {f"deqdet.{key}": value for key, value in changes.items()}
    kept = {key: x for key, x in changed.items() if x is not None and key not in ("format", "deqdet.sha256")}
    kept["deqdet.sha256"] = _checksum(weights, kept)
    save_file(weights, path, kept)


def edit_config(path, text: str) -> None:
    edit(path, config=text)


# There and back


def test_float32_comes_back_bit_for_bit(written):
    path, weights = written
    assert weights["backbone.norm.weight"].dtype == torch.float32
    found = read_model_file(path)
    assert found.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert found.weights[name].dtype == value.dtype and torch.equal(found.weights[name], value), name
    assert found.class_names == tuple(NAMES) and found.pixel_format == "RGB" and found.source == str(path)
    assert found.metadata == {"deqdet.format": "1", "deqdet.version": __version__, "trained on": "noise"}
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_special_values_come_back(small_cfg, tmp_path):
    """Also 0-dimensional, empty and integer tensors, slices, and tensors that share memory."""
    base = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45])
    weights = {"a": base, "slice": base[1:3], "same": base, "count": torch.tensor(2**40), "none": torch.zeros(0, 3)}
    weights |= {"columns": torch.arange(6.0).view(2, 3).T}
    write_model_file(tmp_path / "x.safetensors", weights=weights, cfg=small_cfg(), class_names=NAMES)
    found = read_model_file(tmp_path / "x.safetensors").weights
    for name, value in weights.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].contiguous().reshape(-1).view(torch.uint8),
                           value.contiguous().reshape(-1).view(torch.uint8)), name  # fmt: skip


def test_half_is_close_and_small(written, small_cfg, tmp_path):
    path, weights = written
    half = tmp_path / "half.safetensors"
    weights = {name: x + 1e6 if name.endswith("running_var") else x for name, x in weights.items()}
    write_model_file(half, weights=weights, cfg=small_cfg(), class_names=NAMES, half=True)
    assert half.stat().st_size < 0.7 * path.stat().st_size
    found = read_model_file(half).weights
    for name, value in weights.items():
        assert found[name].dtype == value.dtype, name
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(found[name], value), name
        else:  # float16's smallest step is 6e-8
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=6e-8)
    with safe_open(half, "pt") as file:
        assert file.get_tensor("queries.content.weight").dtype == torch.float16


def test_half_refuses_what_overflows(written, small_cfg, tmp_path):
    path, weights = written
    before = path.read_bytes()
    weights = weights | {"backbone.norm.weight": torch.full((32,), -70000.0)}
    with pytest.raises(CheckpointError, match=r"^backbone.norm.weight has the value 70000, too large for float16"):
        write_model_file(path, weights=weights, cfg=small_cfg(), class_names=NAMES, half=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("half", [False, True])
def test_the_checkpointers_load_it(written, small_model, small_cfg, half):
    path, weights = written
    write_model_file(path, weights=weights, cfg=small_cfg(), class_names=NAMES, half=half)
    for kind in (Checkpointer, CompleteCheckpointer):
        model = small_model()
        torch.nn.init.zeros_(model.queries.content.weight)
        assert kind(model).load(str(path)) == {}
        assert model.queries.content.weight.dtype == torch.float32
        expected = weights["queries.content.weight"]
        torch.testing.assert_close(model.queries.content.weight.data, expected, rtol=1e-3 * half, atol=6e-8 * half)


def test_the_config_is_the_models(written, small_cfg, tmp_path):
    path, weights = written
    cfg = small_cfg(
        "OUTPUT_DIR", "/secret/place", "MODEL.WEIGHTS", "/secret/weights.pth", "DATASETS.TEST", ("a", "b"),
        "DATASETS.REGISTER", [["a", "/secret/a.json", "/secret"]], "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 7,
        "SOLVER.WEIGHT_DECAY_NORM", None, "DATASETS.PROPOSAL_FILES_TEST", ("/secret/p.pkl",),
        "MODEL.TIMM.WEIGHTS", "/secret/imagenet.safetensors",
    )  # fmt: skip
    write_model_file(path, weights=weights, cfg=cfg, class_names=NAMES)
    assert b"/secret" not in path.read_bytes()
    found = load_model_config(read_model_file(path))
    assert found.MODEL.WEIGHTS == "" and found.DATASETS.REGISTER == []
    defaults = get_cfg()
    add_deqdet_config(defaults)
    for key in LOCAL_KEYS:
        cfg.merge_from_list([key, reduce(dict.__getitem__, key.split("."), defaults)])
    # As YAML: a tuple within a tuple comes back as a list, which detectron2 takes for the same.
    assert yaml.safe_load(found.dump()) == yaml.safe_load(cfg.dump())
    assert found.MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS == 7 and found.SOLVER.WEIGHT_DECAY_NORM is None
    assert found.DATASETS.TEST == ("a", "b") and found.OUTPUT_DIR == "./output"


# What is refused


def test_class_names_and_formats_must_fit(written, small_cfg, tmp_path):
    path, weights = written
    before = path.read_bytes()

    def write(target=path, cfg=None, names=NAMES, **options):
        write_model_file(target, weights=weights, cfg=cfg or small_cfg(), class_names=names, **options)

    with pytest.raises(CheckpointError, match="^2 class names for a model of 3 classes"):
        write(names=NAMES[:2])
    with pytest.raises(CheckpointError, match="^INPUT.FORMAT is 'L': it must be RGB or BGR"):
        write(cfg=small_cfg("INPUT.FORMAT", "L"))
    with pytest.raises(CheckpointError, match=r"name must end in .safetensors"):
        write(target=tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"missing/model.safetensors cannot be written \(No such file"):
        write(target=tmp_path / "missing" / "model.safetensors")
    with pytest.raises(ValueError, match="notes must not begin with 'deqdet.': deqdet.format"):
        write(notes={"deqdet.format": "2"})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_every_flipped_byte_of_the_data_is_found(written):
    path, _ = written
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for place in (start, (start + len(content)) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged \(its checksum does not match\)"):
            read_model_file(path)


def test_the_header_is_read_without_the_tensors(written, small_model):
    """A changed tensor is found when the weights are loaded, and only then."""
    path, _ = written
    whole, content = read_model_file(path), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    header = read_model_header(path)
    assert {**vars(header), "weights": whole.weights} == vars(whole)
    assert load_model_config(header) == load_model_config(whole)
    for load in (read_model_file, read_entries, lambda file: Checkpointer(small_model()).load(str(file))):
        with pytest.raises(CheckpointError, match=r"model.safetensors is damaged \(its checksum does not match\)"):
            load(path)


@pytest.mark.parametrize("names, known", [(NAMES, tuple(NAMES)), (["class 0", "class 1", "class 2"], ())])
def test_numbers_are_no_known_names(small_cfg, tmp_path, names, known):
    path = tmp_path / "model.safetensors"
    write_model_file(path, weights={"a": torch.zeros(2)}, cfg=small_cfg(), class_names=names)
    assert read_model_header(path).class_names == tuple(names) and read_model_header(path).known_names == known


def test_a_changed_config_is_found(written):
    path, _ = written
    content = path.read_bytes()
    assert content.count(b"TEST_STEPS: 4") == 1
    path.write_bytes(content.replace(b"TEST_STEPS: 4", b"TEST_STEPS: 9"))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_model_file(path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("content", [b"", b"hello world, this is text", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_other_files(tmp_path, content, read):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert not is_model_file(path) and not is_model_file(tmp_path)
    message = "without a config" if content and b"{}" in content else "is damaged or not a safetensors file"
    message = "x.safetensors does not exist: correct its path" if content is None else message
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_a_checkpoint_is_no_model_file(tmp_path, read):
    path = tmp_path / "model_final.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="model_final.pth is not a model file .*--config-file.*deqdet-publish"):
        read(path)


@pytest.mark.parametrize("read", READERS)
def test_a_truncated_file(written, read):
    path, _ = written
    assert is_model_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert not is_model_file(path)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged or not a safetensors file"):
        read(path)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged or not a safetensors file"):
        Checkpointer(torch.nn.Linear(2, 2)).load(str(path))


@pytest.mark.parametrize("read", READERS)
def test_weights_without_a_config(tmp_path, read):
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert not is_model_file(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a.safetensors holds weights without a config: give --config-file with"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("changes, message", [
    ({"format": "2"}, "has format 2, but this version of deqdet reads formats up to 1: update deqdet"),
    ({"format": "two"}, "is not a model file that deqdet wrote .its format is 'two'"),
    ({"classes": None}, "is not a model file that deqdet wrote"),
    ({"classes": "[1, "}, "is not a model file that deqdet wrote"),
    ({"config": None}, "is not a model file that deqdet wrote"),
    ({"pixel_format": "YUV"}, "its pixel format is 'YUV'"),
])  # fmt: skip
def test_other_metadata(written, changes, message, read):
    path, _ = written
    edit(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("text, message", [
    ("A: !!python/object/apply:os.mkdir [{trap}]", "is not YAML with plain values: .*python/object/apply:os.mkdir"),
    ("MODEL: !!python/name:os.mkdir", "is not YAML with plain values"),
    ("MODEL: [1", "is not YAML with plain values"),
    ("- 1", "is not a YAML mapping"),
    ("MODEL:\n  DEQDET:\n    WINGS: 2", "has the unknown key MODEL.DEQDET.WINGS: a newer version of deqdet wrote"),
    ("_BASE_: other.yaml", "has the unknown key _BASE_"),
    ("MODEL:\n  DEQDET:\n    NUM_QUERIES: many", "has a value that does not fit: .*NUM_QUERIES"),
    ("MODEL: 3", "has a value that does not fit: .*MODEL"),
    ("A: &a {B: *a}", "has the unknown key A"),
    ("MODEL: &a {DEQDET: *a}", "model.safetensors has"),
])  # fmt: skip
def test_other_configs(written, tmp_path, text, message, read):
    """No code in them is run."""
    path, _ = written
    edit_config(path, text.replace("{trap}", str(tmp_path / "trap")))
    with pytest.raises(CheckpointError, match=f"^the config in {re.escape(str(path))} ") as refused:
        load_model_config(read(path))
    assert re.search(message, str(refused.value)) and "\n" not in str(refused.value)
    assert not (tmp_path / "trap").exists()


def test_local_keys_in_a_file_count_for_nothing(written):
    path, _ = written
    edit_config(path, "MODEL: {WEIGHTS: http://x/y.pkl, TRUST_PICKLE: true}\nOUTPUT_DIR: /")
    for read in READERS:
        cfg = load_model_config(read(path))
        assert cfg.MODEL.WEIGHTS == "" and cfg.OUTPUT_DIR == "./output" and not cfg.MODEL.TRUST_PICKLE


# Names on the hub


@pytest.fixture
def hub(monkeypatch, written):
    """The arguments of each call of hf_hub_download, which gives the small model's file."""
    calls = []

    def download(**options):
        calls.append(options)
        return str(written[0])

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    return calls


@pytest.mark.parametrize("name, repo_id, filename, revision", [
    ("hf://me/deq", "me/deq", "model.safetensors", None),
    ("hf://me/deq/", "me/deq", "model.safetensors", None),
    ("hf://me/deq/half.safetensors", "me/deq", "half.safetensors", None),
    ("hf://me/deq@v1.0", "me/deq", "model.safetensors", "v1.0"),
    ("hf://me/deq@3fa9/a/b.safetensors", "me/deq", "a/b.safetensors", "3fa9"),
])  # fmt: skip
def test_hub_names(hub, written, name, repo_id, filename, revision):
    assert resolve_file(name) == written[0]
    assert hub == [{"repo_id": repo_id, "filename": filename, "revision": revision}]


def test_the_checkpointer_takes_a_hub_name(hub, small_model, written):
    model = small_model()
    torch.nn.init.zeros_(model.queries.content.weight)
    CompleteCheckpointer(model).load("hf://me/deq")
    assert torch.equal(model.queries.content.weight, written[1]["queries.content.weight"]) and len(hub) == 1


@pytest.mark.parametrize("name", ["hf://", "hf://me", "hf:///deq", "hf://me/@v1", "hf://me/deq/x.pkl", "hf://a/b/../c.pth"])
def test_names_that_are_none(hub, name):
    with pytest.raises(CheckpointError, match=r"is not of the form hf://OWNER/NAME"):
        resolve_file(name)
    assert hub == []


def test_a_path_stays_as_it_is(hub):
    assert str(resolve_file("some/model.pth")) == "some/model.pth" and hub == []


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=f"^hf://me/deq needs .*: {re.escape(how_to_install('hub'))}$"):
        resolve_file("hf://me/deq")


def test_a_download_that_fails(monkeypatch):
    def download(**_):
        raise ConnectionError("no network\n\nat all")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=download))
    with pytest.raises(CheckpointError) as failed:
        resolve_file("hf://me/deq")
    assert str(failed.value) == "hf://me/deq cannot be downloaded (ConnectionError: no network at all)"


def test_the_header_is_what_the_documentation_says(written):
    path, _ = written
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    metadata = header["__metadata__"]
    ours = {"format", "version", "config", "classes", "pixel_format", "sha256"}
    assert metadata.keys() == {f"deqdet.{key}" for key in ours} | {"format", "trained on"}
    assert json.loads(metadata["deqdet.classes"]) == NAMES and metadata["format"] == "pt"


def test_keys_of_a_plugin_are_kept(tmp_path, small_model, small_cfg):
    """Under MODEL.DEQDET.PLUGIN any key may stand; elsewhere an unknown one is refused when the file is read."""
    cfg = small_cfg()
    cfg.MODEL.DEQDET.PLUGIN.NUM_POINTS = 8
    path = tmp_path / "own.safetensors"
    write_model_file(path, weights=small_model().state_dict(), cfg=cfg, class_names=["a", "b", "c"])
    assert load_model_config(read_model_file(path)).MODEL.DEQDET.PLUGIN.NUM_POINTS == 8
