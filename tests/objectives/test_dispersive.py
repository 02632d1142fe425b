"""Dispersive regularisation: the formula, its gradient, and devices that see part of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vcm_jax.devices import sharding
from vcm_jax.devices.layout import Layout
from vcm_jax.objectives.dispersive import dispersive_loss

Z = np.random.default_rng(0).standard_normal((16, 5))


def test_by_hand():
    pairs = [np.exp(-np.square(a - b).sum() / 5) for a in Z for b in Z]
    with jax.enable_x64(True):
        np.testing.assert_allclose(dispersive_loss(Z), np.log(np.mean(pairs)), rtol=1e-12)
        np.testing.assert_allclose(dispersive_loss(0 * Z + 3), 0, atol=1e-12)
    near = dispersive_loss((Z + 30).astype(np.float32)) / np.log(np.mean(pairs))
    np.testing.assert_allclose(near, 1, rtol=1e-4)  # though the squares cancel


def test_its_gradient_moves_rows_apart():
    distances = lambda z: np.square(z[:, None] - z[None]).sum(-1).mean()
    z = Z.astype(np.float32)
    gradient = np.asarray(jax.grad(dispersive_loss)(z))
    assert distances(z - gradient) > distances(z) > distances(z + gradient)
    np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-6)


def test_eight_devices_have_the_loss_and_the_gradient_of_one():
    """Device by device, as the training step computes its gradients."""
    mesh = sharding.make_mesh(4, 2, 1)
    weights = {"w": np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)}
    layout = Layout(mesh, {"w": NamedSharding(mesh, PartitionSpec())})

    def gradients(params, more, rows, whole):
        def loss(params):
            value = dispersive_loss(layout.gather_rows(rows @ params["w"]))
            return value, value

        grads, value = jax.grad(loss, has_aux=True)(params)
        return layout.sum(jax.tree.map(lambda g: g / layout.shards, grads)), value

    found, value = jax.jit(lambda *args: layout.by_device(gradients, *args))(
        weights, None, Z.astype(np.float32), None
    )
    plain = lambda params: dispersive_loss(Z.astype(np.float32) @ params["w"])
    expected_value, expected = jax.value_and_grad(plain)(weights)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-4, atol=1e-6)
    halves = dispersive_loss(jnp.asarray(Z[:8], jnp.float32) @ weights["w"])
    assert abs(halves - expected_value) > 1e-3, "a part of the batch has another loss"
