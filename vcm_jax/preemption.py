"""SIGTERM: what TPU spot machines, GKE and Slurm send before they take a machine away."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the state is saved; the same command goes on. launch/ restarts on it.
EXIT_CODE = 75


class Preempted(Exception):
    """The run has saved its state and stops, as it was told to."""


@contextlib.contextmanager
def watch():
    """Yields a function of the step that is done: whether to save and stop, on every process alike.

    One process answers its own SIGTERM. Of several, JAX's preemption service hears the signals and
    agrees on a step that none of them has passed; call the function after every step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # Python's rule for handlers
        yield lambda step: False
        return
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
