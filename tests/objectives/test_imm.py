"""Inductive moment matching: groups, the discrepancy, times, and passes."""

import functools

import jax
import numpy as np
import pytest
from small_batches import FLOW, batch, linear_net, loss_of, on_the_flow, rows_of_passes

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.imm import earlier_time, kernel, time_weight

NAME = "imm"
GROUPS = dict(group=4)


def test_the_loss_of_the_exact_flow_vanishes_with_the_step_between_times():
    with jax.enable_x64(True):
        x0, x1, t, s = batch(8)
        t[:], s[:] = np.repeat(t[::4], 4), np.repeat(s[::4], 4)
        x0, x1 = on_the_flow(x0, x1, t)
        found = [
            loss_of(NAME, FLOW.average, x0, x1, t, s, halvings=k, **GROUPS)[1]["mse"]
            for k in (12, 13)
        ]
        np.testing.assert_allclose(np.sqrt(found[0] / found[1]), 4, rtol=0.1)
        exact = loss_of(NAME, FLOW.average, x0, x1, t, s, halvings=20, **GROUPS)[0]
        other = loss_of(NAME, linear_net, x0, x1, t, s, halvings=20, **GROUPS)[0]
    assert exact < 1e-9 < 1e-7 < other


def pair_kernel(p, q, gap):
    return np.exp(-np.linalg.norm(p - q) / 6 / gap)


def test_the_discrepancy_by_hand():
    """Two groups of two rows; the kernel of all pairs, and the gradient through a alone."""
    x0, x1, t, s = batch(4, dtype=np.float64)
    with jax.enable_x64(True):
        loss, _ = loss_of(NAME, linear_net, x0, x1, t, s, group=2)
        t, s = np.repeat(t[::2], 2), np.repeat(s[::2], 2)
        r = np.asarray(earlier_time(t, s, 12))
        zero = {"c": 0.0}
        at = lambda time: (1 - time)[:, None, None] * x0 + time[:, None, None] * x1
        land = lambda time: (
            at(time) + (s - time)[:, None, None] * linear_net(at(time), time, s, zero)
        )
        a, b = land(t).reshape(2, 2, 6), land(r).reshape(2, 2, 6)
        expected = 0
        for g in range(2):
            k = functools.partial(pair_kernel, gap=(t - s)[2 * g])
            for i in range(2):
                for j in range(2):
                    pairs = k(a[g, i], a[g, j]) + k(b[g, i], b[g, j]) - 2 * k(a[g, i], b[g, j])
                    expected += time_weight(t[2 * g], 4.0) * pairs / 4 / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_the_weight_at_a_quarter():
    """log SNR = 2 log 3 there, and b = 4."""
    expected = 1 / (1 + 9 * np.exp(-4)) / (0.25 * (0.75**2 + 0.25**2))
    np.testing.assert_allclose(time_weight(np.float32(0.25), 4.0), expected, rtol=1e-6)


def test_a_group_that_collapses_to_one_point_is_not_where_the_loss_is_least():
    """Equal means are not enough: the spread of the targets counts."""
    rng = np.random.default_rng(0)
    b = rng.standard_normal((1, 64, 2))
    same, collapsed = b, np.zeros_like(b)
    ones = np.ones(1)
    loss = lambda a: float((kernel(a, a, ones) - 2 * kernel(a, b, ones)).mean())
    assert loss(same) < loss(collapsed)


def test_times():
    t, s = np.array([0.9, 0.5, 0.02, 0.3, 0.994]), np.array([0.0, 0.4999, 0.0, 0.0, 0.0])
    r = np.asarray(earlier_time(t, s, 12))
    eta = lambda time: time / (1 - time)
    np.testing.assert_allclose(eta(t[[0, 3]]) - eta(r[[0, 3]]), 0.994 / 0.006 / 4096, rtol=1e-3)
    np.testing.assert_allclose(r[[1, 2, 4]], [0.4999, 0.0, 0.9939], atol=1e-6)
    draw = make_settings(NAME).draw
    t, s, _ = draw(jax.random.key(0), 4000, 1000, 0, 10)
    assert (t[:1000] == s[:1000]).all() and (s[1000:] <= t[1000:] - 1e-4).all()
    spread = [np.percentile(values[1000:], [0, 50, 100]) for values in (t, s / t)]
    np.testing.assert_allclose(spread, [[0, 0.497, 0.994], [0, 0.5, 1]], atol=0.03)


def test_rows_that_do_not_make_groups():
    x0, x1, t, s = batch(6, 1)
    with pytest.raises(
        ValueError, match="groups of objective.group = 4 rows: the 5 rows with s < t"
    ):
        loss_of(NAME, linear_net, x0, x1, t, s, num_instant=1, **GROUPS)


def test_passes():
    assert rows_of_passes(NAME, 4, **GROUPS) == [4, 4, 4]
    assert rows_of_passes(NAME, 4, guidance_scale=3.0) == [4, 8, 4, 4]
