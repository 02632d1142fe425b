"""The parent process of one of several: exit codes, signals, and what it leaves out of stderr."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vcm_jax.devices import distributed, preemption, supervisor

ROOT = Path(__file__).parents[2]
# What JAX prints when process 1 is killed, shortened.
DUMP = """\
E1125 13:02:50.604811    6554 coordination_service.cc:1549] [17] Use error polling: UNAVAILABLE:
1
The tasks have crashed. Check the task logs for an earlier error.
F1125 13:02:50.606153    6565 client.h:80] Terminating process because JAX detected fatal errors.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7f3132040634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
PARENT = """
import sys
from vcm_jax.devices import supervisor
sys.exit(supervisor._run_child([sys.executable, "-c", sys.argv[1]]))
"""


def start(child):
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, f"import os, signal, sys, time\n{child}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("code", [0, 1, 75, 76])
def test_exit_code_and_output_are_those_of_the_child(code):
    child = f"print('out'); print('err', file=sys.stderr); sys.exit({code})"
    assert finish(start(child)) == (code, "out\n", "err\n")


def test_the_dump_of_an_aborted_process_becomes_one_line():
    child = f"""
print('W1125 13:02:50 a.py:1] before', file=sys.stderr)
sys.stderr.write({DUMP!r})
print('W1125 13:02:51 a.py:1] between', file=sys.stderr)
sys.stderr.write({DUMP!r}); sys.stderr.flush()
os.abort()"""
    code, _, err = finish(start(child))
    assert code == distributed.PEER_LOST
    assert err.splitlines() == [
        "W1125 13:02:50 a.py:1] before",
        "W1125 13:02:51 a.py:1] between",
        distributed.PEER_LOST_LINE,
    ]


def test_the_last_line_of_a_process_that_notices_itself_is_kept():
    child = f"""
sys.stderr.write({DUMP.splitlines()[0]!r} + chr(10) + '1' + chr(10))
print('error: another process has died', file=sys.stderr); sys.exit(76)"""
    assert finish(start(child)) == (76, "", "error: another process has died\n")


def test_a_crash_without_a_dump_is_no_lost_process():
    code, _, err = finish(start("os.abort()"))
    assert (code, err) == (128 + signal.SIGABRT, "error: ended by SIGABRT\n")
    code, _, err = finish(start("os.kill(os.getpid(), signal.SIGKILL)"))
    assert (code, err) == (128 + signal.SIGKILL, "error: ended by SIGKILL\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number):
    child = f"""
def handler(*_): os.write(1, b'told\\n'); sys.exit(75)
signal.signal({int(number)}, handler); print('ready', flush=True); time.sleep(60)"""
    # Whoever runs the tests in the background has them ignore Ctrl-C, which children inherit.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        process = start(child)
    finally:
        signal.signal(number, before)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert finish(process) == (75, "told\n", "")


def test_the_child_dies_with_its_parent():
    child = "from vcm_jax.devices import supervisor; supervisor.supervise()"
    process = start(f"{child}\nprint(os.getpid(), flush=True); time.sleep(60)")
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(600):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().split()[2] == "Z":
                    break
        except (ProcessLookupError, FileNotFoundError):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child is still alive")


def test_a_run_of_one_process_has_no_parent(monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert supervisor.supervise() is None
    monkeypatch.setenv("COORDINATOR_ADDRESS", "nowhere")
    assert supervisor.supervise() is None, "the command itself says what is wrong"
    monkeypatch.setenv("COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("NUM_PROCESSES", "2")
    monkeypatch.setenv("PROCESS_ID", "0")
    commands = []
    monkeypatch.setattr(supervisor, "_run_child", lambda command: commands.append(command) or 75)
    with pytest.raises(SystemExit) as stop:
        supervisor.supervise()
    assert stop.value.code == preemption.EXIT_CODE and commands[0][0] == sys.executable
