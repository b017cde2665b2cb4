"""deqdet-train --data: from a folder to a model file, with nothing else, and the same run again by --resume."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from deqdet import Predictor
from deqdet.engine import configuration, labelled_folder, load_config
from deqdet.engine.data_folder import DataInPlace, put_in_place
from deqdet.engine.own_data import use_own_data
from deqdet.errors import UserError
from deqdet.measurement.training_report import write_training_report
from deqdet.model_zoo import get_config
from deqdet.tools import report, train_net

from helpers.engine_toy import IN_PROCESS, parse
from helpers.folders import PICTURES, draw, voc_xml, write, write_coco, write_voc

pytestmark = IN_PROCESS

# A model of width 8, so that an iteration takes no time.
TINY = """
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.DEQDET.HIDDEN_DIM 32
MODEL.DEQDET.ADAMIXER.NUM_GROUPS 2 MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM 32 MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS 4
MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 2 SOLVER.IMS_PER_BATCH 2
""".split()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The working directory, where output/ goes; the names of the sets are free again afterwards."""
    monkeypatch.chdir(tmp_path)
    yield
    forget_sets()


@pytest.fixture
def animals(tmp_path) -> Path:
    return write_voc(tmp_path / "animals")


def arguments(folder, *opts, **others) -> argparse.Namespace:
    usual = {
        "data": str(folder), "data_format": "", "size": None, "val_fraction": None, "config_file": "", "model": "",
        "plugin": [], "eval_only": False, "resume": False, "overwrite": False, "num_gpus": None, "num_machines": 1,
        "machine_rank": 0, "opts": [str(word) for word in opts],
    }  # fmt: skip
    return argparse.Namespace(**{**usual, **others})


def begin(**others) -> None:
    """Prepare a training on the animals, and let it begin, as far as its settings are concerned."""
    args = arguments("animals", **others)
    use_own_data(args)
    put_in_place(Path(args.config_file), [entry[1] for entry in get_config(args.config_file).DATASETS.REGISTER])


def forget_sets() -> None:
    """Unregister the animals, as if a new process began."""
    for name in [name for name in DatasetCatalog if name.startswith("animals-")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def weights(folder: str = "output/animals") -> dict:
    return torch.load(f"{folder}/model_final.pth", weights_only=True)["model"]


def test_a_folder_becomes_a_model_file(animals, capsys, monkeypatch):
    shortened = []
    monkeypatch.setattr(configuration, "shorten_listings", shortened.append)
    train_net.main(["--data", "animals", "--num-gpus", "1", *TINY, "SOLVER.MAX_ITER", "2"])
    printed = capsys.readouterr().out
    assert shortened == ["output/animals"]  # the settings stay in sight
    assert "animals: VOC format" in printed
    assert "4 to train on and 1 to evaluate on" in printed
    assert "== animals-train\nimages: 4, 1 of them without boxes" in printed
    assert "derived: the classes of the data" in printed
    line = next(line for line in printed.splitlines() if "SOLVER.MAX_ITER" in line)
    assert line.split() == ["SOLVER.MAX_ITER", "2", "given"]
    cfg = get_config("output/animals/data/config.yaml")
    assert cfg.MODEL.DEQDET.NUM_CLASSES == 3
    assert cfg.DATASETS.TRAIN == ("animals-train",) and cfg.DATASETS.TEST == ("animals-val",)
    parts = [json.loads(Path(f"output/animals/data/{split}.json").read_text()) for split in ("train", "val")]
    assert sorted(Path(x["file_name"]).stem for part in parts for x in part["images"]) == list(PICTURES)
    found = Predictor.from_file("output/animals/model_final.safetensors", threshold=0.0)(str(animals / "images/a.png"))
    assert set(found.labels) <= {"cat", "dog", "emu"}


def test_resume_finds_the_same_split_and_settings(animals, capsys):
    """Although a picture has come that would change both, and a training that went through is compared."""
    words = ["--data", "animals", "--num-gpus", "1", "--size", "quick", *TINY]
    train_net.main([*words, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", "whole"])
    forget_sets()
    schedule = ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"]
    train_net.main([*words, *schedule])
    for path in (*Path("output/animals").glob("model_*"), Path("output/animals/last_checkpoint")):
        if path.name != "model_0000001.pth":
            path.unlink()
    before = Path("output/animals/data/config.yaml").read_text()
    draw(animals / "images" / "f.png")
    write(animals / "annotations" / "f.xml", voc_xml("f", [("yak", (0, 0, 10, 10))] * 30))
    capsys.readouterr()
    train_net.main(["--data", "animals", "--num-gpus", "1", "--resume"])
    assert "are those of output/animals/data/config.yaml" in capsys.readouterr().out
    assert Path("output/animals/data/config.yaml").read_text() == before
    expected, found = weights("whole"), weights()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_moved_run_uses_its_own_sets(animals):
    """Not those of the run that has taken its old name."""
    words = ["--data", "animals", "--num-gpus", "1", *TINY, "SOLVER.MAX_ITER", "1"]
    train_net.main([*words, "OUTPUT_DIR", "one"])
    own = {path.name: path.read_bytes() for path in Path("one/data").glob("*.json")}
    forget_sets()
    Path("one").rename("moved")
    train_net.main([*words[:4], "--val-fraction", "0.5", *words[4:], "OUTPUT_DIR", "one"])
    assert Path("one/data/val.json").read_bytes() != own["val.json"]
    for config in ("moved/data/config.yaml", "moved/config.yaml"):
        cfg = load_config(parse(config))
        files = {Path(file).name: Path(file) for _, file, _ in cfg.DATASETS.REGISTER}
        assert {name: path.read_bytes() for name, path in files.items()} == {
            name: own[name] for name in ("train.json", "val.json")
        }
        assert {path.parent for path in files.values()} == {Path("moved/data").absolute()}
    register = str([["x", str(Path("one/data/val.json").absolute()), "animals/images"]])
    cfg = load_config(parse("moved/data/config.yaml", "DATASETS.REGISTER", register))  # what is given counts
    assert cfg.DATASETS.REGISTER[0][1] == str(Path("one/data/val.json").absolute())


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_data_of_a_training_stay_until_the_one_that_overwrites_it_begins(animals):
    """Whether the new one has another split or the same, and however late it is refused."""
    words, keys = ["--data", "animals", "--num-gpus", "1"], [*TINY, "SOLVER.MAX_ITER", "1"]
    train_net.main([*words, *keys])
    output = Path("output/animals")
    before = contents(output / "data")
    assert sorted(path.name for path in before) == ["config.yaml", "flags.json", "train.json", "val.json"]
    write(Path("damaged.pth"), "no checkpoint")
    refusals = (
        (["MODEL.DEQDET.NUM_QUERIES", "0"], "NUM_QUERIES is 0"),
        (["SOLVER.ACCUMULATION_STEPS", "3"], "it must divide"),  # once the data are checked
        (["MODEL.WEIGHTS", "missing.pth"], "missing.pth does not exist"),  # when the run is set up
        (["MODEL.WEIGHTS", "damaged.pth"], "damaged.pth is damaged"),  # by the trainer
    )
    for split in ([], ["--val-fraction", "0.5"]):
        for refused, message in refusals:
            with pytest.raises(SystemExit, match=message):
                train_net.main(["--overwrite", *split, *words, *keys, *refused])
            after = contents(output / "data")
            assert {path: after.get(path) for path in before} == before
            assert split or after == before
    args = arguments("animals", resume=True, val_fraction=0.2)
    use_own_data(args)
    assert args.config_file == "output/animals/data/config.yaml"
    train_net.main(["--overwrite", "--val-fraction", "0.5", *words, *keys, "SEED", "2"])
    cfg = get_config("output/animals/data/config.yaml")
    sets = [Path(file) for _, file, _ in cfg.DATASETS.REGISTER]
    assert cfg.SEED == 2 and [len(json.loads(file.read_text())["images"]) for file in sets] == [3, 2]
    assert get_config("output/animals/config.yaml").DATASETS.REGISTER == cfg.DATASETS.REGISTER
    assert json.loads((output / "data/flags.json").read_text())["--val-fraction"] == 0.5
    left = sorted(path.name for path in (output / "data").iterdir())
    assert left == sorted(["config.yaml", "flags.json", *(file.name for file in sets)])
    assert not list(output.glob("data.new*"))


def test_a_new_training_that_is_refused_leaves_no_settings_to_resume_with(animals):
    with pytest.raises(SystemExit, match="missing.pth does not exist"):
        train_net.main(["--data", "animals", "--num-gpus", "1", *TINY, "MODEL.WEIGHTS", "missing.pth"])
    args = arguments("animals", resume=True)
    use_own_data(args)
    assert get_config(args.config_file).MODEL.WEIGHTS == ""


def test_an_evaluation_alone_writes_its_settings_at_once(animals):
    args = arguments("animals", eval_only=True)
    use_own_data(args)
    assert args.config_file == "output/animals/data/config.yaml"


def test_all_processes_prepare_the_same_run_and_the_first_of_each_machine_puts_it_in_place(animals, monkeypatch):
    """Also the process that comes last, and finds what the others have written beside the old training's files."""
    begin()
    before, files = contents(Path("output/animals/data")), []
    for rank in (0, 1):
        torchrun = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
        for name, value in (torchrun | {"MASTER_ADDR": "127.0.0.1"}).items():
            monkeypatch.setenv(name, str(value))
        args = arguments("animals", overwrite=True, val_fraction=0.5)
        use_own_data(args)
        files.append(args.config_file)
    assert files[0] == files[1] and before.items() < contents(Path("output/animals/data")).items()
    new = contents(Path(files[0]).parent)[Path(files[0])]
    for local_rank in (1, 0):
        monkeypatch.setattr(comm, "get_local_rank", lambda rank=local_rank: rank)
        hook = DataInPlace(files[0])
        hook.trainer = SimpleNamespace(cfg=get_config(files[0]))
        hook.before_train()
        config = Path("output/animals/data/config.yaml").read_bytes()
        assert (config == new, Path(files[0]).exists()) == ((True, False) if local_rank == 0 else (False, True))


def test_machines_that_share_a_disk_put_the_settings_in_place_once(animals):
    """Whichever comes first; the other finds nothing left to do."""
    args = arguments("animals")
    use_own_data(args)
    file = Path(args.config_file)
    sets = [entry[1] for entry in get_config(file).DATASETS.REGISTER]
    put_in_place(file, sets)
    before = contents(Path("output/animals/data"))
    put_in_place(file, sets)
    assert contents(Path("output/animals/data")) == before and len(before) == 4


@pytest.mark.parametrize("folder, flags, message", [
    ("animals", {"size": "small"}, "--size small: .* with --size quick; give that value"),
    ("animals", {"val_fraction": 0.5}, "--val-fraction 0.5: .* with --val-fraction 0.2; give that value"),
    ("animals", {"data_format": "coco"}, "--data-format coco: .* with --data-format voc; give that value"),
    ("other", {}, "--data .*other: .* with --data .*animals; give that value"),
])  # fmt: skip
def test_other_flags_than_those_of_the_beginning_are_refused(animals, folder, flags, message):
    output, same = ("OUTPUT_DIR", "output/animals"), {"size": "quick", "val_fraction": 0.2, "data_format": "voc"}
    begin()
    for way in ({"resume": True}, {"eval_only": True}):
        use_own_data(arguments("animals", **way))
        use_own_data(arguments(animals, *output, **same, **way))
        with pytest.raises(UserError, match=message):
            use_own_data(arguments(folder, *output, **flags, **way))


def test_evaluating_another_set_afterwards_leaves_the_trainings_files(animals):
    """Or the report would show the AP of one set and the mistakes in another under the same name."""
    words = ["--data", "animals", "--num-gpus", "1"]
    train_net.main([*words, *TINY, "SOLVER.MAX_ITER", "1"])
    folder = Path("output/animals")
    files = [folder / name for name in ("config.yaml", "inference/coco_instances_results.json")]
    before = [path.read_bytes() for path in files]
    forget_sets()
    other = ["DATASETS.TEST", "('animals-train',)"]
    train_net.main([*words, "--eval-only", *other, "MODEL.WEIGHTS", str(folder / "model_final.safetensors")])
    assert [path.read_bytes() for path in files] == before
    found = json.loads((folder / "inference/animals-train/coco_instances_results.json").read_text())
    assert {result["image_id"] for result in found} != {x["image_id"] for x in json.loads(before[1])}
    text = write_training_report(folder, ["animals-train"]).read_text()
    assert "There is no AP" in text and "Mistakes in 4 images" in text
    DatasetCatalog.remove("animals-train")
    MetadataCatalog.remove("animals-train")
    report.main(["--run", str(folder), "--page-only"])
    text = (folder / "report.md").read_text()
    assert "AP in the last evaluation, after 1 iterations" in text and "Mistakes in 1 image," in text


def test_a_detector_of_other_classes_is_the_beginning(animals, capsys):
    train_net.main(["--data", "animals", "--num-gpus", "1", *TINY, "SOLVER.MAX_ITER", "1"])
    first = weights()
    rest = {name: objects for name, objects in PICTURES.items() if name in "bcd"}
    write_coco(Path("other/animals"), "train.json", "images", {**rest})
    content = json.loads(Path("other/animals/train.json").read_text())
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(("gnu", "dog", "emu", "yak"), 1)]
    Path("other/animals/train.json").write_text(json.dumps(content))
    words = ["--data", "other/animals", "--num-gpus", "1", "--init", "output/animals/model_final.safetensors"]
    forget_sets()
    lr = ["SOLVER.BASE_LR", "1e-30"]  # the weights stay
    train_net.main([*words, *TINY, *lr, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", "second"])
    log = Path("second/log.txt").read_text()
    assert "it has 3 classes, the data 4: dog, emu keep their weights, 2 start from initial weights" in log
    second = weights("second")
    name = "decoder.refinement.class_branch.3.weight"
    assert torch.allclose(second[name][1:3], first[name][1:3])
    assert torch.allclose(second["queries.content.weight"], first["queries.content.weight"])


def test_processes_and_device(animals, monkeypatch, capsys):
    monkeypatch.setattr(labelled_folder, "count_cores", lambda: 2)
    args = arguments(animals)
    use_own_data(args)
    assert args.num_gpus == 2
    cfg = get_config(args.config_file)
    assert (cfg.MODEL.DEVICE, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == ("cpu", 8, 2000)
    for others, count in (
        ({"num_gpus": 1}, 1), ({"opts": ["SOLVER.IMS_PER_BATCH", "3"]}, 1), ({"eval_only": True}, 1),
        ({"opts": ["SOLVER.ACCUMULATION_STEPS", "8"]}, 1), ({"opts": ["SOLVER.ACCUMULATION_STEPS", "4"]}, 2),
    ):  # fmt: skip
        args = arguments(animals, **others)
        use_own_data(args)
        assert args.num_gpus == count
    torchrun = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in (torchrun | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))
    capsys.readouterr()
    args = arguments(animals)
    use_own_data(args)
    assert args.num_gpus == 1 and capsys.readouterr().out == ""  # rank 0 prints


@pytest.mark.parametrize("size", ["quick", "mobilenet", "small", "r50"])
def test_every_size_gives_a_config_that_can_be_used(size, animals):
    args = arguments(animals, size=size)
    use_own_data(args)
    assert get_config(args.config_file).MODEL.DEQDET.NUM_CLASSES == 3


@pytest.mark.parametrize("folder", ["animals/", "animals/images/..", "./animals"])
def test_the_output_has_the_folders_name_however_that_is_written(folder, animals):
    args = arguments(folder)
    use_own_data(args)
    assert Path(args.config_file).parent.parent == Path("output/animals")


def test_given_values_win(animals):
    args = arguments(animals, "MODEL.DEQDET.NUM_QUERIES", 21, "INPUT.MIN_SIZE_TEST", 80, "SEED", 5)
    use_own_data(args)
    cfg = get_config(args.config_file)
    assert (cfg.MODEL.DEQDET.NUM_QUERIES, cfg.INPUT.MIN_SIZE_TEST, cfg.SEED) == (21, 80, 5)
    assert cfg.MODEL.DEQDET.PERTURBATION.POSITION_SIZE == 2.5


@pytest.mark.parametrize("given", [
    ("SOLVER.EARLY_STOP.PATIENCE", 3),  # the base config evaluates nothing
    ("SOLVER.IMS_PER_BATCH", 6, "SOLVER.ACCUMULATION_STEPS", 3),
    ("SOLVER.LR_RULE", "sqrt", "SOLVER.REFERENCE_BATCH", 8),
])  # fmt: skip
def test_given_values_need_to_fit_the_derived_ones_only(given, animals):
    args = arguments(animals, *given)
    use_own_data(args)
    assert get_config(args.config_file).DATASETS.TEST == ("animals-val",)


def test_given_values_that_do_not_fit_the_derived_ones(animals):
    with pytest.raises(UserError, match=r"ACCUMULATION_STEPS is 3: it must divide SOLVER.IMS_PER_BATCH \(8\)"):
        use_own_data(arguments(animals, "SOLVER.ACCUMULATION_STEPS", 3))


def test_a_fault_in_the_labels_names_their_folder(animals):
    write(animals / "annotations" / "b.xml", voc_xml("b", [("emu", (200, 4, 290, 24))]))
    with pytest.raises(UserError, match="^/.*animals/annotations: .*b.png.* lies outside"):
        use_own_data(arguments(animals))
    use_own_data(arguments(animals, "DATASETS.SKIP_BROKEN", True))


@pytest.mark.parametrize("others, words", [
    ({"config_file": "deqdet_shapes"}, "--data chooses a config by --size: omit --config-file deqdet_shapes"),
    ({"model": "a.safetensors"}, "omit --model a.safetensors; --init FILE starts from its weights"),
    ({"opts": ["DATASETS.TRAIN", "('a',)"]}, "--data sets DATASETS.TRAIN: give only one of them"),
    ({"data": "nowhere"}, "nowhere is not a folder"),
    ({"data": "", "size": "r50"}, "--size needs --data FOLDER, which is missing"),
    ({"opts": ["SOLVER.IMS_PER_BATCH", "0"]}, "SOLVER.IMS_PER_BATCH is 0: it must be"),
    ({"num_gpus": 0}, "--num-gpus is 0: it must be an integer of at least 1"),
    ({"num_gpus": 2, "num_machines": 0}, "--num-machines is 0: it must be an integer of at least 1"),
    ({"opts": ["SOLVER.IMS_PER_BACH", "4"]}, "unknown config key SOLVER.IMS_PER_BACH"),
    ({"opts": ["MODEL.DEQDET.NUM_QUERIES", "0"]}, "NUM_QUERIES is 0"),
])  # fmt: skip
def test_command_lines_that_cannot_be(others, words, animals):
    with pytest.raises(UserError, match=words):
        use_own_data(argparse.Namespace(**{**vars(arguments(animals)), **others}))
    assert not Path("output").exists()


def test_another_training_is_not_touched(animals):
    write(Path("output/animals/model_final.pth"), "weights")
    with pytest.raises(UserError, match="already contains a training"):
        use_own_data(arguments(animals))
    assert not Path("output/animals/data").exists()
