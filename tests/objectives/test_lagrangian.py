"""Lagrangian self-distillation: identity, gradients, times, and passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_exact_identity,
    check_guided_identity,
    check_pairs_on_the_flow,
    linear_net,
    loss_of,
    on_the_flow,
    rows_of_passes,
)

from vcm_jax.objectives import make_settings

NAME = "lagrangian"


def test_the_exact_flow_has_no_error():
    check_exact_identity(NAME, guidance_scale=1.0)
    check_guided_identity(NAME)
    check_pairs_on_the_flow(NAME)


@pytest.mark.parametrize("double", [True, False])
def test_gradients_by_hand(double):
    """u = theta (x / 2 + 2 t - s): f moves with u + (s - t) theta (-1) where it lands."""
    x0, x1, t, s = batch(4, dtype=np.float32)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    gap, zero = (s - t)[:, None, None], {"c": 0.0}

    def loss(theta):
        net = lambda *args: theta * linear_net(*args)
        return loss_of(NAME, net, x0, x1, t, s, None, double_backward=double)[0]

    def by_hand(theta):
        u = theta * linear_net(x_t, t, s, zero)
        landed = 1.3 * linear_net(x_t, t, s, zero) * gap + x_t
        slope = -theta if double else -1.3
        error = u + gap * slope - 1.3 * linear_net(landed, s, s, zero)
        return jnp.square(error).mean((1, 2)).mean()

    np.testing.assert_allclose(loss(1.3), by_hand(1.3), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(1.3), jax.grad(by_hand)(1.3), rtol=1e-5)


def test_as_s_approaches_t_the_error_is_that_of_the_velocity_where_it_starts():
    """u(x, t, s) - u(x, t, t), whatever the data are: it vanishes with t - s."""
    with jax.enable_x64(True):
        x0, x1, t, _ = batch()
        errors = [
            np.sqrt(loss_of(NAME, linear_net, x0, x1, t, t - gap, None)[1]["mse"].max())
            for gap in (1e-3, 5e-4)
        ]
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=1e-2)
    assert errors[0] < 0.01


def test_the_central_difference_finds_the_same_error():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        settings = dict(derivative="central", derivative_step=1e-3)
        _, aux = loss_of(NAME, FLOW.average, x0, x1, t, s, None, **settings)
        largest = float(aux["mse"].max())
    assert 1e-18 < largest < 1e-10


def test_gaps_between_times():
    ours = make_settings(NAME, times="gap")
    t, s, _ = ours.draw(jax.random.key(0), 40_000, 0, 0, 1)
    assert (t > s).all() and (t <= 1).all() and (s >= 0).all()
    np.testing.assert_allclose(np.median(t - s), 1 / (1 + np.exp(0.8)), atol=0.01)
    long = t - s > 0.7
    assert np.mean(t[long] > 0.999) < 0.05, "s is truncated, not clipped, below 1 - gap"
    short = t - s < 0.05  # s is hardly truncated there
    np.testing.assert_allclose(np.median(s[short]), 1 / (1 + np.exp(0.4)), atol=0.03)


def test_passes():
    assert rows_of_passes(NAME) == [6, 6, 2, 2, 2]
    assert rows_of_passes(NAME, guidance_scale=1.0) == [6, 2, 2, 2]
    assert rows_of_passes(NAME, derivative="central", double_backward=False) == [6, 6, 2, 2, 2, 2]
    costs = [make_settings(NAME, double_backward=d).passes().forward for d in (True, False)]
    assert costs == [5.5, 4.5]
