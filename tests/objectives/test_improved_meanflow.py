"""Improved MeanFlow: identity, tangent, target, gradient, and passes."""

import jax
import jax.numpy as jnp
import numpy as np
from small_batches import (
    batch,
    check_exact_identity,
    check_guided_identity,
    check_pairs_on_the_flow,
    linear_net,
    loss_of,
    rows_of_passes,
)

NAME = "improved_meanflow"
FIXED = dict(guidance="fixed")
UNGUIDED = FIXED | dict(guidance_scale=1.0)


def test_the_exact_flow_has_no_error():
    check_exact_identity(NAME, **UNGUIDED)
    check_guided_identity(NAME, **FIXED)
    check_pairs_on_the_flow(NAME, **UNGUIDED)


def test_numbers_by_hand():
    """u = x / 2 + 2 t - s + c and x0 = 1, x1 = 3, so that v = 2 and x_t = 1 + 2 t."""
    ones = np.ones((2, 1, 1), np.float32)
    t, s = np.float32([0.5, 0.5]), np.float32([0.5, 0.1])
    _, aux = loss_of(NAME, linear_net, ones, 3 * ones, t, s, None, 1, guidance_scale=4.0, **FIXED)
    # v_c = u(x_t, t, t) = 1.5 and v_u = 2.5: v_g = 2 + 3/4 (1.5 - 2.5) = 1.25.
    np.testing.assert_allclose(np.ravel(aux["target"]), [1.25, 1.25], rtol=1e-6)
    # Row 1: d/dt u = v_c / 2 + 2 = 2.75, u = 1.9 and V = 1.9 + 0.4 * 2.75 = 3.
    np.testing.assert_allclose(aux["mse"], [0.25**2, 1.75**2], rtol=1e-5)


def test_the_gradient_is_that_of_u_alone():
    x0, x1, t, s = batch(4, 1, dtype=np.float32)

    def loss(theta, frozen):
        def net(*args):
            return theta * linear_net(*args)

        def parts(x, t, s, cond):
            return net(x, t, s, cond)

        return (
            loss_of(NAME, parts, x0, x1, t, s, None, 1, p=0.0, **UNGUIDED)[0]
            if not frozen
            else (by_hand(theta))
        )

    def by_hand(theta):
        x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
        zero = {"c": 0.0}
        own = 1.3 * linear_net(x_t, t, t, zero)
        slope = 1.3 * (0.5 * own + 2)
        gap = (t - s)[:, None, None]
        error = theta * linear_net(x_t, t, s, zero) + gap * slope - (x1 - x0)
        return jnp.square(error).sum((1, 2)).mean()

    found = jax.grad(loss)(1.3, False)
    np.testing.assert_allclose(found, jax.grad(loss)(1.3, True), rtol=1e-5)


def test_guidance_outside_its_interval_and_null_rows_aim_at_v():
    x0, x1, t, s = batch(4, 4, dtype=np.float32)
    t[0] = s[0] = 0.9
    _, aux = loss_of(
        NAME, linear_net, x0, x1, t, s, None, 4, np.arange(4) == 1, guidance_interval=(0.0, 0.8)
    )
    plain = np.isclose(aux["target"], x1 - x0).all((1, 2))
    assert plain.tolist() == [True, True, False, False]


def test_passes():
    assert rows_of_passes(NAME) == [6, 2, 2, 2, 8]
    assert rows_of_passes(NAME, **UNGUIDED) == [6, 2, 2, 2]
    assert rows_of_passes(NAME, derivative="central") == [6, 2, 2, 2, 2, 8]
