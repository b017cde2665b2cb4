"""What the import of the package does to the interpreter of the caller."""

import gc
import subprocess
import sys

import pytest

from deqdet.quiet_imports import collector_paused

IMPORT = """
import gc
full = []
gc.callbacks.append(lambda phase, info: full.append(info) if (phase, info["generation"]) == ("start", 2) else None)
import deqdet
print(len(full), gc.isenabled(), gc.get_freeze_count())
"""


def run(code: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)


@pytest.fixture(autouse=True)
def collector():
    gc.unfreeze()  # what conftest.py has frozen
    yield
    gc.enable()
    gc.freeze()


def test_the_import_prints_nothing_and_rarely_collects_garbage():
    done = run(IMPORT)
    full, enabled, frozen = done.stdout.split()
    assert done.stderr == "" and (enabled, frozen) == ("True", "0")
    assert int(full) <= 3  # 7 without the pause


@pytest.mark.parametrize("module", ["deqdet", "deqdet.tools.train_net", "deqdet.tools.publish"])
def test_libraries_that_few_commands_need_are_not_imported(module):
    """Pictures need matplotlib, and matching needs scipy: together a seventh of a command's start."""
    code = f"import sys, {module}; print({{'matplotlib', 'scipy.optimize', 'onnx', 'pandas'}} & sys.modules.keys())"
    assert run(code).stdout == "set()\n"


def test_a_command_visits_the_libraries_objects_no_more():
    code = "import gc; from deqdet.tools.publish import main\ntry: main()\nfinally: print(gc.get_freeze_count())"
    assert int(run(code, "--help").stdout.split()[-1]) > 100_000


def test_the_collector_is_paused_and_runs_again():
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with pytest.raises(ImportError), collector_paused():
        raise ImportError
    assert gc.isenabled()


def test_a_callers_settings_of_the_collector_are_kept():
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collector_paused():
        pass
    # Some frozen objects may have been freed meanwhile, by their reference counts.
    assert frozen >= gc.get_freeze_count() > 0.99 * frozen > 0
    gc.disable()
    with collector_paused():
        pass
    assert not gc.isenabled()
