"""Weighted conditional flow matching: the weights, and the coupling that they make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_batches import (
    batch,
    check_pairs_on_the_flow,
    conditions,
    linear_net,
    loss_of,
    rows_of_passes,
    trained_passes,
)

from vcm_jax.objectives import make_settings
from vcm_jax.objectives.wcfm import WCFMConfig, wcfm_loss


def test_there_is_no_error_on_pairs_with_the_velocity_of_the_network():
    check_pairs_on_the_flow("wcfm")


def test_the_gibbs_weights_give_the_velocity_of_the_tilted_coupling():
    """The best linear u under the weights, on a grid of pairs, against the Gaussian closed form."""
    eps, mu, sigma, t = 0.8, 0.7, 0.4, 0.6
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z0, z1 = (a.ravel() for a in np.meshgrid(nodes, nodes))
    quadrature = np.outer(weights, weights).ravel()
    with jax.enable_x64(True):
        x0, x1 = (mu + sigma * z0)[:, None, None], z1[:, None, None]
        times = np.full(len(x0), t)

        def loss(theta):
            def net(x, t, s, c):
                return theta[0] + theta[1] * x

            def row(a, b):
                args = (a[None], b[None], times[:1], times[:1], None, conditions(1), conditions(1))
                config = WCFMConfig(gibbs_eps=eps)
                _, aux = wcfm_loss(net, *args, np.zeros(1, bool), config, num_instant=1)
                return aux["mse"][0]

            # The weight of a node acts as copies of its row would: it scales the squared error.
            cost = np.square(x1 - x0).mean((1, 2))
            return (quadrature * np.exp(-cost / eps) * jax.vmap(row)(x0, x1)).sum()

        # In closed form: precision and mean of (x0, x1) under the tilted coupling.
        precision = np.array([[1 / sigma**2 + 2 / eps, -2 / eps], [-2 / eps, 1 + 2 / eps]])
        cov = np.linalg.inv(precision)
        mean = cov @ [mu / sigma**2, 0]
        to_x, to_v = np.array([1 - t, t]), np.array([-1.0, 1.0])
        slope = to_v @ cov @ to_x / (to_x @ cov @ to_x)
        best = jnp.array([to_v @ mean - slope * to_x @ mean, slope])
        gradient = jax.grad(loss)(best)
        assert np.abs(gradient).max() < 1e-9 * quadrature.sum()
        assert np.abs(jax.grad(loss)(best * 1.05)).max() > 1e-4 * quadrature.sum()


def test_weights_have_mean_one_and_fall_with_the_cost():
    x0, x1, t, _ = batch(8)
    mse = loss_of("flow_matching", linear_net, x0, x1, t, t, None, num_instant=8)[1]["mse"]
    cost = np.square(x1 - x0).mean((1, 2))
    weight = np.exp(-cost / 0.5)
    expected = (weight / weight.mean() * mse).mean()
    loss, _ = loss_of("wcfm", linear_net, x0, x1, t, t, None, num_instant=8, gibbs_eps=0.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    loss, _ = loss_of("wcfm", linear_net, x0, x1, t, t, None, num_instant=8, gibbs_eps=1e6)
    np.testing.assert_allclose(loss, mse.mean(), rtol=1e-5)  # flow matching


def test_it_costs_one_pass():
    assert rows_of_passes("wcfm") == [8]
    assert trained_passes("wcfm") == ([0], 8)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="objective.gibbs_eps"):
        make_settings("wcfm", gibbs_eps=0.0)
