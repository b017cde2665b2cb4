"""What a resumed training goes on from: data, random numbers, metrics, checkpoints and keys."""

import itertools
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Sampler

from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils.events import EventStorage

from deqdet.checkpoints import Checkpointer, CheckpointError, latest
from deqdet.checkpoints.files import checksum, read_torch, write_torch
from deqdet.checkpoints.latest import find_checkpoint
from deqdet.data.randomness import mix_seed, random_state_kept, seed_all
from deqdet.data.train_loader import BatchStream, assemble_train_loader
from deqdet.engine import UserError, setup
from deqdet.engine.hooks import BestCheckpointer, WeightsCheckpointer
from deqdet.engine.optimizer import parameter_groups
from deqdet.engine.resume import (
    KEPT_KEYS,
    MetricsWriter,
    describe_changes,
    dump_config,
    restore_storage,
    storage_state,
)

from helpers.engine_toy import IN_PROCESS, parse

pytestmark = IN_PROCESS


class Counting(Sampler):
    """0, 1, 2, ..."""

    def __iter__(self):
        return itertools.count()


def draw(record: dict) -> dict:
    """A mapper that shows what it gets and draws."""
    return {**record, "numpy": np.random.rand(), "torch": torch.rand(()).item()}


def make_loader(workers: int, sampler: Sampler, start: int):
    records = [{"id": i, "width": 10, "height": 20 - 15 * (i % 3 == 0)} for i in range(7)]
    parts = {"dataset": records, "mapper": draw, "aspect_ratio_grouping": True, "total_batch_size": 2}
    loader = assemble_train_loader({**parts, "sampler": sampler, "num_workers": workers}, seed=3)
    loader.start_at(start)
    return loader


def first_batches(loader, count: int) -> list:
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("make_sampler", [
    lambda: TrainingSampler(7, seed=5),
    lambda: RepeatFactorTrainingSampler(torch.linspace(1, 3, 7), seed=5),
])  # fmt: skip
def test_batches_do_not_depend_on_the_start_and_the_workers(make_sampler):
    whole = first_batches(make_loader(0, make_sampler(), 0), 12)
    assert len({sample["numpy"] for batch in whole for sample in batch}) == 24
    for workers, start in ((0, 5), (1, 11), (2, 0), (2, 7)):
        assert first_batches(make_loader(workers, make_sampler(), start), 12 - start) == whole[start:]


def test_the_images_of_a_batch_are_of_one_shape():
    batches = first_batches(make_loader(0, TrainingSampler(7, seed=1), 0), 20)
    assert all(len({sample["height"] for sample in batch}) == 1 for batch in batches)


def test_a_group_waits_until_it_fills_a_batch():
    stream = BatchStream(Counting(), 2, groups=[0, 1, 1, 1, 0, 0, 1, 0])
    batches = [[ticket.index for ticket in batch] for batch in itertools.islice(stream, 4)]
    assert batches == [[1, 2], [0, 4], [3, 6], [5, 7]]
    stream.start = 2
    assert [ticket.position for ticket in next(iter(stream))] == [3, 6]


def test_loading_leaves_the_random_states_alone():
    seed_all(1)
    expected = np.random.rand(), torch.rand(()).item()
    seed_all(1)
    first_batches(make_loader(0, TrainingSampler(7, seed=1), 0), 3)
    with random_state_kept():
        torch.rand(3)
    assert (np.random.rand(), torch.rand(()).item()) == expected
    assert len({mix_seed(*x) for x in itertools.product(range(10), repeat=3)}) == 1000


def test_smoothed_metrics_go_on_as_without_an_interruption():
    def put(storage, iterations):
        for i in iterations:
            storage.iter = i
            storage.put_scalar("loss", (i * 7) % 11)
            storage.put_scalar("time", i)
            if i == 3:
                storage.put_scalar("AP", 4.5, smoothing_hint=False)

    whole, first, second = EventStorage(), EventStorage(), EventStorage(30)
    put(whole, range(45))
    put(first, range(30))
    restore_storage(second, storage_state(first))
    put(second, range(30, 45))
    expected = whole.latest_with_smoothing_hint(20)
    assert expected["AP"] == (4.5, 3)
    for name in ("loss", "AP"):
        assert second.latest_with_smoothing_hint(20)[name] == expected[name]
    assert "time" not in storage_state(first)


@pytest.mark.parametrize("state, kept", [
    ({"lines": 2, "last_write": 39}, [19, 39]),
    ({"lines": 1, "last_write": 19}, [19]),
    (None, [19, 39, 45]),  # of a checkpoint that does not know the file
])  # fmt: skip
def test_lines_after_the_checkpoint_are_dropped(tmp_path, state, kept):
    path = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i}) for i in (19, 39, 45, 59)]
    path.write_text("\n".join(lines) + '\n{"iteration": 7')
    writer = MetricsWriter(path)
    writer.go_back(state, 50)
    with EventStorage(50) as storage:
        storage.put_scalar("loss", 1.0)
        writer.write()
    writer.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [*kept, 50]


CONTENT = {"model": {"a": torch.arange(600.0)}, "trainer": {"x": [1, 2.5, (None, "y")]}, "iteration": 1}


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / "model_0000001.pth"
    write_torch(CONTENT, path)
    whole = path.read_bytes()
    assert checksum(read_torch(path)) == checksum(CONTENT)
    place = whole.index(torch.arange(600.0).numpy().tobytes()) + 1000
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert torch.load(path)["model"]["a"].shape == (600,)  # torch does not see it
    with pytest.raises(CheckpointError, match="is damaged.*its checksum does not match"):
        read_torch(path)
    torch.save(CONTENT, path)  # an older one
    assert read_torch(path)["iteration"] == 1


def write_checkpoints(folder, *iterations):
    for iteration in iterations:
        write_torch({**CONTENT, "iteration": iteration}, folder / f"model_{iteration:07d}.pth")
    (folder / "last_checkpoint").write_text(f"model_{iterations[-1]:07d}.pth")


@pytest.mark.parametrize("tag, warning", [
    (b"", "last_checkpoint is empty"),
    (b"\xff\xfe\x00\x81", "last_checkpoint cannot be read .it is not text"),
    (b"gone.pth", "last_checkpoint names gone.pth, which is missing"),
    (b"../x/model_0000001.pth", "last_checkpoint names no checkpoint"),
    (None, "last_checkpoint is missing"),
])  # fmt: skip
def test_without_a_good_last_checkpoint_the_newest_whole_one_counts(tmp_path, tag, warning):
    write_checkpoints(tmp_path, 3, 7)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    found = find_checkpoint(tmp_path)
    assert found.content["iteration"] == 7
    assert warning.split(" .")[0] in found.warnings[0]
    assert found.warnings[-1] == f"continuing from {tmp_path}/model_0000007.pth, the newest complete checkpoint"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    write_checkpoints(tmp_path, 3, 7)
    assert find_checkpoint(tmp_path).warnings == ()
    (tmp_path / "model_0000007.pth").write_bytes(b"")
    found = find_checkpoint(tmp_path)
    assert found.content["iteration"] == 3 and "model_0000007.pth is damaged" in found.warnings[0]
    (tmp_path / "model_0000003.pth").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read .*start again with --overwrite"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path / "nothing") is None


def test_an_unreadable_checkpoint_gives_way_to_the_one_before(tmp_path, monkeypatch):
    write_checkpoints(tmp_path, 3, 7)
    opened = Path.open

    def open_file(path, *args, **kwargs):
        if path.name == "model_0000007.pth":
            raise PermissionError(13, "Permission denied")  # a user with all rights cannot have it from the system
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_file)
    found = find_checkpoint(tmp_path)
    assert found.content["iteration"] == 3
    assert found.warnings[0] == f"{tmp_path}/model_0000007.pth cannot be read (Permission denied)"


def test_only_the_checkpoint_that_is_named_is_read(tmp_path, monkeypatch):
    write_checkpoints(tmp_path, 3)
    write_torch({**CONTENT, "iteration": 9}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    read = []
    monkeypatch.setattr(latest, "read_torch", lambda path: read.append(path.name) or read_torch(path))
    assert find_checkpoint(tmp_path).content["iteration"] == 9
    assert read == ["model_final.pth"]


def test_a_resumed_checkpoint_is_not_kept_in_memory(tmp_path):
    model = torch.nn.Linear(2, 3)
    Checkpointer(model, str(tmp_path), trainer=model).save("model_0000003", iteration=3)
    checkpointer = Checkpointer(model, str(tmp_path), trainer=model)
    taken = []
    load_file = checkpointer._load_file

    def keep(name):
        content = load_file(name)
        taken.append(weakref.ref(content["model"]["weight"]))
        return content

    checkpointer._load_file = keep
    assert checkpointer.resume_or_load("")["iteration"] == 3
    assert [x() for x in taken] == [None]
    assert checkpointer.has_checkpoint() and checkpointer.load(checkpointer.get_checkpoint_file())["iteration"] == 3


def test_the_final_checkpoint_of_a_shorter_training_is_not_the_newest(tmp_path):
    write_checkpoints(tmp_path, 3, 7)
    write_torch({**CONTENT, "iteration": 5}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").unlink()
    assert find_checkpoint(tmp_path).content["iteration"] == 7
    write_torch({**CONTENT, "iteration": 9}, tmp_path / "model_final.pth")
    assert find_checkpoint(tmp_path).content["iteration"] == 9


def test_what_the_checkpoint_decides_is_said(toy_config):
    old = dump_config(setup(parse(toy_config)))
    assert describe_changes(old, setup(parse(toy_config, "--overwrite"))) == ""
    new = setup(parse(toy_config, "--overwrite", "SOLVER.BASE_LR", 0.2, "SOLVER.MAX_ITER", 9))
    message = (
        "kept from the checkpoint: SOLVER.BASE_LR 0.1 (not 0.2); "
        "changed by the new config: SOLVER.MAX_ITER 9 (was 4)"
    )
    assert describe_changes(old, new) == message
    assert describe_changes(dump_config(new, old), new) == "kept from the checkpoint: SOLVER.BASE_LR 0.1 (not 0.2)"


def test_all_keys_of_the_optimizers_groups_are_the_checkpoints(toy_config):
    """A resumed optimizer keeps its groups, whatever of these keys the new config changes."""
    read, solver = set(), setup(parse(toy_config)).SOLVER

    class Noting:
        def __getattr__(self, name: str) -> object:
            read.add(f"SOLVER.{name}")
            return getattr(solver, name)

    parameter_groups(SimpleNamespace(SOLVER=Noting()), nn.Linear(1, 1))
    assert "SOLVER.BASE_LR" in read and "SOLVER.BACKBONE_LR_MULTIPLIER" in read
    assert read <= set(KEPT_KEYS)


def test_a_learning_rate_that_was_scaled_to_another_batch_stays(toy_config):
    rule = ["SOLVER.LR_RULE", "linear", "SOLVER.REFERENCE_BATCH", 4]
    old = dump_config(setup(parse(toy_config, *rule)))
    new = setup(parse(toy_config, "--overwrite", *rule, "SOLVER.IMS_PER_BATCH", 4))
    assert describe_changes(old, new) == (
        "changed by the new config: SOLVER.IMS_PER_BATCH 4 (was 2); "
        "the learning rate stays scaled to the batch size of the checkpoint"
    )


class Begun:
    start_iter = 3


@pytest.mark.parametrize("weights, record, best", [
    ({"value": 4.0, "iteration": 2}, None, 4.0),
    ({"value": 4.0, "iteration": 2}, b'{"value": 1.0, "iteration": 1}', 4.0),
    ({"iteration": 2}, b'{"value": 1.0, "iteration": 1}', 1.0),  # an older file
    ({"iteration": 2}, b"", None),
    ({"iteration": 2}, b"\xff\xfe", None),
    ({"iteration": 2}, b"[1]", None),
    (b"half", b'{"value": 1.0, "iteration": 1}', None),
    (None, b'{"value": 1.0, "iteration": 1}', None),
])  # fmt: skip
def test_the_record_of_the_best_model(tmp_path, weights, record, best, caplog):
    if isinstance(weights, dict):
        write_torch({"model": {}, **weights}, tmp_path / "model_best.pth")
    elif weights:
        (tmp_path / "model_best.pth").write_bytes(weights)
    if record is not None:
        (tmp_path / "model_best.json").write_bytes(record)
    hook = BestCheckpointer(1, WeightsCheckpointer(torch.nn.Linear(1, 1), str(tmp_path), "AP"), "AP")
    hook.trainer = Begun
    hook.before_train()
    assert hook.best_metric == best
    if best is None:
        assert "the next evaluation counts as the best so far" in caplog.text
    else:
        assert json.loads((tmp_path / "model_best.json").read_text())["value"] == best


def test_a_checkpoint_of_nothing_to_go_on_from(tmp_path):
    torch.save({"model": {}}, tmp_path / "model_0000001.pth")
    with pytest.raises(UserError, match="contains no training state"):
        find_checkpoint(tmp_path)
