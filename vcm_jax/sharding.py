"""The device mesh, and where every array of a run lives on it."""

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The batch is split over these; parameters over `fsdp` (their width) and `tensor` (heads, MLPs).
BATCH_AXES = ("data", "fsdp")
RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with axes data, fsdp, tensor; one size may be -1 and takes what is left.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = " x ".join(f"{name}={size}" for name, size in sizes.items())
    rest = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    if any(size < 1 and size != -1 for size in sizes.values()) or len(free) > 1:
        raise ValueError(f"mesh {shown}: sizes are positive, at most one is -1")
    if free and devices.size % rest == 0:
        sizes[free[0]] = devices.size // rest
    elif free or rest != devices.size:
        raise ValueError(f"mesh {shown} does not fit {devices.size} devices")
    return Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError when the devices do not divide the global batch."""
    parts = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if batch_size % parts:
        raise ValueError(
            f"batch_size {batch_size} does not divide over mesh.data x mesh.fsdp = {parts} devices"
        )


def logical_axes(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    """Names of a variable's axes from its place in the network; None where nothing is split.

    It looks at the last two names only, so that optimizer moments and averages, whose paths end
    like their parameter's, get its axes. Convolutions have a leading kernel axis more.
    """
    module, leaf = (None, None, *path)[-2:]
    if module == "qkv":
        axes = ("embed", None, "heads", None) if leaf == "kernel" else (None, "heads", None)
    elif leaf != "kernel":
        axes = ()
    else:
        axes = {
            "w1": ("embed", "mlp"),
            "w3": ("embed", "mlp"),
            "w2": ("mlp", "embed"),
            "linear1": ("heads", "embed"),
        }.get(module, (None, "embed"))
    return (None,) * (ndim - len(axes)) + axes


def state_shardings(abstract_state, mesh: Mesh, num_heads: int):
    """Shardings of a train state (or any tree that holds parameters), leaf by leaf.

    An axis that its mesh axis does not divide is not split; heads are all split or none.
    """
    sizes = dict(mesh.shape)
    rules = dict(RULES)
    if num_heads % sizes["tensor"]:
        logging.info(
            "%d heads do not divide over mesh.tensor=%d: attention is replicated, MLPs are split",
            num_heads,
            sizes["tensor"],
        )
        del rules["heads"]

    def sharding(path, leaf):
        names = tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
        axes = [rules.get(axis) for axis in logical_axes(names, len(leaf.shape))]
        axes = [
            axis if axis and size % sizes[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)
