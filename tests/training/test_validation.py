"""Metrics during training tell good weights from bad, and the best weights are kept."""

import json

import jax
import numpy as np
import pytest

from vcm_jax.codec.linear import fit_linear_codec
from vcm_jax.impacts.render import render_sound
from vcm_jax.impacts.scene import simulate
from vcm_jax.models import MMDiT, ModelConfig
from vcm_jax.runs import averages
from vcm_jax.training.state import OptimizerConfig, make_init, make_optimizer
from vcm_jax.training.validation import Best, Overfitting, sound_metrics

SIZES = ModelConfig(
    latent_dim=20, clip_dim=6, sync_dim=5, text_dim=4, hidden_dim=16, num_heads=2, depth=2,
    fused_depth=1, latent_seq_len=40, clip_seq_len=10, sync_seq_len=16, text_seq_len=5,
)  # fmt: skip


class Oracle:
    """A stand-in for a trained network: it knows the clips, and its latents are off by `error`."""

    def __init__(self, batches, error):
        self.truth, self.error = np.concatenate([b["latent_mean"] for b in batches]), error

    def apply(self, variables, *args, method):
        if method == "null_conditions":
            return MMDiT(SIZES).apply(variables, *args, method=method)
        if method == "encode_conditions":
            return args[0].clip[:, 0, 0].astype(int)  # the clip's number
        x, t, _, number = args
        stats = variables["stats"]
        mean, std = (stats[k][None, None] for k in ("latent_mean", "latent_std"))
        wanted = (jax.numpy.asarray(self.truth)[number] - mean) / std + self.error
        # One straight line to the truth: any number of steps arrives there.
        return (x - wanted) / t[:, None, None]


@pytest.fixture(scope="module")
def clips():
    sounds = [render_sound(simulate(0, "test", i, 1.28)) for i in range(8)]
    codec = fit_linear_codec(sounds)
    latents = np.stack([codec.encode(sound)[0] for sound in sounds])
    zeros = lambda *shape: np.zeros((4, *shape), np.float32)
    batches = []
    for start in (0, 4):
        number = zeros(SIZES.clip_seq_len, SIZES.clip_dim)
        number[:, 0, 0] = np.arange(start, start + 4)
        batches.append(
            {
                "latent_mean": latents[start : start + 4],
                "latent_std": zeros(40, 20),
                "clip": number,
                "sync": zeros(16, 5),
                "text": zeros(5, 4),
                "has_video": np.ones(4, bool),
                "has_text": np.ones(4, bool),
            }
        )
    flat = latents.reshape(-1, 20)
    stats = {
        "latent_mean": flat.mean(0),
        "latent_std": flat.std(0),
        "empty_text": np.zeros((5, 4), np.float32),
    }
    return codec, batches, stats


def variables(stats):
    init = make_init(MMDiT(SIZES), stats, make_optimizer(OptimizerConfig()), (0.05,))
    return jax.jit(init)(jax.random.key(0))


def test_the_metrics_tell_good_weights_from_bad(clips):
    codec, batches, stats = clips
    state = variables(stats)
    key = jax.random.key(1)
    score = lambda error: sound_metrics(
        Oracle(batches, error), state.params, stats, batches, codec, key, steps=(1, 3)
    )
    perfect, off = score(0.0), score(0.3)
    for num in (1, 3):
        assert perfect[f"val/latent_fd_{num}_steps"] < 1e-6
        assert perfect[f"val/log_mel_fd_{num}_steps"] < 1e-6
        assert perfect[f"val/onset_f1_{num}_steps"] == 1
        assert perfect[f"val/spectral_convergence_{num}_steps"] < 1e-3
        # All latents are off by 0.3 standard deviations in each of 20 channels.
        assert off[f"val/latent_fd_{num}_steps"] == pytest.approx(20 * 0.3**2, rel=1e-3)
        assert off[f"val/log_mel_fd_{num}_steps"] > 0.1
    assert len(perfect) == 2 * 6


def test_the_metrics_of_a_network_are_repeatable_and_of_so_many_clips(clips):
    codec, batches, stats = clips
    state = variables(stats)
    score = lambda batches, clips: sound_metrics(
        MMDiT(SIZES),
        state.params,
        stats,
        iter(batches),
        codec,
        jax.random.key(1),
        steps=(1,),
        max_clips=clips,
    )
    first = score(batches, 3)
    assert first == score(batches[:1], 3) != score(batches, 5)
    broken = jax.tree.map(lambda a: a * np.float32(np.nan), stats)
    values = sound_metrics(
        MMDiT(SIZES),
        state.params,
        stats | {"latent_mean": broken["latent_mean"]},
        batches,
        codec,
        jax.random.key(1),
        steps=(1,),
        max_clips=2,
    )
    assert len(values) == 6 and all(np.isnan(list(values.values())))
    with pytest.raises(ValueError, match="no validation clips"):
        score([], 3)


def test_the_best_step_is_kept(clips, tmp_path):
    state = variables(clips[2])
    at = lambda step: state.replace(
        step=np.int32(step), ema=jax.tree.map(lambda a: a + step, state.ema)
    )
    best = Best(tmp_path, "val/x")
    assert best.offer(at(1), {"val/x": 3.0}, {})
    assert not best.offer(at(2), {"val/x": 3.5}, {})
    assert not best.offer(at(3), {"val/x": float("nan")}, {})
    best = Best(tmp_path, "val/x")  # a resumed run
    assert best.value == 3.0 and not best.offer(at(4), {"val/x": 3.2}, {})
    assert best.offer(at(5), {"val/x": 2.0}, {})
    kept = averages.restore_weights(tmp_path / "best")
    jax.tree.map(np.testing.assert_array_equal, kept["params"], at(5).ema["0.05"])
    assert Best(tmp_path, "val/other").value == float("inf")


def test_a_validation_loss_that_rises_is_said_once(tmp_path):
    """Three evaluations above the lowest one; a resumed run goes on from its log."""

    def value(loss):
        return {"val/mse": 5.0, "val/mse_instant_to_velocity": loss}

    path, train = tmp_path / "metrics.jsonl", {"train/mse_instant_to_velocity": 0.5}
    said = []
    losses = [1.0, 0.8, 0.9, 0.801, 0.9, 0.9, 0.9, 0.95, 0.7, 0.8, 0.8, 0.8]
    for step, loss in enumerate(losses, 1):
        line, warning = Overfitting(path).compare(step, value(loss), train)
        assert f"validation loss {loss:g}, training loss 0.5; the lowest" in line
        said += [(step, warning)] if warning else []
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **value(loss)}) + "\n")
            file.write(json.dumps({"step": step, "train/mse": 0.1}) + "\n")
    assert [step for step, _ in said] == [7, 12]
    assert said[0][1].startswith(
        "the validation loss has risen from 0.8 at step 2 to 0.9 at step 7"
    )
    assert Overfitting(path).compare(13, {"val/mse": float("nan")}, {}) == ("", "")
