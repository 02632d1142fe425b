"""Low-rank adapters, and blocks that see s: what they leave unchanged, and what they change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from vcm_jax.models import MMDiT, ModelConfig, adapter
from vcm_jax.models.adapter import AdapterConfig
from vcm_jax.models.conditioned import zero_inputs
from vcm_jax.models.convolution import conv1d
from vcm_jax.training.selection import select

MODEL = ModelConfig(
    latent_dim=4,
    clip_dim=6,
    sync_dim=5,
    text_dim=6,
    hidden_dim=16,
    num_heads=2,
    depth=3,
    fused_depth=2,
    latent_seq_len=12,
    clip_seq_len=4,
    sync_seq_len=8,
    text_seq_len=3,
    audio_kernel=3,
)
PATHS = {
    "dense": (("a", "kernel"), (5, 4)),
    "conv": (("a", "kernel"), (3, 5, 4)),
    "qkv": (("a", "qkv", "kernel"), (5, 3, 2, 4)),
}


@pytest.mark.parametrize("kind", PATHS)
def test_a_merged_kernel_is_the_layer_beside_its_adapter(kind):
    """W + scale A B against the two paths computed one beside the other."""
    path, shape = PATHS[kind]
    rng = np.random.default_rng(0)
    w, x = (np.float32(rng.standard_normal(s)) for s in (shape, (2, 7, 5)))
    a, b = adapter.init_adapter(jax.random.key(0), path, shape, rank=2).values()
    assert not np.any(b) and np.abs(a).max() > 0
    b = np.float32(rng.standard_normal(b.shape))
    whole = adapter.merge(w, a, b, 0.5)
    if kind == "conv":
        layer = conv1d
        beside = conv1d(x, w) + 0.5 * conv1d(x, a) @ b
    else:
        layer = lambda x, kernel: jnp.tensordot(x, kernel, 1)
        beside = layer(x, w) + 0.5 * layer(layer(x, a), b)
    np.testing.assert_allclose(layer(x, whole), beside, atol=1e-5)


@functools.cache
def random_variables():
    """Variables without zeros: a new network ignores its condition."""
    shapes = jax.eval_shape(MMDiT(MODEL).init, jax.random.key(0), *zero_inputs(MODEL))
    rng = np.random.default_rng(0)
    draw = lambda leaf: np.float32(0.2 * rng.standard_normal(leaf.shape))
    found = jax.tree.map(draw, shapes)
    found["stats"]["latent_std"] = np.ones(MODEL.latent_dim, np.float32)
    return found


def inputs():
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: np.float32(rng.uniform(0, 1, (2, *leaf.shape[1:]))), zero_inputs(MODEL)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_no_bit(dtype):
    """Also where frozen kernels are held in bfloat16, in which the network computes."""
    net, variables = MMDiT(MODEL, dtype=jnp.dtype(dtype)), random_variables()
    found = select(net, ("h_embed",), (), AdapterConfig(rank=2))
    trained, frozen = found.split(variables["params"], jax.random.key(0))
    kernels = [v for k, v in traverse_util.flatten_dict(frozen).items() if k[-1] == "kernel"]
    assert {jnp.dtype(kernel.dtype).name for kernel in kernels} == {dtype}
    apply = jax.jit(
        lambda params: net.apply({"params": params, "stats": variables["stats"]}, *inputs())
    )
    base = apply(variables["params"])
    np.testing.assert_array_equal(apply(found.complete(trained, frozen)), base)
    one = {"h_embed", "fused_blocks_1"}
    assert one < set(trained), "adapters and what is trained itself lie in one tree"
    trained["fused_blocks_1"]["linear1"]["lora_b"] += 1.0
    assert not np.array_equal(apply(found.complete(trained, frozen)), base)


def test_blocks_that_see_s_leave_the_instantaneous_velocity_exact():
    """With a second embedder of zeros, as imported weights have it (Decoupled MeanFlow)."""
    variables = jax.tree.map(lambda a: a, random_variables())
    variables["params"]["h_embed"] = jax.tree.map(np.zeros_like, variables["params"]["h_embed"])
    x, t, s, cond = inputs()
    s = t * s

    def velocity(blocks, s, scan=False):
        net = MMDiT(dataclasses.replace(MODEL, blocks_at_s=blocks), scan=scan)
        return jax.jit(net.apply)(variables, x, t, s, cond)

    plain = velocity(0, t)
    np.testing.assert_array_equal(velocity(0, s), plain)
    for blocks in (1, 2):
        np.testing.assert_array_equal(velocity(blocks, t), plain)
    jumps = velocity(1, s), velocity(2, s)
    assert not np.allclose(jumps[0], plain, atol=1e-3)
    assert not np.allclose(*jumps, atol=1e-3)
    np.testing.assert_allclose(velocity(1, s, scan=True), jumps[0], atol=1e-5)
    with pytest.raises(ValueError, match="blocks_at_s 3 must be less than depth 3"):
        velocity(3, s)
