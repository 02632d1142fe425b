"""EMA weights against EDM2's own code (tests/fixtures/phema), in float64."""

import json

import golden
import jax
import numpy as np
import pytest

from vcm_jax import ema

PHEMA = golden.DATA / "phema"


def test_exponents():
    table = json.loads((PHEMA / "std_exp_table.json").read_text())["std_to_exp"]
    for sigma_rel, gamma in table.items():
        np.testing.assert_allclose(ema.gamma_from_sigma_rel(float(sigma_rel)), gamma, rtol=1e-12)
    with pytest.raises(ValueError, match="sigma_rel"):
        ema.gamma_from_sigma_rel(0.3)


def test_constant_decay_starts_as_a_plain_average():
    """Up to step 1 / (1 - decay), and the initial value has no influence."""
    average, seen = np.float64(1e9), []
    with jax.enable_x64(True):
        for step, value in enumerate([1.0, 3.0, 8.0, 4.0, 0.0, 10.0], 1):
            average = ema.follow(average, np.float64(value), step, 0.75)
            seen.append(float(average))
    np.testing.assert_allclose(seen, [1, 2, 4, 4, 3, 4.75])


def test_tracking_and_reconstruction():
    info, arrays = golden.load(PHEMA, "phema")
    total, every, size = info["T"], info["every"], info["D"]
    theta = np.random.RandomState(info["seed"]).standard_normal(size)
    moves = np.random.RandomState(info["seed"] + 1).standard_normal((total, size)) * 0.05
    gammas = [ema.gamma_from_sigma_rel(sigma) for sigma in info["in_std"]]
    with jax.enable_x64(True):
        tracks = [np.full(size, 1e9) for _ in gammas]  # forgotten by the first update
        snapshots = []
        for step, move in enumerate(moves, 1):
            theta = theta + move
            tracks = [ema.update(a, theta, step, gamma) for a, gamma in zip(tracks, gammas)]
            if step % every == 0:
                snapshots += tracks
    np.testing.assert_allclose(snapshots, arrays["snapshots"], rtol=1e-12)

    for step, sigma_rel in info["outs"]:
        name = f"rec_t{step}_s{sigma_rel:.3f}"
        coefficients = ema.posthoc_coefficients(
            arrays["snapshot_ofs"], arrays["snapshot_std"], step, sigma_rel
        )
        used = arrays["snapshot_ofs"] <= step
        assert not coefficients[~used].any()
        # The linear system is ill-conditioned: coefficients agree less well than their result.
        np.testing.assert_allclose(coefficients[used], arrays[f"{name}_coefs"], atol=1e-9)
        np.testing.assert_allclose(
            coefficients @ arrays["snapshots"], arrays[f"{name}_value"], rtol=1e-10
        )


def test_bad_targets():
    with pytest.raises(ValueError, match="must have one entry for every snapshot"):
        ema.posthoc_coefficients([1, 2], [0.05], 2, 0.05)
    with pytest.raises(ValueError, match="not a snapshot's step"):
        ema.posthoc_coefficients([1, 2], [0.05, 0.05], 3, 0.05)
