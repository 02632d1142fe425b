"""The parent of a process that trains together with others; it survives what ends that process.

When a process of a run has died, JAX ends the others by SIGABRT below a long dump, from a C++
thread: no Python code in the same process can prevent that. The command therefore starts itself
again as a child process. The parent passes signals on, leaves the dump out, and ends with an exit
code and one line that say what has happened.

This module loads no JAX: see `preemption`.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys

from vcm_jax.devices import distributed

_VARIABLE = "VCM_JAX_SUPERVISOR"  # process id of the parent, in the environment of the child
# The first line of what JAX's coordination service prints about a process that is lost.
_DUMP = re.compile(rb"[EF]\d{4} .*(coordination_service\w*\.cc|client\.h):\d+\]")
# Lines that are no part of it: other logs, and what this package prints.
_OTHER = re.compile(rb"[IWEF]\d{4} |Traceback |error: |process \d|SIGTERM|interrupted")
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise() -> None:
    """Runs this command in a child process if it is one of several, and exits as the child does.

    It returns in the child, and in a run of one process.
    """
    if parent := os.environ.get(_VARIABLE):
        _die_with(int(parent))
        return
    try:
        if distributed.settings(os.environ) is None:
            return
    except distributed.DistributedError:
        return  # the command reports it
    sys.exit(_run_child([sys.executable, *sys.orig_argv[1:]]))


def _die_with(parent: int) -> None:
    """Lets this process be killed as soon as its parent has died."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it has died before
        os._exit(distributed.PEER_LOST)


def _run_child(command: list[str]) -> int:
    """Runs the command, passes its stderr and our signals on, and returns our exit code."""
    environment = os.environ | {_VARIABLE: str(os.getpid())}
    # A group of its own: a Ctrl-C in the terminal reaches the child once, through this process.
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, process_group=0)

    def forward(number, _):
        child.send_signal(number)

    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    dump = _copy(child.stderr)
    code = child.wait()
    if code >= 0:
        return code
    if code == -signal.SIGABRT and dump:
        _write(distributed.PEER_LOST_LINE.encode() + b"\n")
        return distributed.PEER_LOST
    _write(dump + f"error: ended by {signal.Signals(-code).name}\n".encode())
    return 128 - code


def _copy(stream) -> bytes:
    """Copies the child's stderr to ours, without dumps; returns the last dump."""
    dump, inside = b"", False
    for line in stream:
        if _DUMP.match(line):
            dump, inside = (dump if inside else b"") + line, True
        elif inside and not _OTHER.match(line):
            dump += line
        else:
            inside = False
            _write(line)
    return dump


def _write(text: bytes) -> None:
    sys.stderr.buffer.write(text)
    sys.stderr.buffer.flush()
