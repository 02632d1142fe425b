"""Metrics on numbers worked out by hand or by another way, and on true sounds."""

import dataclasses

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from vcm_jax.impacts.materials import fit_material_classifier, material_accuracy, material_features
from vcm_jax.impacts.render import render_sound
from vcm_jax.impacts.scene import record, simulate
from vcm_jax.metrics import (
    detect_onsets,
    frechet_distance,
    log_mel_features,
    merge_close,
    onset_scores,
    spectral_sharpness,
)

RATE = 16_000


def test_merge_close():
    np.testing.assert_array_equal(merge_close([0.5, 0.1, 0.15, 0.2, 0.53]), [0.1, 0.2, 0.5])
    assert merge_close([]).shape == (0,)


def test_onset_scores_by_hand():
    scores = onset_scores([[0.10, 0.51, 0.9], []], [[0.11, 0.50, 0.53, 2.0], [1.0]])
    assert scores["precision"] == pytest.approx(2 / 3)
    assert scores["recall"] == pytest.approx(2 / 5)
    assert scores["f1"] == pytest.approx(4 / 8)
    assert scores["timing_error_ms"] == pytest.approx(10)
    # Nearest first would pair 0.04 with 0.05 and leave two over; both pairs fit.
    assert onset_scores([[0.04, 0.09]], [[0.0, 0.05]])["f1"] == 1
    assert (
        onset_scores([[1.0]], [[1.049]])["f1"] == 1 and onset_scores([[1.0]], [[1.051]])["f1"] == 0
    )
    empty = onset_scores([[]], [[]])
    assert empty["f1"] == 0 and np.isnan(empty["timing_error_ms"])
    with pytest.raises(ValueError, match="1 predicted clips, but 2"):
        onset_scores([[]], [[], []])


def test_onset_matching_is_as_large_as_can_be():
    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = rng.uniform(0, 1, rng.integers(1, 15)), rng.uniform(0, 1, rng.integers(1, 15))
        fits = csr_array(np.abs(one[:, None] - other) <= 0.05)
        best = np.sum(maximum_bipartite_matching(fits, "column") >= 0)
        assert onset_scores([one], [other])["precision"] == pytest.approx(best / len(one))


def test_onsets_of_true_sounds():
    scenes = [simulate(0, "test", i) for i in range(24)]
    found = [merge_close(detect_onsets(render_sound(s), RATE)) for s in scenes]
    truth = [merge_close([impact.time for impact in s.impacts]) for s in scenes]
    scores = onset_scores(found, truth)
    assert scores["f1"] > 0.96 and scores["timing_error_ms"] < 4
    errors = [f[np.argmin(np.abs(f - t))] - t for f, ts in zip(found, truth) for t in ts]
    assert abs(np.median(errors)) < 0.001  # the bias is gone
    assert onset_scores(found[1:] + found[:1], truth)["f1"] < 0.33


def test_onsets_of_odd_sounds():
    noise = 1e-3 * np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    assert len(detect_onsets(np.zeros(RATE, np.float32), RATE)) == 0
    assert len(detect_onsets(noise, RATE)) == 0
    for rate in (RATE, 44_100):
        click = np.zeros(rate, np.float32)
        click[rate // 2 :] = np.exp(-np.arange(rate - rate // 2) / 300)
        np.testing.assert_allclose(detect_onsets(click, rate), [0.5], atol=0.012)
    for bad in (np.zeros((2, RATE)), np.zeros(10), np.full(RATE, np.nan)):
        with pytest.raises(ValueError, match="finite sound"):
            detect_onsets(bad, RATE)


def test_frechet_distance_against_the_matrix_square_root():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((2, 12, 12))
    pred = rng.standard_normal((300, 12)) @ mixing[0] + 0.5
    truth = rng.standard_normal((200, 12)) @ mixing[1]
    cov = [np.cov(rows, rowvar=False) for rows in (pred, truth)]
    direct = np.sum((pred.mean(0) - truth.mean(0)) ** 2)
    direct += np.trace(cov[0] + cov[1] - 2 * sqrtm(cov[0] @ cov[1]).real)
    assert frechet_distance(pred, truth) == pytest.approx(direct, rel=1e-10)


def test_frechet_distance_in_closed_form_and_with_few_rows():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((50, 4))
    # The same rows stretched by 3 and moved by 2: sum (3 sigma - sigma)^2 + d 2^2.
    scaled = 3 * (rows - rows.mean(0)) + rows.mean(0) + 2
    expected = 4 * np.var(rows, axis=0, ddof=1).sum() + 16
    assert frechet_distance(scaled, rows) == pytest.approx(expected, rel=1e-12)
    few = rng.standard_normal((5, 100))  # singular covariances
    assert abs(frechet_distance(few, few)) < 1e-10
    assert frechet_distance(few + 1, few) == pytest.approx(100, rel=1e-10)


@pytest.mark.parametrize(
    "pred, truth, message",
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), r"pred must be \(n, d\) with n >= 2, got \(1, 3\)"),
        (np.zeros((5, 3)), np.zeros(5), r"truth must be"),
        (np.zeros((5, 3)), np.zeros((5, 4)), r"widths differ: pred \(n, 3\), truth \(n, 4\)"),
        (np.zeros((5, 3)), np.full((5, 3), np.nan), "truth holds 15 values that are not finite"),
    ],
)
def test_frechet_distance_refuses(pred, truth, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(pred, truth)


def test_log_mel_features():
    rows = log_mel_features(np.sin(2 * np.pi * 6000 * np.arange(RATE) / RATE), RATE)
    assert rows.shape == ((RATE - 1024) // 256 + 1, 40)
    # Slaney's scale is logarithmic above 1 kHz = 15 mel; band k of 40 is centred at k / 41 of it.
    mel, top = (15 + 27 * np.log(kilohertz) / np.log(6.4) for kilohertz in (6, 8))
    assert np.argmax(rows[5]) == round(41 * mel / top) - 1
    np.testing.assert_allclose(log_mel_features(np.zeros(2048), RATE), -5)
    with pytest.raises(ValueError, match="at least 1024"):
        log_mel_features(np.zeros(1000), RATE)


def test_metrics_tell_another_draw_from_a_blur():
    """The same pictures with other hidden draws against those with averaged log spectra."""
    scenes = [simulate(0, "test", i) for i in range(60)]

    def features(hidden):
        draws = (render_sound(dataclasses.replace(s, hidden=hidden)) for s in scenes)
        return np.concatenate([log_mel_features(sound, RATE) for sound in draws])

    draws = np.stack([features(hidden) for hidden in range(5)])
    mean = draws[1:].mean(0)
    assert frechet_distance(mean, draws[0]) > 1.5 * frechet_distance(draws[1], draws[0])
    assert spectral_sharpness(mean) < 0.7 * spectral_sharpness(draws[1])


def test_materials_are_recognised():
    def clips(split, count):
        scenes = [simulate(0, split, i) for i in range(count)]
        return [render_sound(s) for s in scenes], [record(s)["impacts"] for s in scenes]

    classifier = fit_material_classifier(*clips("train", 150), RATE)
    audios, impacts = clips("test", 40)
    assert material_accuracy(classifier, audios, impacts, RATE) > 0.85
    assert material_accuracy(classifier, audios[1:] + audios[:1], impacts, RATE) < 0.5
    with pytest.raises(ValueError, match="no isolated impact"):
        material_accuracy(classifier, audios[:1], [[]], RATE)


def test_only_isolated_impacts_count():
    times = [0.02, 0.5, 0.9, 1.0, 1.5, 1.54, 1.9]
    impacts = [{"time": t, "material": str(t)} for t in times]
    noise = np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    rows, materials = material_features(noise, impacts, RATE)
    assert materials.tolist() == ["0.5", "1.0"] and rows.shape == (2, 480)
