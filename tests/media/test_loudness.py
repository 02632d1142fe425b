"""The true-peak limiter, measured by exact interpolation, and loudness in LUFS."""

import numpy as np
import pytest
from scipy import signal

from vcm_jax.media import loudness
from vcm_jax.media.loudness import at_loudness, limit, true_peak


def exact_peak(sound, factor: int = 16) -> float:
    """The true peak in dB by Fourier interpolation: another method than the limiter's own."""
    padded = np.pad(np.asarray(sound, np.float64), 4000)
    return 20 * np.log10(np.abs(signal.resample(padded, factor * len(padded))).max())


def in_db(ratio) -> float:
    return float(20 * np.log10(ratio))


def tone(frequency, rate, seconds=1.0, phase=0.0):
    return np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate + phase)


def band_noise(rng, count, band=0.85):
    """Noise up to a share of the Nyquist frequency."""
    return np.convolve(rng.standard_normal(count), signal.firwin(501, band), "same")


def sounds(rate):
    """Every kind of sound that exceeds full scale, some of them between their samples alone."""
    rng = np.random.default_rng(0)
    clicks = (rng.random(rate) < 2e-3) * rng.standard_normal(rate) * 8
    return {
        "noise": band_noise(rng, rate),
        "clicks": np.convolve(clicks, signal.firwin(101, 0.85), "same"),
        "one click": 5 * signal.unit_impulse(rate, rate // 2),
        "low": 3 * tone(50, rate),
        "between samples": 1.2 * tone(rate / 4, rate, phase=np.pi / 4),
        "step": np.convolve(np.r_[np.zeros(500), np.full(2000, 1.3)], signal.firwin(51, 0.5)),
        "far too loud": 1e4 * band_noise(rng, rate),
        "at the ends": np.r_[2.0, 1.0, np.zeros(500), 1.5],
        "short": np.array([1.5, -1.5]),
    }


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("kind", sounds(16_000))
def test_no_true_peak_above_the_ceiling(rate, kind):
    """At most -1 dBTP, within 0.1 dB of what Fourier interpolation finds."""
    sound = sounds(rate)[kind].astype(np.float32)
    assert exact_peak(sound) > -1
    limited, reduction = limit(sound, rate)
    assert exact_peak(limited) <= -0.9 and true_peak(limited) <= -1
    assert limited.dtype == np.float32 and limited.shape == sound.shape
    # No more than is needed: to the margin, and what the curve at the sound's ends allows.
    assert reduction == pytest.approx(true_peak(sound) + 1.1, abs=0.7)
    assert true_peak(limited) > -2


def test_what_is_below_the_ceiling_stays_as_it_is():
    sound = (0.85 * tone(440, 16_000)).astype(np.float32)
    assert true_peak(sound) == pytest.approx(in_db(0.85), abs=0.02)
    assert limit(sound, 16_000) == (sound, 0.0)
    silence = np.zeros(100, np.float32)
    assert limit(silence, 16_000)[1] == 0
    assert limit(np.zeros(0, np.float32), 16_000)[1] == 0


def test_the_gain_moves_around_a_peak_only():
    """A click 12 dB too high ducks a quiet tone from 5 ms before it, by less than 1 dB after 0.2 s.

    The gain is slow enough not to be heard as distortion: it changes by 12 dB in 5 ms, no faster.
    """
    rate = 16_000
    quiet = 0.1 * tone(500, rate, 2)
    sound = quiet + 3.5 * signal.unit_impulse(len(quiet), rate)
    limited, reduction = limit(sound, rate)
    assert reduction == pytest.approx(in_db(3.6) + 1, abs=0.5)
    np.testing.assert_allclose(limited[: rate - 90], quiet[: rate - 90], atol=1e-6)

    def gain(start, stop):
        part = slice(round(start * rate), round(stop * rate))
        return in_db(np.std(limited[part]) / np.std(quiet[part]))

    assert gain(1.2, 1.25) > -1.2 and gain(1.5, 1.6) > -0.05
    assert gain(1.005, 1.015) == pytest.approx(-reduction, abs=2)
    steps = np.diff(
        20 * np.log10(np.abs(limited[rate - 100 : rate - 1] / sound[rate - 100 :][:99]))
    )
    assert np.abs(steps[np.isfinite(steps)]).max() < 0.5


def test_peaks_in_a_row_do_not_pump():
    """Between clicks 10 ms apart the gain returns by no more than the release allows."""
    rate = 16_000
    sound = 0.05 * tone(1000, rate)
    sound[4000:12000:160] += 2
    limited, reduction = limit(sound, rate)
    gains = 20 * np.log10(np.abs(limited[4500:11500] / sound[4500:11500]))
    assert gains.max() < -reduction * np.exp(-0.01 / 0.08) + 0.3


@pytest.mark.parametrize("bad", [np.array([0.0, np.nan]), np.array([np.inf]), np.zeros((2, 100))])
def test_sounds_that_are_refused(bad):
    for change in (lambda: limit(bad, 16_000), lambda: at_loudness(bad, 16_000, -23)):
        with pytest.raises(ValueError, match="finite and .samples,"):
            change()


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_loudness_of_the_reference_tone(rate):
    """EBU Tech 3341: a tone of 1 kHz at -23 dBFS in both channels has -23 LUFS, in one -26.01."""
    sound = 10 ** (-30 / 20) * tone(1000, rate, 3)
    louder = at_loudness(sound, rate, -26.01)
    assert in_db(np.abs(louder).max()) == pytest.approx(-23, abs=0.1)
    assert louder.dtype == np.float32


def test_pauses_do_not_count():
    noisy = np.random.default_rng(0).standard_normal(32_000) * 0.1
    paused = np.r_[noisy, np.zeros(64_000)]
    gains = [at_loudness(s, 16_000, -20)[100] / s[100] for s in (noisy, paused)]
    assert in_db(gains[0] / gains[1]) == pytest.approx(0, abs=0.5)


def test_sounds_without_a_loudness():
    with pytest.raises(ValueError, match="silence has no loudness"):
        at_loudness(np.zeros(16_000), 16_000, -23)
    with pytest.raises(ValueError, match="silence has no loudness"):
        at_loudness(1e-6 * tone(440, 16_000), 16_000, -23)
    with pytest.raises(ValueError, match="0.1 s of sound have no loudness in LUFS: it takes 0.4 s"):
        at_loudness(tone(440, 16_000, 0.1), 16_000, -23)


def test_long_sounds_are_limited_in_blocks(monkeypatch):
    """Block by block the result is that of one block, at the joints too."""
    sound = np.random.default_rng(0).standard_normal(5000)
    sound[1000:3000] *= 0.1
    whole, most = limit(sound, 16_000)
    peak = true_peak(sound)
    monkeypatch.setattr(loudness, "_BLOCK", 700)
    assert true_peak(sound) == pytest.approx(peak, abs=1e-9)
    limited, reduction = limit(sound, 16_000)
    np.testing.assert_allclose(limited, whole, atol=1e-6)
    assert reduction == pytest.approx(most, abs=1e-5)
