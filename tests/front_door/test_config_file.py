"""Config files and what they inherit from: tags, loops, and the network."""

import functools
import http.server
import threading

import pytest

from deqdet import model_zoo
from deqdet.config_file import MOST_FILES
from deqdet.engine import load_config, parse_arguments
from deqdet.engine.options import check_options
from deqdet.errors import UserError
from deqdet.tools.publish import make_parser

from helpers.paths import ROOT


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of the folder tmp_path/web; what is downloaded goes to a cache of the test's own."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


def test_a_base_of_the_network_needs_leave(tmp_path, server):
    (tmp_path / "web" / "base.yaml").write_text("_BASE_: grand.yaml\nMODEL: {DEQDET: {NUM_QUERIES: 7}}\nVERSION: 2\n")
    (tmp_path / "web" / "grand.yaml").write_text("MODEL: {DEQDET: {NUM_QUERIES: 3, NUM_CLASSES: 5}}\n")
    (tmp_path / "child.yaml").write_text(f"_BASE_: {server}/base.yaml\nSEED: 4\n")
    for name in (tmp_path / "child.yaml", f"{server}/base.yaml"):
        with pytest.raises(UserError, match=r"base.yaml comes from the network: download .* --allow-remote-config"):
            model_zoo.get_config(name)
        deqdet = model_zoo.get_config(name, allow_remote=True).MODEL.DEQDET
        assert (deqdet.NUM_QUERIES, deqdet.NUM_CLASSES) == (7, 5)


def test_the_flag_of_the_tools(tmp_path, server):
    (tmp_path / "web" / "flag.yaml").write_text("MODEL: {DEQDET: {NUM_QUERIES: 7}}\n")
    words = ["a.pth", "--config-file", f"{server}/flag.yaml", "--output", "b.safetensors"]
    with pytest.raises(UserError, match="flag.yaml comes from the network"):
        load_config(parse_arguments(make_parser(), words))
    cfg = load_config(parse_arguments(make_parser(), [*words, "--allow-remote-config"]))
    assert cfg.MODEL.DEQDET.NUM_QUERIES == 7


def test_leave_for_the_network_is_no_leave_for_code(tmp_path, server, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "web" / "evil.yaml").write_text("\n\nOUTPUT_DIR: !!python/object/apply:os.system ['touch canary']\n")
    (tmp_path / "child.yaml").write_text(f"_BASE_: {server}/evil.yaml\n")
    for name in ("child.yaml", f"{server}/evil.yaml"):
        with pytest.raises(UserError, match=rf"^{server}/evil.yaml, line 3: .*os.system.*plain values only"):
            model_zoo.get_config(name, allow_remote=True)
    with pytest.raises(UserError, match=r"gone.yaml cannot be read \(.*404"):
        model_zoo.get_config(f"{server}/gone.yaml", allow_remote=True)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("files, message", [
    ({"a": "_BASE_: a.yaml"}, "a.yaml: its _BASE_ loops, .*a.yaml -> .*a.yaml: remove one of these _BASE_ keys"),
    ({"a": "_BASE_: b.yaml", "b": "_BASE_: ../{here}/a.yaml"}, "loops, .*a.yaml -> .*b.yaml -> .*a.yaml"),
    ({"a": "_BASE_: [c.yaml, b.yaml]", "b": "_BASE_: [a.yaml]", "c": "SEED: 1"}, "loops"),
    ({"a": "_BASE_: gone.yaml"}, "a.yaml: its _BASE_ .*gone.yaml does not exist, or is not a regular file"),
    ({"a": "_BASE_: ."}, "does not exist, or is not a regular file"),
    ({"a": "_BASE_: ftp://localhost/b.yaml"}, "a.yaml: its _BASE_ .*ftp://localhost/b.yaml does not exist"),
    ({"a": "_BASE_: 3"}, "a.yaml: _BASE_ must be the name of a file, or a list of names, got 3"),
    ({"a": "[1, 2]"}, "a.yaml is not a config: it must be a YAML mapping"),
    ({"a": ""}, "a.yaml is not a config: it must be a YAML mapping"),
    ({"a": "SEED: !!python/name:os.system"}, "a.yaml, line 1: .*python/name:os.system"),
    ({"a": "VERSION: 2\nSEED: !ours 3"}, "a.yaml, line 2: .*!ours"),
    ({"a": "SEED: 1\x00"}, "a.yaml: "),
    ({"a": "SEED: &x [*x]"}, "a.yaml: "),
    ({"a": "[" * 2000}, "a.yaml: "),
    ({"a": "OUTPUT_DIR: 2020-01-01"}, "a.yaml: .*OUTPUT_DIR"),
    ({"a": "VERSION: 2\nMODEL: 3"}, "a.yaml: .*MODEL"),
])  # fmt: skip
def test_what_is_wrong_with_a_file(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("{here}", tmp_path.name) + "\n")
    with pytest.raises(UserError, match=message) as error:
        model_zoo.get_config(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)


def test_a_file_may_be_inherited_from_twice(tmp_path):
    (tmp_path / "d.yaml").write_text("SEED: 1\n")
    for name in "bc":
        (tmp_path / f"{name}.yaml").write_text("_BASE_: d.yaml\n")
    (tmp_path / "a.yaml").write_text("_BASE_: [b.yaml, c.yaml]\n")
    assert model_zoo.get_config(tmp_path / "a.yaml").SEED == 1


def test_there_is_an_end_to_inheriting(tmp_path):
    for number in range(8):  # 2^8 files in all
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "8.yaml").write_text("SEED: 1\n")
    with pytest.raises(UserError, match=f"inherits from more than {MOST_FILES} files"):
        model_zoo.get_config(tmp_path / "0.yaml")


def test_a_file_cannot_trust_pickles(tmp_path, caplog):
    (tmp_path / "a.yaml").write_text("MODEL: {TRUST_PICKLE: True}\nVERSION: 2\n")
    assert not model_zoo.get_config(tmp_path / "a.yaml").MODEL.TRUST_PICKLE
    assert "a.yaml: MODEL.TRUST_PICKLE is ignored in a file: it counts on the command line only" in caplog.text
    assert model_zoo.get_config(tmp_path / "a.yaml", ["MODEL.TRUST_PICKLE", "True"]).MODEL.TRUST_PICKLE


@pytest.mark.parametrize("name", ["quick/deqdet_shapes", "deqdet_shapes", "configs/quick/deqdet_shapes.yaml"])
def test_a_base_of_the_model_zoo(tmp_path, name):
    (tmp_path / "a.yaml").write_text(f"_BASE_: {name}\nSEED: 4\n")
    (tmp_path / "b.yaml").write_text("_BASE_: [a.yaml]\nMODEL: {DEQDET: {NUM_CLASSES: 5}}\n")
    cfg, base = model_zoo.get_config(tmp_path / "b.yaml"), model_zoo.get_config("quick/deqdet_shapes")
    assert (cfg.SEED, cfg.MODEL.DEQDET.NUM_CLASSES) == (4, 5) != (base.SEED, base.MODEL.DEQDET.NUM_CLASSES)
    cfg.SEED, cfg.MODEL.DEQDET.NUM_CLASSES = base.SEED, base.MODEL.DEQDET.NUM_CLASSES
    assert cfg == base


def test_a_file_beside_the_config_comes_before_the_model_zoo(tmp_path):
    (tmp_path / "deqdet_shapes").write_text("SEED: 123\n")
    (tmp_path / "a.yaml").write_text("_BASE_: deqdet_shapes\n")
    cfg = model_zoo.get_config(tmp_path / "a.yaml")
    assert cfg.SEED == 123 and cfg.MODEL.DEQDET.NUM_CLASSES == 80
    (tmp_path / "deqdet_shapes").write_text("SEED: !!python/name:os.system\n")
    with pytest.raises(UserError, match="deqdet_shapes, line 1: .*plain values only"):
        model_zoo.get_config(tmp_path / "a.yaml")


def test_a_base_that_is_like_a_name(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: quick/deqdet_shaps\n")
    message = r"a.yaml: its _BASE_ .*/quick/deqdet_shaps does not exist, .*; did you mean quick/deqdet_shapes"
    with pytest.raises(UserError, match=message):
        model_zoo.get_config(tmp_path / "a.yaml")


def test_a_version_that_detectron2_has_left(tmp_path):
    (tmp_path / "a.yaml").write_text("VERSION: 1\n")
    with pytest.raises(UserError, match="a.yaml: VERSION is 1: it must be 2"):
        model_zoo.get_config(tmp_path / "a.yaml")


class TestSolverOptions:
    """What becomes of MODEL.DEQDET.SOLVER.OPTIONS of a base when another solver is named."""

    @pytest.fixture
    def base(self, tmp_path):
        path = tmp_path / "base.yaml"
        path.write_text("MODEL: {DEQDET: {SOLVER: {NAME: Damped, OPTIONS: {START: 0.8}}, PLUGIN: {POINTS: 3}}}\n")
        return path

    @pytest.mark.parametrize("pairs, options", [
        (["SOLVER.NAME", "Anderson"], {}),
        (["SOLVER.NAME", "Damped"], {"START": 0.8}),
        (["SOLVER.OPTIONS.END", "1"], {"START": 0.8, "END": 1}),
        (["SOLVER.NAME", "Anderson", "SOLVER.OPTIONS.HISTORY_SIZE", "3"], {"HISTORY_SIZE": 3}),
        (["SOLVER.OPTIONS.HISTORY_SIZE", "3", "SOLVER.NAME", "Anderson"], {"HISTORY_SIZE": 3}),
        (["SOLVER.OPTIONS", "{}"], {}),
        (["SOLVER.OPTIONS", "{'END': 0.5}"], {"END": 0.5}),
        (["SOLVER.OPTIONS", "{}", "SOLVER.OPTIONS.END", "1"], {"END": 1}),
    ])  # fmt: skip
    def test_on_a_command_line(self, base, caplog, pairs, options):
        keys = [word if i % 2 else f"MODEL.DEQDET.{word}" for i, word in enumerate(pairs)]
        cfg = model_zoo.get_config(base, keys)
        assert cfg.MODEL.DEQDET.SOLVER.OPTIONS == options and cfg.MODEL.DEQDET.PLUGIN == {"POINTS": 3}
        dropped = "SOLVER.OPTIONS {'START': 0.8} of Damped are dropped, since NAME is now Anderson" in caplog.text
        assert dropped == ("Anderson" in pairs)
        model_zoo.put_overrides(cfg, ["MODEL.DEQDET.SOLVER.OPTIONS.NEW", "2"])  # the section is still open
        assert cfg.MODEL.DEQDET.SOLVER.OPTIONS.NEW == 2

    @pytest.mark.parametrize("text, options", [
        ("{NAME: Anderson}", {}),
        ("{NAME: Anderson, OPTIONS: {HISTORY_SIZE: 3}}", {"HISTORY_SIZE": 3}),
        ("{NAME: Damped, OPTIONS: {END: 1}}", {"START": 0.8, "END": 1}),
        ("{OPTIONS: {START: 1}}", {"START": 1}),
        ("{OPTIONS: {}}", {}),
        ("{RTOL: 0.5}", {"START": 0.8}),
    ])  # fmt: skip
    def test_in_a_file(self, base, caplog, text, options):
        child = base.with_name("child.yaml")
        child.write_text(f"_BASE_: base.yaml\nMODEL: {{DEQDET: {{SOLVER: {text}}}}}\n")
        cfg = model_zoo.get_config(child)
        assert cfg.MODEL.DEQDET.SOLVER.OPTIONS == options and cfg.MODEL.DEQDET.PLUGIN == {"POINTS": 3}
        assert ("are dropped" in caplog.text) == ("Anderson" in text)

    def test_a_value_for_a_section(self, base):
        child = base.with_name("child.yaml")
        child.write_text("_BASE_: base.yaml\nMODEL: {DEQDET: {SOLVER: {NAME: {A: 1}}}}\n")
        with pytest.raises(UserError, match="child.yaml: MODEL.DEQDET.SOLVER.NAME is a section here, but one value"):
            model_zoo.get_config(child)
        with pytest.raises(UserError, match="MODEL.DEQDET.PLUGIN is a section, and cannot be 3"):
            model_zoo.get_config(base, ["MODEL.DEQDET.PLUGIN", "3"])


def test_the_config_that_the_page_shows(tmp_path):
    text = (ROOT / "docs" / "config.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(text)
    cfg = model_zoo.get_config(tmp_path / "mine.yaml")
    check_options(cfg)
    assert len(text.splitlines()) == 5
    assert (cfg.MODEL.DEQDET.NUM_QUERIES, cfg.OUTPUT_DIR) == (40, "output/mine")
    assert cfg.DATASETS == model_zoo.get_config("quick/deqdet_shapes").DATASETS
