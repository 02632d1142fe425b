"""SIGTERM: what TPU spot machines, GKE and Slurm send before they take a machine away."""

import contextlib
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the state is saved; the same command goes on. launch/ restarts on it.
EXIT_CODE = 75


class Preempted(Exception):
    """The run has saved its state and stops, as it was told to."""


def leave_at_once() -> None:
    """Until `watch`, when there is nothing to save yet, a SIGTERM ends the process with 75."""

    def leave(*_):
        print("SIGTERM: nothing to save yet; the same command goes on", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def watch():
    """Yields a function of the step that is done: whether to save and stop, on every process alike.

    One process answers its own SIGTERM. Of several, JAX's preemption service hears the signals and
    agrees on a step that none of them has passed; call the function after every step. It raises
    KeyboardInterrupt after a Ctrl-C: raised by the signal itself it can get lost, in a callback
    whose exceptions Python ignores (JAX has one in the garbage collector). A second one raises at
    once.
    """
    if threading.current_thread() is not threading.main_thread():  # Python's rule for handlers
        yield lambda step: False
        return
    interrupted, told = threading.Event(), threading.Event()

    def interrupt(*_):
        interrupted.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        handlers[signal.SIGINT] = interrupt
    if jax.process_count() == 1:
        handlers[signal.SIGTERM] = lambda *_: told.set()

    def stop(step: int) -> bool:
        if interrupted.is_set():
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return told.is_set()

    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
