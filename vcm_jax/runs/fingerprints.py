"""Fingerprints of arrays: a value that was damaged on disk is noticed when it is restored.

A fingerprint is a sum, modulo 2^32, over the 32-bit words of an array, each times an odd number
that depends on its position. A sum does not depend on its order, so that meshes and process counts
do not matter. An odd number has an inverse modulo 2^32, so that a single changed word always
changes the sum; any other damage is missed with a probability of about 2^-32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _words(array):
    """The raw bits of an array as uint32; a 64-bit number becomes two words on a last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    return bits.astype(jnp.uint32)


def _sum(words, position):
    """The sum of words, each times an odd number that follows from its position."""
    spread = position * np.uint32(0x9E3779B1)  # 2^32 over the golden ratio
    return (words * (spread ^ (spread >> 15) | 1)).sum(dtype=jnp.uint32)


@jax.jit
def _sum_whole(array):
    words = _words(array).reshape(-1)  # in one line, which CPUs sum faster
    return _sum(words, jax.lax.iota(jnp.uint32, words.size))


@functools.partial(jax.jit, static_argnames=("mesh", "spec"))
def _sum_shards(array, mesh, spec):
    """The sums over the blocks of an array that is split over a mesh: one for each device."""

    def on_device(block):
        words, shape = _words(block), array.shape
        if words.ndim > len(shape):  # the two words of 64-bit numbers
            shape = (*shape, 2)
        position, stride = jnp.zeros(words.shape, jnp.uint32), 1  # in row-major order, modulo 2^32
        for axis in reversed(range(words.ndim)):
            index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
            if names := spec[axis] if axis < len(spec) else None:
                index += jnp.uint32(jax.lax.axis_index(names) * words.shape[axis])
            position += index * np.uint32(stride % 2**32)
            stride *= shape[axis]
        return _sum(words, position)[None]

    every = PartitionSpec(mesh.axis_names)
    return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=every)(array)


def _dispatch(leaf):
    """Starts the computation for an array; `_collect` waits for it.

    Nothing is exchanged between devices here: these programs do not depend on each other, and
    different processes could run them in a different order.
    """
    if not isinstance(leaf, jax.Array):
        return _sum_whole(leaf)
    if leaf.is_fully_replicated or not isinstance(leaf.sharding, NamedSharding):
        return _sum_whole(leaf.addressable_data(0))
    return _sum_shards(leaf, leaf.sharding.mesh, leaf.sharding.spec)


def _collect(leaf, found) -> int:
    """The sum over an array, or over the blocks that count as this process's."""
    if not found.shape:
        return int(found)
    first = {shard.device for shard in leaf.addressable_shards if shard.replica_id == 0}
    sums = [shard.data for shard in found.addressable_shards if shard.device in first]
    return sum(int(value[0]) for value in jax.device_get(sums)) % 2**32


def fingerprints(tree) -> dict[str, int]:
    """{path: fingerprint} of every array of a pytree, computed on the devices that hold them.

    Args:
      tree: arrays of any shape, on any mesh; every process of a run must call this alike.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One small program for each shape; all are started before the first one is waited for.
    started = [_dispatch(leaf) for _, leaf in leaves]
    sums = [_collect(leaf, found) for (_, leaf), found in zip(leaves, started)]
    split = [bool(found.shape) for found in started]
    if jax.process_count() > 1 and any(split):
        every = multihost_utils.process_allgather(np.asarray(sums, np.uint32))
        sums = np.where(split, every.sum(0, dtype=np.uint32), every[0]).tolist()
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): value for (path, _), value in zip(leaves, sums)}
