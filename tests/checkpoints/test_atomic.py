"""Files that are complete or unchanged, whoever writes them at the same time."""

from pathlib import Path

import pytest

from deqdet import UserError
from deqdet.atomic import prepare_output, replacing, replacing_once_checked, write_text


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text("before", path)
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def write_two(path, fail=None):
    with replacing_once_checked(path) as (unfinished, describe):
        for name in ("a.1.txt", "a.2.txt"):
            write_text("after", unfinished.with_name(name))
        assert describe(f"Writing {unfinished}") == f"Writing {path}"
        if fail:
            raise fail(f"{unfinished} is wrong")


@pytest.mark.parametrize("folder", ["", "{}/"])
def test_several_files_replace_older_ones_only_if_all_is_well(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    path, older = Path(f"{folder.format(tmp_path)}a.txt"), [tmp_path / "a.1.txt", tmp_path / "a.2.txt"]
    for file in older:
        write_text("before", file)
    failures = (ZeroDivisionError, ".*"), (KeyboardInterrupt, ".*"), (BrokenPipeError, f".*{path.name} is wrong")
    for fail, message in ((UserError, f"{path} is wrong"), *failures):
        with pytest.raises(fail, match=f"^{message}$"):
            write_two(path, fail)
        assert [file.read_text() for file in older] == ["before"] * 2 and sorted(tmp_path.iterdir()) == older
    write_two(path)
    assert [file.read_text() for file in older] == ["after"] * 2 and sorted(tmp_path.iterdir()) == older
    older[1].unlink()
    (older[1] / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"^{path} cannot be written \(Is a directory\)$"):
        write_two(path)
    with pytest.raises(UserError, match=r"none/a.txt cannot be written \(No such file or directory\)$"):
        write_two(tmp_path / "none" / "a.txt")


def test_two_writers_do_not_mix(tmp_path):
    """As two processes with the same number do, in containers or on two machines with a common disk."""
    path = tmp_path / "a.txt"
    with replacing(path) as one:
        one.write(b"o")
        with replacing(path) as two:
            two.write(b"tttt")
        assert path.read_bytes() == b"tttt"
        one.write(b"oo")
    assert path.read_bytes() == b"ooo" and list(tmp_path.iterdir()) == [path]


def test_the_folder_of_an_output_is_made(tmp_path):
    prepare_output(tmp_path / "new" / "folder" / "a.txt")
    assert (tmp_path / "new" / "folder").is_dir()
    write_text("x", tmp_path / "file")
    with pytest.raises(UserError, match=r"file/a.txt cannot be written: its folder cannot be created \(File exists\)"):
        prepare_output(tmp_path / "file" / "a.txt")
    with pytest.raises(UserError, match="new cannot be written: it is a folder"):
        prepare_output(tmp_path / "new")


def test_a_disk_error_names_the_file_and_the_reason(tmp_path):
    with pytest.raises(UserError, match=r"none/a.txt cannot be written \(No such file or directory\)$"):
        write_text("x", tmp_path / "none" / "a.txt")
    with pytest.raises(UserError, match=r"a.txt cannot be written \(no room\)$"), replacing(tmp_path / "a.txt"):
        raise RuntimeError("no\nroom")  # as torch.save says it
