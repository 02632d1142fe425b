"""One-dimensional convolution with half of the multiplications, for CPUs.

Four neighbouring outputs of a filter of four taps take 16 products directly. They are also the
coefficients of a product of polynomials that is known from its values at seven points, which takes
seven products (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2016). Filters of 3, 7 and 11 taps are one, two and
three filters of four taps. The rounding error is four times that of float32 products.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_TILE = 4  # outputs, and taps
_POINTS = tuple(map(Fraction, (0, 1, -1, 2, -2, "1/2")))  # and infinity
_LEAST_WIDTH = {3: 192, 7: 96, 11: 96}  # with fewer channels the direct convolution is as fast


def _powers(count: int) -> np.ndarray:
    """Values of 1, x, .., x^(count - 1) at the points, and at infinity: (7, count) fractions."""
    rows = [[point**power for power in range(count)] for point in _POINTS]
    return np.array([*rows, [Fraction(0)] * (count - 1) + [Fraction(1)]])


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Gauss-Jordan elimination of exact fractions."""
    size = len(matrix)
    rows = np.concatenate(
        [matrix, np.array([[Fraction(i == j) for j in range(size)] for i in range(size)])], 1
    )
    for column in range(size):
        pivot = next(row for row in range(column, size) if rows[row, column])
        rows[[column, pivot]] = rows[[pivot, column]]
        rows[column] = rows[column] / rows[column, column]
        for row in range(size):
            if row != column:
                rows[row] = rows[row] - rows[row, column] * rows[column]
    return rows[:, size:]


def _matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(7, 7) of seven inputs, (7, 4) of four taps, (4, 7) of seven products: float64."""
    inputs = _inverse(_powers(2 * _TILE - 1)).T.astype(np.float64)
    # Powers of two, which are exact, bring the values at all points to a similar size.
    scale = 2 ** np.round(np.log2(np.abs(inputs).max(axis=1, keepdims=True)))
    powers = _powers(_TILE).astype(np.float64)
    return inputs / scale, powers * scale, powers.T


_INPUTS, _TAPS, _OUTPUTS = _matrices()


def _combine(matrix: np.ndarray, terms: list) -> list:
    """matrix @ terms, without the products with zero."""
    return [sum(np.float32(c) * x for c, x in zip(row, terms) if c) for row in matrix]


def is_faster(kernel) -> bool:
    """Whether a kernel (k, C, D) has a size for which this is worth while on a CPU."""
    return kernel.ndim == 3 and min(kernel.shape[1:]) >= _LEAST_WIDTH.get(len(kernel), np.inf)


@jax.jit
def at_points(kernel: jax.Array) -> jax.Array:
    """A kernel (4 n - 1, C, D) for `convolve`: (7, n, C, D)."""
    kernel = jnp.pad(kernel, ((0, 1), (0, 0), (0, 0)))
    taps = kernel.reshape(-1, _TILE, *kernel.shape[1:])
    return jnp.stack(_combine(_TAPS, [taps[:, i] for i in range(_TILE)]))


def convolve(kernel: jax.Array, x: jax.Array, dilation: int = 1) -> jax.Array:
    """'Same' convolution with zero padding, without a bias.

    Args:
      kernel: (7, n, C, D) from `at_points`, of a filter of 4 n - 1 taps.
      x: (B, L, C) float32.
      dilation: samples between neighbouring taps.

    Returns:
      (B, L, D) float32.
    """
    (batch, length, _), filters, step = x.shape, kernel.shape[1], _TILE * dilation
    pad, tiles = (_TILE * filters - 2) // 2 * dilation, -(-length // step)
    # A tile has four samples of each of the phases into which the dilation divides the signal.
    x = jnp.pad(x, ((0, 0), (pad, (tiles + filters) * step - length - pad), (0, 0)))
    x = x.reshape(batch, tiles + filters, _TILE, dilation, -1)
    samples = [x[:, :-1, i] for i in range(_TILE)] + [x[:, 1:, i] for i in range(_TILE - 1)]
    products = [
        lax.conv_general_dilated(
            values.reshape(batch, (tiles + filters - 1) * dilation, -1),
            kernel[point],
            window_strides=(1,),
            padding="VALID",
            rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=lax.Precision.HIGHEST,
        ).reshape(batch, tiles, dilation, -1)
        for point, values in enumerate(_combine(_INPUTS, samples))
    ]
    y = jnp.stack(_combine(_OUTPUTS, products), axis=2)
    return y.reshape(batch, tiles * step, -1)[:, :length]
