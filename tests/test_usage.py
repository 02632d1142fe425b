"""--help of every command: one screen with what it does, three examples, and its own flags."""

import importlib
import re
import sys
import types

import pytest
from absl import flags
from commands import run_command

from vcm_jax import cli, usage
from vcm_jax.console import COMMANDS


def own_flags(module) -> list[str]:
    """Flags that a command defines, in order; they stay defined until `forget`."""
    before = set(flags.FLAGS)
    usage.forget_headings()
    if hasattr(module, "define_flags"):
        module.define_flags()
        return [name for name in flags.FLAGS if name not in before]
    return ["config", "workdir", "dry_run", "fit", "peer_timeout"]


@pytest.fixture
def forget():
    before, headings = set(flags.FLAGS), list(usage._headings)
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    usage._headings[:] = headings


def load(name: str):
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


@pytest.mark.parametrize("name", COMMANDS.values())
def test_the_help_of_every_command_fits_a_screen(name, forget):
    module = load(name)
    names = own_flags(module)
    text = usage.text(module.__doc__, names)
    lines = text.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    examples = re.findall(r"^    python -m vcm_jax[\w.]* .*$", text, re.M)
    assert len(examples) >= 3
    entries = re.findall(r"^  --(?:no)?(\w+)", text, re.M)
    plain = {flag.removeprefix("no") for flag in names}
    assert {entry.removeprefix("no") for entry in entries} == plain and len(entries) == len(names)


def small(define, doc="Does something."):
    seen = []
    main = lambda args: seen.append(args)
    return types.SimpleNamespace(__name__="small", __doc__=doc, define_flags=define, main=main)


def test_what_an_entry_says(forget):
    def define():
        flags.DEFINE_string("first", None, "No default.")
        usage.heading("Numbers")
        flags.DEFINE_integer("size", 3, "A size.", lower_bound=1)
        flags.DEFINE_list("times", [], "Some times.")
        usage.heading("Choices")
        flags.DEFINE_enum("kind", "b", ["a", "b"], "A kind.")
        flags.DEFINE_bool("fast", False, "Hurry.")
        flags.DEFINE_bool("safe", True, "Take care.")
        flags.DEFINE_float("a_name_that_is_long", 0.5, "words " * 40)

    names = own_flags(small(define))
    text = usage.text("Does something.\n", names).splitlines()
    assert text[:-4] == [
        "Does something.",
        "",
        "Flags:",
        "  --first=...           No default.",
        "",
        "Numbers:",
        "  --size=3              A size.",
        "  --times=...           Some times.",
        "",
        "Choices:",
        "  --kind=b|a            A kind.",
        "  --fast                Hurry.",
        "  --nosafe              Take care.",
    ]
    assert text[-4].startswith("  --a_name_that_is_long=0.5  words words")
    assert text[-3].startswith(" " * 24 + "words")


@pytest.mark.parametrize("ask", ["--help", "-h", "--helpshort"])
def test_help_does_nothing_else(ask):
    define = lambda: flags.DEFINE_string("out", None, "Where to.", required=True)
    module = small(define)
    done = run_command(module, ask, doc=module.__doc__)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("Does something.\n\nFlags:\n  --out=...")
    assert done.out.endswith("--helpfull lists the flags of all modules.\n")


def test_help_as_a_value_or_after_the_end_of_flags_is_no_wish_for_help():
    assert not usage.is_wanted(["command", "--prompt=--help", "--", "--help"])
    assert not usage.is_wanted(["--help"])  # the name of the command


def test_an_error_says_where_help_is():
    done = run_command(small(lambda: None), "--what")
    assert done.code == 1 and "(--help lists all flags)" in done.err


def test_commands_hand_their_docstring_and_flags_on(monkeypatch, forget):
    """`cli.run` takes them from the module that was started."""
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__doc__="Started."))
    monkeypatch.setattr(cli.app, "run", lambda main, flags_parser: flags_parser(["name", "--help"]))
    shown = []
    monkeypatch.setattr("builtins.print", lambda text, **_: shown.append(text))
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda args: None, lambda: flags.DEFINE_integer("only_mine", 1, "Mine."))
    assert not stop.value.code
    assert shown[0].startswith("Started.\n\nFlags:\n  --only_mine=1")
