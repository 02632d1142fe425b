"""Damaged checkpoints are noticed, whatever byte was changed, and earlier ones are used instead."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vcm_jax.devices import sharding
from vcm_jax.runs import averages, checkpoint
from vcm_jax.runs.fingerprints import fingerprints

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_any_changed_element_changes_the_fingerprint(dtype):
    array = np.asarray(jnp.asarray(RNG.integers(0, 2, (5, 7)), dtype))
    before = fingerprints({"a": array})["a"]
    for index in np.ndindex(array.shape):
        changed = array.copy()
        changed.view(np.uint8)[(*index[:-1], index[-1] * array.itemsize)] ^= 1
        assert fingerprints({"a": changed})["a"] != before


def test_exchanged_elements_and_other_signs_of_zero_change_it():
    array = RNG.standard_normal((4, 6)).astype(np.float32)
    swapped = array.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    zeros = np.zeros(3, np.float32)
    found = fingerprints({"a": array, "b": swapped, "c": array.T.copy(), "d": zeros, "e": -zeros})
    assert len(set(found.values())) == len(found)


def test_the_fingerprint_does_not_depend_on_the_mesh():
    array = RNG.standard_normal((8, 12, 4)).astype(np.float32)
    whole = fingerprints({"a": array})
    for sizes, spec in (
        ((8, 1, 1), ("data",)),
        ((2, 2, 2), ("fsdp", "tensor", "data")),
        ((2, 2, 2), (None, "tensor")),
        ((2, 2, 2), (("data", "fsdp"), None, "tensor")),
        ((2, 2, 2), ()),
    ):
        mesh = sharding.make_mesh(*sizes)
        split = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert fingerprints({"a": split}) == whole


def test_known_values():
    """They are stored in checkpoints, and so must never change."""
    found = fingerprints({"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(5)})
    assert found == {"n": 5, "x": 2736783360}


def state(step: int):
    draw = np.random.default_rng(step)
    layer = {"kernel": draw.standard_normal((20, 30)).astype(np.float32)}
    return {"ema": {"0.05": layer, "0.1": layer}, "stats": {"mean": np.ones(4, np.float32)}}


@pytest.fixture
def workdir(tmp_path):
    with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
        for step in (1, 2):
            saver.save(step, state(step), {"config": {"seed": 3}}, wait=True)
    return tmp_path


def abstract():
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state(1))


def test_a_flip_in_any_file_is_noticed_or_changes_nothing(workdir, tmp_path):
    """Each flip ends in a DamagedError, or in a byte of which nothing depends."""
    files = [p for p in (workdir / "checkpoints/2").rglob("*") if p.is_file() and p.stat().st_size]
    noticed = 0
    for path in files:
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 6).astype(int):
            changed = bytearray(whole)
            changed[place] ^= 0x10
            path.write_bytes(changed)
            try:
                with checkpoint.open_manager(workdir, read_only=True) as manager:
                    found = checkpoint.restore(manager, abstract(), 2)
            except checkpoint.CheckpointError as error:
                assert "/2" in str(error) and "\n" not in str(error)
                noticed += 1
            else:
                jax.tree.map(np.testing.assert_array_equal, found, state(2))
        path.write_bytes(whole)
    assert noticed >= 10


def damage(workdir, step: int):
    """Changes some bytes in each of a checkpoint's data files."""
    for path in (workdir / f"checkpoints/{step}").rglob("d/*"):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 4, len(content), 97):
            content[place] ^= 0x40
        path.write_bytes(content)


def test_weights_of_a_damaged_checkpoint_are_refused(workdir):
    averages.restore_weights(workdir)
    damage(workdir, 2)
    with pytest.raises(checkpoint.DamagedError, match="checkpoints/2"):
        averages.restore_weights(workdir)
    np.testing.assert_array_equal(
        averages.restore_weights(workdir, step=1)["params"]["kernel"],
        state(1)["ema"]["0.05"]["kernel"],
    )


def test_a_damaged_checkpoint_is_set_aside(workdir):
    with checkpoint.open_manager(workdir) as manager:
        assert checkpoint.set_aside(manager, workdir, 2) == workdir / "damaged/2"
        assert manager.latest_step() == 1 and (workdir / "damaged/2/meta").is_dir()


def test_changed_meta_is_noticed(workdir):
    path = workdir / "checkpoints/1/meta/metadata"
    content = json.loads(path.read_text())
    content["config"]["seed"] = 4
    path.write_text(json.dumps(content))
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        with pytest.raises(checkpoint.DamagedError, match="meta is not what was saved"):
            checkpoint.read_meta(manager, 1)


def test_a_checkpoint_without_fingerprints_is_read(workdir, monkeypatch):
    monkeypatch.setattr(checkpoint, "seal", lambda meta: {"config": meta["config"]})
    with checkpoint.Saver(checkpoint.open_manager(workdir)) as saver:
        saver.save(3, state(3), {"config": {}}, wait=True)
    lines = []
    monkeypatch.setattr(checkpoint.logging, "info", lambda text, *args: lines.append(text))
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        found = checkpoint.restore(manager, abstract(), 3)
    jax.tree.map(np.testing.assert_array_equal, found, state(3))
    assert any("was saved without fingerprints" in line for line in lines)


def test_a_damaged_reconstruction_is_refused(workdir):
    path = workdir / "averages/2_0.2.npz"
    path.parent.mkdir()
    np.savez(path, **{"params/kernel": np.ones(100, np.float32)})
    averages.restore_weights(workdir, sigma_rel=0.2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(checkpoint.DamagedError, match="2_0.2.npz is damaged"):
        averages.restore_weights(workdir, sigma_rel=0.2)
    shutil.rmtree(path.parent)
