"""Runs of a few steps on small records: they resume, stop, and are refused."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags, logging
from small_runs import (
    SEQUENCE,
    final_state,
    make_config,
    write_records,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vcm_jax.claim import hold
from vcm_jax.interop import import_network
from vcm_jax.interop.weights import abstract_variables
from vcm_jax.records import mixture
from vcm_jax.records.schema import (
    EMPTY_TEXT,
)
from vcm_jax.records.source import RecordSource
from vcm_jax.runs import averages, checkpoint
from vcm_jax.training import loop, monitor, setup


class Interruption(Exception):
    pass


def test_an_interrupted_run_ends_bit_identical_to_one_that_was_not(data, tmp_path, monkeypatch):
    loop.train(make_config(data), tmp_path / "whole")

    def interrupted(meter):
        if meter._step == 6:
            raise Interruption
        return collect(meter)

    collect = monitor.Meter.collect
    monkeypatch.setattr(monitor.Meter, "collect", interrupted)
    with pytest.raises(Interruption):
        loop.train(make_config(data), tmp_path / "stopped")
    monkeypatch.undo()
    assert checkpoint.open_manager(tmp_path / "stopped", read_only=True).latest_step() == 3
    # The data position does not depend on how many processes read ahead.
    flags.FLAGS.mark_as_parsed()
    loop.train(make_config(data, **{"data.num_workers": 1}), tmp_path / "stopped")

    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert whole["step"] == resumed["step"] == 6
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)

    # The logs can be read, and a complete run is not touched.
    events = EventAccumulator(str(tmp_path / "stopped" / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {
        "train/loss",
        "train/mse_jump_t2",
        "train/grad_norm",
        "speed/samples_per_s",
        "val/mse_instant",
        "val/log_mel_fd_1_steps",
        "train/learning_rate",
    } <= set(tags)
    lines = (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    # The weights with the best metric are kept, in a workdir to generate from.
    metrics = {
        r["step"]: r["val/log_mel_fd_1_steps"]
        for r in map(json.loads, lines)
        if "val/log_mel_fd_1_steps" in r
    }
    best = tmp_path / "stopped" / "best"
    assert list(metrics) == [3, 6] and (best / "run.json").exists() and (best / "codec").is_dir()
    kept = checkpoint.open_manager(best, read_only=True).latest_step()
    assert kept == min(metrics, key=metrics.get)
    assert set(averages.restore_weights(best)) == {"params", "stats"}
    loop.train(make_config(data), tmp_path / "stopped")
    assert (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines() == lines
    whole_lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = lambda lines: {
        r["step"]: r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r
    }
    assert losses(lines)[6] == losses(whole_lines)[6]

    # Another network in the same workdir is refused, and nothing changes.
    other = make_config(data)
    other.model_overrides.hidden_dim = 32
    with pytest.raises(
        loop.SetupError, match="another run: config.model_overrides.hidden_dim is 32, was 16"
    ):
        loop.train(other, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path / "stopped"), whole)

    # Another run starts from its EMA weights.
    weights = averages.restore_weights(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, weights["params"], whole["ema"]["0.05"])
    started = make_config(
        data, steps=1, init_from=str(tmp_path / "whole"), **{"optimizer.learning_rate": 1e-12}
    )
    loop.train(started, tmp_path / "second")
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9)
    jax.tree.map(close, final_state(tmp_path / "second")["params"], weights["params"])
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of step 7; .*\[3, 6\]"):
        averages.restore_weights(tmp_path / "whole", step=7)
    with pytest.raises(checkpoint.CheckpointError, match=r"no EMA of .* only 0.05, 0.1"):
        averages.restore_weights(tmp_path / "whole", sigma_rel=0.2)


def flip_bits(folder):
    """Changes bytes in the middle of every data file of a checkpoint."""
    for path in folder.rglob("d/*"):
        content = bytearray(path.read_bytes())
        for place in range(len(content) // 4, len(content), 97):
            content[place] ^= 0x40
        path.write_bytes(content)


def test_a_run_resumes_from_the_newest_whole_checkpoint(data, tmp_path, caplog):
    caplog.set_level("INFO")
    logging.set_verbosity(logging.INFO)
    config, folder = make_config(data, eval_every=0), tmp_path / "checkpoints"
    loop.train(config, tmp_path)
    whole = final_state(tmp_path)
    flip_bits(folder / "6")
    loop.train(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), whole)
    assert f"{folder}/6" in caplog.text and "resuming after step 3" in caplog.text
    assert f"the damaged checkpoint 6 is kept as {tmp_path}/damaged/6" in caplog.text
    assert (tmp_path / "damaged/6/state").is_dir()

    # If all are damaged, the run does not quietly start again.
    for step in (3, 6):
        flip_bits(folder / str(step))
    with pytest.raises(loop.SetupError, match=r"all checkpoints are damaged \(6, 3\): delete"):
        loop.train(config, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


@pytest.mark.slow
def test_the_parameters_of_the_targets_are_saved_and_resumed(data, tmp_path):
    sizes = {"mesh.data": 8, "mesh.fsdp": 1, "mesh.tensor": 1}
    config = make_config(data, eval_every=0, **sizes, **{"objective.target_ema": 0.9})
    loop.train(config, tmp_path)
    whole = final_state(tmp_path)
    assert jax.tree.structure(whole["target"]) == jax.tree.structure(whole["params"])
    shutil.rmtree(tmp_path / "checkpoints/6")
    loop.train(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path), whole)
    assert set(averages.restore_weights(tmp_path)) == {"params", "stats"}
    without = make_config(data, steps=9, eval_every=0)
    with pytest.raises(loop.SetupError, match="another run: config.objective.target_ema is 0.0,"):
        loop.train(without, tmp_path)


def test_two_runs_in_one_workdir(data, tmp_path):
    with hold(tmp_path), pytest.raises(loop.SetupError, match="works in this folder") as error:
        loop.train(make_config(data, steps=1), tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "run.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
    config = make_config(
        data,
        checkpoint_every=1,
        eval_every=0,
        **{"optimizer.learning_rate": 1e25, "optimizer.warmup_steps": 0},
    )
    with pytest.raises(loop.NonFiniteError, match="is nan at step 2|is inf at step 2"):
        loop.train(config, tmp_path)
    assert checkpoint.open_manager(tmp_path, read_only=True).latest_step() == 1
    state = final_state(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_steps_that_are_not_finite_can_be_skipped(data, tmp_path):
    """The first step ruins the weights; the run stops after three more, which change nothing."""
    config = make_config(
        data,
        eval_every=0,
        checkpoint_every=2,
        on_nonfinite="skip",
        steps=9,
        **{"optimizer.learning_rate": 1e25, "optimizer.warmup_steps": 0},
    )
    with pytest.raises(loop.NonFiniteError, match="3 steps in a row were skipped: .* at step 4;"):
        loop.train(config, tmp_path)
    state = final_state(tmp_path)
    assert state["step"] == 2 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    lines = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    source = RecordSource(data / "train")
    mixed = mixture.mix([source], [1.0], seed=0)
    for step, line in zip((2, 3, 4), lines, strict=True):
        assert line["step"] == step
        assert line["ids"] == [mixed[i]["id"] for i in range(8 * step - 8, 8 * step)]


def test_watching_a_run(data, tmp_path):
    config = make_config(
        data, eval_every=0, sample_every=3, sample_clips=2, profile="2:4", snapshot_every=3
    )
    loop.train(config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for i in range(2):
        names = [f"clip_{i}/{kind}" for kind in ("1_steps", "4_steps", "25_steps")]
        for name in names:
            assert [event.step for event in events.Audio(name)] == [3, 6]
            assert [event.step for event in events.Images(f"{name}/spectrogram")] == [3, 6]
        (truth,) = events.Audio(f"clip_{i}/truth")
        assert truth.length_frames == SEQUENCE.num_samples and truth.sample_rate == 16_000
    # Noise and clips are the same every time; only the weights have changed.
    first, last = (event.encoded_audio_string for event in events.Audio("clip_0/1_steps"))
    assert first != last
    tags = set(events.Tags()["scalars"])
    assert {
        "ema/distance_0.05",
        "ema/distance_0.1",
        "speed/data_wait_ms",
        "speed/device_ms",
        "speed/host_ms",
        "speed/step_ms",
        "speed/tflops_per_device",
        "train/update_norm",
        "train/skipped_steps",
        "memory/host_peak_gib",
    } <= tags
    assert all(0 < event.value < 1 for event in events.Scalars("ema/distance_0.1"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))

    # EMA weights of a width that the run does not track.
    averages.reconstruct(tmp_path, 0.08)
    weights = averages.restore_weights(tmp_path, 6, 0.08)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.05),
        weights["params"],
        final_state(tmp_path)["ema"]["0.1"],
    )


def test_what_may_change_when_a_run_is_resumed(data, tmp_path, caplog):
    folder = tmp_path / "records"
    shutil.copytree(data / "train", folder / "train")
    config = lambda **changes: make_config(folder, eval_every=0, **changes)
    workdir = tmp_path / "run"
    loop.train(config(steps=3, checkpoint_every=3), workdir)
    message = r"optimizer.learning_rate is 0.25, was .*allow_config_change"
    with pytest.raises(loop.SetupError, match=message):
        loop.train(config(**{"optimizer.learning_rate": 0.25}), workdir)
    shutil.rmtree(folder / "train")
    write_records(folder / "train", 13)
    message = r"data source train=1 changed since the checkpoint: 13 records .* was 12"
    with pytest.raises(loop.SetupError, match=message):
        loop.train(config(steps=3, checkpoint_every=3), workdir)
    assert final_state(workdir)["step"] == 3
    loop.train(config(allow_config_change=True, log_every=3), workdir)
    assert final_state(workdir)["step"] == 6
    assert "config.log_every is 3, was 2" in caplog.text


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(data, tmp_path, capsys):
    config = make_config(data, **{"data.sources": ()})  # no data are needed
    loop.train(config, tmp_path / "run", dry_run=True)
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "fused_blocks_0/ffn/w1/kernel" in out and "Total: " in out
    assert "mesh: {'data': 2, 'fsdp': 2, 'tensor': 2}, 8 devices" in out
    for line in (
        "state per device: ",
        "activations and other temporaries per device: ",
        "memory per device: ",
        "  all-gather over fsdp: ",
        "model FLOPs: ",
        "input: ",
    ):
        assert line in out


@pytest.mark.parametrize("version, held", [(1, np.float32), (2, jnp.bfloat16)])
def test_imported_weights_start_a_run_and_keep_their_statistics(
    data, tmp_path, caplog, version, held
):
    config = make_config(
        data,
        steps=1,
        init_from=str(tmp_path / "imported"),
        **{"optimizer.learning_rate": 1e-12, "model_overrides.version": version},
    )
    manifest = RecordSource(data / "train").manifest
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: (0.05 * rng.standard_normal(leaf.shape)).astype(held),
        abstract_variables(setup.model_config(config, manifest)),
    )
    latents = {"latent_mean": np.float32(manifest.latent_mean) + 1}
    latents["latent_std"] = 3 * np.float32(manifest.latent_std)
    import_network.save(tmp_path / "imported", variables | {"stats": latents}, {})
    loop.train(config, tmp_path / "run")
    state = final_state(tmp_path / "run")
    close = lambda a, b: np.testing.assert_allclose(a, np.float32(b), atol=1e-9)
    jax.tree.map(close, state["params"], variables["params"])
    empty_text = np.load(data / "train" / EMPTY_TEXT)  # the data's: their text encoder's
    jax.tree.map(close, state["stats"], latents | {"empty_text": empty_text})
    warning = next(r.getMessage() for r in caplog.records if "latents are normalised" in r.msg)
    assert "stds by a factor of up to 3: are the data's latents those of another codec?" in warning

    # Weights without statistics get those of the data; other sizes are refused.
    found = setup.kept_statistics({"latent_mean": latents["latent_mean"]}, {}, "imported")
    assert found == {}
    for name, value in (("hidden_dim", 32), ("version", 3 - version)):
        other = copy.deepcopy(config)
        other.model_overrides[name] = value
        with pytest.raises(loop.SetupError, match=f"imported is of another size: {name} "):
            loop.train(other, tmp_path / "other")
        assert not (tmp_path / "other").exists()
