"""The velocity consistency objective: identities, gradients, numbers by hand, a toy world."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flows import GaussianFlow, energy_distance
from small_batches import (
    FLOW,
    batch,
    conditions,
    linear_net,
    loss_of,
    on_the_flow,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.times import intermediate_time, lambda_schedule, sample_times
from vcm_jax.objectives.vcm import VCMConfig, vcm_loss
from vcm_jax.sampling import sample, uniform_times

PLAIN = VCMConfig(guidance_scale=1.0, mix_ratio=1.0, guidance_interval=(0.0, 1.0), p=0.0)
UNGUIDED = dict(guidance_scale=1.0, mix_ratio=0.0, guidance_interval=(0.0, 1.0))


@pytest.mark.parametrize("mu, sigma", [(0.7, 0.4), (-0.3, 1.7)])
def test_the_residual_of_the_exact_flow_shrinks_as_lambda_squared(mu, sigma):
    flow = GaussianFlow(mu, sigma)

    def u(x, t, s, cond):
        return jnp.asarray(
            flow.average_velocity(
                np.asarray(x), np.asarray(t)[:, None, None], np.asarray(s)[:, None, None]
            )
        )

    config = VCMConfig(mix_ratio=0.0, guidance_interval=(0.0, 1.0))  # v_mix = u(x, t, t)
    residuals = []
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        for lam in (0.1, 0.05, 0.025, 0.0125):
            args = (u, x0, x1, t, s, lam, conditions(6), conditions(6), np.zeros(6, bool))
            _, aux = vcm_loss(*args, config, num_instant=0)
            residuals.append(np.sqrt(aux["mse"].mean()))
        assert aux["mse"].dtype == np.float64
    ratios = np.divide(residuals[:-1], residuals[1:])
    assert residuals[0] > 1e-5
    np.testing.assert_allclose(ratios, 4, atol=0.25)
    assert abs(ratios[-1] - 4) < abs(ratios[0] - 4)


def test_below_the_least_gap_lambda_has_no_effect():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)

        def residual(lam):
            _, aux = loss_of("vcm", FLOW.average, x0, x1, t, s, lam, **UNGUIDED)
            return np.sqrt(aux["mse"].mean())

        np.testing.assert_allclose(residual(0.05) / residual(0.025), 4, atol=0.15)
        assert residual(1e-9) == residual(1e-6)


def test_at_equal_times_without_guidance_it_is_flow_matching():
    x0, x1, t, s = batch(num_instant=6)
    args = (linear_net, x0, x1, t, s, 0.1, conditions(6), conditions(6), np.zeros(6, bool))
    loss, aux = vcm_loss(*args, PLAIN, num_instant=6)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    squares = np.square(linear_net(x_t, t, t, conditions(6)) - (x1 - x0))
    np.testing.assert_allclose(loss, squares.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["velocity_mse"], squares.mean((1, 2)), rtol=1e-5)


def test_hand_computed_values():
    """One number a row: u = x / 2 + 2 t - s + c; x0 = 1, x1 = 3, so v = 2 and x_t = 1 + 2 t."""
    config = VCMConfig(
        guidance_scale=3.0, mix_ratio=0.5, guidance_interval=(0.0, 0.8), p=1.0, eps=0.01
    )
    t = np.array([0.5, 0.5, 0.5, 0.9], np.float32)
    s = np.array([0.5, 0.1, 0.1, 0.1], np.float32)
    ones = np.ones((4, 1, 1), np.float32)
    is_null = np.array([False, False, True, False])
    args = (linear_net, ones, 3 * ones, t, s, 0.25, conditions(4, 0.25), conditions(4, -0.5))
    loss, aux = vcm_loss(*args, is_null, config, num_instant=1)
    # Rows 0 and 1: x_t = 2, u(x_t, t, t, c) = 1 + 0.5 + 0.25 = 1.75, null 1 + 0.5 - 0.5 = 1:
    # v_mix = 0.5 (3 * 2 - 2 * 1) + 0.5 * 1.75 = 2.875.
    # Row 1: l = 0.4, x_l = 2 - 0.1 * 2.875 = 1.7125, u_ls = 0.85625 + 0.8 - 0.1 + 0.25 = 1.80625,
    # target = 0.25 * 2.875 + 0.75 * 1.80625 = 2.0734375; u_ts = 1 + 1 - 0.1 + 0.25 = 2.15.
    # Row 2, null: v_mix = 2, x_l = 1.8, u_ls = 0.9 + 0.7 - 0.5 = 1.1, target = 1.325, u_ts = 1.4.
    # Row 3, t > 0.8: v_mix = 2, l = 0.7, x_t = 2.8, x_l = 2.4, u_ls = 1.2 + 1.4 - 0.1 + 0.25
    # = 2.75, target = 2.5625; u_ts = 1.4 + 1.8 - 0.1 + 0.25 = 3.35.
    targets = [2.875, 2.0734375, 1.325, 2.5625]
    np.testing.assert_allclose(np.ravel(aux["target"]), targets, rtol=1e-6)
    mse = np.square(np.subtract([1.75, 2.15, 1.4, 3.35], targets))
    np.testing.assert_allclose(aux["mse"], mse, rtol=1e-5)
    np.testing.assert_allclose(loss, (mse / (mse + 0.01)).mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["velocity_mse"], [0.0625], rtol=1e-5)


def test_null_rows_and_rows_outside_the_interval_aim_at_the_plain_velocity():
    config = VCMConfig(guidance_interval=(0.6, 0.7))
    x0, x1, t, s = batch(8, num_instant=8, dtype=np.float32)
    t[:3] = s[:3] = 0.59, 0.6, 0.7
    is_null = np.arange(8) == 5
    args = (linear_net, x0, x1, t, s, 0.1, conditions(8), conditions(8, 3.0), is_null)
    _, aux = vcm_loss(*args, config, num_instant=8)
    plain = np.isclose(aux["target"], x1 - x0, atol=1e-6).all((1, 2))
    np.testing.assert_array_equal(plain, is_null | (t < 0.6) | (t > np.float32(0.7)))
    assert 0 < plain.sum() < 8


def test_only_the_trained_prediction_has_a_gradient():
    """Every call of u has its own offset; the first alone may move the loss."""
    x0, x1, t, s = batch(8, num_instant=3, dtype=np.float32)
    is_null, config = np.arange(8) == 4, VCMConfig(guidance_interval=(0.0, 1.0))

    def run(u):
        args = (u, x0, x1, t, s, 0.2, conditions(8), conditions(8, 1.0), is_null)
        return vcm_loss(*args, config, num_instant=3)

    def with_offsets(offsets):
        calls = iter(offsets)
        return run(lambda *args: linear_net(*args) + next(calls))[0]

    gradients = jax.grad(with_offsets)(jnp.zeros(4))
    assert (gradients != 0).tolist() == [True, False, False, False]
    assert trained_passes("vcm") == ([0], 8)

    def scaled(theta):
        return run(lambda *args: theta * linear_net(*args))

    _, frozen = scaled(1.3)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    cond = {"c": np.where(is_null, 1.0, 0.0)[:, None, None]}

    def against_frozen_target(theta):
        error = theta * linear_net(x_t, t, s, cond) - frozen["target"]
        return (jnp.square(error).mean((1, 2)) / (frozen["mse"] + 0.01)).mean()

    found = jax.grad(lambda theta: scaled(theta)[0])(1.3)
    np.testing.assert_allclose(found, jax.grad(against_frozen_target)(1.3), rtol=1e-4)


@pytest.mark.parametrize(
    "settings, passes",
    [
        ({}, [8, 8, 2, 2]),
        (dict(mix_ratio=1.0), [8, 8, 2]),
        (dict(mix_ratio=0.0), [8, 2, 2]),
        (dict(guidance_scale=1.0), [8, 2, 2]),
        (dict(guidance_scale=1.0, mix_ratio=1.0), [8, 2]),
    ],
)
def test_no_row_pays_for_a_pass_that_it_does_not_need(settings, passes):
    assert rows_of_passes("vcm", **settings) == passes


def test_half_precision_inputs_are_computed_in_float32():
    x0, x1, t, s = batch(4, num_instant=2, dtype=np.float32)

    def u(*args):
        return linear_net(*args).astype(jnp.bfloat16)

    half = jnp.asarray(x0, jnp.bfloat16)
    args = (u, half, x1, t, s, 0.1, conditions(4), conditions(4), np.zeros(4, bool))
    loss, aux = vcm_loss(*args, VCMConfig(), num_instant=2)
    assert {loss.dtype, aux["mse"].dtype, aux["target"].dtype} == {jnp.dtype(jnp.float32)}


def test_times():
    t, s = sample_times(jax.random.key(0), 20_000, 15_000, -0.4, 1.0)
    np.testing.assert_array_equal(t[:15_000], s[:15_000])
    assert (s[15_000:] <= t[15_000:] - 1e-4).all() and (s >= 0).all() and (t <= 1).all()
    # The median of a logit-normal is sigmoid(mean); of the larger of two, its 1/sqrt(2) quantile.
    np.testing.assert_allclose(np.median(t[:15_000]), 1 / (1 + np.exp(0.4)), atol=0.01)
    np.testing.assert_allclose(np.median(t[15_000:]), 1 / (1 + np.exp(0.4 - 0.5450)), atol=0.015)
    lam = [lambda_schedule(k, 100, 1 / 10, 1 / 500) for k in (0, 50, 100)]
    np.testing.assert_allclose(lam, [0.1, (0.1 * 0.002) ** 0.5, 0.002], rtol=1e-5)
    l, fraction = intermediate_time(np.float32([0.9, 0.5]), np.float32([0.2, 0.4995]), 0.1)
    np.testing.assert_allclose(l, [0.83, 0.4999], rtol=1e-6)
    np.testing.assert_allclose(fraction, [0.1, 0.2], rtol=1e-3)


def test_drawn_times_and_lambda():
    assert VCMConfig().time_mean == -0.4  # SoundVCM 4.3
    t, s, lam = VCMConfig().draw(jax.random.key(0), 4000, 1000, 50, 100)
    l, _ = intermediate_time(t[1000:], s[1000:], lam)
    assert 0 < lam < 0.1 and (l < t[1000:]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mix_ratio": 1.5}, "mix_ratio"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"eps": 0.0}, "eps"),
        ({"p": -1.0}, "objective.p"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        make_settings("vcm", **change)


def mixture(rng, size):
    """Eight narrow Gaussians on a circle."""
    angles = 2 * np.pi * rng.integers(0, 8, size) / 8
    centres = 1.5 * np.stack([np.cos(angles), np.sin(angles)], -1)
    return (centres + 0.08 * rng.standard_normal((size, 2))).astype(np.float32)


def train_toy(num_instant, steps=3000, size=256):
    """A small MLP on the mixture; all rows at s = t is flow matching."""
    rng = np.random.default_rng(0)
    data = jnp.asarray(mixture(rng, 20_000))
    widths = [2 + 2 * 8, 128, 128, 128, 2]
    params = [
        (rng.standard_normal((i, o)).astype(np.float32) / np.sqrt(i), np.zeros(o, np.float32))
        for i, o in zip(widths[:-1], widths[1:])
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def u(params, x, t, s, cond):
        times = jnp.stack([t, s - t], -1)[..., None] * (2.0 ** np.arange(4))[None, None]
        times = jnp.concatenate([jnp.sin(times), jnp.cos(times)], -1).reshape(len(t), -1)
        h = jnp.concatenate([x, times], -1)
        for weight, bias in params[:-1]:
            h = jax.nn.silu(h @ weight + bias[None])
        return h @ params[-1][0] + params[-1][1][None]

    def step(state, k):
        params, opt_state = state
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), k), 3)
        x0 = data[jax.random.randint(keys[0], (size,), 0, len(data))]
        x1 = jax.random.normal(keys[1], x0.shape)
        t, s = sample_times(keys[2], size, num_instant, -0.4, 1.0)
        lam = lambda_schedule(k, steps, 1 / 10, 1 / 500)
        empty = jnp.zeros((size, 1))

        def loss(params):
            args = (x0, x1, t, s, lam, empty, empty, jnp.zeros(size, bool))
            return vcm_loss(functools.partial(u, params), *args, PLAIN, num_instant=num_instant)[0]

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    init = (params, optimizer.init(params))
    # Thousands of steps: optimizing the program takes less time than it saves.
    train = jax.jit(
        lambda init: jax.lax.scan(step, init, jnp.arange(steps))[0][0],
        compiler_options={"xla_backend_optimization_level": 1},
    )
    params = train(init)
    return functools.partial(u, params)


def test_one_step_samples_of_a_mixture_are_far_closer_than_flow_matching_s():
    rng = np.random.default_rng(5)
    truth, noise = mixture(rng, 2000), rng.standard_normal((2000, 2)).astype(np.float32)

    def distance(u, n):
        return energy_distance(sample(u, noise, uniform_times(n), None), truth)

    floor = energy_distance(mixture(rng, 2000), truth)
    consistency, matching = train_toy(num_instant=128), train_toy(num_instant=256)
    one, euler = distance(consistency, 1), distance(matching, 1)
    assert euler > 0.1, "one Euler step should collapse to the conditional mean"
    assert floor < one < euler / 5, (one, euler, floor)
    assert distance(consistency, 4) < one and distance(matching, 50) < euler / 5
