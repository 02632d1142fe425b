"""Runs as commands: killed, told to stop, spread over processes, resumed on other devices."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import portpicker
import pytest
from small_runs import SIZES, final_state, make_config, write_records

from vcm_jax.devices import distributed, preemption
from vcm_jax.runs import averages, checkpoint
from vcm_jax.training import loop

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_records(folder / "train", 12)
    write_records(folder / "val", 8, seed=1)
    return folder


def settings(data, **changes):
    return {
        "steps": STEPS, "batch_size": 8, "data.dir": str(data), "log_every": 1,
        "checkpoint_every": 2, "snapshot_every": 4, "eval_every": 0, "sample_every": 0,
        "mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1,
        **{f"model_overrides.{name}": size for name, size in SIZES.items()}, **changes,
    }  # fmt: skip


def start(workdir, config, *flags, devices=8, **env):
    """Starts `python -m vcm_jax.main` with these settings, in the background."""
    xla = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    environment = {
        **os.environ,
        "XLA_FLAGS": xla,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    if cache := jax.config.jax_compilation_cache_dir:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        }
    # If a shell runs the tests in the background, Ctrl-C is ignored, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    keys = (f"--config.{key}={value}" for key, value in config.items())
    return subprocess.Popen(
        [sys.executable, "-m", "vcm_jax.main", "--config=configs/impacts.py",
         f"--workdir={workdir}", *flags, *keys],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip


def read_to_step(process, step):
    """Reads the output up to the progress line of a step, or to the end."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            break
    return "".join(lines)


def two_processes(workdir, config, *flags):
    port = portpicker.pick_unused_port()
    return [
        start(
            workdir,
            config,
            *flags,
            devices=4,
            COORDINATOR_ADDRESS=f"localhost:{port}",
            NUM_PROCESSES="2",
            PROCESS_ID=str(i),
        )
        for i in range(2)
    ]


def finish(process, code=0):
    out = process.communicate(timeout=300)[0]
    assert process.returncode == code, out
    return out


def assert_equal(workdir, other):
    jax.tree.map(np.testing.assert_array_equal, final_state(workdir), final_state(other))


def whole_run(config, workdir):
    """A run that nothing disturbs."""
    full = make_config(config["data.dir"], **config)
    loop.train(full, workdir)
    return workdir


def kill_at_random(data, workdir, rng, kills, config):
    """Starts a run several times and kills it at a random moment after a random step."""
    for _ in range(kills):
        process = start(workdir, config)
        out = read_to_step(process, rng.randint(1, config["steps"] - 1))
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.communicate()
        assert "step" in out, out


def test_a_run_that_was_killed_and_stopped_ends_like_an_undisturbed_one(data, tmp_path):
    config = settings(data)
    whole = whole_run(config, tmp_path / "whole")
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    rng = random.Random(seed)

    workdir = tmp_path / "killed"
    kill_at_random(data, workdir, rng, 1, config)
    process = start(workdir, config)
    out = read_to_step(process, 9)
    process.send_signal(signal.SIGTERM)
    rest = finish(process, preemption.EXIT_CODE)
    saved = int(re.search(r"SIGTERM: step (\d+) is saved", rest)[1])
    assert saved in (9, 10, 11), out + rest
    assert saved == checkpoint.open_manager(workdir, read_only=True).latest_step()
    assert f"resuming after step {saved}" in finish(start(workdir, config))
    assert_equal(workdir, whole)
    for folder in (workdir, whole):
        assert averages.open_snapshots(folder, read_only=True).all_steps() == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_many_kills(data, tmp_path, workers):
    config = settings(data, steps=60, **{"data.num_workers": workers})
    whole = whole_run(config | {"data.num_workers": 0}, tmp_path / "whole")
    for seed in range(3):
        workdir = tmp_path / f"killed_{seed}"
        kill_at_random(data, workdir, random.Random(seed), 8, config)
        finish(start(workdir, config))
        assert_equal(workdir, whole)


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(data, tmp_path):
    """In float32 the parameters are within 1e-5 of those of one process, which then resumes."""
    config = settings(data, **{"mesh.data": 4, "mesh.fsdp": 2})
    whole = whole_run(config, tmp_path / "whole")
    workdir = tmp_path / "two"
    processes = two_processes(workdir, config)
    out = read_to_step(processes[0], 4)
    processes[1].send_signal(signal.SIGTERM)  # to one process alone, and both have to save
    outs = [finish(process, preemption.EXIT_CODE) for process in processes]
    outs[0] = out + outs[0]
    steps = {int(re.search(r"SIGTERM: step (\d+) is saved", out)[1]) for out in outs}
    assert len(steps) == 1 and 4 <= steps.pop() < STEPS
    for i, out in enumerate(outs):
        assert f"process {i} of 2 with 4 devices reads block {i} of 2 of every batch" in out
    assert "step 1/" not in outs[1], "only process 0 writes"
    assert len(list((workdir / "tensorboard").iterdir())) == 1

    # It resumes on another mesh and with another number of processes, on the same samples.
    loop.train(make_config(data, **config | {"mesh.data": 2, "mesh.tensor": 2}), workdir)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    found, wanted = final_state(workdir), final_state(whole)
    jax.tree.map(close, found["params"], wanted["params"])
    jax.tree.map(close, found["ema"], wanted["ema"])


@pytest.mark.slow
def test_two_processes_resume_and_end(data, tmp_path):
    config = settings(data, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    whole = whole_run(config, tmp_path / "whole")
    workdir = tmp_path / "two"
    for kill in (True, False):
        port = portpicker.pick_unused_port()
        processes = [
            start(
                workdir,
                config,
                devices=4,
                JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i),
            )
            for i in range(2)
        ]
        if kill:
            read_to_step(processes[0], 7)
            for process in processes:
                process.kill()
                process.communicate()
        else:
            outs = [finish(process) for process in processes]
            assert "resuming after step" in outs[0]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    jax.tree.map(close, final_state(workdir)["params"], final_state(whole)["params"])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_of_two_processes_is_killed_the_other_ends_with_one_line(data, tmp_path, killed):
    config = settings(data, steps=10_000, log_every=50, **{"mesh.data": 4, "mesh.fsdp": 2})
    processes = two_processes(tmp_path / "run", config, "--peer_timeout=5")
    other = processes[1 - killed]
    read_to_step(processes[0], 50)
    processes[killed].kill()
    killed_at = time.monotonic()
    out = finish(other, distributed.PEER_LOST)
    assert time.monotonic() - killed_at < 15
    assert out.splitlines()[-1] == distributed.PEER_LOST_LINE
    assert "Traceback" not in out and "stack trace" not in out
    processes[killed].communicate()


@pytest.mark.slow
def test_an_error_in_one_of_two_processes_ends_the_other_with_its_line(data, tmp_path):
    """Process 1 cannot read its records; the other has nothing to complain about."""
    config = settings(data, **{"mesh.data": 4, "mesh.fsdp": 2})
    wrong = config | {"data.dir": str(tmp_path / "nowhere")}
    port = portpicker.pick_unused_port()
    env = {"COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": "2"}
    processes = [
        start(tmp_path / "run", given, devices=4, PROCESS_ID=str(i), **env)
        for i, given in enumerate((config, wrong))
    ]
    outs = [finish(process, 1) for process in processes]
    line = outs[1].splitlines()[-1]
    assert line.startswith("error: ") and "nowhere" in line
    assert outs[0].splitlines()[-1] == f"process 1 of this run has ended with exit code 1: {line}"


def test_a_sigterm_while_python_still_imports(data, tmp_path):
    process = start(tmp_path / "run", settings(data))
    while not int(re.search(r"SigCgt:\t(\w+)", status(process))[1], 16) >> 14 & 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out = finish(process, preemption.EXIT_CODE)
    assert out == "SIGTERM: there is nothing to save yet; run the same command again to resume\n"
    assert not (tmp_path / "run").exists()


def status(process):
    return Path(f"/proc/{process.pid}/status").read_text()


def test_ctrl_c_is_one_line(data, tmp_path):
    process = start(tmp_path / "run", settings(data, steps=10_000))
    read_to_step(process, 3)
    process.send_signal(signal.SIGINT)
    out = finish(process, 130)
    assert "Traceback" not in out
    assert out.splitlines()[-1] == (
        "interrupted; run the same command again to resume from the last checkpoint"
    )


def test_a_directory_that_vanishes_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_AFTER", (0.0,))
    collect, workdir = loop.monitor.Meter.collect, tmp_path / "run"

    def vanish(meter):
        if meter._step == 5:
            (workdir / "checkpoints").rename(tmp_path / "gone")  # at once, unlike rmtree
        return collect(meter)

    monkeypatch.setattr(loop.monitor.Meter, "collect", vanish)
    with pytest.raises(checkpoint.StorageError, match="checkpoints.*directory is gone") as error:
        loop.train(make_config(data, **settings(data, checkpoint_every=2)), workdir)
    assert "\n" not in str(error.value)
