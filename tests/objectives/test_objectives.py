"""Every objective: its identity on exact flows, gradients, passes, parity with original code."""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import GaussianFlow, TraceableFlow

from vcm_jax.objectives import OBJECTIVES, make_settings, read_section
from vcm_jax.objectives.guidance import smooth_decay
from vcm_jax.objectives.meanflow import MeanFlowConfig, meanflow_loss
from vcm_jax.objectives.shortcut import ShortcutConfig
from vcm_jax.objectives.soflow import SoFlowConfig, noised, soflow_loss
from vcm_jax.objectives.times import intermediate_time, lambda_schedule
from vcm_jax.objectives.wcfm import WCFMConfig, wcfm_loss

PARITY = golden.DATA / "objectives"
FLOW = TraceableFlow(0.7, 0.4)
UNGUIDED = {
    "vcm": dict(guidance_scale=1.0, mix_ratio=0.0, guidance_interval=(0.0, 1.0)),
    "meanflow": dict(omega=1.0, kappa=0.0),
    "soflow": dict(guidance_scale=1.0, mix_ratio=1.0),
}


def batch(size=6, num_instant=0, seed=0, dtype=np.float64):
    """x0, x1, t, s with N = 3, C = 2; the s < t rows are at least 0.1 apart."""
    rng = np.random.default_rng(seed)
    x0, x1 = rng.standard_normal((2, size, 3, 2))
    t, s = rng.uniform(0.55, 0.79, size), rng.uniform(0.05, 0.45, size)
    s[:num_instant] = t[:num_instant]
    return [a.astype(dtype) for a in (x0, x1, t, s)]


def on_the_flow(x0, x1, t):
    """Pairs (x0, x1) with the same x_t whose velocity x1 - x0 is the marginal one at x_t."""
    time = t[:, None, None]
    x_t = (1 - time) * x0 + time * x1
    v = np.asarray(FLOW.velocity(x_t, time))
    return x_t - time * v, x_t + (1 - time) * v


def empty(size, value=0.0):
    return {"c": np.full((size, 1, 1), value)}


def linear_net(x, t, s, cond):
    return 0.5 * x + (2 * t - s)[:, None, None] + cond["c"]


def call(name, net, x0, x1, t, s, lam=0.3, num_instant=0, is_null=None, **settings):
    size = len(x0)
    is_null = np.zeros(size, bool) if is_null is None else is_null
    return make_settings(name, **settings).loss(
        net, x0, x1, t, s, lam, empty(size), empty(size, 1.0), is_null, num_instant=num_instant,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["meanflow", "split_meanflow", "shortcut"])
def test_exact_identities_hold_to_rounding(name):
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        _, aux = call(name, FLOW.average, x0, x1, t, s, **UNGUIDED.get(name, {}))
        assert aux["mse"].dtype == np.float64 and aux["mse"].max() < 1e-24
        # Which does not hold for any u: the instant velocity alone leaves an error.
        _, aux = call(name, lambda x, t, s, c: FLOW.average(x, t, t, c), x0, x1, t, s,
                      **UNGUIDED.get(name, {}))  # fmt: skip
        assert aux["mse"].min() > 1e-9


def test_meanflow_s_residual_with_the_sample_s_velocity_is_zero_in_the_mean_alone():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        _, aux = call("meanflow", FLOW.average, x0, x1, t, s, **UNGUIDED["meanflow"])
        assert aux["mse"].min() > 1e-3


@pytest.mark.parametrize("parameterisation", ["euler", "trigonometric"])
def test_soflow_s_difference_quotient_shrinks_as_lambda(parameterisation):
    """The network of the exact solution operator, in either parameterisation."""

    def net(x, t, s, cond):
        f = x + (s - t)[:, None, None] * FLOW.average(x, t, s, cond)
        if parameterisation == "euler":
            return (f - x) / (s - t)[:, None, None]
        angle = np.pi / 2 * (s - t)[:, None, None]
        return (f - jnp.cos(angle) * x) / jnp.sin(angle)

    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        residuals = [
            np.sqrt(
                call("soflow", net, x0, x1, t, s, lam, parameterisation=parameterisation,
                     **UNGUIDED["soflow"])[1]["mse"].mean()
            )
            for lam in (0.1, 0.05, 0.025, 0.0125)
        ]  # fmt: skip
    ratios = np.divide(residuals[:-1], residuals[1:])
    np.testing.assert_allclose(ratios, 2, atol=0.15)
    assert residuals[0] > 1e-4 and abs(ratios[-1] - 2) < abs(ratios[0] - 2)


def test_vcm_s_residual_shrinks_as_lambda_squared_and_clamps():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        root = lambda lam: np.sqrt(
            call("vcm", FLOW.average, x0, x1, t, s, lam, **UNGUIDED["vcm"])[1]["mse"].mean()
        )
        np.testing.assert_allclose(root(0.05) / root(0.025), 4, atol=0.15)
        assert root(1e-9) == root(1e-6), "below the least gap lambda is of no effect"


@pytest.mark.parametrize("name", ["flow_matching", "reflow", "wcfm"])
def test_without_error_where_pairs_have_the_velocity_of_the_network(name):
    with jax.enable_x64(True):
        x0, x1, t, _ = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        loss, aux = call(name, FLOW.average, x0, x1, t, t, None, num_instant=6)
        assert loss < 1e-24 and aux["mse"].dtype == np.float64
        assert call(name, FLOW.average, x0 + 0.1, x1, t, t, None, num_instant=6)[0] > 1e-4


def test_reflow_with_the_exact_teacher_is_exact_in_one_euler_step():
    mu, sigma = FLOW.mu, FLOW.sigma

    def straight(x, t, s, cond):
        t = t[:, None, None]
        x1 = (x - (1 - t) * mu) / ((1 - t) * sigma + t)
        return (1 - sigma) * x1 - mu

    with jax.enable_x64(True):
        _, x1, t, _ = batch()
        x0 = mu + sigma * x1  # where the flow takes x1
        assert call("reflow", straight, x0, x1, t, t, None, num_instant=6)[0] < 1e-24
        one = x1 - straight(x1, np.ones(6), np.ones(6), None)
        np.testing.assert_allclose(one, x0, atol=1e-12)


def test_the_gibbs_weights_give_the_velocity_of_the_tilted_coupling():
    """The best linear u under the weights, on a grid of pairs, against the Gaussian closed form."""
    eps, mu, sigma, t = 0.8, 0.7, 0.4, 0.6
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z0, z1 = (a.ravel() for a in np.meshgrid(nodes, nodes))
    keep = np.outer(weights, weights).ravel()
    with jax.enable_x64(True):
        x0, x1 = (mu + sigma * z0)[:, None, None], z1[:, None, None]
        size = len(x0)

        def loss(theta):
            net = lambda x, t, s, c: theta[0] + theta[1] * x
            # The nodes' own weights enter as copies of rows would: scale every squared error.
            times = np.full(size, t)
            row = lambda a, b: wcfm_loss(
                net, a[None], b[None], times[:1], times[:1], None, empty(1), empty(1),
                np.zeros(1, bool), WCFMConfig(gibbs_eps=eps), num_instant=1,
            )[1]["mse"][0]  # fmt: skip
            cost = np.square(x1 - x0).mean((1, 2))
            return (keep * np.exp(-cost / eps) * jax.vmap(row)(x0, x1)).sum()

        # The closed form of METHOD: precision and mean of (x0, x1) under the tilted coupling.
        precision = np.array([[1 / sigma**2 + 2 / eps, -2 / eps], [-2 / eps, 1 + 2 / eps]])
        cov = np.linalg.inv(precision)
        mean = cov @ [mu / sigma**2, 0]
        to_x, to_v = np.array([1 - t, t]), np.array([-1.0, 1.0])
        slope = to_v @ cov @ to_x / (to_x @ cov @ to_x)
        best = jnp.array([to_v @ mean - slope * to_x @ mean, slope])
        gradient = jax.grad(loss)(best)
        assert np.abs(gradient).max() < 1e-9 * keep.sum()
        assert np.abs(jax.grad(loss)(best * 1.05)).max() > 1e-4 * keep.sum()


def test_wcfm_weights_have_mean_one_and_fall_with_the_cost():
    x0, x1, t, _ = batch(8)
    mse = call("flow_matching", linear_net, x0, x1, t, t, None, num_instant=8)[1]["mse"]
    cost = np.square(x1 - x0).mean((1, 2))
    weight = np.exp(-cost / 0.5)
    expected = (weight / weight.mean() * mse).mean()
    loss, _ = call("wcfm", linear_net, x0, x1, t, t, None, num_instant=8, gibbs_eps=0.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    near_matching, _ = call("wcfm", linear_net, x0, x1, t, t, None, num_instant=8, gibbs_eps=1e6)
    np.testing.assert_allclose(near_matching, mse.mean(), rtol=1e-5)


# name -> rows of each call of the network, of 8 with 6 at s = t, at the default settings.
PASSES = {
    "vcm": [8, 8, 2, 2],
    "flow_matching": [8],
    "soflow": [8, 8, 2, 2],
    "meanflow": [6, 8, 2, 2],
    "split_meanflow": [8, 6, 2, 2],
    "shortcut": [8, 6, 2, 2],
    "reflow": [8],
    "wcfm": [8],
}
TRAINED = dict.fromkeys(PASSES, [0]) | {"meanflow": [0, 3]}  # calls that a gradient goes through


def counted(name, settings, num_instant=6):
    x0, x1, t, s = batch(8, num_instant)
    if OBJECTIVES[name].instant_only:
        num_instant, s = 8, t
    rows = []

    def net(x, t, s, cond):
        assert x.shape[0] == t.shape[0] == s.shape[0] == cond["c"].shape[0]
        rows.append(x.shape[0])
        return linear_net(x, t, s, cond)

    call(name, net, x0, x1, t, s, 0.1, num_instant, **settings)
    return rows


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_row_pays_for_a_pass_it_does_not_need(name):
    assert counted(name, {}) == PASSES[name]


@pytest.mark.parametrize(
    "name, settings, num_instant, passes",
    [
        ("soflow", dict(guidance_scale=1.0), 6, [8, 2]),
        ("soflow", dict(mix_ratio=1.0), 6, [8, 8, 2]),
        ("meanflow", dict(omega=1.0, kappa=0.0), 6, [6, 2]),
        ("meanflow", dict(omega=0.5, kappa=0.5), 6, [6, 2, 2]),
        ("meanflow", {}, 8, [8, 8]),
        ("meanflow", {}, 0, [8, 8, 8]),
        ("split_meanflow", dict(guidance_scale=1.0), 6, [8, 2, 2]),
        ("shortcut", {}, 0, [8, 8, 8]),
        ("soflow", {}, 8, [8, 8]),
    ],
)
def test_passes_without_effect_are_left_out(name, settings, num_instant, passes):
    assert counted(name, settings, num_instant) == passes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_trained_prediction_has_a_gradient(name):
    """Every call of the network has its own factor; the trained ones alone may move the loss."""
    n = 8 if OBJECTIVES[name].instant_only else 3
    x0, x1, t, s = batch(8, n, dtype=np.float32)
    is_null = np.arange(8) == 4

    def with_factors(factors):
        calls = iter(factors)
        net = lambda *args: next(calls) * linear_net(*args)
        return call(name, net, x0, x1, t, s, 0.2, n, is_null)[0]

    gradients = jax.grad(with_factors)(jnp.ones(len(PASSES[name])))
    assert np.flatnonzero(gradients).tolist() == TRAINED[name]


def test_the_gradient_of_meanflow_does_not_go_through_the_derivative():
    x0, x1, t, s = batch(4, 0, dtype=np.float32)
    net = lambda theta: lambda *args: theta * linear_net(*args)
    settings = dict(omega=1.0, kappa=0.0, p=0.0)
    target = call("meanflow", net(1.3), x0, x1, t, s, **settings)[1]["target"]
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    frozen = lambda theta: jnp.square(net(theta)(x_t, t, s, empty(4)) - target).sum((1, 2)).mean()
    found = jax.grad(lambda theta: call("meanflow", net(theta), x0, x1, t, s, **settings)[0])(1.3)
    np.testing.assert_allclose(found, jax.grad(frozen)(1.3), rtol=1e-5)


@pytest.mark.parametrize("name", ["vcm", "soflow", "meanflow", "split_meanflow", "shortcut"])
def test_null_rows_aim_at_the_plain_velocity(name):
    """And see the empty condition, whatever their own is: they are the same with and without it."""
    x0, x1, t, s = batch(4, 4, dtype=np.float32)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1
    plain = np.square(linear_net(x_t, t, t, empty(4, 1.0)) - (x1 - x0)).mean((1, 2))
    is_null = np.array([True, False, True, False])
    _, aux = call(name, linear_net, x0, x1, t, s, 0.2, 4, is_null)
    np.testing.assert_array_equal(np.isclose(aux["mse"], plain, rtol=1e-4), is_null)


def test_shortcut_s_finest_halves_are_instant_velocities():
    asked = []

    def net(x, t, s, cond):
        asked.append(np.asarray(t - s))
        return linear_net(x, t, s, cond)

    x0, x1, _, _ = batch(2)
    t, s = np.float32([0.5, 0.5]), np.float32([0.5 - 2 / 8, 0.5 - 2 / 4])
    call("shortcut", net, x0, x1, t, s, None, finest=8)
    np.testing.assert_allclose(asked, [[0.25, 0.5], [0, 0.25], [0, 0.25]], atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_drawn_times_are_what_the_loss_takes(name):
    config = OBJECTIVES[name]()
    n = 4000 if config.instant_only else 1000
    t, s, lam = config.draw(jax.random.key(0), 4000, n, 50, 100)
    np.testing.assert_array_equal(t[:n], s[:n])
    assert (t <= 1).all() and (s >= 0).all()
    if n < 4000:
        assert (t[n:] - s[n:] >= 0.99e-4).all()
    if name == "split_meanflow":
        assert lam.shape == (4000,) and 0.45 < lam.mean() < 0.55
    elif name in ("vcm", "soflow"):
        l, _ = intermediate_time(t[n:], s[n:], lam)
        assert 0 < lam < 0.1 and (l < t[n:]).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_instant_times_are_logit_normal(name):
    config = OBJECTIVES[name]()
    t, _, _ = config.draw(jax.random.key(0), 40_000, 40_000, 50, 100)
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose(np.median(logit), config.time_mean, atol=0.03)
    np.testing.assert_allclose(np.std(logit), config.time_std, atol=0.03)
    # SoundVCM 4.3, MeanFlow's ImageNet runs, SoFlow's code, MMAudio.
    published = {"vcm": -0.4, "meanflow": -0.4, "soflow": -0.2, "flow_matching": 0.0}
    assert config.time_mean == published.get(name, config.time_mean)


@pytest.mark.parametrize("name", ["split_meanflow", "shortcut"])
def test_composed_jumps_are_weighted_and_guided_where_they_should_be(name):
    x0, x1, t, s = batch(num_instant=6, dtype=np.float32)
    t[:3] = s[:3] = 0.9
    ask = lambda **settings: call(name, linear_net, x0, x1, t, s, num_instant=6, **settings)
    loss, aux = ask(p=1.0, eps=0.5)
    np.testing.assert_allclose(loss, (aux["mse"] / (aux["mse"] + 0.5)).mean(), rtol=1e-5)
    np.testing.assert_allclose(ask(p=0.0)[0], aux["mse"].mean(), rtol=1e-5)
    everywhere = ask(guidance_interval=(0.0, 1.0))[1]["mse"]
    assert (everywhere[:3] != aux["mse"][:3]).all()  # the default ends at 0.8
    np.testing.assert_array_equal(everywhere[3:], aux["mse"][3:])
    np.testing.assert_allclose(aux["mse"][:3], aux["velocity_mse"][:3], rtol=1e-5)


def test_the_noising_of_a_run_is_its_settings_own():
    x0, x1, t, _ = batch()
    for noising, (a, b) in {
        "linear": (1 - t, t), "trigonometric": (np.cos(np.pi / 2 * t), np.sin(np.pi / 2 * t))
    }.items():  # fmt: skip
        found = make_settings("soflow", noising=noising).noised(x0, x1, t)
        a, b = (c[:, None, None] for c in (a, b))
        np.testing.assert_allclose(found, a * x0 + b * x1, rtol=1e-5)


def test_shortcut_s_grid():
    t, s, _ = ShortcutConfig(finest=8).draw(jax.random.key(1), 6000, 0, 0, 1)
    lengths, counts = np.unique(t - s, return_counts=True)
    np.testing.assert_allclose(lengths, [0.25, 0.5, 1])
    assert counts.min() > 1800
    np.testing.assert_allclose((t / (t - s)) % 1, 0, atol=1e-6)


def test_soflow_s_distribution_of_times():
    t, s, _ = SoFlowConfig().draw(jax.random.key(0), 40_000, 20_000, 0, 1)
    logit = lambda p: np.log(p) - np.log1p(-p)
    np.testing.assert_allclose(np.median(logit(t[:20_000])), -0.2, atol=0.03)
    np.testing.assert_allclose(np.median(logit(t[20_000:])), 0.2, atol=0.03)
    np.testing.assert_allclose(logit(t[20_000:]).std(), 0.8, atol=0.02)
    # s is N(-1, 0.8), cut at t.
    assert np.quantile(logit(np.float64(s[20_000:])), 0.1) == pytest.approx(-2.05, abs=0.06)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_a_network_of_half_precision_in_float32_under_jit(name):
    n = 4 if OBJECTIVES[name].instant_only else 2
    x0, x1, t, s = batch(4, n, dtype=np.float32)

    def loss(theta):
        net = lambda *args: (theta * linear_net(*args)).astype(jnp.bfloat16)
        return call(name, net, jnp.asarray(x0, jnp.bfloat16), x1, t, s, 0.2, n)

    (value, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(1.0)
    assert {value.dtype, aux["mse"].dtype} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(gradient) and gradient != 0 and aux["velocity_mse"].shape == (n,)


# Parity with the original code's numbers, in float64.


def tiny_params(description):
    table = description["tiny_params"] if "tiny_params" in description else TINY
    state = golden.fill(table, "tiny.")
    return {name: jnp.asarray(value, jnp.float64) for name, value in state.items()}


TINY = [
    ["emb.weight", [5, 5], "fan_in"], ["fc1.weight", [32, 31], "fan_in"],
    ["fc1.bias", [32], "small"], ["fc2.weight", [24, 32], "fan_in"], ["fc2.bias", [24], "small"],
]  # fmt: skip


def tiny_net(params, x, t, h, label):
    """`B ...`, two times and labels `B` -> `B ...`."""
    inputs = jnp.concatenate(
        [x.reshape(len(x), -1), t[:, None], h[:, None], params["emb.weight"][label]], 1
    )
    hidden = inputs @ params["fc1.weight"].T + params["fc1.bias"][None]
    out = jax.nn.silu(hidden) @ params["fc2.weight"].T + params["fc2.bias"][None]
    return out.reshape(x.shape)


SOFLOW = golden.load(PARITY, "soflow")[0]["cases"]


@pytest.mark.parametrize("case", SOFLOW)
@pytest.mark.parametrize("kind", ["velocity", "consistency"])
def test_soflow_has_the_losses_and_gradients_of_the_original(case, kind):
    description, data = golden.load(PARITY, "soflow")
    settings, expected = description["cases"][case], description["results"][f"{case}.{kind}"]
    with jax.enable_x64(True):
        params, size = tiny_params(description), len(data["x"])
        config = SoFlowConfig(
            noising={"Linear": "linear", "Trig": "trigonometric"}[settings["noising"]],
            parameterisation={"Euler": "euler", "Trig": "trigonometric"}[settings["coef"]],
            guidance_scale=settings["cfg_scale"], mix_ratio=settings["mix"],
            decay_start=settings["decay"], p=settings["p"], eps=settings["eps"],
        )  # fmt: skip
        null = np.full(size, description["num_classes"])
        labelled = settings["labels"] is not None
        labels = data["labels"] if labelled else null
        # The original masks labels where it guides alone.
        masks = labelled and settings["cfg_scale"] > 1
        is_null = data["cfg_mask"] if masks else np.zeros(size, bool)
        instant = kind == "velocity"
        t = data["t_velocity" if instant else "t_cons"]
        s = t if instant else data["s_cons"]
        lam = None if instant else (data["l_cons"] - t) / (s - t)

        def loss(params):
            net = lambda x, t, s, label: tiny_net(params, x, t, s, label)
            return soflow_loss(
                net, data["x"], data[f"noise_{kind}"], t, s, lam, labels, null, is_null, config,
                num_instant=size if instant else 0,
            )  # fmt: skip

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        value, aux, gradients = jax.device_get((value, aux, gradients))
        slope = np.pi / 2 if settings["coef"] == "Trig" and instant else 1
        weight = (aux["mse"] + config.eps) ** -config.p / slope
    np.testing.assert_allclose(aux["mse"].mean(), expected["mse"], rtol=1e-9)
    np.testing.assert_allclose(weight.mean(), expected["weight"], rtol=1e-9)
    if instant:  # the original's consistency value is no error, only its gradient means something
        np.testing.assert_allclose(value, expected["loss"], rtol=1e-9)
    for name, gradient in gradients.items():
        assert golden.relative_error(gradient, data[f"grad.{case}.{kind}.{name}"]) < 1e-9, name


def test_soflow_s_decay_and_middle_times_are_the_original_s():
    description, data = golden.load(PARITY, "soflow")
    with jax.enable_x64(True):
        found = smooth_decay(jnp.asarray(data["decay_t"]), 0.8, 0.025)
        np.testing.assert_allclose(found, data["decay_scale_0.8"], rtol=1e-5, atol=1e-12)
        assert (smooth_decay(jnp.linspace(0, 1, 9), 1.0, 0.025) == 1).all()
        middle = [
            intermediate_time(jnp.float64(0.9), 0.2, lambda_schedule(step, 400, 0.1, 0.002))[0]
            for step in (0, 100, 399)
        ]
    # By the original's exponential schedule; the last one is its l after that many steps.
    np.testing.assert_allclose(middle, description["results"]["middle_time"]["Exponent"], 1e-6)


MEANFLOW = golden.load(PARITY, "meanflow")[0]["cases"]


@pytest.mark.parametrize("case", MEANFLOW)
def test_meanflow_has_the_targets_losses_and_gradients_of_the_original(case):
    description, data = golden.load(PARITY, "meanflow")
    settings, expected = description["cases"][case], description["results"][case]
    size = description["B"]
    num_instant = int(size * settings.get("data_proportion", 0.75))
    guided = settings.get("guidance_eq", "cfg") != ""
    config = MeanFlowConfig(
        omega=settings.get("omega", 1.0) if guided else 1.0,
        kappa=settings.get("kappa", 0.5) if guided else 0.0,
        guidance_interval=(settings.get("t_start", 0.0), settings.get("t_end", 1.0)),
        p=settings.get("norm_p", 1.0), eps=settings.get("norm_eps", 0.01),
    )  # fmt: skip
    with jax.enable_x64(True):
        params = tiny_params(description)
        t, s = data["t"], data[f"r.{case}"]
        null = np.full(size, description["num_classes"])
        is_null = np.arange(size) < expected["num_drop"]

        def loss(params):
            net = lambda x, t, s, label: tiny_net(params, x, t, t - s, label)
            return meanflow_loss(
                net, data["x"], data["noise"], t, s, None, data["labels"], null, is_null, config,
                num_instant=num_instant,
            )  # fmt: skip

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        value, aux, gradients = jax.device_get((value, aux, gradients))
    np.testing.assert_array_equal(t[:num_instant], s[:num_instant])
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-9)
    assert golden.relative_error(aux["target"], data[f"u_tgt.{case}"]) < 1e-9
    np.testing.assert_allclose(24 * aux["mse"], data[f"sq_error_sum.{case}"], rtol=1e-9)
    for name, gradient in gradients.items():
        assert golden.relative_error(gradient, data[f"grad.{case}.{name}"]) < 1e-8, name


# From the network to u, and from names to settings.


@pytest.mark.parametrize("parameterisation", ["euler", "trigonometric"])
def test_soflow_s_network_becomes_an_average_velocity(parameterisation):
    config = SoFlowConfig(parameterisation=parameterisation)
    x, _, t, s = batch(dtype=np.float32)
    u = config.velocity(linear_net)
    found = x + (s - t)[:, None, None] * u(x, t, s, empty(6))
    angle = np.pi / 2 * (s - t)[:, None, None]
    f = {
        "euler": x + (s - t)[:, None, None] * linear_net(x, t, s, empty(6)),
        "trigonometric": np.cos(angle) * x + np.sin(angle) * linear_net(x, t, s, empty(6)),
    }[parameterisation]
    np.testing.assert_allclose(found, f, rtol=1e-5, atol=1e-6)
    # Its limit at s = t, where the quotient itself is 0 / 0; and the gradient is finite there.
    np.testing.assert_allclose(u(x, t, t, empty(6)), u(x, t, t - 1e-3, empty(6)), atol=5e-3)
    assert np.isfinite(jax.grad(lambda x: u(x, t, t, empty(6)).sum())(x)).all()


def test_trigonometric_noising_runs_from_data_to_noise():
    x0, x1, t, _ = batch(dtype=np.float32)
    end = lambda time: noised(x0, x1, np.full(6, time, np.float32), "trigonometric")
    np.testing.assert_allclose(end(0), x0, atol=1e-6)
    np.testing.assert_allclose(end(1), x1, atol=1e-6)


def test_names_and_settings():
    settings, rest = read_section({"name": "meanflow", "omega": 2.0, "null_prob": 0.3})
    assert settings == MeanFlowConfig(omega=2.0) and rest == {"null_prob": 0.3}
    assert settings.name == "meanflow" and OBJECTIVES["meanflow"] is MeanFlowConfig
    listed = make_settings("vcm", guidance_interval=[0.1, 0.5])
    assert listed.guidance_interval == (0.1, 0.5) and hash(listed)
    with pytest.raises(ValueError, match="'gan' is not one of vcm, flow_matching, soflow"):
        make_settings("gan")
    with pytest.raises(ValueError, match=r"meanflow has no setting lambda_end, .*py:meanflow\)"):
        make_settings("meanflow", lambda_end=0.1, mix_ratio=0.5)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("soflow", {"noising": "cubic"}, "objective.noising must be one of linear, trig"),
        ("soflow", {"parameterisation": "x"}, "objective.parameterisation must be one of euler"),
        ("soflow", {"decay_rate": 0.0}, "objective.decay_rate"),
        ("soflow", {"jump_std": 0.0}, "objective.jump_std"),
        ("meanflow", {"kappa": 1.0}, "objective.kappa"),
        ("shortcut", {"finest": 96}, "objective.finest must be a power of 2, >= 2, not 96"),
        ("wcfm", {"gibbs_eps": 0.0}, "objective.gibbs_eps"),
        ("reflow", {"teacher_steps": 0}, "objective.teacher_steps"),
        ("flow_matching", {"guidance_interval": (0.9, 0.1)}, "objective.guidance_interval"),
        ("split_meanflow", {"instant_ratio": 2.0}, "objective.instant_ratio"),
    ],
)
def test_settings_out_of_range(name, change, message):
    with pytest.raises(ValueError, match=message):
        make_settings(name, **change)
    assert dataclasses.is_dataclass(make_settings(name))


def test_the_flow_of_the_tests_is_the_one_of_the_other_tests():
    """The traceable flow agrees with the plain one, also across its removable singularity."""
    plain = GaussianFlow(0.7, 0.4)
    x, _, t, s = batch()
    s[0] = t[0]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    with jax.enable_x64(True):
        close(
            FLOW.average(x, t, s, None),
            plain.average_velocity(x, t[:, None, None], s[:, None, None]),
        )
