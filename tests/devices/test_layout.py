"""Weights inside a step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vcm_jax.devices import sharding
from vcm_jax.devices.layout import Layout


def test_gathered_weights_are_made_before_they_are_used():
    """A barrier keeps XLA for TPUs from gathering in each pass again; numbers do not show it."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    layout = Layout(mesh)

    def use(w):
        (whole,) = layout.gather_by_device({"kernel": w}, {"kernel": 0}, jnp.bfloat16).values()
        return whole

    specs = dict(in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec(), check_vma=False)
    step = jax.jit(jax.shard_map(use, mesh=mesh, **specs))
    w = np.arange(32, dtype=np.float32).reshape(8, 4)
    np.testing.assert_array_equal(step(w), w)
    program = step.lower(w).as_text()
    assert program.index("all_gather") < program.index("optimization_barrier")
