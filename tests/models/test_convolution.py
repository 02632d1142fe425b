"""The convolution of the network: its derivatives are those of JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcm_jax.models.convolution import conv1d


def plain(x, kernel):
    """The convolution as a sum over the shifts, which JAX differentiates by itself."""
    reach, length = kernel.shape[0] // 2, x.shape[1]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return sum(padded[:, j : j + length] @ weights for j, weights in enumerate(kernel))


def example(width: int, inputs: int, outputs: int):
    rng = np.random.default_rng(width)
    return rng.standard_normal((2, 9, inputs)), rng.standard_normal((width, inputs, outputs))


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4), (7, 4, 4)])
def test_values_and_derivatives(shape):
    x, kernel = example(*shape)

    def loss(convolve):
        return lambda x, kernel: jnp.sin(convolve(x, kernel)).sum()

    def along_x(convolve):
        """The gradient by the kernel of a derivative along x, as MeanFlow's targets take it."""

        def derivative(kernel):
            both = lambda x: convolve(jnp.sin(convolve(x, kernel)), kernel.swapaxes(1, 2))
            return jnp.sin(jax.jvp(both, (x,), (x,))[1]).sum()

        return jax.grad(derivative)

    with jax.enable_x64(True):
        for of in (
            lambda f: f(x, kernel),
            lambda f: jax.grad(loss(f), (0, 1))(x, kernel),
            lambda f: jax.jvp(f, (x, kernel), (x, kernel))[1],
            lambda f: jax.jvp(lambda x: f(x, kernel), (x,), (x,))[1],
            lambda f: along_x(f)(kernel),
            lambda f: jax.grad(jax.checkpoint(loss(f)), 1)(x, kernel),
        ):
            found, expected = of(conv1d), of(plain)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)


def test_the_gradient_by_the_kernel_is_one_product():
    x, kernel = example(3, 4, 6)
    text = jax.jit(jax.grad(lambda kernel: conv1d(x, kernel).sum())).lower(kernel).as_text()
    assert text.count("stablehlo.dot_general") == 1
