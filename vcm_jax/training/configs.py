"""Config files by path or, where this package is installed, by name: --config=s16k."""

import importlib.util
import re
import sys
import types
from pathlib import Path

# Installed, the files lie in the package; in a checkout they lie beside it.
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
_NAME = re.compile(r"[A-Za-z_]\w*")


class ConfigError(ValueError):
    """A config that does not exist; one line."""


def folder() -> Path:
    """The folder of this project's configs."""
    return next((path for path in _FOLDERS if (path / "s16k.py").exists()), _FOLDERS[-1])


def resolve(argv: list[str]) -> list[str]:
    """The arguments with the paths of configs that --config names, and imports made possible.

    Config files import others by `from configs import s16k`. Where no such package can be found,
    as outside a checkout, it is the folder of the given file, then this project's.

    Raises:
      ConfigError: --config is a name that no config has.
    """
    argv = list(argv)
    for i, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option not in ("--config", "-config"):
            continue
        if not equals:  # the value is the next argument
            i, option, value = i + 1, "", "".join(argv[i + 1 : i + 2])
        if not value:
            continue
        path = _path(value)
        argv[i] = f"{option}{equals}{path}"
        _make_importable(Path(path.partition(":")[0]).absolute().parent)
    return argv


def _path(value: str) -> str:
    """FILE or FILE:ARGUMENT for what --config is."""
    name, colon, argument = value.partition(":")
    if not _NAME.fullmatch(name) or Path(name).exists():
        return value
    path = folder() / f"{name}.py"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder().glob("*.py")))
        raise ConfigError(f"--config={name}: no such config; there are {known}, or give a path")
    return f"{path}{colon}{argument}"


def _make_importable(beside: Path) -> None:
    """Lets `import configs` find a folder's files and this project's."""
    if "configs" in sys.modules or importlib.util.find_spec("configs") is not None:
        return
    package = types.ModuleType("configs")
    package.__path__ = [str(beside), str(folder())]
    sys.modules["configs"] = package
