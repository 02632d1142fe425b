"""Saving on disks that fail, and EMA weights of any width from snapshots."""

import contextlib
import re
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_command

from vcm_jax import ema, reconstruct
from vcm_jax.runs import averages, checkpoint
from vcm_jax.training.state import TrainState

STATE = {"a": jnp.asarray(np.random.default_rng(0).standard_normal(100_000), jnp.float32)}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_AFTER", (0.0, 0.0))


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_saved(workdir, steps):
    with checkpoint.open_manager(workdir) as manager:
        assert manager.all_steps() == steps
        for step in steps:
            found = manager.restore(step)["state"]["a"]
            np.testing.assert_array_equal(found, STATE["a"])


def test_a_full_disk_stops_the_run_and_earlier_checkpoints_are_whole(tmp_path):
    with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
        saver.save(1, STATE, {}, wait=True)
        message = r"checkpoints cannot be saved to: .*there and whole: \[1\]"
        with full_disk(), pytest.raises(checkpoint.StorageError, match=message) as error:
            saver.save(2, STATE, {}, wait=True)
        assert "\n" not in str(error.value)
    assert_saved(tmp_path, [1])


@pytest.mark.parametrize("target", [None, {"w": np.float32([3.0, 4.0])}])
def test_the_parameters_of_the_targets_are_saved_where_there_are_any(tmp_path, target):
    weights = {"w": np.float32([1.0, 2.0])}
    state = TrainState(np.int32(1), weights, {}, {}, {"0.05": weights}, {"v": weights}, target)
    saved = {"step", "params", "stats", "opt_state", "ema"} | ({"target"} if target else set())
    assert set(state.saved()) == saved
    with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
        saver.save(1, state.saved(), {}, wait=True)
        found = checkpoint.restore(saver.manager, jax.tree.map(jnp.asarray, state.saved()), 1)
    assert set(found) == saved
    jax.tree.map(np.testing.assert_array_equal, TrainState(**found).target, target)
    assert averages.restore_weights(tmp_path)["params"].keys() == {"w"}


def test_a_save_in_the_background_that_fails_is_made_up_for(tmp_path):
    with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
        with full_disk():
            saver.save(1, STATE, {})
            while saver.manager.is_saving_in_progress():
                time.sleep(0.01)
        assert saver.failed()  # a save is due at the next step
        saver.save(2, STATE, {})
        saver.manager.wait_until_finished()
        assert not saver.failed()
    assert_saved(tmp_path, [2])


def test_the_last_save_that_fails_is_no_silent_loss(tmp_path):
    with full_disk(), pytest.raises(checkpoint.StorageError, match="whole: nothing"):
        with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
            saver.save(1, STATE, {})


def test_an_error_that_goes_away_is_tried_again(tmp_path, monkeypatch):
    with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
        save, failures = saver.manager.save, [OSError(116, "Stale file handle")] * 2

        def flaky(*args, **kwargs):
            if failures:
                raise failures.pop()
            return save(*args, **kwargs)

        monkeypatch.setattr(saver.manager, "save", flaky)
        saver.save(3, STATE, {}, wait=True)
    assert_saved(tmp_path, [3])


def test_a_damaged_checkpoint_is_one_line_that_says_what_to_do(tmp_path):
    with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
        for step in (1, 2):
            saver.save(step, STATE, {"a": 1}, wait=True)
    for name in ("state/_METADATA", "meta/metadata"):
        (tmp_path / "checkpoints/2" / name).write_bytes(b"{")
    message = "checkpoints/2 cannot be read .*it is damaged; earlier checkpoints: 1"
    with checkpoint.open_manager(tmp_path) as manager:
        for read in (checkpoint.read_meta, lambda m, step: checkpoint.restore(m, STATE, step)):
            with pytest.raises(checkpoint.CheckpointError, match=message) as error:
                read(manager, 2)
            assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "checkpoints/2")
    assert checkpoint.latest_step(tmp_path) == 1
    assert checkpoint.latest_step(tmp_path / "new") is None


def test_a_directory_that_is_gone(tmp_path):
    with checkpoint.Saver(checkpoint.open_manager(tmp_path)) as saver:
        saver.save(1, STATE, {}, wait=True)
        shutil.rmtree(tmp_path / "checkpoints")
        with pytest.raises(checkpoint.StorageError, match="the directory is gone.*whole: nothing"):
            saver.save(2, STATE, {})
    assert not (tmp_path / "checkpoints").exists()


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        checkpoint.StorageError, match="file/run cannot be written: Not a directory"
    ):
        checkpoint.check_writable(tmp_path / "file" / "run")
    checkpoint.check_writable(tmp_path / "new" / "run")
    assert not list((tmp_path / "new" / "run").iterdir())


WIDTHS = (0.05, 0.1)


def snapshots(workdir, steps=400, every=50):
    """Saves snapshots of a random walk; returns its EMA of width 0.07, tracked directly."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(0.05 * rng.standard_normal((steps, 3)), 0)
    tracks = {width: np.zeros(3) for width in (*WIDTHS, 0.07)}
    direct = {}
    stats = {"latent_std": jnp.ones(2)}
    with (
        checkpoint.Saver(averages.open_snapshots(workdir)) as saver,
        checkpoint.Saver(checkpoint.open_manager(workdir)) as manager,
    ):
        for step, theta in enumerate(walk, 1):
            for width in tracks:
                gamma = ema.gamma_from_sigma_rel(width)
                tracks[width] = ema.update(tracks[width], theta, float(step), gamma)
            if step % every == 0:
                kept = {
                    f"{w:g}": {"layer": {"kernel": jnp.asarray(tracks[w], jnp.float32)}}
                    for w in WIDTHS
                }
                state = TrainState(jnp.int32(step), None, stats, None, kept)
                averages.save_snapshot(saver, state)
                direct[step] = np.asarray(tracks[0.07])
        manager.save(step, state, {}, wait=True)
    return direct


def test_ema_weights_of_any_width_from_snapshots(tmp_path):
    direct = snapshots(tmp_path)
    for step in (None, 300):
        path = averages.reconstruct(tmp_path, 0.07, step)
        assert path == tmp_path / "averages" / f"{step or 400}_0.07.npz"
        found = averages.restore_weights(tmp_path, step, sigma_rel=0.07)
        assert found["params"]["layer"]["kernel"].dtype == np.float32
        # The difference comes from the approximated profile and from float16.
        close = direct[step or 400]
        np.testing.assert_allclose(found["params"]["layer"]["kernel"], close, atol=3e-3)
        np.testing.assert_array_equal(found["stats"]["latent_std"], [1, 1])
    # Reconstructing a width that is tracked gives the same weights.
    with np.load(averages.reconstruct(tmp_path, 0.05)) as made:
        kernel = made["params/layer/kernel"]
    with averages.open_snapshots(tmp_path, read_only=True) as manager:
        kept = averages._restore_average(manager, 400, "0.05")["params"]["layer"]["kernel"]
    np.testing.assert_allclose(kernel, kept, atol=1e-5)
    # The weights in the checkpoint are preferred: they were never converted to float16.
    tracked = averages.restore_weights(tmp_path, 400, 0.05)["params"]["layer"]["kernel"]
    np.testing.assert_array_equal(
        tracked, averages.restore_weights(tmp_path)["params"]["layer"]["kernel"]
    )

    done = run_command(reconstruct, f"--workdir={tmp_path}", "--sigma_rel=0.2", "--step=200")
    assert f"--workdir={tmp_path} --sigma_rel=0.2 --checkpoint=200" in done.out
    assert averages.restore_weights(tmp_path, 200, 0.2)

    for arguments, message in (
        (["--sigma_rel=0.07", "--step=7"], r"no checkpoint of step 7; there are \[50, 100"),
        (["--sigma_rel=0.3"], "sigma_rel 0.3 must lie between"),
        ([f"--workdir={tmp_path}/x", "--sigma_rel=0.1"], "no snapshots there .config.snapshot_eve"),
    ):
        done = run_command(reconstruct, f"--workdir={tmp_path}", *arguments)
        assert done.code == 1 and re.match(f"error: .*{message}.*\n$", done.err)
    with pytest.raises(
        checkpoint.CheckpointError, match="only 0.05, 0.1 .*reconstruct makes others"
    ):
        averages.restore_weights(tmp_path, sigma_rel=0.06)


def test_snapshots_take_half_the_space_and_later_ones_are_dropped(tmp_path):
    snapshots(tmp_path)
    with checkpoint.Saver(averages.open_snapshots(tmp_path)) as saver:
        tree = saver.manager.item_metadata(50)["state"].tree
        assert tree["ema"]["0.05"]["layer"]["kernel"].dtype == jnp.float16
        saver.drop_after(150)
        assert saver.manager.all_steps() == [50, 100, 150]
