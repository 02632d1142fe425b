"""The benchmark of the training step measures the step as it is."""

import jax
import jax.numpy as jnp
import train_step as benchmark

from vcm_jax.devices import sharding
from vcm_jax.models import MODELS
from vcm_jax.objectives import make_settings
from vcm_jax.training.rows import StepConfig


def test_its_step_can_be_traced():
    config = StepConfig(steps=10, objective=make_settings("vcm"))
    mesh = sharding.make_mesh(2, 1, 1, jax.devices()[:2])
    step, init, batch, _ = benchmark.prepare(MODELS["demo"], 8, jnp.float32, mesh, config)
    key = jax.random.key(0)
    state = jax.eval_shape(init, key)
    traced = step.trace(state, batch, key)
    assert jax.tree.map(jnp.shape, traced.out_info[0]) == jax.tree.map(jnp.shape, state)
