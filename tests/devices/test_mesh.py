"""The order of the devices in the mesh, on devices that are only described."""

import dataclasses

import jax
import numpy as np
import pytest

from vcm_jax.devices import sharding


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip as `jax.experimental.mesh_utils` looks at it."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def pod(shape=(4, 4, 1), host=(2, 2, 1), slice_index=0, first=0):
    """Chips of a slice, numbered along x first, with hosts of so many chips."""
    hosts = tuple(n // m for n, m in zip(shape, host))
    chips = []
    for z, y, x in np.ndindex(*reversed(shape)):
        at = tuple(c // m for c, m in zip((x, y, z), host))
        process = at[0] + hosts[0] * (at[1] + hosts[1] * at[2]) + slice_index * int(np.prod(hosts))
        chips.append(Chip(first + len(chips), (x, y, z), process, slice_index))
    return chips


def distances(devices: np.ndarray, axis: int) -> np.ndarray:
    """How far neighbours along an axis of the mesh are apart on the grid of chips."""
    coords = np.array([chip.coords for chip in devices.flat]).reshape(*devices.shape, 3)
    return np.abs(np.diff(coords, axis=axis)).sum(-1)


@pytest.mark.parametrize("sizes", [(16, 1, 1), (1, 16, 1), (4, 4, 1), (4, 2, 2), (4, 1, 4)])
def test_neighbours_in_the_mesh_are_close_on_the_grid(sizes):
    """The axes that communicate most lie within a host, and the hosts follow one another."""
    mesh = sharding._ordered(sizes, np.asarray(pod()))
    assert len({chip.id for chip in mesh.flat}) == 16
    assert sharding._rows_are_blocks(mesh)
    for axis, size in enumerate(sizes):
        if size > 1:
            assert distances(mesh, axis).mean() <= (1.5 if size == 16 else 2)


def test_the_order_in_which_devices_come_does_not_matter():
    chips = pod()
    shuffled = [chips[i] for i in np.random.default_rng(0).permutation(16)]
    first, second = (sharding._ordered((4, 2, 2), np.asarray(c)) for c in (chips, shuffled))
    assert [chip.id for chip in first.flat] == [chip.id for chip in second.flat]


def test_slices_are_split_along_data():
    chips = np.asarray(pod() + pod(slice_index=1, first=16))
    mesh = sharding._ordered((8, 4, 1), chips)
    assert [{chip.slice_index for chip in part.flat} for part in np.split(mesh, 2)] == [{0}, {1}]
    assert sharding._rows_are_blocks(mesh)
    mesh = sharding._ordered((1, 32, 1), chips)
    assert sharding._rows_are_blocks(mesh)


def test_rows_that_are_scattered_are_noticed():
    chips = [Chip(i, (i, 0, 0), process_index=i % 2) for i in range(4)]
    assert not sharding._rows_are_blocks(np.asarray(chips).reshape(4, 1, 1))
    assert sharding._rows_are_blocks(np.asarray(chips).reshape(2, 1, 2))
    ordered = sharding._ordered((4, 1, 1), np.asarray(chips))
    assert sharding._rows_are_blocks(ordered)


def test_a_mesh_of_these_devices():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:8]
