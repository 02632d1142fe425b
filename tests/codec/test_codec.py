import json
import os

import golden
import jax
import numpy as np
import pytest
from mel_input import MODES, chirp
from sklearn.decomposition import PCA

from vcm_jax.codec import check_codec, copy_codec, fit_linear_codec, load_codec
from vcm_jax.codec.mel import MEL_16K, hann_window, log_mel, mel_filters
from vcm_jax.records.sequence import SequenceConfig


def thump(seed: int, n: int = 40_960) -> np.ndarray:
    """A few decaying tones over a little noise."""
    rng = np.random.default_rng(seed)
    sound = 0.003 * rng.standard_normal(n)
    for start in rng.integers(0, n - 4000, 4):
        time = np.arange(n - start) / 16_000
        tone = np.sin(2 * np.pi * rng.uniform(150, 3000) * time)
        sound[start:] += 0.3 * tone * np.exp(-time / rng.uniform(0.02, 0.2))
    return sound.astype(np.float32)


def spectrum(sound: np.ndarray) -> np.ndarray:
    return np.asarray(log_mel(sound[None], MEL_16K)[0])


@pytest.fixture(scope="module")
def codec():
    return fit_linear_codec(thump(seed) for seed in range(30))


@pytest.mark.parametrize("mode", MODES)
def test_mel_of_one_second_matches_the_reference(mode):
    config, seed, top = MODES[mode]
    reference = np.load(golden.DATA / "codec" / "mel_1s.npz")[f"mel_{mode}"]
    wave = chirp(config, seed, top, config.sample_rate)
    assert np.abs(wave).max() > 1  # the clamp matters
    mel = jax.jit(log_mel, static_argnums=1)(wave[None], config)
    assert golden.relative_error(np.swapaxes(mel, 1, 2), reference) < 1e-4


@pytest.mark.parametrize("mode, samples", [("16k", 128_000), ("44k", 353_280)])
def test_mel_of_eight_seconds_matches_the_reference(shared, mode, samples):
    config, seed, top = MODES[mode]
    with np.load(shared(f"codec/mel_{mode}.npz")) as reference:
        mel = log_mel(chirp(config, seed, top, samples)[None], config)
        assert golden.relative_error(np.swapaxes(mel, 1, 2), reference["mel_8s"]) < 1e-4
        np.testing.assert_allclose(mel_filters(config), reference["mel_basis"], atol=1e-7)
        np.testing.assert_allclose(hann_window(config.n_fft), reference["hann_window"], atol=1e-6)


def test_mel_of_a_batch():
    waves = np.stack([thump(0), thump(1)])
    mel = log_mel(waves, MEL_16K)
    assert mel.shape == (2, 160, 80)
    np.testing.assert_allclose(mel[1], spectrum(waves[1]), atol=1e-5)


def test_latents_are_the_principal_components(codec):
    rows = np.concatenate([spectrum(thump(seed)).reshape(-1, 160) for seed in range(30)])
    pca = PCA(20, svd_solver="full").fit(rows.astype(np.float64))
    np.testing.assert_allclose(
        codec.explained_variance, pca.explained_variance_ratio_.sum(), rtol=1e-4
    )
    mean, std = codec.encode(thump(99))
    expected = pca.transform(spectrum(thump(99)).reshape(-1, 160))
    assert mean.shape == (80, 20) and mean.dtype == np.float32 and not std.any()
    signs = np.sign((mean * expected).sum(0))
    np.testing.assert_allclose(mean[:, :8], (expected * signs)[:, :8], atol=0.02)


def test_round_trip(codec):
    sound = thump(99)
    latents = codec.encode(sound)[0]
    back = codec.decode(latents)
    assert back.shape == sound.shape and back.dtype == np.float32
    np.testing.assert_array_equal(back, codec.decode(latents))  # no random phases
    error = lambda a, b: 20 * np.sqrt(np.mean((spectrum(a) - spectrum(b)) ** 2))  # dB
    assert error(back, sound) < 5 < 8 < error(np.zeros_like(sound), sound)
    # In time to well within a frame: any shift makes it worse.
    assert error(back, sound) < min(error(np.roll(back, s), sound) for s in (-96, 96))


def test_any_length(codec):
    latents, _ = codec.encode(thump(0, 12_345))
    assert latents.shape == (25, 20) and codec.decode(latents).shape == (12_800,)
    assert codec.encode(thump(0, 5000)[:100])[0].shape == (1, 20)


def test_bad_shapes(codec):
    with pytest.raises(ValueError, match=r"\(samples,\), not \(2, 1024\)"):
        codec.encode(np.zeros((2, 1024)))
    with pytest.raises(ValueError, match=r"\(N, 20\), not \(5, 40\)"):
        codec.decode(np.zeros((5, 40)))
    with pytest.raises(ValueError, match="2 latent frames are too few to fit 20 components"):
        fit_linear_codec([thump(0, 5000)[:1024]])


def test_save_and_load(codec, tmp_path):
    codec.save(tmp_path / "codec")
    loaded = load_codec(tmp_path / "codec")
    assert loaded.fingerprint == codec.fingerprint
    assert (loaded.name, loaded.latent_dim, loaded.sample_rate) == ("linear", 20, 16_000)
    np.testing.assert_array_equal(loaded.encode(thump(5))[0], codec.encode(thump(5))[0])
    other = fit_linear_codec(thump(seed) for seed in range(10))
    assert other.fingerprint != codec.fingerprint


def test_bad_folders(codec, tmp_path):
    with pytest.raises(ValueError, match="not a codec folder"):
        load_codec(tmp_path)
    codec.save(tmp_path)
    meta = json.loads((tmp_path / "codec.json").read_text())
    del meta["hash"]  # earlier versions wrote none
    for change, reason in (
        ({"name": "other"}, "unknown codec 'other'"),
        ({"version": 7}, "version 7"),
        ({"fingerprint": "0"}, "do not fit codec.json"),
        ({"hop": 512}, "do not fit codec.json .hop"),
        ({"name": ["linear"]}, "unknown codec"),
    ):
        (tmp_path / "codec.json").write_text(json.dumps(meta | change))
        with pytest.raises(ValueError, match=reason):
            load_codec(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps(meta))
    (tmp_path / "codec.npz").write_bytes((tmp_path / "codec.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match="codec.npz: missing or damaged"):
        load_codec(tmp_path)


def test_any_damaged_byte_is_found_or_changes_nothing(codec, tmp_path):
    codec.save(tmp_path)
    for name in ("codec.json", "codec.npz"):
        whole = (tmp_path / name).read_bytes()
        found = 0
        for position in range(0, len(whole), 1 if name == "codec.json" else 97):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 7
            (tmp_path / name).write_bytes(damaged)
            try:
                loaded = load_codec(tmp_path)
            except ValueError as error:
                found += 1
                assert str(tmp_path) in str(error) and "\n" not in str(error)
                continue
            np.testing.assert_array_equal(loaded.mean, codec.mean)
            np.testing.assert_array_equal(loaded.components, codec.components)
            assert loaded.explained_variance == codec.explained_variance
        assert found > 0.9 * position / (1 if name == "codec.json" else 97)
        (tmp_path / name).write_bytes(whole)


def test_a_folder_of_relative_links_is_copied_as_files(codec, tmp_path):
    codec.save(tmp_path / "store")
    (tmp_path / "linked").mkdir()
    for name in ("codec.json", "codec.npz"):
        (tmp_path / "linked" / name).symlink_to(os.path.join("..", "store", name))
    copy_codec(tmp_path / "linked", tmp_path / "deep" / "run" / "codec")
    copied = tmp_path / "deep" / "run" / "codec"
    assert not any(file.is_symlink() for file in copied.iterdir())
    assert load_codec(copied).fingerprint == codec.fingerprint
    assert os.path.samefile(copied / "codec.npz", tmp_path / "store" / "codec.npz")


def test_a_copy_appears_whole_or_not_at_all(codec, tmp_path):
    codec.save(tmp_path / "one")
    (tmp_path / "one" / "gone").symlink_to("nowhere")
    with pytest.raises(OSError):
        copy_codec(tmp_path / "one", tmp_path / "copies" / "codec")
    assert not list((tmp_path / "copies").iterdir())
    (tmp_path / "one" / "gone").unlink()
    copy_codec(tmp_path / "one", tmp_path / "copies" / "codec")
    fit_linear_codec(thump(seed) for seed in range(10)).save(tmp_path / "other")
    copy_codec(tmp_path / "other", tmp_path / "copies" / "codec")  # the first one stays
    assert load_codec(tmp_path / "copies" / "codec").fingerprint == codec.fingerprint
    assert len(list((tmp_path / "copies").iterdir())) == 1


def test_another_sample_rate_is_refused(codec):
    check_codec(codec, SequenceConfig(duration=2.56))
    with pytest.raises(ValueError, match="linear codec has sample_rate 16000, the data 44100"):
        check_codec(codec, SequenceConfig.mode_44k())
