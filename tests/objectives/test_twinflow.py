"""TwinFlow: jumps on the exact flow, numbers and gradients by hand, rows of each kind, passes."""

import jax
import jax.numpy as jnp
import numpy as np
from small_batches import FLOW, batch, linear_net, loss_of, on_the_flow, rows_of_passes

from vcm_jax.models import layers
from vcm_jax.objectives import make_settings
from vcm_jax.objectives.guidance import within

NAME = "twinflow"
PLAIN = dict(guidance_scale=1.0, mix_ratio=1.0)
ZERO = {"c": 0.0}
time = lambda t: np.asarray(t)[:, None, None]


def twin(x, t, s, cond):
    """As `linear_net`, with another answer at negative times."""
    return linear_net(x, t, s, cond) + jnp.where(time_of(t) < 0, 0.4 * x, 0)


def time_of(t):
    return t[:, None, None]


def test_jumps_of_the_exact_flow_have_an_error_of_the_first_order_in_the_gap():
    """Rows of all lengths, the one from 1 to 0 too; a jump shorter than the gap has none."""
    with jax.enable_x64(True):
        x0, x1, t, s = batch(12, 3)
        t[3:6], s[3:6] = 1, 0
        s[8] = t[8] - 1e-4
        x0, x1 = on_the_flow(x0, x1, t)
        ask = lambda gap, **changes: np.sqrt(
            loss_of(NAME, FLOW.average, x0, x1, t, s, 0.3, 3, gap=gap, **PLAIN | changes)[1]["mse"]
        )[:9]
        coarse, fine = ask(2e-3), ask(1e-3)
        other = ask(1e-3, legs=1)  # the exact flow composes any number of jumps
    np.testing.assert_allclose(coarse[3:8] / fine[3:8], 2, rtol=0.02)
    assert 1e-6 < fine[3:8].max() < 2e-3 and fine[:3].max() < 1e-12 and fine[8] < 1e-4
    np.testing.assert_allclose(other, fine, rtol=1e-6, atol=1e-12)


def draws(lam, shape):
    """What the loss draws from the keys of some rows: noise, and times."""
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(lam)
    t = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(lam)
    return np.asarray(noise), np.asarray(t)


def test_loss_and_gradient_by_hand():
    """One s = t row, one from noise to data, one jump, one fake; every pass scaled by theta."""
    x0, x1, t, s = batch(4, 1, dtype=np.float32)
    ours = make_settings(NAME, matching=0.7, gap=0.1, **PLAIN)
    lam = ours.draw(jax.random.key(3), 4, 1, 0, 1)[2]
    (z, _), (noise, again) = draws(lam[3:], (3, 2)), draws(lam[1:2], (3, 2))

    def loss(theta):
        net = lambda *args: theta * twin(*args)
        settings = dict(matching=0.7, gap=0.1, **PLAIN)
        return loss_of(NAME, net, x0, x1, t, s, lam, 1, **settings)[0]

    t_, s_ = t.copy(), s.copy()
    t_[1], s_[1] = 1, 0
    x, v = (1 - time(t_)) * x0 + time(t_) * x1, x1 - x0
    net = lambda *args: 1.3 * twin(*args)
    one, nil = np.ones(1, np.float32), np.zeros(1, np.float32)

    def distance(error):
        mse = jnp.square(error).mean((1, 2))
        return mse / jnp.sqrt(jax.lax.stop_gradient(mse) + 1e-6)

    def by_hand(theta):
        u = theta * twin(x[:3], t_[:3], s_[:3], ZERO)
        first = distance(u[:1] - v[:1]) * (1 + np.tan(np.pi / 2.5))
        xs, ts, ss, vs, us = x[1:3], t_[1:3], s_[1:3], v[1:3], 1.3 * twin(x, t_, s_, ZERO)[1:3]
        l, m = ts - 0.1, (ts - 0.1 + ss) / 2
        x_l = xs - 0.1 * vs
        u_l = net(x_l, l, m, ZERO)
        way = time(l - m) * u_l + time(m - ss) * net(x_l - time(l - m) * u_l, m, ss, ZERO)
        g = (time(ts - ss) * us - way) / 0.1 - vs
        weight = 1 + np.tan((1 - ts + ss) * np.pi / 2.5)
        jumps = distance(u[1:] - us + np.clip(g, -1, 1)) * weight
        sample = z - net(z, one, nil, ZERO)
        x_fake = time(1 - t[3:]) * sample + time(t[3:]) * x1[3:]
        fake = distance(theta * twin(x_fake, -t[3:], -t[3:], ZERO) - (x1[3:] - sample))
        y = time(1 - again) * (x1[1:2] - us[:1]) + time(again) * noise
        apart = np.clip(net(y, -again, -again, ZERO) - net(y, again, again, ZERO), -1, 1)
        matching = distance(u[1:2] - us[:1] + apart)
        return (first.sum() + jumps.sum() + fake.sum()) / 4 + 0.7 * matching.mean()

    np.testing.assert_allclose(loss(1.3), by_hand(1.3), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(1.3), jax.grad(by_hand)(1.3), rtol=1e-5)


def test_flows_that_agree_do_not_move_the_samples():
    """D is 0 for the same velocity at both signs of t; else a sample moves along -D by u."""
    x0, x1, t, s = batch(6, 3, dtype=np.float32)

    def gradient(net, matching):
        pushed = lambda shift: loss_of(
            NAME,
            lambda x, t, *rest: net(x, t, *rest) + shift * jnp.where(time_of(t) == 1, 1.0, 0),
            *(x0, x1, t, s, 0.3, 3),
            matching=matching,
        )[0]
        return jax.grad(pushed)(0.0)

    def even(x, t, s, cond):
        return linear_net(x, jnp.abs(t), jnp.abs(s), cond)

    for net, sign in ((even, 0), (lambda *args: even(*args) + (time_of(args[1]) < 0), 1)):
        moved = gradient(net, 1.0) - gradient(net, 0.0)
        assert abs(moved) < 1e-6 if sign == 0 else moved > 0.5


def test_times_of_each_kind_of_row():
    t, s, keys = make_settings(NAME).draw(jax.random.key(0), 40_000, 10_000, 0, 1)
    assert (t[10_000:20_000] == 1).all() and (s[10_000:20_000] == 0).all()
    anywhere = s[20_000:30_000] / t[20_000:30_000]
    np.testing.assert_allclose(
        np.quantile(anywhere, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02
    )
    np.testing.assert_allclose(np.quantile(t[:10_000], [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    assert len(keys) == 40_000


def test_the_network_tells_negative_times_apart():
    embed = layers.TimestepEmbedder(8)
    t = jnp.array([0.02, 0.5, 1.0])
    variables = embed.init(jax.random.key(0), t)
    there, back = (np.asarray(embed.apply(variables, sign * t)) for sign in (1, -1))
    assert (np.abs(there - back).max(-1) > 1e-5).all() and np.isfinite(back).all()


def test_passes():
    """The guided velocity, two legs, samples for the fakes, and the velocities of both flows."""
    plain = dict(target_ema=0.0)
    assert rows_of_passes(NAME, 2, **plain) == [6, 18, 12, 12, 12, 12, 6, 6, 6, 6]
    assert rows_of_passes(NAME, 2) == [6, 18, 18, 12, 12, 12, 6, 6, 6, 6]
    assert rows_of_passes(NAME, 2, matching=0.0, legs=1, **PLAIN) == [6, 12, 12, 6, 6]
    assert make_settings(NAME).passes().forward == 6.25


def test_jumps_from_noise_are_not_guided():
    """The authors' code guides where t < 1; float32 must tell the end of the interval from 1."""
    interval = make_settings(NAME).guidance_interval
    found = within(jnp.array([0.5, 0.999, 1.0], jnp.float32), interval)
    assert found.tolist() == [True, True, False]
