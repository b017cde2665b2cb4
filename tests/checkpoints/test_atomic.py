"""Files that are complete or unchanged, whoever writes them at the same time."""

import pytest

from deqdet import UserError
from deqdet.atomic import prepare_output, replacing, write_text


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text("before", path)
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


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
