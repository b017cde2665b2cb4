"""tools/install_detectron2.py: what it restores, what it refuses and how it says so, without the network."""

import hashlib
import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.paths import TOOLS

SCRIPT = TOOLS / "install_detectron2.py"

OFFICIAL = {
    "detectron2/__init__.py": b'"""Official."""\nfrom detectron2.layers import nms\n',
    "detectron2/layers/nms.py": b"import detectron2.layers\n\n\ndef nms():\n    return 'detectron2'\n",
    "detectron2/model_zoo/configs/Base.yaml": b"MODEL:\n  MASK_ON: True\n",
}
HASHES = {name: hashlib.sha256(data).hexdigest() for name, data in OFFICIAL.items()}
ALTERED = OFFICIAL | {"detectron2/layers/nms.py": b"import os\n"}


def carrier(files: dict[str, bytes]) -> bytes:
    """A wheel that holds `files` as the real one does: renamed, with CRLF, beside other packages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("EZannot/__init__.py", "raise RuntimeError('not detectron2')\r\n")
        archive.writestr("EZannot/detectron2_extra.py", "")
        for name, data in files.items():
            for statement in (b"from ", b"import "):
                data = data.replace(statement + b"detectron2", statement + b"EZannot.detectron2")
            archive.writestr(f"EZannot/{name}", data.replace(b"\n", b"\r\n"))
    return buffer.getvalue()


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FakePip:
    """Stands for subprocess.run: downloads `wheel`; fails with `stderr` where told of `failing`."""

    def __init__(self):
        self.commands = []
        self.wheel = b""
        self.failing = None
        self.stderr = ""
        self.installed = None  # the files of the project that it was last told to install

    def __call__(self, command, **_):
        assert command[:3] == [sys.executable, "-m", "pip"]
        _, _, _, *arguments = command
        self.commands.append(arguments)
        if self.failing and self.failing in " ".join(arguments):
            return SimpleNamespace(returncode=1, stderr=self.stderr)
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            (folder / "ezannot-1.1.0-py3-none-any.whl").write_bytes(self.wheel)
        elif Path(arguments[-1]).is_dir():
            self.installed = written(Path(arguments[-1]))
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def installer():
    spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pip(installer, monkeypatch, tmp_path) -> FakePip:
    """The installer where torch is present and detectron2 is not, with OFFICIAL for the official files."""
    fake = FakePip()
    hashes = tmp_path / "official.sha256"
    hashes.write_text("".join(f"{digest}  {name}\n" for name, digest in HASHES.items()))
    monkeypatch.setattr(installer, "OFFICIAL_HASHES", hashes)
    monkeypatch.setattr(installer.subprocess, "run", fake)
    monkeypatch.setattr(installer.importlib.util, "find_spec", {"torch": "found"}.get)
    return fake


def offer(installer, pip: FakePip, monkeypatch, files: dict[str, bytes]) -> None:
    """Let pip download `files`, in a wheel that has the known hash."""
    pip.wheel = carrier(files)
    monkeypatch.setattr(installer, "CARRIER_SHA256", hashlib.sha256(pip.wheel).hexdigest())


def failure(installer, capsys, *arguments: str) -> str:
    """Run main, which must fail, and return its one message."""
    assert installer.main(list(arguments)) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("install_detectron2: ") and output.err.count("install_detectron2: ") == 1
    return output.err


def test_restore_undoes_line_ends_and_namespace_and_takes_detectron2_only(installer, tmp_path):
    wheel = tmp_path / "carrier.whl"
    wheel.write_bytes(carrier(OFFICIAL))
    installer.restore(wheel, HASHES, tmp_path / "out")
    assert written(tmp_path / "out") == OFFICIAL


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"detectron2/layers/nms.py": b"import os\n"}, "detectron2/layers/nms.py is altered"),
        ({"detectron2/model_zoo/configs/Base.yaml": None}, "configs/Base.yaml is missing"),
        ({"detectron2/backdoor.py": b""}, "detectron2/backdoor.py is not official"),
        ({"detectron2/model_zoo/configs/More.yaml": b""}, "configs/More.yaml is not official"),
    ],
    ids=["altered", "missing", "extra-py", "extra-yaml"],
)
def test_restore_refuses_any_other_set_of_files_and_writes_none(installer, tmp_path, change, complaint):
    files = {name: data for name, data in (OFFICIAL | change).items() if data is not None}
    wheel = tmp_path / "carrier.whl"
    wheel.write_bytes(carrier(files))
    with pytest.raises(installer.InstallError, match=r"1 file\(s\) wrong") as caught:
        installer.restore(wheel, HASHES, tmp_path / "out")
    assert complaint in str(caught.value) and "--source git" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_pip_installs_is_the_restored_tree_as_detectron2_0_6(installer, pip, monkeypatch):
    offer(installer, pip, monkeypatch, OFFICIAL)
    assert installer.main([]) == 0
    project = pip.installed.pop("pyproject.toml").decode()
    assert pip.installed == OFFICIAL
    assert 'name = "detectron2"\nversion = "0.6"\n' in project and "'setuptools<81'" in project


def test_a_wheel_with_another_hash_is_not_installed(installer, pip, capsys):
    pip.wheel = carrier(OFFICIAL)
    message = failure(installer, capsys)
    assert installer.CARRIER_SHA256 in message and hashlib.sha256(pip.wheel).hexdigest() in message
    assert "Nothing was installed" in message
    assert [command[0] for command in pip.commands] == ["download"]


def test_a_wheel_with_an_altered_file_is_not_installed(installer, pip, capsys, monkeypatch):
    offer(installer, pip, monkeypatch, ALTERED)
    assert "detectron2/layers/nms.py is altered" in failure(installer, capsys)
    assert [command[0] for command in pip.commands] == ["download"]


def test_a_failed_download_quotes_pip_and_offers_a_way_on(installer, pip, capsys):
    pip.failing = "EZannot"
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution for EZannot\n\n[notice] new pip\n"
    message = failure(installer, capsys)
    assert "pip download failed: ERROR: No matching distribution for EZannot\n" in message
    assert "--source git" in message and "retrying" not in message and "notice" not in message


def test_a_failed_installation_quotes_pip(installer, pip, capsys, monkeypatch):
    offer(installer, pip, monkeypatch, OFFICIAL)
    pip.failing = "install"
    pip.stderr = "error: externally-managed-environment\n\nhint: See PEP 668.\n"
    message = failure(installer, capsys)
    assert "pip install failed: error: externally-managed-environment\n" in message
    assert "virtual environment" in message


def test_a_failed_git_build_names_what_it_takes(installer, pip, capsys):
    pip.failing = "git+"
    pip.stderr = "ERROR: Cannot find command 'git'\n"
    message = failure(installer, capsys, "--source", "git")
    assert "pip install failed: ERROR: Cannot find command 'git'\n" in message and "C++ compiler" in message


def test_git_builds_the_official_commit_without_isolation(installer, pip):
    assert installer.main(["--source", "git"]) == 0
    preparation, build = pip.commands
    assert preparation == ["install", "setuptools<81", "wheel"]
    assert build[:2] == ["install", "--no-build-isolation"]
    assert build[2].endswith("/detectron2.git@28fd05eeb68114aa8a8d915168bdf6e7f7b5c2a6")


def test_torch_missing(installer, pip, capsys, monkeypatch):
    monkeypatch.setattr(installer.importlib.util, "find_spec", {}.get)
    assert "pip install torchvision" in failure(installer, capsys)
    assert pip.commands == []


def test_python_too_old(installer, pip, capsys, monkeypatch):
    monkeypatch.setattr(installer.sys, "version_info", (3, 9, 18))
    assert "Python 3.10 or later" in failure(installer, capsys)
    assert pip.commands == []


def run_script(path: Path) -> subprocess.CompletedProcess:
    """The script by itself where only `path` can be imported from: no torch there, and no pip."""
    command = [sys.executable, "-S", str(SCRIPT)]
    return subprocess.run(command, env={"PYTHONPATH": str(path)}, capture_output=True, text=True)


@pytest.mark.parametrize(("version", "shown"), [("0.7", "0.7"), (None, "(version unknown)")])
def test_an_installed_detectron2_is_left_alone(tmp_path, version, shown):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    if version:
        info = tmp_path / f"detectron2-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\n")
    done = run_script(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"left unchanged: detectron2 {shown} in {package}\n"


def test_a_bare_folder_of_that_name_is_not_an_installation(tmp_path):
    (tmp_path / "detectron2").mkdir()
    done = run_script(tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("install_detectron2: torch is missing")


def test_the_committed_list_is_whole(installer):
    hashes = installer.read_hashes(installer.OFFICIAL_HASHES)
    assert len(hashes) == 306
    assert all(name.startswith("detectron2/") and name.endswith((".py", ".yaml")) for name in hashes)
    assert all(len(digest) == 64 and int(digest, 16) for digest in hashes.values())
