"""The command line that all tools share."""

import argparse
import io
import sys

import pytest

from deqdet.engine import exit_on_user_error, parse_arguments
from deqdet.errors import UserError
from deqdet.plugins import import_plugins


def parse(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--steps", nargs="+", type=int)
    return parse_arguments(parser, words)


@pytest.mark.parametrize("words, files, steps, opts", [
    (["a", "--steps", "1", "2", "SEED", "3"], ["a"], [1, 2], ["SEED", "3"]),
    (["a", "b", "MODEL.WEIGHTS", "c"], ["a", "b"], None, ["MODEL.WEIGHTS", "c"]),
    (["a", "--opts", "MODEL.WEIGHTS", "c"], ["a"], None, ["MODEL.WEIGHTS", "c"]),
    (["--steps", "4"], [], [4], []),
    (["a", "SOLVR.MAX_ITER", "4"], ["a"], None, ["SOLVR.MAX_ITER", "4"]),
])  # fmt: skip
def test_pairs_at_the_end(words, files, steps, opts):
    args = parse(*words)
    assert (args.files, args.steps, args.opts) == (files, steps, opts)


def test_a_user_error_is_one_line_and_exit_code_1(capsys):
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        raise UserError("this\n  is wrong")
    assert end.value.code == "error: this is wrong"
    with pytest.raises(SystemExit) as end, exit_on_user_error("say it again to go on"):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "say it again to go on\n"


def test_names_that_are_not_utf_8_can_be_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", write_through=True))
    with exit_on_user_error():
        print("caf\udce9.jpg")
    assert written.getvalue() == b"caf\\udce9.jpg\n"


def test_plugins(tmp_path, monkeypatch):
    (tmp_path / "mine_a.py").write_text("import builtins\nbuiltins.imports = getattr(builtins, 'imports', 0) + 1\n")
    monkeypatch.setattr("builtins.imports", 0, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    import_plugins([str(tmp_path / "mine_a.py"), str(tmp_path / "mine_a.py")])
    import builtins

    assert builtins.imports == 1
    import_plugins(["mine_a"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine_a.py").write_text("")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for name, message in [
        (str(tmp_path / "other" / "mine_a.py"), "another plugin file of this name"),
        (str(tmp_path / "broken.py"), "broken.py cannot be imported: ZeroDivisionError: division by zero"),
        ("no_such_module", "--plugin no_such_module cannot be imported: ModuleNotFoundError"),
        (str(tmp_path / "gone.py"), "gone.py cannot be imported: FileNotFoundError"),
    ]:
        with pytest.raises(UserError, match=message):
            import_plugins([name])
