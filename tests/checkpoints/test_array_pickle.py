"""Pickles of arrays are read without running what is in them."""

import os
import pickle

import numpy as np
import pytest

from deqdet.checkpoints import CheckpointError
from deqdet.checkpoints.array_pickle import read_array_pickle

ARRAYS = {
    "float": np.arange(6, dtype="f4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
    "half": np.float16([1.5]),
    "big-endian": np.arange(3, dtype=">i4"),
    "bytes": np.arange(256, dtype="u1"),  # all of latin1, in which Python 2's bytes are texts
    "flags": np.array([True, False]),
    "no axis": np.array(3.0),
    "empty": np.zeros((0, 4)),
    "scalar": np.float32(2.5),
}
# numpy.arange(2, dtype="f4") as Python 2 pickled it, by hand: bytes are str (the S, U and T opcodes).
PYTHON_2 = (
    b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x08\x00\x00\x00\x00\x00\x00\x80\x3ftbs."
)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(tmp_path, name, protocol):
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"x": [ARRAYS[name], "text", {"y": (1, None)}]}, protocol))
    loaded, *others = read_array_pickle(file)["x"]
    np.testing.assert_array_equal(loaded, ARRAYS[name], strict=True)
    assert others == ["text", {"y": (1, None)}]


def test_arrays_of_python_2(tmp_path):
    (tmp_path / "a.pkl").write_bytes(PYTHON_2)
    np.testing.assert_array_equal(read_array_pickle(tmp_path / "a.pkl")["a"], np.float32([0, 1]), strict=True)


class Call:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def forged_type():
    """A type of objects that claims to be plain bytes: NumPy would read addresses from the array's content."""
    return b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR."


@pytest.mark.parametrize("content", [
    pickle.dumps({"x": Call(os.system, "touch canary")}),
    pickle.dumps({"x": Call(eval, "open('canary', 'w')")}),
    pickle.dumps({"x": Call(np.fromfile, __file__)}),  # harmless, but none of the known names
    pickle.dumps({"x": np.array([Call(os.system, "touch canary")], dtype=object)}),
    pickle.dumps({"x": np.array(["text"])}),
    pickle.dumps(np.dtype([("a", "f4")])),
    pickle.dumps({"x": {1, 2}}),
    forged_type(),
    pickle.dumps({"x": ARRAYS["float"]})[:-9],
    b"cnumpy\nndarray\n(tR(I1\n(I3\ntcnumpy\nndarray\nI00\nS''\ntb.",  # a class in place of a type
    b"(dS'a'\np0\ng0\nsg1\n.",
    b"\x80\x04\x95",
    b"",
])  # fmt: skip
def test_anything_else_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a.pkl is damaged, or not a pickle of only NumPy arrays \(\w+: "):
        read_array_pickle(tmp_path / "a.pkl")
    assert not (tmp_path / "canary").exists()


def test_a_pickle_that_holds_itself_is_refused(tmp_path):
    loop = {}
    loop["x"] = loop
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(loop))
    with pytest.raises(CheckpointError, match="RecursionError"):
        read_array_pickle(tmp_path / "a.pkl")
