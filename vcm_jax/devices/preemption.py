"""SIGTERM, which TPU spot machines, GKE and Slurm send before they take a machine away.

This module loads no JAX, so that the command answers a SIGTERM while JAX is still being loaded.
"""

import contextlib
import os
import signal
import sys
import threading

# EX_TEMPFAIL of sysexits.h: the state is saved, and the same command resumes the run. The scripts
# in launch/ start it again.
EXIT_CODE = 75


class Preempted(Exception):
    """The run was told to stop, and has saved its state."""


def leave_at_once() -> None:
    """Until `watch` is entered, a SIGTERM ends the process with 75: there is nothing to save."""

    def leave(*_):
        line = "SIGTERM: there is nothing to save yet; run the same command again to resume"
        print(line, file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def watch():
    """Yields `stop(step)`, which says after every step whether to save and stop now.

    It gives the same answer on every process. A run of one process answers its own SIGTERM. With
    several processes, JAX's preemption service hears the signals and agrees on a step that no
    process has passed yet, so that each of them has to call `stop` after every step.

    `stop` raises KeyboardInterrupt after a Ctrl-C. An exception that is raised by the signal itself
    can get lost in a callback whose exceptions Python ignores; JAX has one in the garbage
    collector. A second Ctrl-C raises at once.
    """
    if threading.current_thread() is not threading.main_thread():  # Python's rule for handlers
        yield lambda step: False
        return
    import jax
    from jax.experimental import multihost_utils

    interrupted, told = threading.Event(), threading.Event()
    several = jax.process_count() > 1

    def interrupt(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def terminate(*_):
        told.set()

    handlers = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        handlers[signal.SIGINT] = interrupt
    if not several:
        handlers[signal.SIGTERM] = terminate

    def stop(step: int) -> bool:
        if interrupted.is_set():
            raise KeyboardInterrupt
        return multihost_utils.reached_preemption_sync_point(step) if several else told.is_set()

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
