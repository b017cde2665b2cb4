"""The packages that messages name, against the extras of setup.py."""

import re
import runpy

import pytest
import setuptools

from deqdet.extras import PACKAGES, how_to_install

from helpers.paths import ROOT


def test_each_extra_has_the_packages_of_setup(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    names = {
        extra: tuple(re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
        for extra, requirements in given["extras_require"].items()
    }
    assert PACKAGES == {extra: packages for extra, packages in names.items() if extra not in ("app", "dev")}


@pytest.mark.parametrize("extra, words", [
    ("mlflow", "pip install mlflow-skinny, or install deqdet with its extra [mlflow]"),
    ("export", "pip install onnx onnxscript onnxruntime, or install deqdet with its extra [export]"),
])  # fmt: skip
def test_a_message_does_not_need_a_release(extra, words):
    """pip install deqdet[...] would look for one on PyPI."""
    assert how_to_install(extra) == words
    sources = (path.read_text() for path in (ROOT / "projects").rglob("*.py"))
    assert not any(re.search(r"pip install ['\"]?deqdet", source) for source in sources)
