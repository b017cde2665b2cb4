"""Loading checkpoints to evaluate them."""

import itertools
import pickle
import tarfile

import pytest
import torch
from torch import nn

from detectron2.utils.file_io import PathManager

from deqdet.checkpoints import Checkpointer, CheckpointError, CompleteCheckpointer
from deqdet.engine import UserError, load_weights


def make_model(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))


@pytest.fixture
def saved(tmp_path):
    model = make_model()
    torch.save({"model": model.state_dict(), "iteration": 7}, tmp_path / "whole.pth")
    return tmp_path, model


def test_a_whole_checkpoint_is_loaded(saved):
    folder, model = saved
    loaded = make_model()
    assert CompleteCheckpointer(loaded).load(str(folder / "whole.pth")) == {"iteration": 7}
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_a_missing_weight_is_an_error_for_an_evaluation_only(saved):
    folder, model = saved
    torch.save({k: v for k, v in model.state_dict().items() if k != "0.bias"}, folder / "part.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the model: 0.bias is missing. Give the config that it"):
        CompleteCheckpointer(make_model()).load(str(folder / "part.pth"))
    Checkpointer(make_model()).load(str(folder / "part.pth"))  # a training may begin with it


def test_counters_of_batch_norm_may_be_missing(saved):
    folder, model = saved
    weights = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save(weights, folder / "uncounted.pth")
    CompleteCheckpointer(make_model()).load(str(folder / "uncounted.pth"))


def test_another_shape_is_an_error(saved):
    folder, _ = saved
    message = r"0.weight is \(3, 2\), not \(5, 2\); 0.bias is \(3,\), not \(5,\); 1.weight is .* and 3 more. Give"
    with pytest.raises(CheckpointError, match=message):
        CompleteCheckpointer(make_model(width=5)).load(str(folder / "whole.pth"))


def truncated(folder):
    whole = (folder / "whole.pth").read_bytes()
    (folder / "bad.pth").write_bytes(whole[: len(whole) // 2])


def text(folder):
    (folder / "bad.pth").write_text("no weights here\n")


class Code:
    def __reduce__(self):
        return print, ("ran",)


def code(folder):
    torch.save({"model": {"0.weight": Code()}}, folder / "bad.pth")


def a_list(folder):
    torch.save([1, 2], folder / "bad.pth")


def numbers(folder):
    torch.save({"model": {"0.weight": 1}}, folder / "bad.pth")


@pytest.mark.parametrize("damage, message", [
    (a_list, "bad.pth holds a list: a checkpoint is a dict of tensors"),
    (numbers, "bad.pth is not a dict of tensors: its entry '0.weight' is a int"),
    (truncated, "bad.pth is damaged"),
    (text, "bad.pth is damaged, or was not written by torch.save"),
    (code, r"bad.pth holds (\S+\.)?print, which is not loaded"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [Checkpointer, CompleteCheckpointer])
def test_a_bad_file_is_one_clear_error(saved, capsys, kind, damage, message):
    folder, _ = saved
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        kind(make_model()).load(str(folder / "bad.pth"))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["no weights here", ""])
def test_a_bad_pickle_is_one_clear_error(tmp_path, content):
    (tmp_path / "bad.pkl").write_text(content)
    with pytest.raises(CheckpointError, match="bad.pkl is damaged or not a checkpoint"):
        Checkpointer(make_model(), trust_pickle=True).load(str(tmp_path / "bad.pkl"))


@pytest.mark.parametrize("name, query", [("a.pkl", ""), ("a.pkl", "?matching_heuristics=True"), ("a.pyth", "")])
def test_a_pickle_is_refused_by_its_name(tmp_path, name, query):
    (tmp_path / name).write_bytes(pickle.dumps(Code()))
    message = rf"{name}\S* is a pickle, which is not loaded, because reading it can run code: "
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(make_model()).load(str(tmp_path / name) + query)


def test_a_trusted_pickle_is_loaded(tmp_path):
    model, loaded = make_model(), make_model()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": weights, "__author__": "us"}))
    Checkpointer(loaded, trust_pickle=True).load(str(tmp_path / "a.pkl"))
    assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.parametrize("name", ["http://localhost:1/a.pkl", "https://localhost:1/a.pkl?matching_heuristics=True"])
def test_a_pickle_of_the_network_is_refused_before_it_is_downloaded(name):
    with pytest.raises(CheckpointError, match=r"a.pkl\S* is a pickle, .* MODEL.TRUST_PICKLE True on the command line"):
        Checkpointer(make_model()).load(name)


def test_an_unknown_query_is_refused(saved):
    folder, _ = saved
    with pytest.raises(CheckpointError, match=r"ends in \?heuristics=1: the only option .* \?matching_heuristics=True"):
        Checkpointer(make_model()).load(f"{folder / 'whole.pth'}?heuristics=1")


@pytest.fixture
def model_zoo(tmp_path, monkeypatch):
    """A folder from which the names of detectron2's own server are read."""
    monkeypatch.setattr(PathManager, "get_local_path", lambda path, **_: str(tmp_path / path.rpartition("/")[2]))
    return tmp_path


@pytest.mark.parametrize("prefix", ["detectron2://", "catalog://"])
def test_the_model_zoo_loads_without_trust(model_zoo, prefix):
    model = make_model()
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    own = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    caffe2 = {"blobs": arrays | {"0.weight_momentum": arrays["0.weight"]}}
    for content, protocol in itertools.product((own, arrays, caffe2), (2, 3, 4)):
        (model_zoo / "a.pkl").write_bytes(pickle.dumps(content, protocol))
        loaded = make_model()
        Checkpointer(loaded).load(f"{prefix}ImageNetPretrained/a.pkl")
        assert torch.equal(loaded[0].weight, model[0].weight)


@pytest.mark.parametrize("content, message", [
    ({"model": Code(), "__author__": "x"}, r"not a pickle of only NumPy arrays \(UnpicklingError: it holds \w+.print"),
    ({"model": [1], "__author__": "x"}, "a.pkl is not a dict of arrays"),
    ({"blobs": 3}, "a.pkl is not a dict of arrays"),
    ({"0.weight": "text"}, "its entry '0.weight' is a str"),
    ([1], "a.pkl holds a list"),
])  # fmt: skip
def test_the_model_zoo_runs_no_code_either(model_zoo, capsys, content, message):
    (model_zoo / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(make_model()).load("detectron2://a.pkl")
    assert "ran" not in capsys.readouterr().out


def test_a_tar_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.add(__file__, "pickle")
    with pytest.raises(CheckpointError, match="old.pth is a tar archive, .*: save it again with torch.save"):
        Checkpointer(make_model()).load(str(tmp_path / "old.pth"))
    (tmp_path / "zeros.pth").write_bytes(bytes(2048))
    with pytest.raises(CheckpointError, match="zeros.pth is damaged"):
        Checkpointer(make_model()).load(str(tmp_path / "zeros.pth"))


def test_the_tools_report_weights_of_another_config(small_cfg, small_model, tmp_path):
    torch.save(small_model("MODEL.DEQDET.NUM_CLASSES", 5).state_dict(), tmp_path / "five.pth")
    cfg = small_cfg("MODEL.WEIGHTS", str(tmp_path / "five.pth"))
    message = r"cannot load the weights: .*class_branch.3.weight is \(5, 32\), not \(3, 32\)"
    with pytest.raises(UserError, match=message):
        load_weights(small_model(), cfg, resume=False)
