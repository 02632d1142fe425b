"""Rectified flow: exact pairs make one Euler step exact."""

import jax
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_pairs_on_the_flow,
    loss_of,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import make_settings


def test_there_is_no_error_on_pairs_with_the_velocity_of_the_network():
    check_pairs_on_the_flow("reflow")


def test_with_the_exact_teacher_one_euler_step_is_exact():
    mu, sigma = FLOW.mu, FLOW.sigma

    def straight(x, t, s, cond):
        t = t[:, None, None]
        x1 = (x - (1 - t) * mu) / ((1 - t) * sigma + t)
        return (1 - sigma) * x1 - mu

    with jax.enable_x64(True):
        _, x1, t, _ = batch()
        x0 = mu + sigma * x1  # where the flow takes x1
        assert loss_of("reflow", straight, x0, x1, t, t, None, num_instant=6)[0] < 1e-24
        one = x1 - straight(x1, np.ones(6), np.ones(6), None)
        np.testing.assert_allclose(one, x0, atol=1e-12)


def test_annealing_turns_flow_matching_into_reflow():
    """At b = 1 the noise is fresh, at b = 0 the teacher's; rows draw theirs by their own keys."""
    half = make_settings("reflow", anneal=0.5)
    draws = [half.draw(jax.random.key(0), 6, 6, k, 100)[2] for k in (0, 25, 50, 90)]
    np.testing.assert_allclose([share for share, _ in draws], [1, 0.5, 0, 0])
    x0, x1, t, _ = batch(dtype=np.float32)
    seen = []

    def net(x, t, s, cond):
        seen.append(x)
        return 0 * x

    def velocity(draw, rows=slice(None)):
        args = (x0[rows], x1[rows], t[rows], t[rows], draw)
        return loss_of("reflow", net, *args, num_instant=len(t[rows]), anneal=0.5)[1]["target"]

    np.testing.assert_allclose(velocity(draws[2]), x1 - x0, atol=1e-6)
    fresh, mixed = velocity(draws[0]) + x0, velocity(draws[1]) + x0
    np.testing.assert_allclose(mixed, np.sqrt(0.75) * x1 + 0.5 * fresh, atol=1e-5)
    assert np.abs(np.corrcoef(fresh.ravel(), x1.ravel())[0, 1]) < 0.5
    time = t[:, None, None]
    np.testing.assert_allclose(seen[-1], (1 - time) * x0 + time * mixed, atol=1e-5)
    some = velocity((draws[0][0], draws[0][1][2:4]), slice(2, 4))
    np.testing.assert_array_equal(some, (fresh - x0)[2:4].astype(some.dtype))
    assert make_settings("reflow").draw(jax.random.key(0), 6, 6, 0, 100)[2] is None


def test_it_costs_one_pass():
    assert rows_of_passes("reflow") == [8]
    assert trained_passes("reflow") == ([0], 8)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="objective.teacher_steps"):
        make_settings("reflow", teacher_steps=0)
