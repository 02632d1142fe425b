"""What the commands share: how they start, what they log, and how they fail.

Every command is a module that is written like this:

    def define_flags():
        define_run_flags()
        flags.DEFINE_integer("clips", 16, "Number of records.", lower_bound=1)

    def main(args):  # args: the values of the flags
        ...

    if __name__ == "__main__":
        run(main, define_flags)

`main` raises ValueError (or a subclass) for bad input and returns an exit code, or None for 0.
A command that takes arguments besides its flags names them: `run(main, define_flags,
positional="the runs to compare")`, and gets `main(args, rest)`.

Exit codes: 0 done; 1 the line on stderr says what is wrong; 3 done, but some clips were left out
(LEFT_OUT); 74 an output cannot be written (UNWRITABLE_CODE); 130 interrupted by Ctrl-C.
"""

import functools
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import app, flags, logging

from vcm_jax import usage
from vcm_jax.atomic import UNWRITABLE
from vcm_jax.usage import heading as heading

LEFT_OUT = 3
UNWRITABLE_CODE = 74  # EX_IOERR of sysexits.h
INTERRUPTED = 130

# Errors of libraries that a damaged file, a full disk or a killed worker causes; none of these is a
# ValueError or an OSError, and the libraries need not be loaded.
_LIBRARY_ERRORS = {
    "_csv.Error",
    "_lzma.LZMAError",
    "_pickle.UnpicklingError",
    "av.error.FFmpegError",
    "builtins.EOFError",
    "concurrent.futures.process.BrokenProcessPool",
    "google.protobuf.message.DecodeError",
    "safetensors._safetensors_rust.SafetensorError",
    "soundfile.SoundFileError",
    "struct.error",
    "zipfile.BadZipFile",
    "zlib.error",
}
_PACKAGE = str(Path(__file__).parent)

# Orbax logs a traceback for errors that it also raises, and a save that failed leaves asyncio tasks
# behind; whoever catches the error prints it as one line.
_REPORTED_ELSEWHERE = ("orbax", "asyncio")


def show_ours() -> None:
    """Shows this package's information and everybody's warnings; Orbax alone says a lot more."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_shown)
    others = sys.unraisablehook

    def unraisable(error):
        # After a failed save TensorStore reports for every array that its event loop is closed.
        if str(error.exc_value) != "Event loop is closed":
            others(error)

    sys.unraisablehook = unraisable


def _is_shown(record) -> bool:
    if "vcm_jax" in record.pathname:
        return True
    reported = record.exc_info and any(name in record.pathname for name in _REPORTED_ELSEWHERE)
    # Orbax warns about a checkpoint that is opened for reading that it is read-only.
    reading = "orbax" in record.pathname and re.search("read.only", record.getMessage())
    return record.levelno >= 30 and not reported and not reading


def cache_note() -> str:
    """What to add to a message that something is compiled: whether it is compiled again later."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return " (once: later starts take it from the cache)"
    return " (each time: JAX_COMPILATION_CACHE_DIR=DIR would keep it)"


def define_run_flags(required: bool = True) -> None:
    """--workdir and --checkpoint, of the commands that read a trained run."""
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=required)
    flags.DEFINE_integer("checkpoint", None, "Training step of the checkpoint (the latest).")


def define_weight_flags() -> None:
    """--dtype, --codec and --encoders, of the commands that make sound."""
    flags.DEFINE_enum(
        "dtype",
        None,
        ["bfloat16", "float32"],
        "Of weights and activations (float32 on CPUs, otherwise bfloat16).",
    )
    flags.DEFINE_string("codec", None, "Codec folder (the run's own), e.g. with another vocoder.")
    flags.DEFINE_string("encoders", None, "Folder of CLIP's and Synchformer's weights.")


def define_duration(default: float, text: str) -> None:
    """--duration in seconds: 0 or more, and finite."""
    flags.DEFINE_float("duration", default, text)
    flags.register_validator(
        "duration", lambda seconds: 0 <= seconds < math.inf, "must be finite and not negative"
    )


def define_truth_flags() -> None:
    """--captions and --duration, of the commands that compare sounds with true ones."""
    flags.DEFINE_string("captions", None, "TSV with columns id and caption.")
    define_duration(0.0, "Seconds compared, from the start (0: all).")


def run(
    main: Callable[..., int | None],
    define_flags: Callable[[], None] | None = None,
    *,
    positional: str = "",
    memory_hint: str = "",
) -> None:
    """Runs a command: reads its flags, calls `main`, and exits.

    Args:
      main: `main(args)`, or `main(args, rest)` if there are positional arguments.
      define_flags: defines the command's flags.
      positional: what the arguments besides the flags are; "" if there are none.
      memory_hint: what the user can do if the memory does not suffice: "lower --batch_size".
    """
    before = set(flags.FLAGS)
    if define_flags is not None:
        define_flags()
    own = [name for name in flags.FLAGS if name not in before]

    def start(argv):
        execute(main, argv[1:], positional=positional, memory_hint=memory_hint)

    doc = sys.modules["__main__"].__doc__ or ""
    app.run(start, flags_parser=functools.partial(parse_flags, doc=doc, own=own))


def show_help(doc: str, own: Iterable[str]) -> None:
    """Prints a command's help (see `vcm_jax.usage`) and exits."""
    print(usage.text(doc, own) + "\n\n--helpfull lists the flags of all modules.")
    sys.exit(0)


def parse_flags(argv: list[str], doc: str = "", own: Iterable[str] = ()) -> list[str]:
    """absl's parser, whose complaints are one line, and two checks that hold for every flag.

    Args:
      argv: name and arguments of the command.
      doc, own: what --help says; see `usage.text`.
    """
    if usage.is_wanted(argv):
        show_help(doc, own)
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {_one_line(str(error))} (--help lists all flags)")
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if not flag.present:
            continue
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            sys.exit(f"error: --{name}={flag.value} is not a finite number")
        # A flag whose default is None is left out, not given as an empty text.
        if flag.value == "" and flag.default is None:
            sys.exit(f"error: --{name} is empty: give a value or leave it out")
    return rest


def execute(
    main: Callable[..., int | None],
    rest: list[str],
    *,
    positional: str = "",
    memory_hint: str = "",
) -> None:
    """Calls `main` with the parsed flags and exits with one line if it fails as expected.

    Raises:
      SystemExit: with the exit code, if that is not 0.
      Exception: whatever is not expected; its traceback is for a report of the bug.
    """
    show_ours()
    try:
        if rest and not positional:
            raise ValueError(f"not understood: {' '.join(rest)} (flags begin with --)")
        code = main(flags.FLAGS, rest) if positional else main(flags.FLAGS)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNWRITABLE_CODE)
    except (Exception, KeyboardInterrupt) as error:
        found = explain(error, memory_hint)
        if found is None or logging.level_debug():
            raise
        code, line = found
        print(line, file=sys.stderr, flush=True)
    if code:
        sys.exit(code)


def explain(error: BaseException, memory_hint: str = "") -> tuple[int, str] | None:
    """(exit code, line) of an error that a command may meet; None for a bug.

    Expected are ValueError and OSError, too little memory, Ctrl-C, and the errors by which
    libraries report damaged files and dead workers.
    """
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        what = "the machine" if isinstance(error, MemoryError) else "the device"
        hint = f": {memory_hint}" if memory_hint else ""
        return 1, f"error: {what} does not have enough memory{hint}"
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if not isinstance(error, ValueError | OSError) and not names & _LIBRARY_ERRORS:
        return None
    code = UNWRITABLE_CODE if getattr(error, "errno", None) in UNWRITABLE else 1
    return code, f"error: {describe(error)}{_hint(error)}"


def describe(error: BaseException) -> str:
    """An error as one line: that of a file begins with its name."""
    reason = getattr(error, "strerror", None)
    if reason and (name := getattr(error, "filename", None)):
        names = [name, other] if (other := getattr(error, "filename2", None)) else [name]
        return _one_line(f"{' -> '.join(map(os.fsdecode, names))}: {reason}")
    return _one_line(str(error)) or type(error).__name__


def _hint(error: BaseException) -> str:
    """How to see more of an error that a library raised, which may also be a bug of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = not frames or frames[-1].filename.startswith(_PACKAGE)
    named = isinstance(error, OSError) and error.filename
    return "" if ours or named else f" ({type(error).__name__}; --verbosity=1 shows where)"


def _one_line(text: str) -> str:
    return " ".join(text.split())
