"""What --help prints: what a command does, examples, and its own flags; one screen."""

import re
import textwrap
from collections.abc import Iterable

from absl import flags

WIDTH = 100  # columns
_NAMES = 24  # columns of the names of flags
_ASKS = {"--help", "-help", "--h", "-h", "--helpshort", "-helpshort", "-?"}
_headings: list[tuple[str, set[str]]] = []  # (title, flags that were defined before)


def heading(title: str) -> None:
    """Begins a group of flags in the help: those that are defined next belong to it."""
    _headings.append((title, set(flags.FLAGS)))


def forget_headings() -> None:
    """Another command's flags are defined in this process next."""
    _headings.clear()


def is_wanted(argv: list[str]) -> bool:
    """Whether the arguments ask for help (--helpfull is absl's own list of all flags)."""
    before = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    return any(argument in _ASKS for argument in before)


def text(doc: str, names: Iterable[str]) -> str:
    """The help of a command.

    Args:
      doc: the docstring of its module.
      names: its own flags, in the order of their definition.
    """
    lines = [doc.strip()]
    for title, members in _groups(list(names)):
        lines += ["", f"{title}:"]
        for name in members:
            lines += _entry(flags.FLAGS[name])
    return "\n".join(lines)


def _groups(names: list[str]) -> Iterable[tuple[str, list[str]]]:
    """(title, flags) in order; flags before the first heading are called Flags."""
    groups = {"Flags": []}
    for name in names:
        title = next((t for t, before in reversed(_headings) if name not in before), "Flags")
        groups.setdefault(title, []).append(name)
    return [(title, members) for title, members in groups.items() if members]


def _entry(flag) -> list[str]:
    """A flag's lines: its name with its default (... if it has none), and what it is."""
    name = f"  {_shown(flag)}"
    indent = " " * _NAMES
    # A long name has a line of its own only if its text would not fit beside it.
    first = f"{name:{_NAMES - 1}} " if len(name) < _NAMES else f"{name}  "
    help_text = " ".join((flag.help or "").split())
    help_text = re.sub(r"^<[^>]*>: ", "", help_text)  # absl's list of an enum's values
    return textwrap.wrap(first + help_text, WIDTH, subsequent_indent=indent, drop_whitespace=True)


def _shown(flag) -> str:
    if flag.boolean:
        return f"--no{flag.name}" if flag.default else f"--{flag.name}"
    values = getattr(flag.parser, "enum_values", None)
    if values:
        first = [flag.default] if flag.default in values else []
        return f"--{flag.name}={'|'.join(first + [v for v in values if v not in first])}"
    default = flag.default
    is_given = default is not None and default != "" and default != []
    return f"--{flag.name}={flag.default_as_str.strip(chr(39)) if is_given else '...'}"
