"""SoFlow: the exact solution operator, its cost, its times, parity with the original code."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    conditions,
    linear_net,
    loss_of,
    on_the_flow,
    rows_of_passes,
    tiny_net,
    tiny_params,
    trained_passes,
)

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.guidance import smooth_decay
from vcm_jax.objectives.soflow import SoFlowConfig, noised, soflow_loss
from vcm_jax.objectives.times import intermediate_time, lambda_schedule

PARITY = golden.DATA / "objectives"
UNGUIDED = dict(guidance_scale=1.0, mix_ratio=1.0)


@pytest.mark.parametrize("parameterisation", ["euler", "trigonometric"])
def test_the_difference_quotient_shrinks_as_lambda(parameterisation):
    """The network of the exact solution operator, in either parameterisation."""

    def net(x, t, s, cond):
        f = x + (s - t)[:, None, None] * FLOW.average(x, t, s, cond)
        if parameterisation == "euler":
            return (f - x) / (s - t)[:, None, None]
        angle = np.pi / 2 * (s - t)[:, None, None]
        return (f - jnp.cos(angle) * x) / jnp.sin(angle)

    settings = UNGUIDED | dict(parameterisation=parameterisation)
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        x0, x1 = on_the_flow(x0, x1, t)
        mse = [
            loss_of("soflow", net, x0, x1, t, s, lam, **settings)[1]["mse"].mean()
            for lam in (0.1, 0.05, 0.025, 0.0125)
        ]
    residuals = np.sqrt(mse)
    ratios = np.divide(residuals[:-1], residuals[1:])
    np.testing.assert_allclose(ratios, 2, atol=0.15)
    assert residuals[0] > 1e-4 and abs(ratios[-1] - 2) < abs(ratios[0] - 2)


@pytest.mark.parametrize(
    "settings, num_instant, passes",
    [
        ({}, 6, [8, 8, 2, 2]),
        (dict(guidance_scale=1.0), 6, [8, 2]),
        (dict(mix_ratio=1.0), 6, [8, 8, 2]),
        (dict(mix_ratio=0.0), 6, [8, 2, 2]),
        ({}, 8, [8, 8]),
    ],
)
def test_no_row_pays_for_a_pass_that_it_does_not_need(settings, num_instant, passes):
    assert rows_of_passes("soflow", num_instant, **settings) == passes


def test_only_the_trained_prediction_has_a_gradient():
    assert trained_passes("soflow") == ([0], 8)


def test_the_noising_of_a_run_follows_its_settings():
    x0, x1, t, _ = batch()
    quarter = np.pi / 2 * t
    for noising, factors in {
        "linear": (1 - t, t),
        "trigonometric": (np.cos(quarter), np.sin(quarter)),
    }.items():
        found = make_settings("soflow", noising=noising).noised(x0, x1, t)
        a, b = (c[:, None, None] for c in factors)
        np.testing.assert_allclose(found, a * x0 + b * x1, rtol=1e-5)


def test_trigonometric_noising_runs_from_data_to_noise():
    x0, x1, t, _ = batch(dtype=np.float32)
    for time, end in ((0, x0), (1, x1)):
        found = noised(x0, x1, np.full(6, time, np.float32), "trigonometric")
        np.testing.assert_allclose(found, end, atol=1e-6)


def test_the_distribution_of_times_is_that_of_the_original_code():
    t, s, _ = SoFlowConfig().draw(jax.random.key(0), 40_000, 20_000, 0, 1)

    def logit(p):
        return np.log(p) - np.log1p(-p)

    assert SoFlowConfig().time_mean == -0.2
    np.testing.assert_allclose(np.median(logit(t[:20_000])), -0.2, atol=0.03)
    np.testing.assert_allclose(np.median(logit(t[20_000:])), 0.2, atol=0.03)
    np.testing.assert_allclose(logit(t[20_000:]).std(), 0.8, atol=0.02)
    # s is N(-1, 0.8), cut at t.
    assert np.quantile(logit(np.float64(s[20_000:])), 0.1) == pytest.approx(-2.05, abs=0.06)


def test_l_lies_below_t():
    t, s, lam = SoFlowConfig().draw(jax.random.key(0), 4000, 1000, 50, 100)
    l, _ = intermediate_time(t[1000:], s[1000:], lam)
    assert 0 < lam < 0.1 and (l < t[1000:]).all()


@pytest.mark.parametrize("parameterisation", ["euler", "trigonometric"])
def test_the_network_becomes_an_average_velocity(parameterisation):
    x, _, t, s = batch(dtype=np.float32)
    u = SoFlowConfig(parameterisation=parameterisation).velocity(linear_net)
    cond, gap = conditions(6), (s - t)[:, None, None]
    found = x + gap * u(x, t, s, cond)
    f = {
        "euler": x + gap * linear_net(x, t, s, cond),
        "trigonometric": np.cos(np.pi / 2 * gap) * x
        + np.sin(np.pi / 2 * gap) * linear_net(x, t, s, cond),
    }[parameterisation]
    np.testing.assert_allclose(found, f, rtol=1e-5, atol=1e-6)
    # Its limit at s = t, where the quotient itself is 0 / 0; and the gradient is finite there.
    np.testing.assert_allclose(u(x, t, t, cond), u(x, t, t - 1e-3, cond), atol=5e-3)
    assert np.isfinite(jax.grad(lambda x: u(x, t, t, cond).sum())(x)).all()


@pytest.mark.parametrize("case", golden.load(PARITY, "soflow")[0]["cases"])
@pytest.mark.parametrize("kind", ["velocity", "consistency"])
def test_losses_and_gradients_are_those_of_the_original(case, kind):
    description, data = golden.load(PARITY, "soflow")
    settings, expected = description["cases"][case], description["results"][f"{case}.{kind}"]
    with jax.enable_x64(True):
        params, size = tiny_params(description), len(data["x"])
        config = SoFlowConfig(
            noising={"Linear": "linear", "Trig": "trigonometric"}[settings["noising"]],
            parameterisation={"Euler": "euler", "Trig": "trigonometric"}[settings["coef"]],
            guidance_scale=settings["cfg_scale"],
            mix_ratio=settings["mix"],
            decay_start=settings["decay"],
            p=settings["p"],
            eps=settings["eps"],
        )
        null = np.full(size, description["num_classes"])
        labelled = settings["labels"] is not None
        labels = data["labels"] if labelled else null
        # The original masks labels only where it guides.
        masks = labelled and settings["cfg_scale"] > 1
        is_null = data["cfg_mask"] if masks else np.zeros(size, bool)
        instant = kind == "velocity"
        t = data["t_velocity" if instant else "t_cons"]
        s = t if instant else data["s_cons"]
        lam = None if instant else (data["l_cons"] - t) / (s - t)

        def loss(params):
            def net(x, t, s, label):
                return tiny_net(params, x, t, s, label)

            args = (net, data["x"], data[f"noise_{kind}"], t, s, lam, labels, null, is_null)
            return soflow_loss(*args, config, num_instant=size if instant else 0)

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        value, aux, gradients = jax.device_get((value, aux, gradients))
        slope = np.pi / 2 if settings["coef"] == "Trig" and instant else 1
        weight = (aux["mse"] + config.eps) ** -config.p / slope
    np.testing.assert_allclose(aux["mse"].mean(), expected["mse"], rtol=1e-9)
    np.testing.assert_allclose(weight.mean(), expected["weight"], rtol=1e-9)
    if instant:  # the consistency value of the original is no error; its gradient alone counts
        np.testing.assert_allclose(value, expected["loss"], rtol=1e-9)
    for name, gradient in gradients.items():
        assert golden.relative_error(gradient, data[f"grad.{case}.{kind}.{name}"]) < 1e-9, name


def test_the_decay_of_guidance_and_l_are_those_of_the_original():
    description, data = golden.load(PARITY, "soflow")
    with jax.enable_x64(True):
        found = smooth_decay(jnp.asarray(data["decay_t"]), 0.8, 0.025)
        np.testing.assert_allclose(found, data["decay_scale_0.8"], rtol=1e-5, atol=1e-12)
        assert (smooth_decay(jnp.linspace(0, 1, 9), 1.0, 0.025) == 1).all()
        middle = [
            intermediate_time(jnp.float64(0.9), 0.2, lambda_schedule(step, 400, 0.1, 0.002))[0]
            for step in (0, 100, 399)
        ]
    # By the exponential schedule of the original; the last one is its l after that many steps.
    np.testing.assert_allclose(middle, description["results"]["middle_time"]["Exponent"], 1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noising": "cubic"}, "objective.noising must be one of linear, trig.*, not 'cubic'"),
        ({"parameterisation": "x"}, "objective.parameterisation must be one of euler"),
        ({"decay_rate": 0.0}, "objective.decay_rate"),
        ({"jump_std": 0.0}, "objective.jump_std"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        make_settings("soflow", **change)
