"""The convolution with fewer multiplications against the direct one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vcm_jax.codec import conv, fast_conv


def direct(kernel, x, dilation):
    """'Same' convolution in float64."""
    taps = len(kernel)
    pad = (taps - 1) * dilation // 2
    padded = np.pad(np.float64(x), ((0, 0), (pad, pad), (0, 0)))
    windows = (padded[:, i * dilation :][:, : x.shape[1]] for i in range(taps))
    return sum(window @ np.float64(tap) for window, tap in zip(windows, kernel))


@pytest.mark.parametrize("taps", [3, 7, 11])
@pytest.mark.parametrize("dilation, length", [(1, 37), (3, 40), (5, 4)])
def test_equals_the_direct_convolution(taps, dilation, length):
    rng = np.random.default_rng(taps)
    x = rng.standard_normal((2, length, 6), np.float32)
    kernel = rng.standard_normal((taps, 6, 5), np.float32)
    found = jax.jit(fast_conv.convolve, static_argnums=2)(fast_conv.at_points(kernel), x, dilation)
    expected = direct(kernel, x, dilation)
    assert found.shape == expected.shape and found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 2e-5 * expected.std()


def test_which_kernels_are_replaced():
    shapes = {
        "wide": (7, 96, 200),
        "narrow": (7, 95, 200),
        "even": (8, 96, 96),
        "one": (1, 200, 200),
    }
    params = {f"{name}.weight": jnp.ones(shape) for name, shape in shapes.items()}
    params |= {"wide.bias": jnp.ones(200), "linear.weight": jnp.ones((200, 200))}
    found = conv.for_cpus(params)
    assert set(params) - set(found) == {"wide.weight"}
    assert found["wide.points"].shape == (7, 2, 96, 200)
    x = jnp.ones((1, 20, 96))
    expected = conv.conv(params, "wide", x, 2)
    np.testing.assert_allclose(conv.conv(found, "wide", x, 2), expected, rtol=1e-5)
