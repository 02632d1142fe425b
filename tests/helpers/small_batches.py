"""Small batches, a network by hand, and the checks that tests of several objectives share."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
from flows import TraceableFlow

from vcm_jax.objectives import make_settings

FLOW = TraceableFlow(0.7, 0.4)
# Settings with which an objective takes any number of rows.
ANY_ROWS = {"imm": {"group": 1}}
# Objectives whose lam is what they draw.
DRAWN = ("twinflow",)


def batch(size=6, num_instant=0, seed=0, dtype=np.float64):
    """x0, x1, t, s with N = 3, C = 2; in the s < t rows t - s is at least 0.1."""
    rng = np.random.default_rng(seed)
    x0, x1 = rng.standard_normal((2, size, 3, 2))
    t, s = rng.uniform(0.55, 0.79, size), rng.uniform(0.05, 0.45, size)
    s[:num_instant] = t[:num_instant]
    return [a.astype(dtype) for a in (x0, x1, t, s)]


def on_the_flow(x0, x1, t, velocity=None):
    """Pairs (x0, x1) with the same x_t, whose velocity x1 - x0 is the marginal one at x_t.

    Another `velocity(x_t, time)` may take its place.
    """
    time = t[:, None, None]
    x_t = (1 - time) * x0 + time * x1
    v = np.asarray((velocity or FLOW.velocity)(x_t, time))
    return x_t - time * v, x_t + (1 - time) * v


def conditions(size, value=0.0):
    return {"c": np.full((size, 1, 1), value)}


def linear_net(x, t, s, cond):
    """A network small enough to be computed by hand."""
    return 0.5 * x + (2 * t - s)[:, None, None] + cond["c"]


def loss_of(name, net, x0, x1, t, s, lam=0.3, num_instant=0, is_null=None, drawn=None, **settings):
    """(loss, aux) of an objective; the empty condition is 1, the condition of every row 0.

    `drawn` is the guidance of each row, of an objective whose guidance is conditioned, or a dict of
    options of the loss.
    """
    size = len(x0)
    is_null = np.zeros(size, bool) if is_null is None else is_null
    cond, null_cond = conditions(size), conditions(size, 1.0)
    options = drawn if isinstance(drawn, dict) else {} if drawn is None else {"guidance": drawn}
    settings = ANY_ROWS.get(name, {}) | settings
    if name in DRAWN and isinstance(lam, float):
        lam = make_settings(name).draw(jax.random.key(0), size, num_instant, 0, 1)[2]
    return make_settings(name, **settings).loss(
        net, x0, x1, t, s, lam, cond, null_cond, is_null, num_instant=num_instant, **options
    )


def rows_of_passes(name, num_instant=6, **settings):
    """The number of rows in every pass of the network, of a batch of 8, in their order.

    (Of 24 for TwinFlow, whose s < t rows divide into three kinds, and `num_instant` counts thirds.)

    The tangent of a JVP is a pass of its own. Checks that `passes` counts the same rows.
    """
    objective = make_settings(name, **settings)
    num_instant = 8 if objective.instant_only else num_instant
    times = 3 if name == "twinflow" else 1
    size, num_instant = 8 * times, num_instant * times
    x0, x1, t, s = batch(size, num_instant)
    rows = []

    @jax.custom_jvp
    def net(x, t, s, cond):
        assert x.shape[0] == t.shape[0] == s.shape[0] == cond["c"].shape[0]
        rows.append(x.shape[0])
        return linear_net(x, t, s, cond)

    @net.defjvp
    def tangent(primals, tangents):
        rows.append(primals[0].shape[0])
        return net(*primals), jax.jvp(linear_net, primals, tangents)[1]

    options = {"target_u": net} if objective.target_ema else {}
    if objective.guidance_input:
        options["guidance"] = objective.draw_guidance(jax.random.key(0), size)

    def loss():
        return loss_of(name, net, x0, x1, t, s, 0.1, num_instant, drawn=options, **settings)[0]

    jax.eval_shape(loss)  # nothing is computed: every operation would compile for each shape
    if not objective.instant_only:
        ratio = num_instant / size or 1e-12  # some objectives refuse 0
        objective = make_settings(name, **settings | {"instant_ratio": ratio})
    np.testing.assert_allclose(sum(rows), size * objective.passes().total, rtol=1e-9)
    return rows


def trained_passes(name):
    """(indices of the passes that a gradient goes through, their rows), of a batch of 8 rows."""
    n = 8 if make_settings(name).instant_only else 3
    x0, x1, t, s = batch(8, n, dtype=np.float32)
    is_null = np.arange(8) == 4
    rows = []

    def with_factors(factors):
        """The loss with a factor of its own on every pass."""
        rows.clear()

        def net(x, *args):
            rows.append(len(x))
            return factors[len(rows) - 1] * linear_net(x, *args)

        return loss_of(name, net, x0, x1, t, s, 0.2, n, is_null)[0]

    gradients = jax.grad(with_factors)(jnp.ones(10))
    trained = np.flatnonzero(gradients).tolist()
    return trained, sum(rows[i] for i in trained)


def check_exact_identity(name, **settings):
    """The exact flow satisfies the objective's identity to rounding; another velocity does not."""

    def instant(x, t, s, cond):
        return FLOW.average(x, t, t, cond)

    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        _, aux = loss_of(name, FLOW.average, x0, x1, t, s, **settings)
        assert aux["mse"].dtype == np.float64 and aux["mse"].max() < 1e-24
        _, aux = loss_of(name, instant, x0, x1, t, s, **settings)
        assert aux["mse"].min() > 1e-9


def check_guided_identity(name, scale=3.0, **settings):
    """With guidance: the exact guided flow leaves no error, the flow without guidance does.

    The guided flow is the Gaussian one. The empty condition, whose value is 1, has another velocity
    n, so that the velocity v of the pairs follows from w v + (1 - w) n.
    """

    def free(x):
        return 0.3 * x - 0.5

    def net(x, t, s, cond):
        return jnp.where(cond["c"] == 1, free(x), FLOW.average(x, t, s, cond))

    def velocity(x, time):
        return (FLOW.velocity(x, time) - (1 - scale) * free(x)) / scale

    with jax.enable_x64(True):
        x0, x1, t, s = batch(num_instant=2)
        x0, x1 = on_the_flow(x0, x1, t, velocity)
        args = (name, net, x0, x1, t, s)
        _, aux = loss_of(*args, num_instant=2, guidance_scale=scale, **settings)
        assert aux["mse"].max() < 1e-24
        _, aux = loss_of(*args, num_instant=2, guidance_scale=1.0, **settings)
        assert aux["mse"][:2].min() > 1e-6


def check_pairs_on_the_flow(name, **settings):
    """There is no error where the velocity of every pair is the one that the network gives."""
    with jax.enable_x64(True):
        x0, x1, t, _ = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        loss, aux = loss_of(name, FLOW.average, x0, x1, t, t, None, num_instant=6, **settings)
        assert loss < 1e-24 and aux["mse"].dtype == np.float64
        moved = loss_of(name, FLOW.average, x0 + 0.1, x1, t, t, None, num_instant=6, **settings)
        assert moved[0] > 1e-4


def check_weight_and_guidance_of_composed_jumps(name):
    """The adaptive weight acts on all rows; guidance acts on s = t rows, within its interval."""
    x0, x1, t, s = batch(num_instant=6, dtype=np.float32)
    t[:3] = s[:3] = 0.9

    def ask(**settings):
        return loss_of(name, linear_net, x0, x1, t, s, num_instant=6, **settings)

    loss, aux = ask(p=1.0, eps=0.5)
    np.testing.assert_allclose(loss, (aux["mse"] / (aux["mse"] + 0.5)).mean(), rtol=1e-5)
    np.testing.assert_allclose(ask(p=0.0)[0], aux["mse"].mean(), rtol=1e-5)
    everywhere = ask(guidance_interval=(0.0, 1.0))[1]["mse"]
    assert (everywhere[:3] != aux["mse"][:3]).all()  # the default ends at 0.8
    np.testing.assert_array_equal(everywhere[3:], aux["mse"][3:])
    np.testing.assert_allclose(aux["mse"][:3], aux["velocity_mse"][:3], rtol=1e-5)


TINY = [
    ["emb.weight", [5, 5], "fan_in"],
    ["fc1.weight", [32, 31], "fan_in"],
    ["fc1.bias", [32], "small"],
    ["fc2.weight", [24, 32], "fan_in"],
    ["fc2.bias", [24], "small"],
]


def tiny_params(description):
    """Weights of the tiny network of the reference numbers, float64."""
    state = golden.fill(description.get("tiny_params", TINY), "tiny.")
    return {name: jnp.asarray(value, jnp.float64) for name, value in state.items()}


def tiny_net(params, x, t, h, label):
    """`B ...`, two times and labels `B` -> `B ...`."""
    inputs = jnp.concatenate(
        [x.reshape(len(x), -1), t[:, None], h[:, None], params["emb.weight"][label]], 1
    )
    hidden = inputs @ params["fc1.weight"].T + params["fc1.bias"][None]
    out = jax.nn.silu(hidden) @ params["fc2.weight"].T + params["fc2.bias"][None]
    return out.reshape(x.shape)
