"""The learned codec: its Fourier head, streaming, folders, losses and training."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from vcm_jax.codec import (
    LearnedCodec,
    LinearCodec,
    copy_codec,
    fit_linear_codec,
    fourier,
    load_codec,
    losses,
    train,
)
from vcm_jax.codec.corpus import CorpusError, open_corpus
from vcm_jax.codec.learned import N_FFT
from vcm_jax.codec.mel import MELS
from vcm_jax.codec.step import CodecConfig, init_state

RNG = np.random.default_rng(0)


def random_codec(encoder: str = "linear", mode: str = "16k", latent_dim: int = 4) -> LearnedCodec:
    """A codec with random weights."""
    config = CodecConfig(mode=mode, encoder=encoder, latent_dim=latent_dim, crop=8)
    width = 2 * MELS[mode].bands
    statistics = {
        "decoder/mean": RNG.standard_normal(latent_dim),
        "decoder/std": np.full(latent_dim, 2.0),
        "encoder/mean": np.full(width, -4.0),
    }
    if encoder == "linear":
        components = np.linalg.qr(RNG.standard_normal((width, latent_dim)))[0].T
        statistics["encoder/components"] = components
    else:
        statistics["encoder/std"] = np.ones(width)
    statistics = {name: np.float32(array) for name, array in statistics.items()}
    return train.make_codec(config, statistics, init_state(config).params)


@pytest.fixture(scope="module")
def codec():
    return random_codec()


def test_the_inverse_stft_inverts_the_stft():
    n_fft, sound = 64, RNG.standard_normal(640).astype(np.float32)
    hop = n_fft // 4
    padded = np.pad(sound, (n_fft - hop) // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    assert len(frames) == 640 // hop
    spectrum = np.fft.rfft(frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)))
    found = fourier.inverse_stft(jnp.asarray(spectrum[None], jnp.complex64), n_fft)
    np.testing.assert_allclose(found[0], sound, atol=1e-5)


def test_a_constant_phase_is_a_steady_tone():
    """p is the phase beside the advance of a bin's own frequency: constant p, a pure tone."""
    n_fft, bins, frames = 64, 33, 40
    a = np.full((1, frames, bins), -30.0)
    a[:, :, 5] = 3.0
    head = (jnp.asarray(a), jnp.zeros(a.shape), jnp.zeros(a.shape))
    sound = np.asarray(fourier.inverse_stft(fourier.spectrum(head, None), n_fft))[0, 64:-64]
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    assert np.argmax(spectrum) == pytest.approx(5 / n_fft * len(sound), abs=1)
    levels = np.sqrt(np.mean(sound[: len(sound) // 64 * 64].reshape(-1, 64) ** 2, axis=1))
    assert levels.std() < 0.02 * levels.mean()


def test_noise_adds_power_as_the_head_says():
    """With a silent deterministic part the expected power of a bin is 2 exp(2 n)."""
    shape = (1, 400, 33)
    head = (jnp.full(shape, -30.0), jnp.zeros(shape), jnp.full(shape, 1.0))
    noise = fourier.draw_noise(jax.random.key(0), 0, 100, 64)[None]
    power = jnp.abs(fourier.spectrum(head, noise)) ** 2
    assert float(power.mean()) == pytest.approx(2 * np.exp(2), rel=0.03)


@pytest.mark.parametrize("mode", MELS)
def test_lengths_and_rates(mode):
    codec = random_codec(mode=mode)
    assert codec.sample_rate / codec.hop / 2 == pytest.approx(
        {"16k": 31.25, "44k": 43.07}[mode], 1e-3
    )
    for samples in (1, 3 * N_FFT[mode], 40 * N_FFT[mode] + 7):
        mean, std = codec.encode(0.1 * RNG.standard_normal(samples).astype(np.float32))
        tokens = -(-samples // N_FFT[mode])
        assert mean.shape == std.shape == (tokens, 4)
        sound = codec.decode(mean)
        assert sound.shape == (tokens * N_FFT[mode],) and sound.dtype == np.float32
        assert np.isfinite(sound).all()


def test_long_sounds_are_decoded_in_windows_as_the_whole(codec, monkeypatch):
    latents = RNG.standard_normal((300, 4)).astype(np.float32)
    whole = codec.decode(latents, seed=3)  # two windows of 256
    from vcm_jax.codec import learned

    monkeypatch.setattr(learned, "_WINDOW", 320)
    np.testing.assert_allclose(codec.decode(latents, seed=3), whole, atol=2e-5)
    monkeypatch.setattr(learned, "_WINDOW", 64)
    np.testing.assert_allclose(codec.decode(latents, seed=3), whole, atol=2e-5)


def test_the_context_is_what_affects_a_sample(codec):
    latents = RNG.standard_normal((96, 4)).astype(np.float32)
    changed = latents.copy()
    changed[40] += 1.0
    different = np.abs(codec.decode(changed) - codec.decode(latents)) > 1e-6
    touched = np.flatnonzero(different.reshape(96, -1).any(axis=1))
    context = fourier.DECODERS["tiny"].context
    assert 40 - context <= touched.min() and touched.max() <= 40 + context
    assert touched.max() - touched.min() > context  # the test would see a smaller one


def test_equal_seeds_give_equal_sounds(codec):
    latents = RNG.standard_normal((20, 4)).astype(np.float32)
    np.testing.assert_array_equal(codec.decode(latents, 5), codec.decode(latents, 5))
    assert np.abs(codec.decode(latents, 5) - codec.decode(latents, 6)).max() > 1e-4


@pytest.mark.parametrize("encoder", ["linear", "learned"])
def test_save_and_load(encoder, tmp_path):
    codec = random_codec(encoder)
    codec.save(tmp_path / "codec")
    (tmp_path / "codec/training").mkdir()
    copy_codec(tmp_path / "codec", tmp_path / "copy")
    assert not (tmp_path / "copy/training").exists()
    loaded = load_codec(tmp_path / "copy")
    assert isinstance(loaded, LearnedCodec) and loaded.encoder == encoder
    assert loaded.fingerprint == codec.fingerprint
    sound = 0.1 * RNG.standard_normal(5000).astype(np.float32)
    for ours, theirs in zip(loaded.encode(sound), codec.encode(sound)):
        np.testing.assert_array_equal(ours, theirs)
    latents = codec.encode(sound)[0]
    np.testing.assert_array_equal(loaded.decode(latents, 1), codec.decode(latents, 1))


def test_latents_of_the_linear_codec_are_decoded(tmp_path):
    """The fingerprint is the encoder's: a learned decoder takes the place of Griffin-Lim."""
    codec = random_codec()
    linear = LinearCodec(codec.arrays["encoder/mean"], codec.arrays["encoder/components"], 0.5)
    assert linear.fingerprint == codec.fingerprint
    assert random_codec("learned").fingerprint != codec.fingerprint


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "version", "size"])
def test_damaged_folders(damage, codec, tmp_path):
    codec.save(tmp_path)
    path, description = tmp_path / "codec.npz", tmp_path / "codec.json"
    if damage in ("version", "size"):
        content = json.loads(description.read_text())
        content[damage] = 99 if damage == "version" else "huge"
        content.pop("hash")
        description.write_text(json.dumps(content))
    elif damage == "gone":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 64
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_codec(tmp_path)


def test_the_distance_is_a_metric_and_the_energy_distance_a_proper_score():
    rate, rng = 16_000, np.random.default_rng(1)
    noise = rng.standard_normal((6, 4096)).astype(np.float32)
    x, y, z = (losses.analyse(jnp.asarray(0.1 * noise[i : i + 2]), rate) for i in (0, 2, 4))
    assert float(losses.distance(x, x)) < 1e-3
    assert float(losses.distance(x, y)) == pytest.approx(float(losses.distance(y, x)))
    assert losses.distance(x, z) <= losses.distance(x, y) + losses.distance(y, z)
    # Draws of the true distribution score better than draws that are too loud, too quiet or alike.
    scores = {}
    for name, (a, b) in {
        "true": (0.1 * noise[2:4], 0.1 * noise[4:6]),
        "loud": (0.2 * noise[2:4], 0.2 * noise[4:6]),
        "quiet": (0.05 * noise[2:4], 0.05 * noise[4:6]),
        "one draw": (0.1 * noise[2:4], 0.1 * noise[2:4]),
    }.items():
        features = (losses.analyse(jnp.asarray(s), rate) for s in (a, b))
        scores[name] = float(losses.energy_distance(x, *features))
    assert min(scores, key=scores.get) == "true", scores


def test_the_distance_of_44_khz_frames_the_same_seconds():
    features = losses.analyse(jnp.zeros((1, 44_100)), 44_100)
    assert features[0][0].shape[1] == pytest.approx(44_100 / 1024, abs=2)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Twelve decaying tones in noise, one of which is silent and one no sound at all."""
    folder = tmp_path_factory.mktemp("sounds")
    t = np.arange(12_000) / 16_000
    for i in range(12):
        tone = np.sin(2 * np.pi * (300 + 100 * i) * t) * np.exp(-8 * t)
        sound = 0.3 * tone + 0.003 * RNG.standard_normal(len(t))
        soundfile.write(folder / f"{i}.wav", sound, 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(12_000), 16_000)
    (folder / "text.wav").write_text("not a sound")
    return folder


def test_a_corpus_is_decoded_once_and_cropped_repeatably(sounds, tmp_path):
    corpus = open_corpus(sounds, 16_000, tmp_path)
    assert [name for name, _ in corpus.left_out] == ["silent.wav", "text.wav"]
    assert len(corpus.names) == 12 and corpus.sound(3).shape == (12_000,)
    training, held_out = corpus.split(16)
    assert len(held_out) == 1 and not set(training) & set(held_out)
    crops = corpus.crops(training, 15_000, slice(0, 4), 8, 0, 7)
    again = open_corpus(sounds, 16_000, tmp_path).crops(training, 15_000, slice(2, 8), 8, 0, 7)
    np.testing.assert_array_equal(crops[2:], again[:2])
    assert (crops[:, 12_000:] == 0).all() and np.abs(crops[:, :12_000]).max() > 0.1
    assert (corpus.crops(training, 500, slice(0, 4), 8, 0, 8) != crops[:, :500]).any()
    with pytest.raises(CorpusError, match="changed"):
        open_corpus(sounds, 8_000, tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no sound or video files"):
        open_corpus(tmp_path / "empty", 16_000, tmp_path / "cache")


@dataclasses.dataclass
class Args:
    """The flags of the command that `train` reads."""

    val_sounds: int = 2
    log_every: int = 4
    eval_every: int = 0
    checkpoint_every: int = 4


SHORT = dict(steps=8, batch_size=8, crop=8, warmup_steps=0, latent_dim=4, noise_from=0.5)


@pytest.mark.parametrize("settings", [{}, {"encoder": "learned", "adversarial": True}])
def test_training_resumes_exactly(settings, sounds, tmp_path, monkeypatch):
    corpus = open_corpus(sounds, 16_000, tmp_path / "cache")
    config = CodecConfig(**SHORT | settings, learning_rate=1e-3)
    whole = train.train(config, corpus, tmp_path / "whole", Args())
    stopped = iter([False] * 3 + [True])

    class Stop:
        def __enter__(self):
            return lambda step: next(stopped)

        def __exit__(self, *_):
            return False

    with monkeypatch.context() as patch:
        patch.setattr(train.preemption, "watch", Stop)
        with pytest.raises(train.preemption.Preempted, match="step 4"):
            train.train(config, corpus, tmp_path / "parts", Args())
    parts = train.train(config, corpus, tmp_path / "parts", Args())
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(parts.arrays[name], array, err_msg=name)
    lines = [json.loads(line) for line in (tmp_path / "parts/metrics.jsonl").open()]
    stages = [line for line in lines if "train/loss" in line]
    assert "train/distance" in stages[0] and "train/energy_distance" in stages[1]
    assert any("val/spectral_convergence" in line for line in lines)


def test_learning_lowers_the_distance(sounds, tmp_path):
    """Sixty steps on tones: the round trip comes nearer to the true sounds than at the start."""
    corpus = open_corpus(sounds, 16_000, tmp_path / "cache")
    config = CodecConfig(**SHORT | {"steps": 60, "noise_from": 1.0})
    codec = train.train(config, corpus, tmp_path / "run", Args(log_every=10))
    values = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses_seen = [line["train/loss"] for line in values if "train/loss" in line]
    assert losses_seen[-1] < 0.5 * losses_seen[0]
    sound = corpus.sound(2)
    found = codec.decode(codec.encode(sound)[0])[: len(sound)]
    early, late = (np.sqrt(np.mean(part**2)) for part in (found[:2_000], found[-2_000:]))
    assert early > 1.5 * late  # the tones decay


def test_a_batch_is_the_same_on_any_mesh(sounds, tmp_path):
    """One step on one device and on two gives equal weights (when there are two)."""
    from jax.sharding import Mesh

    from vcm_jax.codec.step import train_step
    from vcm_jax.devices.sharding import BATCH_AXES

    if jax.device_count() < 2:
        pytest.skip("one device")
    corpus = open_corpus(sounds, 16_000, tmp_path)
    config = CodecConfig(**SHORT, learning_rate=1e-3)
    statistics = train.read_statistics(corpus, np.arange(10), config, None)
    sound = corpus.crops(np.arange(10), config.crop_samples, slice(0, 8), 8, 0, 1)
    found = []
    for count in (1, 2):
        mesh = Mesh(np.array(jax.devices()[:count]).reshape(count, 1), BATCH_AXES)
        step = jax.jit(
            lambda *args, mesh=mesh: train_step(
                *args, config=config, noisy=True, mesh=mesh, axes=BATCH_AXES
            )
        )
        state, _ = step(init_state(config), statistics, sound, jax.random.key(0))
        found.append(jax.device_get(state.params))
    for ours, theirs in zip(*map(jax.tree.leaves, found)):
        # Adam's first steps are of equal size, whatever the gradient: where that is nearly 0,
        # rounding decides.
        assert np.mean(np.abs(ours - theirs)) < 1e-6


def test_a_given_linear_codec_is_kept(sounds, tmp_path):
    corpus = open_corpus(sounds, 16_000, tmp_path / "cache")
    linear = fit_linear_codec([corpus.sound(i) for i in range(4)], 4)
    statistics = train.read_statistics(corpus, np.arange(4), CodecConfig(**SHORT), linear)
    np.testing.assert_array_equal(statistics["encoder/components"], linear.components)
    linear.save(tmp_path / "linear")
    with pytest.raises(ValueError, match="latent_dim=4"):
        train._linear_codec(tmp_path / "linear", CodecConfig(latent_dim=20))


def test_sounds_too_short_to_measure_cost_nothing(tmp_path):
    """Training ends with a codec, although no validation sound can be scored."""
    (tmp_path / "short").mkdir()
    for i in range(4):
        soundfile.write(tmp_path / f"short/{i}.wav", 0.1 * RNG.standard_normal(1_200), 16_000)
    corpus = open_corpus(tmp_path / "short", 16_000, tmp_path / "cache")
    codec = train.train(CodecConfig(**SHORT), corpus, tmp_path / "run", Args())
    assert np.isfinite(codec.decode(codec.encode(corpus.sound(0))[0])).all()
