"""Attention by cuDNN, as far as it can be tried without a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from vcm_jax.models import layers


def rows(*lengths, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, n, 3, 64)), dtype) for n in lengths]


# The lengths of small_16k's joint, last joint and fused blocks, and of large_44k's fused ones.
@pytest.mark.parametrize("queries, keys", [(391, 391), (250, 391), (250, 250), (345, 345)])
def test_jax_has_a_kernel_and_a_gradient_for_the_lengths_of_the_networks(
    queries, keys, monkeypatch
):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

    def loss(q, k, v):
        return layers.attention(q, k, v, "cudnn").astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(
        *rows(queries, keys, keys, dtype=jnp.bfloat16)
    )
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$(\w+)", program)) == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
    assert [a.shape[1] for a in traced.out_info] == [queries, keys, keys]


@pytest.mark.parametrize("queries, keys", [(5, 5), (4, 7), (7, 4), (4, 4)])
def test_rows_that_make_lengths_even_change_nothing(queries, keys):
    q, k, v = rows(queries, keys, keys)
    asked = []

    def attend(q, k, v, **lengths):
        asked.append((q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, implementation="xla", **lengths)

    found = layers._with_even_lengths(attend, q, k, v)
    assert all(length % 2 == 0 for length in asked[0])
    expected = functools.partial(jax.nn.dot_product_attention, implementation="xla")(q, k, v)
    np.testing.assert_allclose(found, expected, atol=1e-6)
