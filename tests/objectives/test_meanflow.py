"""MeanFlow: its identity, its cost, parity with the original code."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import (
    FLOW,
    batch,
    check_exact_identity,
    conditions,
    linear_net,
    loss_of,
    rows_of_passes,
    tiny_net,
    tiny_params,
    trained_passes,
)

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.meanflow import MeanFlowConfig, meanflow_loss

PARITY = golden.DATA / "objectives"
UNGUIDED = dict(omega=1.0, kappa=0.0)


def test_the_exact_flow_satisfies_its_identity():
    check_exact_identity("meanflow", **UNGUIDED)


def test_with_the_velocity_of_the_sample_the_residual_is_zero_in_the_mean_alone():
    with jax.enable_x64(True):
        x0, x1, t, s = batch()
        _, aux = loss_of("meanflow", FLOW.average, x0, x1, t, s, **UNGUIDED)
        assert aux["mse"].min() > 1e-3


@pytest.mark.parametrize(
    "settings, num_instant, passes",
    [
        ({}, 6, [6, 8, 2, 2, 2]),
        (UNGUIDED, 6, [6, 2, 2]),
        (dict(omega=0.5, kappa=0.5), 6, [6, 2, 2, 2]),
        ({}, 8, [8, 8]),
        ({}, 0, [8, 8, 8, 8]),
    ],
)
def test_no_row_pays_for_a_pass_that_it_does_not_need(settings, num_instant, passes):
    """The last two passes are the tangent and the prediction of the JVP."""
    assert rows_of_passes("meanflow", num_instant, **settings) == passes


def test_only_the_trained_predictions_have_a_gradient():
    """Those of the s = t rows, and those of the JVP."""
    assert trained_passes("meanflow") == ([0, 3], 8)


def test_the_gradient_does_not_go_through_the_derivative():
    x0, x1, t, s = batch(4, 0, dtype=np.float32)
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * x1

    def loss(theta):
        def net(*args):
            return theta * linear_net(*args)

        return loss_of("meanflow", net, x0, x1, t, s, **UNGUIDED, p=0.0)

    target = loss(1.3)[1]["target"]

    def against_frozen_target(theta):
        error = theta * linear_net(x_t, t, s, conditions(4)) - target
        return jnp.square(error).sum((1, 2)).mean()

    found = jax.grad(lambda theta: loss(theta)[0])(1.3)
    np.testing.assert_allclose(found, jax.grad(against_frozen_target)(1.3), rtol=1e-5)


@pytest.mark.parametrize("case", golden.load(PARITY, "meanflow")[0]["cases"])
def test_targets_losses_and_gradients_are_those_of_the_original(case):
    description, data = golden.load(PARITY, "meanflow")
    settings, expected = description["cases"][case], description["results"][case]
    size = description["B"]
    num_instant = int(size * settings.get("data_proportion", 0.75))
    guided = settings.get("guidance_eq", "cfg") != ""
    config = MeanFlowConfig(
        omega=settings.get("omega", 1.0) if guided else 1.0,
        kappa=settings.get("kappa", 0.5) if guided else 0.0,
        guidance_interval=(settings.get("t_start", 0.0), settings.get("t_end", 1.0)),
        p=settings.get("norm_p", 1.0),
        eps=settings.get("norm_eps", 0.01),
    )
    with jax.enable_x64(True):
        params = tiny_params(description)
        t, s = data["t"], data[f"r.{case}"]
        null = np.full(size, description["num_classes"])
        is_null = np.arange(size) < expected["num_drop"]

        def loss(params):
            def net(x, t, s, label):
                return tiny_net(params, x, t, t - s, label)

            args = (net, data["x"], data["noise"], t, s, None, data["labels"], null, is_null)
            return meanflow_loss(*args, config, num_instant=num_instant)

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        value, aux, gradients = jax.device_get((value, aux, gradients))
    np.testing.assert_array_equal(t[:num_instant], s[:num_instant])
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-9)
    assert golden.relative_error(aux["target"], data[f"u_tgt.{case}"]) < 1e-9
    np.testing.assert_allclose(24 * aux["mse"], data[f"sq_error_sum.{case}"], rtol=1e-9)
    for name, gradient in gradients.items():
        assert golden.relative_error(gradient, data[f"grad.{case}.{name}"]) < 1e-8, name


def test_the_distribution_of_times_is_that_of_the_imagenet_runs():
    assert make_settings("meanflow").time_mean == -0.4


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="objective.kappa"):
        make_settings("meanflow", kappa=1.0)
