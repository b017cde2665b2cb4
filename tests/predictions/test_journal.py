"""The journal of a run: what is kept of one that a kill has cut off anywhere."""

import pytest

from deqdet.errors import UserError
from deqdet.predictions import Done, Journal
from deqdet.predictions.journal import NAME

SETTINGS = {"model": "a", "--steps": None}
IMAGES = [Done([f"{i}.png", i, i], (48, 64), ((1, 0.1 * i, 1 / 3, 2.0, 3.0, 4.0),)) for i in range(7)]
IMAGES[3] = Done(["3.png", 3, 3], fault="3.png: not an image")


def open_journal(folder, overwrite=False, **settings) -> Journal:
    return Journal(folder, SETTINGS | settings, group=2, overwrite=overwrite)


def write(folder) -> bytes:
    """A journal of three groups of two and a last one of one; its content."""
    journal = open_journal(folder)
    for start in range(0, 7, 2):
        journal.add(IMAGES[start : start + 2])
    journal.close()
    return (folder / NAME).read_bytes()


def test_whole_groups_are_kept_to_the_last_digit_wherever_the_file_is_cut(tmp_path):
    content = write(tmp_path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]  # of the head and of each image
    assert len(ends) == 8
    for cut in {*ends, *(end - 1 for end in ends), *(end + 5 for end in ends[:-1]), 0, 3}:
        (tmp_path / NAME).write_bytes(content[:cut])
        journal = open_journal(tmp_path)
        kept = sum(end <= cut for end in ends[1:]) // 2 * 2
        assert journal.done == IMAGES[:kept]
        journal.add(IMAGES[kept : kept + 2])
        journal.close()
        assert (tmp_path / NAME).read_bytes() == content[: ends[min(kept + 2, 7)]]


def test_a_damaged_line_ends_what_is_kept(tmp_path):
    lines = write(tmp_path).splitlines(keepends=True)
    lines[3] = b'{"state": 1}\n'
    (tmp_path / NAME).write_bytes(b"".join(lines))
    journal = open_journal(tmp_path)
    assert journal.done == IMAGES[:2]
    journal.close()


def test_images_are_kept_up_to_the_group_of_the_first_other_one(tmp_path):
    write(tmp_path)
    states = [image.state for image in IMAGES]
    for changed, kept in ((6, 6), (5, 4), (2, 2)):
        journal = open_journal(tmp_path)
        journal.keep([*states[:changed], ["other.png", 1, 1], *states[changed + 1 :]])
        assert journal.done == IMAGES[:kept]
        journal.close()
    journal = open_journal(tmp_path)
    with pytest.raises(UserError, match="is from an unfinished run on other images: choose another --output"):
        journal.keep([["other.png", 1, 1]])
    journal.keep([["other.png", 1, 1]], overwrite=True)
    assert journal.done == []
    journal.close()


def test_other_settings(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="unfinished run with another --steps: use the same as before"):
        open_journal(tmp_path, **{"--steps": 3})
    journal = open_journal(tmp_path, overwrite=True, **{"--steps": 3})
    assert journal.done == []
    journal.close()


def test_nothing_is_left_at_the_end(tmp_path):
    write(tmp_path)
    journal = open_journal(tmp_path)
    with pytest.raises(UserError, match="is in use by another run"):
        open_journal(tmp_path)
    journal.remove()
    assert list(tmp_path.iterdir()) == []
