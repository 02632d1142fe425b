"""Consistency objectives: the exact flow, numbers by hand, schedules, and passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_pairs_on_the_flow,
    linear_net,
    loss_of,
    on_the_flow,
    rows_of_passes,
)

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.consistency import earlier_time
from vcm_jax.sampling import Sampler

NAME = "consistency"
KINDS = ("facm", "scm", "ect")
PLAIN = dict(guidance_scale=1.0)


def to_data(size=6, num_instant=0, dtype=np.float64):
    x0, x1, t, s = batch(size, num_instant, dtype=dtype)
    s[num_instant:] = 0
    return x0, x1, t, s


@pytest.mark.parametrize("kind", ["facm", "scm"])
def test_the_exact_flow_has_no_error(kind):
    with jax.enable_x64(True):
        x0, x1, t, s = to_data()
        x0, x1 = on_the_flow(x0, x1, t)
        ask = lambda net: loss_of(NAME, net, x0, x1, t, s, 1.0, kind=kind, **PLAIN)[1]["mse"]
        assert ask(FLOW.average).max() < 1e-24
        assert ask(lambda x, t, s, c: FLOW.average(x, t, t, c)).min() > 1e-9
    check_pairs_on_the_flow(NAME, kind=kind, cosine=0.0)


def test_ect_s_error_on_the_exact_flow_shrinks_with_the_square_of_its_gap():
    with jax.enable_x64(True):
        x0, x1, t, s = to_data()
        x0, x1 = on_the_flow(x0, x1, t)
        errors = [
            np.sqrt(loss_of(NAME, FLOW.average, x0, x1, t, s, lam, kind="ect", **PLAIN)[1]["mse"])
            for lam in (1 / 256, 1 / 512)
        ]
    np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.05)


def test_ect_has_vcm_s_target():
    x0, x1, t, s = to_data(4, dtype=np.float32)
    _, ours = loss_of(NAME, linear_net, x0, x1, t, s, 0.05, kind="ect", **PLAIN)
    r = np.asarray(earlier_time(t, 0.05))
    assert (0 < r).all() and (r < t).all() and (r > 0.5 * t).all()
    tau = 1 - 0.05 * (1 + 8 / (1 + np.exp(0.5)))  # of t = 0.5, whose own is 1
    assert float(earlier_time(jnp.float32(0.5), 0.05)) == pytest.approx(tau / (1 + tau), rel=1e-5)
    for i in range(4):
        row = slice(i, i + 1)
        args = (x0[row], x1[row], t[row], s[row], (t - r)[i] / t[i])
        _, theirs = loss_of("vcm", linear_net, *args, guidance_scale=1.0, mix_ratio=1.0)
        np.testing.assert_allclose(ours["target"][row], theirs["target"], rtol=1e-4)


def test_ect_s_gradient_is_twice_that_of_its_distance():
    """Of (1 / tau^2 + 1) |f(x_t, t, 0) - sg f(x_r, r, 0)|, with a small eps."""
    x0, x1, t, s = to_data(4, dtype=np.float32)
    time = t[:, None, None]
    x_t, tau = (1 - time) * x0 + time * x1, t / (1 - t)
    net = lambda theta: lambda *args: theta * linear_net(*args)
    target = loss_of(NAME, net(1.3), x0, x1, t, s, 0.05, kind="ect", **PLAIN)[1]["target"]

    def distance(theta):
        error = time * (net(theta)(x_t, t, s, {"c": 0.0}) - target)
        return ((1 / tau**2 + 1) * jnp.sqrt(jnp.square(error).sum((1, 2)))).mean()

    def loss(theta):
        return loss_of(NAME, net(theta), x0, x1, t, s, 0.05, kind="ect", eps=1e-9, **PLAIN)[0]

    np.testing.assert_allclose(jax.grad(loss)(1.3), 2 * jax.grad(distance)(1.3), rtol=1e-4)


def test_facm_s_numbers_by_hand():
    """u = x / 2 + 2 t - s; x0 = 1, x1 = 3: v = 2, x_t = 1 + 2 t, du/dt = 2 / 2 + 2 = 3."""
    ones = np.ones((2, 1, 2), np.float32)
    t, s = np.float32([0.64, 0.64]), np.float32([0.64, 0.0])
    settings = dict(guidance_scale=1.0, p=0.5, eps=1e-3)
    loss, aux = loss_of(NAME, linear_net, ones, 3 * ones, t, s, 1.0, 1, **settings)
    # Row 1: u = 1.14 + 1.28 = 2.42, g = 2.42 - 2 + 0.64 * 3 = 2.34, clipped to 1, times 0.4.
    np.testing.assert_allclose(aux["target"][1], 2.42 - 0.4, rtol=1e-5)
    jump = np.sin(np.pi / 2 * 0.64) * 0.16 / (0.16 + 1e-3) ** 0.5
    # Row 0: u = 1.78; both channels are equal, as those of v: the cosine is 1.
    np.testing.assert_allclose(loss, (0.22**2 + jump) / 2, rtol=1e-4)
    across = ones * np.float32([1, -1])
    turned, _ = loss_of(NAME, linear_net, across, 3 * ones, t, s, 1.0, 1, **settings)
    plain, _ = loss_of(NAME, linear_net, across, 3 * ones, t, s, 1.0, 1, cosine=0.0, **settings)
    assert turned > plain + 0.01


def test_scm_normalises_and_warms_up():
    x0, x1, t, s = to_data(4, dtype=np.float32)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    u, sine = linear_net(x_t, t, s, {"c": 0.0}), np.sin(np.pi / 2 * t)[:, None, None]
    for warm in (0.0, 0.5, 1.0):
        _, aux = loss_of(NAME, linear_net, x0, x1, t, s, warm, kind="scm", p=0.0, **PLAIN)
        g = sine * (u - (x1 - x0) + warm * t[:, None, None] * (0.5 * (x1 - x0) + 2))
        size = np.sqrt(np.square(g).mean((1, 2), keepdims=True))
        np.testing.assert_allclose(aux["target"], u - g / (size + 0.1), rtol=1e-4, atol=1e-5)


def test_times_and_schedules():
    for kind, wanted in (
        ("facm", [1, 1, 1]),
        ("scm", [0, 1, 1]),
        ("ect", [1 / 2, 1 / 32, 1 / 256]),
    ):
        ours = make_settings(NAME, kind=kind)
        found = [ours.draw(jax.random.key(0), 4, 2, step, 100)[2] for step in (0, 50, 100)]
        np.testing.assert_allclose(found, wanted)
    t, s, _ = make_settings(NAME).draw(jax.random.key(0), 20_000, 5_000, 0, 1)
    assert (s[5_000:] == 0).all() and (t[:5_000] == s[:5_000]).all()
    np.testing.assert_allclose(np.median(t[5_000:]), 2 / np.pi * np.arctan(np.exp(-0.8)), atol=0.01)
    ours = make_settings(NAME, jump_times="logit_normal", jump_mean=-1.1, jump_std=2.0)
    t, _, _ = ours.draw(jax.random.key(0), 20_000, 0, 0, 1)
    np.testing.assert_allclose(np.median(t), 1 / (1 + np.exp(1.1)), atol=0.01)


def test_several_steps_restart_from_fresh_noise():
    ours, x1 = make_settings(NAME), np.ones((2, 3, 2), np.float32)

    def net(x, t, s, cond):
        return x / t[:, None, None]  # to zero

    found = Sampler()(ours, net, x1, (1.0, 0.5, 0.0), None, None)
    assert np.abs(found).max() < 1e-6 and Sampler().restarts(ours)
    assert not Sampler(guidance_scale=2.0).restarts(ours), "Euler steps of the anchor"
    assert not Sampler().restarts(make_settings("vcm"))


def test_passes():
    assert rows_of_passes(NAME) == [6, 8, 2, 2]
    for kind in KINDS:
        assert rows_of_passes(NAME, kind=kind, **PLAIN) == [6, 2, 2]
        assert rows_of_passes(NAME, 0, kind=kind, **PLAIN) == [8, 8]
    assert rows_of_passes(NAME, derivative="central", **PLAIN) == [6, 2, 2, 2]
    assert not make_settings(NAME, kind="ect").needs_jvp and make_settings(NAME).needs_jvp
