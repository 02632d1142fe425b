"""Derivatives of u along the flow and by its end, by JVP and by central difference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import FLOW, batch, on_the_flow

from vcm_jax.objectives import flow_maps, make_settings

JVP = make_settings("meanflow")


def curved(x, t, s, cond):
    """A function without symmetry, that is no flow."""
    return jnp.sin(2 * x) * t[:, None, None] ** 3 + jnp.cos(3 * s)[:, None, None] * x * cond


@pytest.mark.parametrize("by", ["flow", "end"])
def test_a_central_difference_approaches_the_jvp_with_the_square_of_its_step(by):
    with jax.enable_x64(True):
        x, velocity, t, s = batch()

        def ask(config):
            if by == "flow":
                return flow_maps.along_flow(curved, x, t, s, 2.0, velocity, config)
            return flow_maps.by_end(curved, x, t, s, 2.0, config)

        exact, errors = ask(JVP), []
        for step in (0.02, 0.01, 0.005):
            found = ask(make_settings("meanflow", derivative="central", derivative_step=step))
            np.testing.assert_array_equal(found[0], exact[0])
            errors.append(np.abs(found[1] - exact[1]).max())
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, atol=0.02)


def test_the_error_of_the_default_step_in_float32():
    """On the exact flow, relative to the derivative itself; rounding is the smaller part of it."""
    x, _, t, s = batch(200, dtype=np.float32)
    v = np.float32(FLOW.velocity(x, t[:, None, None]))
    net = functools.partial(flow_maps.along_flow, FLOW.average, x, t, s, None, v)
    exact = net(JVP)[1]
    error = {
        step: np.abs(
            net(make_settings("meanflow", derivative="central", derivative_step=step))[1] - exact
        ).max()
        / np.abs(exact).max()
        for step in (0.005, 1e-6)
    }
    assert error[0.005] < 1e-3 < 0.02 < error[1e-6]


def test_at_the_ends_of_the_times_the_difference_is_one_sided():
    """It asks for no time beyond 1 or below s, and for no end beyond t or below 0."""
    seen = []

    def net(x, t, s, cond):
        seen.append((np.asarray(t), np.asarray(s)))
        return curved(x, t, s, cond)

    with jax.enable_x64(True):
        x, velocity, *_ = batch(3)
        t, s = np.array([1.0, 0.5, 0.4001]), np.array([0.0, 0.498, 0.4])
        config = make_settings("meanflow", derivative="central")
        for by in ("flow", "end"):
            args = (x, t, s, 2.0)
            if by == "flow":
                found = flow_maps.along_flow(net, *args, velocity, config)[1]
                exact = flow_maps.along_flow(curved, *args, velocity, JVP)[1]
            else:
                found = flow_maps.by_end(net, *args, config)[1]
                exact = flow_maps.by_end(curved, *args, JVP)[1]
            np.testing.assert_allclose(found, exact, atol=0.15)
    for t_, s_ in seen:
        assert (t_ <= 1).all() and (s_ >= 0).all() and (s_ <= t_).all() and (t_ >= s).all()


def test_the_exact_flow_satisfies_all_three_identities():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        time = t[:, None, None]
        x0, x1 = on_the_flow(x0, x1, t)
        x, v = (1 - time) * x0 + time * x1, x1 - x0
        u, slope = flow_maps.along_flow(FLOW.average, x, t, s, None, v, JVP)
        np.testing.assert_allclose(u, v - (time - s[:, None, None]) * slope, atol=1e-12)
        u, slope = flow_maps.by_end(FLOW.average, x, t, s, None, JVP)
        landed = flow_maps.jump(u, x, t, s)
        moved = u + (s[:, None, None] - time) * slope
        np.testing.assert_allclose(moved, FLOW.average(landed, s, s, None), atol=1e-12)
        l = (t + 2 * s) / 3
        once = flow_maps.jump(FLOW.average(x, t, l, None), x, t, l)
        twice = flow_maps.jump(FLOW.average(once, l, s, None), once, l, s)
        np.testing.assert_allclose(twice, landed, atol=1e-12)
