"""Fingerprints of arrays: a value that was damaged on disk is noticed when it is restored.

A fingerprint is a sum, modulo 2^32, over the 32-bit words of an array, each times an odd number
that depends on its position. A sum does not depend on its order, so that meshes and process counts
do not matter. An odd number has an inverse modulo 2^32, so that a single changed word always
changes the sum; any other damage is missed with a probability of about 2^-32.
"""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _words(array):
    """The raw bits of an array as uint32; a 64-bit number becomes two words on a last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    return bits.astype(jnp.uint32)


def _positions(shape: tuple[int, ...]):
    """The index of every element in row-major order, uint32, modulo 2^32."""
    found, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = np.uint32(stride % 2**32)
        found = found + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]
    return found


@jax.jit
def _fingerprint(array):
    words = _words(array)
    spread = _positions(words.shape) * np.uint32(0x9E3779B1)  # 2^32 over the golden ratio
    return (words * (spread ^ (spread >> 15) | 1)).sum(dtype=jnp.uint32)


def fingerprints(tree) -> dict[str, int]:
    """{path: fingerprint} of every array of a pytree, computed on the devices that hold them.

    Args:
      tree: arrays of any shape, on any mesh; every process of a run must call this alike.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One small program for each shape, all dispatched before the first result is waited for.
    found = jax.device_get([_fingerprint(leaf) for _, leaf in leaves])
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): int(value) for (path, _), value in zip(leaves, found)}


def checksum(content: dict) -> str:
    """A hash of a JSON object."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
