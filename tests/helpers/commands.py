"""Runs a command inside the test's process: flags, exit code, what it prints."""

import contextlib
import dataclasses
import io

from absl import flags

from vcm_jax import cli, usage


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


def run_command(module, *arguments, doc="", **options) -> Done:
    """`python -m MODULE ARGUMENTS`; `options` are those of `cli.run`. Bugs are raised."""
    before = set(flags.FLAGS)
    usage.forget_headings()
    module.define_flags()
    own = [name for name in flags.FLAGS if name not in before]
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                rest = cli.parse_flags([module.__name__, *map(str, arguments)], doc, own)[1:]
                cli.execute(module.main, rest, **options)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
                if isinstance(stop.code, str):
                    print(stop.code, file=err)
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
    return Done(code, out.getvalue(), err.getvalue())
