"""The device mesh, and how the arrays of a run are sharded over it."""

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The batch is split over these; parameters over `fsdp` (their width) and `tensor` (heads, MLPs).
BATCH_AXES = ("data", "fsdp")
RULES = {"embed": "fsdp", "mlp": "tensor", "heads": "tensor"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with the axes data, fsdp, tensor; one size may be -1, which uses all other devices.

    JAX orders the devices: on a TPU slice neighbours in the mesh are neighbours on the chips'
    network, `tensor` the closest. Processes keep their devices together, so that the rows of a
    batch that a process reads are one block (`process_part` checks it).

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
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
    return Mesh(_ordered(tuple(sizes.values()), devices.flatten()), tuple(sizes))


def _ordered(shape: tuple[int, ...], devices: np.ndarray) -> np.ndarray:
    """The devices as an array of the mesh's shape, ordered by their place in the topology.

    Several TPU slices are split along `data`, or along `fsdp` if they do not divide `data`: the
    network between slices is slow. Where JAX's order would scatter the rows of a process, the
    devices are ordered by process instead.
    """
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    options = dict(contiguous_submeshes=True, allow_split_physical_axes=True)
    try:
        if slices == 1:
            found = mesh_utils.create_device_mesh(shape, devices, **options)
        else:
            axis = next((axis for axis in (0, 1) if shape[axis] % slices == 0), None)
            if axis is None:
                raise ValueError(
                    f"{slices} slices divide neither mesh.data={shape[0]} nor mesh.fsdp={shape[1]}"
                )
            outer = tuple(slices if i == axis else 1 for i in range(len(shape)))
            inner = tuple(size // count for size, count in zip(shape, outer))
            options.pop("contiguous_submeshes")
            found = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)
    except (NotImplementedError, ValueError, AssertionError) as error:
        logging.info("devices stay in the order of their processes: %s", error)
        found = None
    if found is None or not _rows_are_blocks(found):
        found = _process_by_process(devices).reshape(shape)
    return found


def _process_by_process(devices: np.ndarray) -> np.ndarray:
    """The devices in a line, those of a process together; each is close to the one before it."""
    members: dict[int, list] = {}
    for device in sorted(devices, key=lambda device: device.id):
        members.setdefault(device.process_index, []).append(device)
    groups = [members[process] for process in sorted(members)]
    if not all(hasattr(device, "coords") for device in devices):
        return np.asarray(sum(groups, []))
    corners = [tuple(np.min([device.coords for device in group], axis=0)) for group in groups]
    slices = [getattr(group[0], "slice_index", None) or 0 for group in groups]
    ordered = []
    for i in _snake([(*corner, slice_) for corner, slice_ in zip(corners, slices)]):
        cores = [(getattr(d, "core_on_chip", 0), *d.coords) for d in groups[i]]
        ordered += [groups[i][j] for j in _snake(cores)]
    return np.asarray(ordered)


def _snake(points: list[tuple[int, ...]]) -> list[int]:
    """The order that visits points of a grid line by line, every other line backwards."""
    ranks = []
    for values in zip(*points):
        levels = sorted(set(values))
        ranks.append([levels.index(value) for value in values])

    def key(i: int) -> list[int]:
        found, lines = [], 0
        for rank in reversed(ranks):
            place = rank[i] if lines % 2 == 0 else max(rank) - rank[i]
            found.append(place)
            lines += place
        return found

    return sorted(range(len(points)), key=key)


def _rows_are_blocks(devices: np.ndarray) -> bool:
    """Whether every process's devices hold one block of the rows of a batch.

    Args:
      devices: data x fsdp x tensor.
    """
    groups = devices.reshape(-1, devices.shape[-1])
    found: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        for process in {device.process_index for device in group}:
            found.setdefault(process, []).append(row)
    return all(rows == list(range(rows[0], rows[-1] + 1)) for rows in found.values())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def process_part(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """(i, n): the devices of this process hold the i-th of n equal blocks of a batch.

    Several processes hold the same block if the mesh splits the model over them.

    Raises:
      ValueError: the rows of this process are not one block of the batch.
    """
    blocks = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({block[0].indices(batch_size)[:2] for block in blocks})
    start, stop = spans[0][0], spans[-1][1]
    rows = sum(b - a for a, b in spans)
    if rows != stop - start or batch_size % rows or start % rows:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: process {jax.process_index()} holds rows {spans}, which "
            "are not one block of the batch; mesh.tensor must divide a process's devices or be a "
            "multiple of them"
        )
    return start // rows, batch_size // rows


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ValueError if a batch, or a microbatch, does not divide over the devices."""
    shards = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, not {accumulate}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if batch_size % shards:
        raise ValueError(
            f"batch_size {batch_size} does not divide over mesh.data x mesh.fsdp = {shards} devices"
        )
    if batch_size % (shards * accumulate):
        raise ValueError(
            f"batch_size {batch_size} does not divide into accumulate = {accumulate} microbatches "
            f"over mesh.data x mesh.fsdp = {shards} devices"
        )


def check_model(model, mesh: Mesh) -> None:
    """Raises ValueError if the sizes of the mesh do not divide those of the model.

    Heads that do not divide are no error: attention is then replicated.
    """
    for axis, name in (("fsdp", "hidden_dim"), ("tensor", "mlp_dim")):
        if getattr(model, name) % mesh.shape[axis]:
            raise ValueError(
                f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} "
                f"{getattr(model, name)}"
            )


def logical_axes(path: tuple[str, ...], ndim: int) -> tuple[str | None, ...]:
    """The names of a variable's axes, from its path in the network; None for axes without one.

    Only the last two names of the path count: the paths of optimizer moments and EMA weights end
    like that of their parameter, and so they get the same axes. Convolutions have one more axis in
    front.
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
    """The sharding of every array of a train state, or of any tree that holds parameters.

    An axis that the mesh does not divide is not split. Either all heads are split or none are.
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


def place(abstract, shardings):
    """Shapes, dtypes and shardings in one tree, the target of restoring a checkpoint."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def device_bytes(abstract, shardings) -> int:
    """Bytes of a tree on one device."""
    sizes = jax.tree.map(
        lambda a, s: int(np.prod(s.shard_shape(a.shape))) * a.dtype.itemsize, abstract, shardings
    )
    return sum(jax.tree.leaves(sizes))
