"""The command, and processes that run at the same time or are killed."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from weight_server import Fault, served_path

from vcm_jax import pretrained
from vcm_jax.pretrained import __main__ as command
from vcm_jax.pretrained import files, table

NAME = "mmaudio_small_16k"
ROOT = Path(__file__).parents[2]

# A process with the tiny files; the settings are environment variables, as users have them.
PROGRAM = """
import sys
from pathlib import Path
import pytest, weight_server
weight_server.use_tiny_table(pytest.MonkeyPatch(), Path({folder!r}), {release!r})
from vcm_jax.cli import run
from vcm_jax.pretrained import __main__ as command
sys.argv = ["pretrained", "fetch", {name!r}]
run(command.main, command.define_flags, positional="x")
"""


def run(*argv, out=None):
    """Runs the command in this process."""
    command.main(types.SimpleNamespace(out=out), list(argv))


@pytest.fixture
def start(home, server, served):
    """Starts a process that fetches; killed at the end of the test."""
    running = []

    def start():
        code = PROGRAM.format(folder=str(served), release=server.release_url, name=NAME)
        environment = os.environ | {
            "HF_HOME": str(home),
            "HF_ENDPOINT": server.url,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
        }
        for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
            environment.pop(name, None)
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def finished(process):
    """(standard output, standard error) of a process that has succeeded."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output, errors


def test_list_fetch_and_verify(home, capsys, tmp_path):
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(table.PUBLIC_MODELS)
    assert "16000 Hz" in lines[0] and "CC-BY-NC 4.0" in lines[0] and "to fetch" in lines[0]
    run("fetch", NAME)
    captured = capsys.readouterr()
    assert captured.out.endswith(f"use it with vcm_jax.generate --model={NAME}\n")
    pretrained.load(NAME)
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("here, converted") and "to fetch" in lines[1]
    run("verify", NAME)
    assert capsys.readouterr().out.count(": good") == 8 + 3
    run("fetch", NAME, out=str(tmp_path / "out"))
    assert capsys.readouterr().out.endswith(f"--model={tmp_path / 'out'}\n")
    path = tmp_path / "out/ext_weights/v1-16.pth"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="out is damaged; see above"):
        run("verify", str(tmp_path / "out"))
    assert f"{path}: {path}: truncated or damaged" in capsys.readouterr().out


def test_what_it_does_not_understand(home):
    for argv in ([], ["fetch"], ["list", NAME], ["remove", NAME], ["verify", NAME, NAME]):
        with pytest.raises(ValueError, match="give list, fetch NAME, or verify NAME"):
            run(*argv)
    with pytest.raises(ValueError, match="--out belongs to fetch"):
        run("list", out="x")
    with pytest.raises(ValueError, match="nothing: unknown; the public models are"):
        run("fetch", "nothing")


def test_two_processes_at_once(start, server):
    """Each file is fetched once, and both processes have all of them."""
    server.faults = {name: Fault(pause=0.02) for name in ("v1-16.pth", f"{NAME}.pth")}
    outputs = [finished(process) for process in [start(), start()]]
    assert outputs[0][0] == outputs[1][0] != ""
    for file in table.PUBLIC_MODELS[NAME].files:
        assert [asked for asked, _ in server.downloads(file.name)] == [None], file.name
    errors = "".join(errors for _, errors in outputs)
    assert errors.count("works in this folder; wait until it has ended") == 1


def test_killed_while_it_fetches(start, server, home):
    root = home / "assets/vcm_jax/pretrained/mmaudio"
    target = root / "ext_weights/v1-16.pth"
    partial = target.parent / ".v1-16.pth.download/v1-16.pth.part"
    server.faults["v1-16.pth"] = Fault(pause=0.1)
    process = start()
    deadline = time.time() + 60
    while not (partial.exists() and partial.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    have = partial.stat().st_size
    assert have and not target.exists()
    del server.faults["v1-16.pth"]
    server.log.clear()
    output, _ = finished(start())
    assert output.endswith(f"--model={NAME}\n")
    assert [asked for asked, _ in server.downloads("v1-16.pth")] == [f"bytes={have}-"]
    assert server.downloads(f"{NAME}.pth") == []  # this one was complete
    for file in table.PUBLIC_MODELS[NAME].files:
        wanted = served_path(server.folder, file).read_bytes()
        assert files.locate(file, root).read_bytes() == wanted


@pytest.mark.parametrize("setting", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_the_environments_settings(tmp_path, setting):
    """The real command, with no network: announcements, and one line at the end."""
    value = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}[setting]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "vcm_jax.pretrained", "fetch", "mmaudio_large_44k_v2"]
    if setting == "HF_ENDPOINT":
        # huggingface_hub tries again for half a minute: ask it for less.
        command = [sys.executable, "-c", IMPATIENT, *command[3:]]
    found = subprocess.run(
        command,
        env=environment | {setting: value},
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert found.returncode == 1
    lines = found.stderr.splitlines()
    assert "about 10.74 GB" in lines[0] and "CC-BY-NC 4.0" in lines[1]
    reason = "127.0.0.1:9 cannot be reached" if setting == "HF_ENDPOINT" else "forbids fetching"
    assert lines[-1].startswith("error: mmaudio_large_44k_v2") and reason in lines[-1]
    assert "error" not in "".join(lines[:-1])
    assert str(tmp_path) in lines[-1] and "weights/mmaudio_large_44k_v2.pth" in lines[-1]


IMPATIENT = """
import runpy, sys, time
time.sleep = lambda _: None
sys.argv = ["vcm_jax.pretrained", *sys.argv[1:]]
runpy.run_module("vcm_jax.pretrained", run_name="__main__")
"""
