"""The network as on accelerators: equal blocks as one program.

It is the same function of the same weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcm_jax.models import MODELS, MMDiT
from vcm_jax.models.conditioned import zero_inputs
from vcm_jax.models.mmdit import stack_blocks, unstack_blocks

LENGTHS = dict(latent_seq_len=10, clip_seq_len=3, sync_seq_len=8, text_seq_len=2)
WIDTHS = dict(hidden_dim=16, latent_dim=4, clip_dim=6, sync_dim=5, text_dim=6)
CONFIG = dataclasses.replace(MODELS["demo"], depth=5, fused_depth=2, **LENGTHS, **WIDTHS)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.2 * rng.standard_normal(a.shape, np.float32), tree)


@pytest.mark.parametrize("remat", ["none", pytest.param("products", marks=pytest.mark.slow)])
def test_scanned_blocks_have_the_numbers_of_single_ones(remat):
    """The velocity and all gradients, float32, within 1e-5 of their largest number."""
    inputs = random_like(zero_inputs(CONFIG), 0)
    variables = random_like(jax.eval_shape(MMDiT(CONFIG).init, jax.random.key(0), *inputs), 1)

    def gradient(params, net):
        def loss(params):
            u = net.apply(variables | {"params": params}, *inputs)
            return jnp.square(u).sum(), u

        return jax.grad(loss, has_aux=True)(params)

    def lower(params, **options):
        return jax.jit(gradient, static_argnums=1).lower(params, MMDiT(CONFIG, **options))

    single = lower(variables["params"]).compile()(variables["params"])
    scanned = lower(variables["params"], scan=True, remat=remat)
    # Three joint blocks, of which the last differs, and two fused ones: forward and backward.
    assert scanned.as_text().count("stablehlo.while") == 4
    found = scanned.compile()(variables["params"])
    stacked = stack_blocks(variables["params"], CONFIG)
    assert "joint_blocks_2" in stacked and stacked.keys() >= {"joint_blocks", "fused_blocks"}
    assert jax.tree.structure(lower(stacked).out_info[0]) == jax.tree.structure(stacked)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())

    jax.tree.map(close, found, single)


def test_stacking_is_undone():
    abstract = jax.eval_shape(MMDiT(CONFIG).init, jax.random.key(0), *zero_inputs(CONFIG))
    params = random_like(abstract["params"], 2)
    again = unstack_blocks(stack_blocks(params, CONFIG), CONFIG)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_stacked_weights_of_a_network_with_one_joint_block():
    """There is nothing to stack among the joint blocks, as in `demo` and `laptop`."""
    config = dataclasses.replace(CONFIG, depth=3)
    net, inputs = MMDiT(config, scan=True), random_like(zero_inputs(config), 0)
    variables = random_like(jax.eval_shape(net.init, jax.random.key(0), *inputs), 1)
    stacked = variables | {"params": stack_blocks(variables["params"], config)}
    assert "joint_blocks_0" in stacked["params"] and "fused_blocks" in stacked["params"]
    found = jax.eval_shape(net.apply, stacked, *inputs)
    assert found.shape == inputs[0].shape


def test_features_are_those_after_the_first_quarter_of_the_blocks():
    """The mean of the latent tokens, the same in a network that scans its blocks."""
    config = dataclasses.replace(CONFIG, depth=8, fused_depth=5)  # two of three joint blocks
    inputs = random_like(zero_inputs(config), 0)
    variables = random_like(jax.eval_shape(MMDiT(config).init, jax.random.key(0), *inputs), 1)

    def features(net, x, t, s, cond):
        return net.features(x, t, s, net.encode_conditions(cond))

    def seen(module, _):
        return module.name == "joint_blocks_1"

    found, kept = MMDiT(config).apply(
        variables, *inputs, method=features, capture_intermediates=seen, mutable="intermediates"
    )
    (streams,) = kept["intermediates"]["joint_blocks_1"]["__call__"]
    np.testing.assert_allclose(found, streams[0].mean(1), rtol=1e-5, atol=1e-6)
    scanned = MMDiT(config, scan=True).apply(variables, *inputs, method=features)
    np.testing.assert_allclose(scanned, found, rtol=1e-4, atol=1e-5)
    assert config.feature_depth == 2
