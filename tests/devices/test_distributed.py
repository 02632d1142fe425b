"""How processes find each other, and which rows of a batch each of them reads."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vcm_jax.devices import distributed, preemption, sharding

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def test_one_process_needs_nothing():
    assert distributed.settings({}) is None
    assert distributed.settings(SLURM | {"SLURM_NTASKS": "1"}) is None
    # In a batch script, outside of srun.
    assert distributed.settings({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}) is None


@pytest.mark.parametrize("prefix", ["", "JAX_"])
def test_variables(prefix):
    values = {"COORDINATOR_ADDRESS": "10.0.0.1:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
    found = distributed.settings({prefix + name: value for name, value in values.items()})
    assert found == {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"NUM_PROCESSES": ""}, "NUM_PROCESSES must be a number"),
        ({"PROCESS_ID": "x"}, "PROCESS_ID must be a number, not 'x'"),
        ({"PROCESS_ID": "2"}, "PROCESS_ID 2 must be below NUM_PROCESSES 2"),
        ({"COORDINATOR_ADDRESS": "host"}, "must be HOST:PORT, not 'host'"),
    ],
)
def test_variables_that_do_not_fit(change, message):
    values = {"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}
    with pytest.raises(distributed.DistributedError, match=message):
        distributed.settings(values | change)


@pytest.mark.parametrize(
    "change, ids",
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [0, 1, 2, 3]),
        ({"SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        # One process per GPU, with and without binding.
        (
            {
                "CUDA_VISIBLE_DEVICES": "0,1",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
                "SLURM_LOCALID": "1",
            },
            [1],
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_LOCALID": "1"},
            [0],
        ),
    ],
)
def test_slurm(change, ids):
    assert distributed.settings(SLURM | change) == {"local_device_ids": ids}


@pytest.mark.parametrize(
    "sizes, per_process, parts",
    [
        ((8, 1, 1), 4, [(0, 2), (1, 2)]),
        ((2, 2, 2), 4, [(0, 2), (1, 2)]),
        ((4, 2, 1), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # The model is split over processes: two of them read the same rows.
        ((2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 1, 8), 4, [(0, 1), (0, 1)]),
    ],
)
def test_every_process_reads_the_rows_of_its_devices(sizes, per_process, parts, monkeypatch):
    mesh = sharding.make_mesh(*sizes)
    whole = sharding.batch_sharding(mesh).devices_indices_map((16,))
    for process, part in enumerate(parts):
        ours = jax.devices()[process * per_process : (process + 1) * per_process]
        monkeypatch.setattr(
            jax.sharding.NamedSharding,
            "addressable_devices_indices_map",
            lambda self, shape, ours=ours: {device: whole[device] for device in ours},
        )
        assert sharding.process_part(mesh, 16) == part
    # An order of the devices that scatters the rows of a process over the batch.
    scattered = {d: whole[d] for d in jax.devices()[::4]}
    monkeypatch.setattr(
        jax.sharding.NamedSharding, "addressable_devices_indices_map", lambda *_: scattered
    )
    if len({index[0].start for index in scattered.values()}) > 1 and sizes == (8, 1, 1):
        with pytest.raises(ValueError, match="not one block of the batch"):
            sharding.process_part(mesh, 16)


def test_a_sigterm_before_there_is_anything_to_save():
    code = (
        "import os, signal, sys; from vcm_jax.devices import preemption, supervisor; "
        "assert 'jax' not in sys.modules; preemption.leave_at_once(); "
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert found.returncode == preemption.EXIT_CODE
    assert found.stderr == (
        "SIGTERM: there is nothing to save yet; run the same command again to resume\n"
    )


def test_sigterm_is_noted_and_the_handler_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as told:
        assert not told(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told(2)
    assert signal.getsignal(signal.SIGTERM) is before
    assert np.isscalar(preemption.EXIT_CODE)


def test_errors_that_say_that_a_process_is_gone(monkeypatch):
    gone = RuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [10.0.0.1]:547")
    wrapped = OSError("checkpoints cannot be saved to")
    wrapped.__cause__ = gone
    assert not distributed.is_peer_lost(gone), "a run of one process has no peers"
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    assert distributed.is_peer_lost(gone) and distributed.is_peer_lost(wrapped)
    assert not distributed.is_peer_lost(ValueError("batch_size 6 does not divide"))
