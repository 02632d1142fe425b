"""Scores on features: against the reference's numbers, other formulas, and by hand."""

import caches
import golden
import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from measured import measured

from vcm_jax.metrics import (
    RunningGaussian,
    bootstrap,
    caption_accuracy,
    cosine_score,
    desync,
    frechet_distance,
    frechet_standard_error,
    inception_score,
    kl_divergence,
    loudness,
    spectral_convergence,
)

RATE = 16_000


def test_the_full_size_reference():
    description, arrays = golden.load(caches.DATA, "metrics_full")
    narrow = description["dims"] | {"nsync": 0}
    truth, pred = caches.features(description | {"dims": narrow})
    ids = list(pred["passt_logits"])
    rows = lambda side, name: np.stack([side[name][clip] for clip in ids])
    layer = lambda side, key: np.stack([side["pann_features"][clip][key] for clip in ids])
    found = {
        "FD-VGG": frechet_distance(
            *(rows(side, "vggish_features").reshape(-1, 128) for side in (pred, truth))
        ),
        "FD-PANN": frechet_distance(layer(pred, "2048"), layer(truth, "2048")),
        "FD-PASST": frechet_distance(
            rows(pred, "passt_features_embed"), rows(truth, "passt_features_embed")
        ),
        "KL-PANNS-softmax": kl_divergence(layer(pred, "logits"), layer(truth, "logits")),
        "KL-PASST-softmax": kl_divergence(rows(pred, "passt_logits"), rows(truth, "passt_logits")),
        "IB-Score": cosine_score(
            rows(truth | pred, "imagebind_video"), rows(truth | pred, "imagebind_audio")
        ),
        "DeSync": desync(arrays["desync_logits_first14"], arrays["desync_logits_last14"]),
    }
    for name, logits in (("PANNS", layer(pred, "logits")), ("PASST", rows(pred, "passt_logits"))):
        found[f"ISC-{name}-mean"], found[f"ISC-{name}-std"] = inception_score(logits)
    for name, value in description["metrics_reference"].items():
        assert found[name] == pytest.approx(value, rel=1e-4 if "FD" in name else 1e-6), name
    for name, value in description["frechet_exact_svd"].items():
        assert found[name] == pytest.approx(value, rel=1e-10), name


def test_divergence_and_inception_score_by_another_formula():
    rng = np.random.default_rng(0)
    pred, truth = 3 * rng.standard_normal((2, 57, 11))
    p, q = (scipy.special.softmax(logits, axis=1) for logits in (truth, pred))
    expected = np.mean([scipy.stats.entropy(one, other) for one, other in zip(p, q)])
    assert kl_divergence(pred, truth) == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(pred + 7, truth - 3) == pytest.approx(expected, rel=1e-12)
    assert kl_divergence(truth, truth) == 0

    order = np.random.RandomState(2020).permutation(57)
    bounds = [i * 57 // 10 for i in range(11)]
    # Inception score = exp(entropy of the mean - mean entropy).
    scores = [
        np.exp(scipy.stats.entropy(chunk.mean(0)) - np.mean(scipy.stats.entropy(chunk, axis=1)))
        for chunk in (q[order][a:b] for a, b in zip(bounds, bounds[1:]))
    ]
    np.testing.assert_allclose(inception_score(pred), [np.mean(scores), np.std(scores)], rtol=1e-12)
    # Every class alike often and certain: as many as there are classes.
    certain = np.tile(100 * np.eye(4), (25, 1))
    assert inception_score(certain, splits=1)[0] == pytest.approx(4)


def test_cosine_and_desync_by_hand():
    assert cosine_score([[3.0, 4.0], [1.0, 0.0]], [[4.0, 3.0], [-2.0, 0.0]]) == pytest.approx(-0.02)
    first, last = np.zeros((2, 2, 21))
    first[0, 10], first[1, 0], last[0, 20], last[1, 13] = 1, 1, 1, 1  # 0, -2, 2, 0.6 s
    assert desync(first, last) == pytest.approx((0 + 2 + 2 + 0.6) / 4)


@pytest.mark.parametrize(
    "score, arguments, message",
    [
        (kl_divergence, (np.zeros((3, 4)), np.zeros((2, 4))), "shapes differ: pred_logits"),
        (kl_divergence, (np.zeros((0, 4)), np.zeros((0, 4))), "one clip at least"),
        (kl_divergence, (np.full((3, 4), np.nan), np.zeros((3, 4))), "not finite in 3 of 3 rows"),
        (inception_score, (np.zeros((9, 4)),), "needs as many clips, not 9"),
        (cosine_score, (np.ones((3, 4)), np.zeros((3, 4))), "3 of 3 rows are all zeros"),
        (desync, (np.zeros((3, 20)), np.zeros((3, 20))), "21 classes, got 20"),
    ],
)
def test_scores_refuse(score, arguments, message):
    with pytest.raises(ValueError, match=message):
        score(*arguments)


def test_streamed_covariance():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 7)) @ rng.standard_normal((7, 7)) + 1e3
    other = rng.standard_normal((300, 7))
    running = RunningGaussian()
    for start, end in ((0, 1), (1, 40), (40, 500)):
        running.update(rows[start:end])
    np.testing.assert_allclose(running.mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(running.scatter / 499, np.cov(rows, rowvar=False), rtol=1e-10)
    whole = frechet_distance(rows, other)
    assert frechet_distance(running, other) == pytest.approx(whole, rel=1e-12)
    # Few rows on either side, against many on the other; features that are always 0.
    few, dead = rng.standard_normal((5, 7)), rows * (np.arange(7) < 4)
    for one, two in ((few, rows), (rows, few), (dead, other), (dead, few)):
        cov = [np.cov(side, rowvar=False) for side in (one, two)]
        roots = scipy.linalg.sqrtm(cov[0] + 1e-14 * np.eye(7)) @ scipy.linalg.sqrtm(
            cov[1] + 1e-14 * np.eye(7)
        )
        direct = np.sum((one.mean(0) - two.mean(0)) ** 2) + np.trace(cov[0] + cov[1])
        direct -= 2 * np.linalg.svd(roots.real, compute_uv=False).sum()
        assert frechet_distance(one, two) == pytest.approx(direct, rel=1e-7)
    with pytest.raises(ValueError, match="width 6 after rows of width 7"):
        running.update(np.zeros((2, 6)))
    with pytest.raises(ValueError, match="truth must have at least 2 rows, it has 1"):
        frechet_distance(rows, RunningGaussian().update(other[:1]))


def test_the_standard_error_of_a_frechet_distance():
    """The jackknife by hand, and what fresh clips of the same kind do to the distance."""
    rng = np.random.default_rng(0)

    def clips(count):
        levels = rng.standard_normal((count, 1, 3))
        return list(levels + 0.3 * rng.standard_normal((count, 8, 3)) + [0.5, 0, 0])

    truth = rng.standard_normal((4000, 3))
    few = clips(5)
    left = [frechet_distance(np.concatenate(few[:i] + few[i + 1 :]), truth) for i in range(5)]
    by_hand = np.sqrt(4 / 5 * np.sum((left - np.mean(left)) ** 2))
    assert frechet_standard_error(few, truth) == pytest.approx(by_hand, rel=1e-9)
    spread = np.std([frechet_distance(np.concatenate(clips(60)), truth) for _ in range(300)])
    errors = [frechet_standard_error(clips(60), truth) for _ in range(20)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.25)
    with pytest.raises(ValueError, match="at least 2 clips, got 1"):
        frechet_standard_error(few[:1], truth)
    with pytest.raises(ValueError, match="8 rows without 8 of them leave none"):
        RunningGaussian().update(few[0]).without(RunningGaussian().update(few[0]))


def test_loudness_follows_the_a_curve():
    time = np.arange(RATE) / RATE
    sine = lambda frequency, amplitude=1.0: amplitude * np.sin(2 * np.pi * frequency * time)
    assert loudness(sine(1000), RATE) == pytest.approx(0, abs=0.05)
    assert loudness(sine(1000, 0.1), RATE) == pytest.approx(-20, abs=0.05)
    # IEC 61672: -19.1 dB at 100 Hz, +1.0 dB at 4 kHz.
    assert loudness(sine(100), RATE) == pytest.approx(-19.1, abs=0.6)
    assert loudness(sine(4000), RATE) == pytest.approx(1.0, abs=0.2)
    assert loudness(np.zeros(RATE), RATE) == -70
    with pytest.raises(ValueError, match="must be finite"):
        loudness(np.full(RATE, np.inf), RATE)


def test_spectral_convergence():
    noise = np.random.default_rng(0).standard_normal(RATE)
    assert spectral_convergence(0.7 * noise, noise, RATE) == pytest.approx(0.3, rel=1e-5)
    assert spectral_convergence(-noise, noise, RATE) == pytest.approx(0, abs=1e-6)
    assert spectral_convergence(0 * noise, noise, RATE) == 1
    with pytest.raises(ValueError, match="digital silence"):
        spectral_convergence(noise, 0 * noise, RATE)


def tone(frequency, seed, level=0.3):
    noise = np.random.default_rng(seed).standard_normal(RATE)
    return np.float32(level * np.sin(2 * np.pi * frequency * np.arange(RATE) / RATE) + 0.01 * noise)


def test_caption_accuracy_is_of_sounds_that_were_not_trained_on():
    truth = [tone(400 if i % 2 else 1600, i) for i in range(40)]
    captions = ["low" if i % 2 else "high" for i in range(40)]
    swapped = truth[1:] + truth[:1]
    found = caption_accuracy(swapped, truth, captions, RATE)
    assert found["accuracy"] == 0 and found["true_accuracy"] == 1 and found["chance"] == 0.5
    # Captions without any bearing on the sound: a classifier that had seen the clips would know.
    random = np.random.default_rng(0).permutation(captions).tolist()
    assert caption_accuracy(truth, truth, random, RATE)["true_accuracy"] < 0.8
    rare = caption_accuracy(truth, truth, captions[:38] + ["odd", "odd"], RATE)
    assert rare["clips"] == 38 and rare["captions"] == 2
    with pytest.raises(ValueError, match="0 captions have 10 clips or more"):
        caption_accuracy(truth, truth, [str(i) for i in range(40)], RATE)


def test_metrics_of_weighted_clips_are_those_of_the_clips():
    """The sums that are kept give the same metrics as the sounds, for any choice of clips."""
    from vcm_jax.metrics import detect_onsets, log_mel_features, merge_close, onset_scores

    truth = [tone(300 + 40 * i, i) * np.float32(np.arange(RATE) > 1600 * i) for i in range(6)]
    pred = [0.5 * np.roll(sound, 200) for sound in truth]
    metrics = measured(
        ((str(i), one, other) for i, (one, other) in enumerate(zip(pred, truth))), RATE
    )
    weights = np.array([2, 0, 1, 0, 3, 0])
    chosen = np.repeat(np.arange(6), weights)
    values = metrics.values(weights)
    rows = [np.concatenate([log_mel_features(s[i], RATE) for i in chosen]) for s in (pred, truth)]
    assert values["log_mel_fd"] == pytest.approx(frechet_distance(*rows), rel=1e-9)
    onsets = [[merge_close(detect_onsets(s[i], RATE)) for i in chosen] for s in (pred, truth)]
    direct = onset_scores(*onsets)
    assert values["onset_f1"] == direct["f1"] > 0.5
    assert values["onset_timing_error_ms"] == pytest.approx(direct["timing_error_ms"])
    convergence = np.mean([spectral_convergence(pred[i], truth[i], RATE) for i in chosen])
    assert values["spectral_convergence"] == pytest.approx(convergence)
    assert values["loudness_error_db"] == pytest.approx(20 * np.log10(2), abs=0.1)


def test_bootstrap_intervals():
    rng = np.random.default_rng(0)
    sounds = [tone(500, i) for i in range(30)]
    gains = rng.uniform(0.2, 1, 30)
    scaled = lambda extra: measured(
        ((str(i), np.float32(extra * g * s), s) for i, (g, s) in enumerate(zip(gains, sounds))),
        RATE,
    )
    draws = bootstrap({"a": scaled(1.0), "b": scaled(0.9)}, draws=300)
    errors = -20 * np.log10(gains)
    spread = np.std(draws["a"]["loudness_error_db"])
    assert spread == pytest.approx(np.std(errors) / np.sqrt(30), rel=0.2)
    # What all clips share cancels in the difference.
    difference = draws["b"]["loudness_error_db"] - draws["a"]["loudness_error_db"]
    np.testing.assert_allclose(difference, -20 * np.log10(0.9), atol=0.05)
    other = measured([("x", sounds[0], sounds[1])], RATE)
    with pytest.raises(ValueError, match="same clips"):
        bootstrap({"a": scaled(1.0), "b": other})
    with pytest.raises(ValueError, match="x: .* the true sound has"):
        measured([("x", sounds[0], sounds[1][:-5])], RATE)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, 2**70, -(2**63)])
def test_any_integer_is_a_seed_of_the_bootstrap(seed):
    sounds = [tone(500, i) for i in range(2)]
    metrics = measured(((str(i), 0.5 * s, s) for i, s in enumerate(sounds)), RATE)
    assert len(bootstrap({"a": metrics}, draws=2, seed=seed)["a"]["onset_f1"]) == 2
