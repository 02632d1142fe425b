"""What a dry run says of memory, and steps for devices that are not there."""

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_runs import make_config

from configs import s16k
from vcm_jax.training import dry_run, loop, setup

GIB = 2**30


def memory(total, capacity=GIB):
    return dry_run.Memory(total / 2, total / 2, 0, capacity, total)


def test_a_step_that_does_not_fit_is_an_error_after_the_description(
    data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(dry_run, "_capacity", lambda setup: 2.0**16)
    config = make_config(data, **{"data.sources": ()})
    with pytest.raises(loop.SetupError, match="batch_size 8 does not fit: .* GiB per device; use"):
        loop.train(config, tmp_path / "run", dry_run=True)
    out = capsys.readouterr().out
    assert re.search(r"memory per device: .* GiB of 0.000 GiB .*; it does not fit", out)
    assert "communication per device and step:" in out and "input: " in out
    assert "the 6 rows with s = t do not divide into 4 parts" in out and "multiples of 16" in out


@pytest.mark.parametrize("capacity, largest", [(100, 96), (16, 16), (1000, 960)])
def test_the_largest_batch_is_found_within_a_sixteenth(data, monkeypatch, capacity, largest):
    """Memory that grows with the batch, one unit a sample; batches are multiples of 16."""
    config = make_config(data, **{"data.sources": ()})
    found = setup.read_setup(config, without_data=True)
    assert dry_run._unit(config, found) == 16
    tried = []

    def compile_step(batch_size):
        tried.append(batch_size)
        return SimpleNamespace(memory=memory(batch_size, capacity))

    monkeypatch.setattr(dry_run, "_capacity", lambda setup: capacity)
    monkeypatch.setattr(dry_run, "make_program", lambda config, setup: config.batch_size)
    monkeypatch.setattr(dry_run, "compile_step", compile_step)
    line = dry_run.largest_batch(config, found)
    size = int(re.match(r"largest batch that fits: (\d+) ", line)[1])
    assert size <= capacity < size + max(16, size / 8) and size == largest
    assert len(tried) == len(set(tried)) <= 14
    with pytest.raises(setup.SetupError, match="no batch fits: 16 samples take"):
        capacity = 4
        dry_run.largest_batch(config, found)


def test_multiples_of_the_smallest_batch_have_whole_groups(data):
    config = s16k.for_cpu("imm")
    config.update_from_flattened_dict({"batch_size": 160, "model": "demo", "mesh.data": 1})
    config.mesh.fsdp, config.objective.instant_ratio = 8, 0.35  # 24 rows will do, 48 will not
    found = setup.read_setup(config, without_data=True)
    unit = dry_run._unit(config, found)
    assert [(n - found.step.num_instant(n)) % 4 for n in range(unit, 20 * unit, unit)] == [0] * 19


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--fit", "--fit is for --dry_run"),
        ("--config.stepss=1", '--config.stepss=1: this config has no stepss. Did you mean "steps"'),
    ],
)
def test_flags_that_will_not_do(flag, message):
    command = [sys.executable, "-m", "vcm_jax.main", "--config=small", "--workdir=none", flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and "\\" not in done.stderr


def test_a_setting_of_remat_that_fits_is_found(data, monkeypatch):
    config = make_config(data, **{"data.sources": ()})
    found = setup.read_setup(config, without_data=True)
    taken = {"products": 1.5 * GIB, "full": 0.5 * GIB}
    monkeypatch.setattr(dry_run, "make_program", lambda config, setup: setup.net.remat)
    monkeypatch.setattr(
        dry_run, "compile_step", lambda remat: SimpleNamespace(memory=memory(taken[remat]))
    )
    line = dry_run.fitting_remat(config, found)
    assert line.startswith("batch_size 8 fits with --config.remat=full: 0.500 GiB of 1.000 GiB")
    taken["full"] = 2 * GIB
    assert dry_run.fitting_remat(config, found) == "batch_size 8 fits with no setting of remat"


def test_the_largest_batch_needs_the_memory_of_the_devices(data):
    config = make_config(data, **{"data.sources": ()})
    with pytest.raises(setup.SetupError, match="--fit needs .*config.topology"):
        dry_run.largest_batch(config, setup.read_setup(config, without_data=True))


@pytest.mark.parametrize(
    "message, used",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (34.33G) exceeds available HBM (15.75G).",
            34.33,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory. Used 18.35G of 15.75G hbm.", 18.35),
    ],
)
def test_xla_s_refusals_are_read(message, used):
    def refuse():
        raise jax.errors.JaxRuntimeError(message)

    topology = SimpleNamespace(memory=GIB)
    program = SimpleNamespace(compile=refuse, setup=SimpleNamespace(topology=topology))
    found = dry_run.compile_step(program)
    assert found.step is None and not found.memory.fits
    np.testing.assert_allclose(
        [found.memory.total, found.memory.capacity], [used * GIB, 15.75 * GIB]
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_step_compiled_for_four_tpus(tmp_path):
    """Real sizes of memory, products and communication, of a shallow network."""
    sizes = dict(hidden_dim=128, num_heads=2, depth=3, fused_depth=1)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vcm_jax.main", "--config=s16k", f"--workdir={tmp_path}/run"),
            *("--dry_run", "--config.topology=v5e:2x2", "--config.batch_size=64"),
            *(f"--config.model_overrides.{name}={size}" for name, size in sizes.items()),
            "--config.data.sources=()",
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    out, number = done.stdout, r"([\d.]+)"
    assert "4 devices (TPU v5 lite)" in out and not (tmp_path / "run").exists()
    total = re.search(rf"memory per device: {number} GiB of 15.750 GiB .*; it fits", out)
    assert 0.1 < float(total[1]) < 2
    counted = re.search(rf"{number} T per step; the compiled products take {number} T", out)
    assert 0.9 < float(counted[2]) / float(counted[1]) < 1.1
    lines = re.findall(rf"^  ([\w-]+) over (\w+): {number} MB .*\((.*)\)$", out, re.MULTILINE)
    assert {line[:2] for line in lines} == {("all-reduce", "data")}, lines
    parameters = int(re.search(r"^Total: ([\d,]+)", out, re.MULTILINE)[1].replace(",", ""))
    assert (
        4e-6 * parameters <= float(lines[0][2]) < 4.1e-6 * parameters and "bf16" not in lines[0][3]
    )
