"""The two ways to compute the rotary embedding have the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcm_jax.models import layers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_of_tpus_has_the_numbers_of_other_devices(dtype):
    angles = layers.rope_table(20, 64)
    waves = [np.float32(wave(angles))[None, :, None] for wave in (np.cos, np.sin)]
    x = jax.random.normal(jax.random.key(0), (2, 20, 3, 64)).astype(dtype)
    np.testing.assert_array_equal(layers.rotate_by_product(x, *waves), layers.rotate(x, angles))


def test_tpus_alone_take_the_product():
    rotate = jax.jit(lambda x: layers.rotate(x, layers.rope_table(20, 64)))
    traced = rotate.trace(jnp.zeros((2, 20, 3, 64)))
    for platform, products in (("cpu", 0), ("cuda", 0), ("tpu", 1)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.dot_general") == products
