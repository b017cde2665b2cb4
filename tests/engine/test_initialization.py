"""--init: what of a checkpoint fits is taken, and all else is said."""

import argparse
import logging
from types import SimpleNamespace

import pytest
import torch

from detectron2.utils.file_io import PathManager

from deqdet.checkpoints import write_model_file
from deqdet.engine import initialization
from deqdet.engine.initialization import adapt, initialize, prepare_initialization
from deqdet.errors import UserError

OWN = ["cat", "dog", "emu"]
CLASS_LAYERS = [f"decoder.{part}.class_branch.3.{kind}" for part in ("initialization", "refinement")
                for kind in ("weight", "bias")]  # fmt: skip


def arguments(init, *opts, **others):
    return argparse.Namespace(**{"init": str(init), "opts": list(opts), "eval_only": False, "model": "", **others})


def test_the_same_model_is_taken_whole(small_model, tmp_path, stir, caplog):
    caplog.set_level(logging.INFO)
    source, model = small_model(), small_model()
    stir(source)
    torch.save({"model": source.state_dict(), "optimizer": {}, "iteration": 3}, tmp_path / "model.pth")
    initialize(model, str(tmp_path / "model.pth"), OWN)
    count = len(source.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        f"{count} of the model's {count} tensors are taken"
    ]


def test_other_classes_begin_anew_and_all_else_is_taken(small_model, small_cfg, tmp_path, stir, caplog):
    caplog.set_level(logging.INFO)
    source, model = small_model("MODEL.DEQDET.NUM_CLASSES", 5), small_model()
    stir(source)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(source.state_dict(), tmp_path / "model.pth")
    initialize(model, str(tmp_path / "model.pth"), OWN)
    for name, value in model.state_dict().items():
        expected = before if name in CLASS_LAYERS else source.state_dict()
        assert torch.equal(value, expected[name]), name
    assert f"{len(before) - 4} of the model's {len(before)} tensors are taken" in caplog.text
    assert "it has 5 classes, the data 3: all start from initial weights" in caplog.text
    assert "decoder.initialization.class_branch.3, decoder.refinement.class_branch.3" in caplog.text


def test_classes_that_both_know_by_name_keep_their_weights(small_model, small_cfg, tmp_path, stir, caplog):
    """The model file's classes are emu, cow, Cat, the data's cat, dog, emu, although both have three."""
    caplog.set_level(logging.INFO)
    source, model = small_model(), small_model()
    stir(source)
    write_model_file(
        tmp_path / "m.safetensors", weights=source.state_dict(), cfg=small_cfg(), class_names=["emu", "cow", "Cat"]
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    initialize(model, str(tmp_path / "m.safetensors"), OWN)
    for name in CLASS_LAYERS:
        found, file = model.state_dict()[name], source.state_dict()[name]
        assert torch.equal(found[0], file[2]) and torch.equal(found[2], file[0])
        assert torch.equal(found[1], before[name][1])
    assert "cat, emu keep their weights, 1 start from initial weights" in caplog.text


def test_a_hidden_layer_with_as_many_rows_as_there_are_classes(small_model, stir):
    """Of the 32 classes in another order, only the rows of the last layers change places, not the 32 features."""
    source, model = (small_model("MODEL.DEQDET.NUM_CLASSES", 32) for _ in range(2))
    stir(source)
    others = [f"class {i}" for i in range(32)]
    found = adapt(model.state_dict(), source.state_dict(), others[::-1], others).weights
    for name, value in source.state_dict().items():
        assert torch.equal(found[name], value.flip(0) if name in CLASS_LAYERS else value), name


def test_queries_of_another_number(small_model):
    source, model = small_model("MODEL.DEQDET.NUM_QUERIES", 4), small_model()
    state = model.state_dict()
    found = adapt(state, {k: v + 1 for k, v in source.state_dict().items()}, OWN, [])
    content = found.weights["queries.content.weight"]
    assert torch.equal(content[:4], source.state_dict()["queries.content.weight"] + 1)
    assert torch.equal(content[4:], state["queries.content.weight"][4:])
    assert "the first 4 of its 4 initial queries are taken; the model has 6" in found.lines


def test_a_backbone_alone(small_model):
    """Its names lack the prefix; what is missing and what is too much is said."""
    model = small_model()
    prefix = "backbone.bottom_up."
    part = {k.removeprefix(prefix): v + 1 for k, v in model.state_dict().items() if k.startswith(prefix)}
    found = adapt(model.state_dict(), {**part, "fc.weight": torch.zeros(3, 3)}, OWN, [])
    assert set(found.weights) == {prefix + name for name in part}
    assert torch.equal(found.weights[f"{prefix}stem.conv1.weight"], part["stem.conv1.weight"])
    lacks, unused = found.lines[1:]
    assert lacks.startswith("it lacks ") and "decoder.initialization (" in lacks
    assert unused == "it has 1 tensors that the model lacks: backbone.bottom_up (1)"


def test_other_shapes_are_named_and_stay(small_model):
    source = small_model("MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM", 32).state_dict()
    model = small_model()
    found = adapt(model.state_dict(), source, OWN, [])
    (line,) = [line for line in found.lines if line.startswith("these do not fit")]
    assert "is (32, 32), not (64, 32)" in line
    assert all(found.weights[name].shape == model.state_dict()[name].shape for name in found.weights)
    assert not any(name.endswith("feedforward.0.weight") for name in found.weights)


def test_a_url_is_downloaded_by_detectron2(small_model, tmp_path, monkeypatch, stir):
    source, model = small_model(), small_model()
    stir(source)
    torch.save(source.state_dict(), tmp_path / "there.pth")
    asked = []

    def download(path, **others):
        asked.append(path)
        return str(tmp_path / "there.pth")

    monkeypatch.setattr(initialization, "PathManager", SimpleNamespace(get_local_path=download))
    initialize(model, "https://example.org/there.pth", OWN)
    assert asked == ["https://example.org/there.pth"]
    assert torch.equal(model.state_dict()[CLASS_LAYERS[0]], source.state_dict()[CLASS_LAYERS[0]])


def test_a_url_without_network(small_model, monkeypatch):
    def download(path, **others):
        raise OSError("Name or service not known")

    monkeypatch.setattr(initialization, "PathManager", SimpleNamespace(get_local_path=download))
    with pytest.raises(UserError, match=r"--init https://example.org/a.pth cannot be read \(Name or service"):
        initialize(small_model(), "https://example.org/a.pth", OWN)


def test_names_of_detectron2s_model_zoo():
    args = arguments("COCO-Detection/retinanet_R_50_FPN_1x", "SEED", "3")
    prepare_initialization(args)
    assert args.opts == ["SEED", "3", "MODEL.WEIGHTS", ""]
    found = initialization._locate_name(args.init)
    assert found.startswith("detectron2://COCO-Detection/retinanet_R_50_FPN_1x/") and found.endswith(".pkl")
    assert PathManager.exists  # the object that opens such names


@pytest.mark.parametrize("change, words", [
    ({"eval_only": True}, "--init and --eval-only both set the weights"),
    ({"model": "m.safetensors"}, "--init and --model both set the weights"),
    ({"opts": ["MODEL.WEIGHTS", "x.pth"]}, "--init and MODEL.WEIGHTS both set the weights"),
    ({"init": "nowhere.pth"}, "--init nowhere.pth is not a file, a URL or a name in detectron2's model zoo"),
])  # fmt: skip
def test_command_lines_that_cannot_be(change, words, tmp_path):
    (tmp_path / "x.pth").touch()
    with pytest.raises(UserError, match=words):
        prepare_initialization(argparse.Namespace(**{**vars(arguments(tmp_path / "x.pth")), **change}))


def test_files_that_cannot_be_used(small_model, tmp_path):
    model = small_model()
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"alien.weight": torch.zeros(2)}, tmp_path / "alien.pth")
    (tmp_path / "any.pkl").touch()
    bad = {**model.state_dict(), CLASS_LAYERS[1]: torch.full((3,), float("nan"))}
    torch.save(bad, tmp_path / "nan.pth")
    for name, words in (
        ("text.pth", "is damaged"),
        ("alien.pth", "none of its 1 tensors fits"),
        ("any.pkl", "is a pickle"),
        ("nan.pth", "nan"),
    ):
        with pytest.raises(UserError, match=words):
            initialize(model, str(tmp_path / name), OWN)
