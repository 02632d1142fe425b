"""Griffin-Lim in chunks: no seams, bounded memory, and librosa's sound where one chunk suffices."""

import librosa
import numpy as np
import pytest

from vcm_jax.codec.griffin_lim import griffin_lim

N_FFT, HOP = 1024, 256


def spectrum(sound):
    return np.abs(librosa.stft(sound, n_fft=N_FFT, hop_length=HOP, pad_mode="constant"))


@pytest.fixture(scope="module")
def sound():
    """12 s of a slowly changing chord in noise: every instant of it shows a seam."""
    rng = np.random.default_rng(0)
    time = np.arange(12 * 16_000) / 16_000
    chord = sum(np.sin(2 * np.pi * pitch * (time + 0.002 * time**2)) for pitch in (180, 450, 1130))
    return (0.2 * chord + 0.02 * rng.standard_normal(len(time))).astype(np.float32)


def chunks(magnitudes, **options):
    asked = []

    def part(first, end):
        asked.append((first, end))
        return magnitudes[:, first:end]

    found = list(griffin_lim(part, magnitudes.shape[1], N_FFT, HOP, 32, **options))
    return found, asked


def test_a_sound_of_one_chunk_is_librosas(sound):
    wanted = spectrum(sound[:40_000])
    (found,), _ = chunks(wanted)
    options = dict(n_iter=32, hop_length=HOP, n_fft=N_FFT, momentum=0.99, random_state=0)
    np.testing.assert_allclose(found, librosa.griffinlim(wanted, **options), atol=1e-3)


def test_chunks_have_no_seams(sound):
    """Chunks with unrelated phases would cancel partly where they are cross-faded."""
    wanted = spectrum(sound)
    found, asked = chunks(wanted, chunk=128)
    assert len(found) == 6 and max(end - first for first, end in asked) <= 128 + 2 * 32
    joined = np.concatenate(found)
    assert len(joined) == (wanted.shape[1] - 1) * HOP
    have, count = spectrum(joined), wanted.shape[1]
    level = 10 * np.log10((have**2).sum(0) / (wanted**2).sum(0))
    error = ((have - wanted) ** 2).sum(0) / (wanted**2).sum(0)
    seams = np.concatenate([np.arange(seam - 6, seam + 3) for seam in range(128, count - 64, 128)])
    others = np.setdiff1d(np.arange(10, count - 10), seams)
    assert abs(level[seams].mean() - level[others].mean()) < 0.2
    assert level[seams].min() > level[others].min() - 0.5
    assert error[seams].mean() < 1.5 * error[others].mean() + 0.01
    jump = np.abs(np.diff(joined))
    ends = np.cumsum([len(chunk) for chunk in found])[:-1]
    assert max(jump[end - 2 : end + 2].max() for end in ends) <= jump.max()


@pytest.mark.parametrize("frames", [3, 128, 129, 192, 193, 256, 257])
def test_any_number_of_frames(frames):
    found, _ = chunks(np.ones((N_FFT // 2 + 1, frames), np.float32), chunk=64)
    assert sum(map(len, found)) == (frames - 1) * HOP
    assert np.isfinite(np.concatenate(found)).all()
