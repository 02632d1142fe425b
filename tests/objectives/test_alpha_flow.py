"""alpha-Flow: both ends of its schedule, the schedule, and its passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_guided_identity,
    linear_net,
    loss_of,
    on_the_flow,
    rows_of_passes,
)

from vcm_jax.objectives import make_settings

UNGUIDED = dict(guidance_scale=1.0, mix_ratio=1.0)


def curved_net(theta, x, t, s, cond):
    return jnp.tanh(theta * x + (t - 2 * s)[:, None, None]) * (1 + t[:, None, None]) + cond["c"]


@pytest.mark.parametrize("alpha", [0.0, jnp.zeros(())])
def test_at_alpha_0_it_is_meanflow_bit_for_bit(alpha):
    x0, x1, t, s = batch(6, 2, dtype=np.float32)
    is_null = np.arange(6) == 4

    def ask(name, lam, **settings):
        def loss(theta):
            net = functools.partial(curved_net, theta)
            return loss_of(name, net, x0, x1, t, s, lam, 2, is_null, **settings)[0]

        return jax.jit(jax.value_and_grad(loss))(0.7)

    ours = ask("alpha_flow", alpha, reduction="sum", eps=0.01)
    np.testing.assert_array_equal(ours, ask("meanflow", None))
    assert ours != ask("alpha_flow", 0.5, reduction="sum", eps=0.01)


def test_at_alpha_1_it_is_flow_matching_at_every_s():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        loss, aux = loss_of("alpha_flow", linear_net, x0, x1, t, s, 1.0, p=0.0, **UNGUIDED)
        np.testing.assert_allclose(aux["target"], x1 - x0, atol=1e-12)
        x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
        error = linear_net(x_t, t, s, {"c": 0.0}) - (x1 - x0)
        np.testing.assert_allclose(loss, np.square(error).mean())


def test_in_between_it_has_vcm_s_target_with_the_weight_alpha():
    x0, x1, t, s = batch(6, 2, dtype=np.float32)
    same = dict(guidance_scale=3.0, mix_ratio=0.5, guidance_interval=(0.0, 1.0), p=0.0)
    ours, aux = loss_of("alpha_flow", linear_net, x0, x1, t, s, 0.2, 2, **same)
    _, theirs = loss_of("vcm", linear_net, x0, x1, t, s, 0.2, 2, **same)
    np.testing.assert_allclose(aux["target"], theirs["target"], rtol=1e-6)
    weighted = np.where(np.arange(6) < 2, 1, 0.2) * theirs["mse"]
    np.testing.assert_allclose(ours, weighted.mean(), rtol=1e-6)
    _, clipped = loss_of("alpha_flow", linear_net, x0, x1, t, s, 0.2, 2, clamp=0.1, **same)
    assert np.abs(clipped["target"][2:]).max() <= np.float32(0.1) < np.abs(aux["target"]).max()


def test_the_residual_of_the_exact_flow():
    """It shrinks with the square of alpha, and is zero to rounding at 0."""
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        errors = [
            np.sqrt(
                loss_of("alpha_flow", FLOW.average, x0, x1, t, s, a, **UNGUIDED)[1]["mse"].max()
            )
            for a in (0.02, 0.01, 0.0)
        ]
    assert 3.8 < errors[0] / errors[1] < 4.2 and errors[2] < 1e-12
    check_guided_identity("alpha_flow", lam=0.0, guidance_interval=(0.0, 1.0))


def test_the_schedule():
    ours = make_settings("alpha_flow", alpha_start=0.2, alpha_end=0.8)
    found = np.array([ours.alpha(k, 100) for k in (0, 19, 30, 50, 70, 81, 100)])
    np.testing.assert_array_equal(found[[0, 1, 5, 6]], [1, 1, 0, 0])
    np.testing.assert_allclose(found[3], 0.5)
    np.testing.assert_allclose(found[2] + found[4], 1, rtol=1e-5)
    np.testing.assert_allclose(found[4], 1 / (1 + np.exp(25 / 3)), atol=1e-3)
    assert make_settings("alpha_flow").draw(jax.random.key(0), 4, 1, 0, 100)[2] == 1


def test_a_schedule_that_ends_before_it_begins():
    with pytest.raises(ValueError, match="alpha_start 0.8 is after objective.alpha_end 0.2"):
        make_settings("alpha_flow", alpha_start=0.8, alpha_end=0.2)


def test_passes():
    assert rows_of_passes("alpha_flow") == [6, 8, 2, 2, 2]
    assert rows_of_passes("alpha_flow", **UNGUIDED) == [6, 2, 2]
    x0, x1, t, s = batch(8, 6)
    rows = []

    def net(x, *args):
        rows.append(len(x))
        return linear_net(x, *args)

    loss_of("alpha_flow", net, x0, x1, t, s, 0.0, 6, derivative="central")
    trained, repeated = 2, 2  # XLA computes the pass that stands there twice once
    assert rows == [6, 8, 2, trained, 2, 2, repeated], "the central difference takes two passes"


def test_the_condition_keeps_nothing_for_the_gradient_of_the_trained_pass():
    """A condition that holds the trained pass writes what both phases keep, in each step."""
    x0, x1, t, s = batch(8, 6, dtype=np.float32)

    def loss(scale, alpha):
        def net(x, *args):
            return scale * linear_net(x, *args)

        return loss_of("alpha_flow", net, x0, x1, t, s, alpha, 6)[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(jnp.ones(()), jnp.zeros(()))
    (condition,) = (e for e in jaxpr.eqns if e.primitive.name == "cond")
    assert [v.aval.shape for v in condition.outvars] == [(2, *x0.shape[1:])], "the target alone"
