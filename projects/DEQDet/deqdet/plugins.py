"""Imports modules that register a user's own layers, decoders, solvers and backbones.

Only the user can name such modules, on a command line (`--plugin`) or by importing them. A config or a model file
cannot, since reading a file must not run code.
"""

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, one_line


def import_plugins(names: Sequence[str]) -> None:
    """Import modules, each once.

    Args:
        names: module names that Python can import ("my_package.my_layer"), or files ("my_layer.py").

    Raises:
        UserError: a module cannot be imported; says why.
    """
    for name in names:
        try:
            _import_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise UserError(f"--plugin {name} cannot be imported: {_explain(error)}") from error


def _explain(error: BaseException) -> str:
    """Describe an exception on one line, with the file and line that raised it."""
    if registered := re.match(r"An object named '(.+)' was already registered in '(.+)' registry", str(error)):
        return f"the name {registered[1]} is registered in {registered[2]} already: choose another one"
    told = f"{type(error).__name__}: {one_line(error)}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return told if isinstance(error, SyntaxError | ImportError) else f"{told} ({place.filename}, line {place.lineno})"


def _import_file(path: Path) -> None:
    name = f"deqdet_plugin_{path.stem}"
    known = sys.modules.get(name)
    if known is not None:
        if Path(known.__file__).resolve() != path.resolve():
            raise UserError(f"another plugin file of this name was imported from {known.__file__}: rename one")
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
