"""Adapters as PyTorch files: merged with their base, and alone."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from commands import run_command
from flax import traverse_util
from small_runs import save_run, write_records

from vcm_jax import weights
from vcm_jax.interop import export_torch
from vcm_jax.interop.state_dict import read_state_dict
from vcm_jax.models import MMDiT
from vcm_jax.models.adapter import AdapterConfig
from vcm_jax.runs import averages, checkpoint, description
from vcm_jax.training.selection import select

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(workdir of a run, workdir of an adapter for it with random numbers)."""
    folder = tmp_path_factory.mktemp("runs")
    write_records(folder / "records", 3)
    save_run(folder)
    base, found = folder / "run", averages.restore_weights(folder / "run")
    described = description.read(base)
    selection = select(MMDiT(described.model), ("h_embed",), (), AdapterConfig(2, 0.5))
    trained, _ = selection.split(found["params"], jax.random.key(0))
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda a: np.float32(rng.standard_normal(a.shape)), trained)
    adapter = folder / "adapter"
    shutil.copytree(base, adapter, ignore=shutil.ignore_patterns("checkpoints", "run.json"))
    owner = weights.Base(weights.place_of(str(base)), weights.hash_params(found["params"]))
    content = dataclasses.asdict(described) | {"base": dataclasses.asdict(owner)}
    content["config"]["adapter"] = dataclasses.asdict(selection.adapter)
    (adapter / "run.json").write_text(json.dumps(content))
    with checkpoint.Saver(checkpoint.open_manager(adapter)) as saver:
        saver.save(0, {"ema": {"0.05": trained}, "stats": found["stats"]}, {})
    return base, adapter


def export(workdir, out, *flags):
    done = run_command(export_torch, f"--workdir={workdir}", f"--out={out}", *flags)
    return done, read_state_dict(out) if out.exists() else None


def test_the_adapter_alone_and_its_base_make_the_merged_file(runs, tmp_path):
    """The documented layout: W + lora_scale B A; a convolution A is followed by B at each place."""
    base, adapter = runs
    _, whole = export(base, tmp_path / "base.pth")
    _, merged = export(adapter, tmp_path / "merged.pth")
    _, alone = export(adapter, tmp_path / "alone.pth", "--trained_only")
    assert merged.keys() == whole.keys()
    scale, kinds = alone.pop("lora_scale"), set()
    assert scale == 0.5
    for name, value in whole.items():
        layer = name.removesuffix("weight")
        if name in alone:
            value = alone[name]
        elif f"{layer}lora_A.weight" in alone:
            a, b = (alone[f"{layer}lora_{which}.weight"] for which in "AB")
            assert a.ndim == b.ndim == value.ndim and a.shape[0] == b.shape[1] == 2
            kinds |= {(value.ndim, "qkv" in name)}
            value = value + scale * np.einsum("or,ri...->oi...", b.reshape(b.shape[:2]), a)
        np.testing.assert_allclose(merged[name], value, atol=1e-5, err_msg=name)
    assert kinds == {(2, False), (2, True), (3, False)}
    names = {name for name in alone if "lora_" not in name}
    assert names == {name for name in whole if name.startswith("h_embed.")}
    flat = traverse_util.flatten_dict(averages.restore_weights(adapter)["params"])
    assert len(flat) == len(alone)


def test_what_cannot_be_written_alone(runs, tmp_path):
    base, adapter = runs
    done, _ = export(base, tmp_path / "x.pth", "--trained_only")
    assert done.code == 1 and "run cannot be written alone: its weights are whole" in done.err
    done, _ = export(adapter, tmp_path / "x.pth", "--trained_only", "--convention=mmaudio")
    assert done.code == 1 and not (tmp_path / "x.pth").exists()
