"""What the commands show of the log."""

import re
import sys

from absl import logging

# Orbax logs with a traceback what it also raises, and a save that failed leaves asyncio tasks
# behind; who catches the error here says it in a line.
TOLD_OTHERWISE = ("orbax", "asyncio")


def show_ours() -> None:
    """Shows this package's information and everybody's warnings; Orbax alone says a lot more."""
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_shown)
    others = sys.unraisablehook

    def unraisable(error):
        # Of every array of a save that failed TensorStore tells a loop that is gone.
        if str(error.exc_value) != "Event loop is closed":
            others(error)

    sys.unraisablehook = unraisable


def _shown(record) -> bool:
    if "vcm_jax" in record.pathname:
        return True
    told = record.exc_info and any(name in record.pathname for name in TOLD_OTHERWISE)
    # Of a checkpoint that is only read Orbax warns that it is only read.
    reading = "orbax" in record.pathname and re.search("read.only", record.getMessage())
    return record.levelno >= 30 and not told and not reading
