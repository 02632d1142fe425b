"""Where rows, weights and gradients live inside a training step.

A step computes its gradients in one of two ways:

- Device by device (`Layout.by_device`): each device takes its own rows and never sends one. Weights
  that are split over `fsdp` are gathered once, in the dtype of the products. Gradients leave the
  products in that dtype, and are summed over the devices in float32.
- As one program of the whole batch, with constraints from which XLA derives the communication: for
  objectives whose rows depend on each other, and for batches whose s = t rows the devices do not
  divide.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vcm_jax.devices.sharding import BATCH_AXES, batch_sharding


@flax.struct.dataclass
class Weight:
    """A weight inside the step: what the device holds of it, and the whole of it.

    Attributes:
      shard: of this device, float32; its gradient is that of the weight.
      whole: the weight, gathered, in the dtype of the products; nothing is differentiated by it.
      axis: the axis along which it is split over `fsdp`; -1 if it is not split.
    """

    shard: jax.Array
    whole: jax.Array
    axis: int = flax.struct.field(pytree_node=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _use(shard, whole, axis: int, reduce: tuple[str, ...]):
    """`whole`; the gradient goes to the shard, summed over the axes of the mesh in `reduce`."""
    del shard, axis, reduce
    return whole


def _use_forward(shard, whole, axis, reduce):
    del axis, reduce
    return whole, jnp.zeros((), shard.dtype)


def _use_backward(axis, reduce, like, gradient):
    wide = gradient.astype(like.dtype)
    if axis >= 0 and "fsdp" in reduce:
        wide = jax.lax.psum_scatter(wide, "fsdp", scatter_dimension=axis, tiled=True)
        reduce = tuple(name for name in reduce if name != "fsdp")
    if reduce:
        wide = jax.lax.psum(wide, reduce)
    return wide, jnp.zeros_like(gradient)


_use.defvjp(_use_forward, _use_backward)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The devices of a step; by default there is one.

    Attributes:
      mesh: the device mesh.
      weights: the shardings of the parameters that are trained.
      frozen: those of all other parameters; None if there are none.
    """

    mesh: Mesh | None = None
    weights: Any = None
    frozen: Any = None

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the mesh over which the rows of a batch are split."""
        return tuple(axis for axis in BATCH_AXES if self.mesh and self.mesh.shape[axis] > 1)

    @property
    def shards(self) -> int:
        """In how many blocks the rows of a batch are split."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.axes])) if self.axes else 1

    def rows(self, tree):
        """Splits the leading axis over the devices; scalars have none."""
        if self.mesh is None:
            return tree
        split = batch_sharding(self.mesh)
        constrain = jax.lax.with_sharding_constraint
        return jax.tree.map(lambda a: constrain(a, split) if jnp.ndim(a) else a, tree)

    def gather(self, params):
        """Gathers weights along `fsdp`; they stay split along `tensor`."""
        return self._gather(params, self.weights)

    def gather_frozen(self, params):
        """As `gather`, for the parameters that are not trained."""
        return self._gather(params, self.frozen)

    def _gather(self, params, shardings):
        if self.mesh is None or params is None:
            return params

        def whole(sharding):
            axes = [axis if axis == "tensor" else None for axis in sharding.spec]
            return NamedSharding(self.mesh, PartitionSpec(*axes))

        shardings = jax.tree.map(whole, shardings)
        return jax.lax.with_sharding_constraint(params, shardings)

    def scatter(self, grads):
        """Splits gradients like the parameters."""
        if self.mesh is None:
            return grads
        return jax.lax.with_sharding_constraint(grads, self.weights)

    def by_device(self, function, params, more, rows, whole):
        """`function(params, more, rows, whole)` on every device by itself.

        Args:
          function: gets the shards of the parameters, and the device's rows. It returns gradients
            like its parameters, and a tree of scalars that are the same on all devices.
          params: split as `weights` say.
          more: another such tree, or None.
          rows: a tree whose arrays have a leading axis `B`, which is split; scalars are not.
          whole: a tree that every device gets in full.

        Returns:
          The gradients, split like the parameters, and the scalars.
        """
        if self.shards == 1:
            return function(params, more, rows, whole)

        def manual(sharding):
            keep = self.mesh.shape["fsdp"] > 1
            return PartitionSpec(*("fsdp" if keep and a == "fsdp" else None for a in sharding.spec))

        everywhere = PartitionSpec()
        weights = jax.tree.map(manual, self.weights)
        split = jax.tree.map(lambda a: PartitionSpec(self.axes) if a.ndim else everywhere, rows)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(weights, more and weights, split, jax.tree.map(lambda a: everywhere, whole)),
            out_specs=(weights, everywhere),
            axis_names=set(self.axes),
            check_vma=False,
        )(params, more, rows, whole)

    def fsdp_axes(self, params):
        """The axis along which each parameter is split over `fsdp`; -1 for none."""
        if self.mesh is None or self.mesh.shape["fsdp"] == 1:
            return jax.tree.map(lambda a: -1, params)
        axis = lambda s: s.spec.index("fsdp") if "fsdp" in s.spec else -1
        return jax.tree.map(axis, self.weights)

    def sum(self, tree, axes=BATCH_AXES):
        """The sum over axes of the mesh, within `by_device`."""
        axes = tuple(axis for axis in axes if axis in self.axes)
        return jax.lax.psum(tree, axes) if axes else tree

    def gather_rows(self, rows):
        """The rows of all devices, within `by_device`: an array with a leading axis `B`."""
        return jax.lax.all_gather(rows, self.axes, tiled=True) if self.axes else rows

    def gather_by_device(self, shards, axes, dtype, stacked: tuple[str, ...] = ()):
        """The whole weights, within `by_device`; kernels are cast before they are gathered.

        Args:
          shards: of this device.
          axes: as `fsdp_axes`.
          dtype: of matrix products.
          stacked: the first names of weights that have one more axis in front.
        """

        def gather(path, shard, axis):
            whole = jax.lax.stop_gradient(shard)
            if path[-1].key == "kernel":
                whole = whole.astype(dtype)
            if axis < 0:
                return whole
            axis += path[0].key in stacked
            return jax.lax.all_gather(whole, "fsdp", axis=axis, tiled=True)

        whole = jax.tree_util.tree_map_with_path(gather, shards, axes)
        # Without the barrier XLA moves the gathers into the loops over blocks, so that each pass
        # gathers again: four times the bytes for large_44k, and more memory.
        return jax.lax.optimization_barrier(whole)

    def use(self, weights, reduce: tuple[str, ...]):
        """Arrays from `Weight`s; their gradients are summed over `reduce`, in float32."""
        reduce = tuple(axis for axis in reduce if axis in self.axes)
        is_weight = lambda node: isinstance(node, Weight)
        return jax.tree.map(
            lambda w: _use(w.shard, w.whole, w.axis, reduce), weights, is_leaf=is_weight
        )
