"""Align Your Flow: identity, gradients against the paper's expression, warm-up, and passes."""

import jax
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_exact_identity,
    linear_net,
    loss_of,
    rows_of_passes,
)

from vcm_jax.objectives import make_settings

NAME = "align_your_flow"
UNGUIDED = dict(guidance_scale=1.0)


@pytest.mark.parametrize("kind", ["emd", "lmd"])
def test_the_exact_flow_has_no_error(kind):
    check_exact_identity(NAME, lam=1.0, kind=kind, **UNGUIDED)


@pytest.mark.parametrize("kind", ["emd", "lmd"])
def test_the_gradient_moves_the_jump_s_end_against_its_residual(kind):
    """By f = x_t + (s - t) u it is 2 (sign) g / (rms(g) + 0.1), as in the paper."""
    x0, x1, t, s = batch(4, dtype=np.float32)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    gap, v, zero = (t - s)[:, None, None], x1 - x0, {"c": 0.0}
    u = 1.3 * linear_net(x_t, t, s, zero)
    if kind == "emd":  # d/dt f, at r = 0.5
        g = v - u - 0.5 * gap * 1.3 * (0.5 * v + 2)
    else:  # d/ds f - u(f, s, s)
        landed = x_t - gap * u
        g = u - gap * -1.3 - 1.3 * linear_net(landed, s, s, zero)
    g = g / (np.sqrt(np.square(g).mean((1, 2), keepdims=True)) + 0.1)
    sign = 1 if kind == "emd" else -1

    def by_hand(theta):
        f = x_t - gap * theta * linear_net(x_t, t, s, zero)
        return 2 * sign * (f * g).mean((1, 2)).mean()

    def loss(theta):
        net = lambda *args: theta * linear_net(*args)
        return loss_of(NAME, net, x0, x1, t, s, 0.5, kind=kind, **UNGUIDED)[0]

    np.testing.assert_allclose(jax.grad(loss)(1.3), jax.grad(by_hand)(1.3), rtol=1e-4)


@pytest.mark.parametrize("kind", ["emd", "lmd"])
def test_a_teacher_s_velocity_takes_the_place_of_the_data_s(kind):
    """On any pairs the exact guided flow leaves no error; rows without condition learn V_null."""
    free = lambda x: 0.3 * x - 0.5

    def teacher(x, t, s, cond):
        plain = (FLOW.velocity(x, t[:, None, None]) + 2 * free(x)) / 3  # 3 V_c - 2 V_null = V
        return np.where(cond["c"] == 1, free(x), plain)

    is_null = np.array([False, True, False, False, False, True])
    with jax.enable_x64(True):
        x0, x1, t, s = batch(num_instant=2)

        def ask(net, **settings):
            return loss_of(
                NAME, net, x0, x1, t, s, 1.0, 2, is_null, drawn={"teacher_u": teacher},
                kind=kind, teacher="run", **{"guidance_scale": 3.0} | settings,
            )[1]  # fmt: skip

        aux = ask(FLOW.average)
        assert aux["mse"][~is_null].max() < 1e-24 and aux["mse"][is_null].min() > 1e-4
        assert ask(FLOW.average, guidance_scale=1.0)["mse"][0] > 1e-4
        x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
        np.testing.assert_allclose(aux["target"][1], free(x_t[1]))


def test_the_gradient_of_emd_with_a_teacher():
    """The teacher's velocity is the residual's, and the direction of the derivative."""
    x0, x1, t, s = batch(4, dtype=np.float32)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    gap, zero = (t - s)[:, None, None], {"c": 0.0}
    field = 0.7 * linear_net(x_t, t, t, zero)
    u = 1.3 * linear_net(x_t, t, s, zero)
    g = field - u - 0.5 * gap * 1.3 * (0.5 * field + 2)
    g = g / (np.sqrt(np.square(g).mean((1, 2), keepdims=True)) + 0.1)

    def loss(theta, phi):
        net, teacher = (lambda *args, f=f: f * linear_net(*args) for f in (theta, phi))
        options = {"teacher_u": teacher}
        return loss_of(NAME, net, x0, x1, t, s, 0.5, drawn=options, teacher="run", **UNGUIDED)[0]

    by_hand = lambda theta: -2 * gap * theta * linear_net(x_t, t, s, zero) * g
    found = jax.grad(loss, (0, 1))(1.3, 0.7)
    expected = jax.grad(lambda theta: by_hand(theta).mean())(1.3)
    np.testing.assert_allclose(found, [expected, 0], rtol=1e-4)


def test_settings_that_a_teacher_does_not_have():
    for name, value in (("mix_ratio", 0.5), ("target_ema", 0.9)):
        with pytest.raises(ValueError, match=f"objective.{name} must be .* with objective.teach"):
            make_settings(NAME, teacher="run", **{name: value})
    ours = make_settings(NAME, teacher="run")
    assert ours.has_teacher and not make_settings(NAME).has_teacher
    assert ours.passes().forward == 3.5


def test_warm_up():
    found = [make_settings(NAME).draw(jax.random.key(0), 4, 2, k, 100)[2] for k in (0, 5, 10, 90)]
    np.testing.assert_allclose(found, [0, 0.495, 0.99, 0.99], rtol=1e-6)


def test_guidance_moves_the_target_of_emd_alone():
    x0, x1, t, s = batch(4, 1, dtype=np.float32)
    for kind, moves in (("emd", True), ("lmd", False)):
        ask = lambda w, kind=kind: loss_of(
            NAME, linear_net, x0, x1, t, s, 0.5, 1, kind=kind, guidance_scale=w
        )[1]["target"]
        assert (np.abs(ask(1.0) - ask(3.0))[1:].max() > 1e-3) == moves


def test_passes():
    assert rows_of_passes(NAME) == [6, 8, 2, 2]
    assert rows_of_passes(NAME, kind="lmd") == [6, 6, 2, 2, 2]
    assert rows_of_passes(NAME, kind="lmd", derivative="central", **UNGUIDED) == [6, 2, 2, 2, 2]


def test_times_by_their_difference():
    """t - s is logit-normal, and s uniform in what is left; or two times in order."""
    t, s, _ = make_settings(NAME).draw(jax.random.key(0), 8000, 2000, 0, 10)
    assert (t[:2000] == s[:2000]).all()
    gap, s = np.asarray(t - s)[2000:], np.asarray(s)[2000:]
    logit = np.log(gap) - np.log1p(-gap)
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.8, 1], atol=0.05)
    np.testing.assert_allclose(
        np.percentile(s / (1 - gap), [10, 50, 90]), [0.1, 0.5, 0.9], atol=0.03
    )
    t, s, _ = make_settings(NAME, times="sorted").draw(jax.random.key(0), 8000, 0, 0, 10)
    ends = np.concatenate([t, s])
    assert np.mean(np.log(ends) - np.log1p(-ends)) == pytest.approx(-0.8, abs=0.05)
