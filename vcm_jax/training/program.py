"""The training step as a program: shapes, shardings, and what compiles it."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vcm_jax import cli
from vcm_jax.devices import sharding
from vcm_jax.devices.layout import Layout
from vcm_jax.training import monitor
from vcm_jax.training.rows import abstract_batch
from vcm_jax.training.setup import Setup, initial_stats
from vcm_jax.training.state import TrainState, make_init, make_optimizer
from vcm_jax.training.step import train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled for a run, and where its arrays live; nothing is computed yet.

    Attributes:
      key: the random key that everything random in the run follows from.
      stats: the network's collection "stats", from the data.
      abstract: shapes and dtypes of the training state.
      shardings: of the state.
      layout: what the step says about where its arrays live.
      rows: the sharding of a batch, whose rows are spread over the devices.
      whole: the sharding of what every device holds in full.
      batch: shapes and dtypes of a global batch.
      teacher_variables: of a reflow run's teacher, on every device; else None.
    """

    setup: Setup
    key: jax.Array
    stats: dict
    abstract: TrainState
    shardings: TrainState
    layout: Layout
    rows: NamedSharding
    whole: NamedSharding
    batch: dict[str, jax.ShapeDtypeStruct]
    teacher_variables: Any
    _step: Callable
    _make_init: Callable

    def freeze(self, params):
        """The parameters that are not trained, on the devices; None if all are."""
        if self.setup.selection.is_whole:
            return None
        return jax.device_put(self.setup.selection.frozen(params), self.shardings.frozen)

    def init(self, stats: dict, params=None) -> TrainState:
        """The state before the first step, made directly on the devices.

        Args:
          stats: the network's collection "stats".
          params: parameters to start from; None for random ones.
        """
        init = self._make_init(stats=stats)
        return jax.jit(init, out_shardings=self.shardings)(self.key, params)

    def split_key(self) -> tuple[jax.Array, jax.Array]:
        """The keys of training and of validation."""
        return jax.jit(_split_key, out_shardings=self.whole)(self.key)

    def lower(self):
        """The step before its compilation."""
        key = jax.eval_shape(lambda: self.key)
        return self._step.lower(self.abstract, self.batch, key, self.teacher_variables)

    def compile(self):
        """(the compiled step, its model FLOPs per sample)."""
        logging.info("compiling the step%s", cli.cache_note())
        started = time.perf_counter()
        compiled = self.lower().compile(compiler_options=self.setup.compiler_options())
        logging.info("compiled the step in %.1f s", time.perf_counter() - started)
        flops, how = monitor.model_flops(
            self.setup.model, self.setup.step, compiled, self.batch, self.setup.mesh.devices.size
        )
        logging.info("model FLOPs: %.4g G per sample, %s", flops / 1e9, how)
        return compiled, flops


def _place_teacher(setup: Setup, whole: NamedSharding):
    """The teacher's variables on every device, or their shapes where there are no devices."""
    if setup.topology is None:
        return jax.device_put(setup.teacher_variables, whole)
    return jax.eval_shape(lambda: setup.teacher_variables)


def _split_key(key):
    return jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)


def make_program(config: ConfigDict, setup: Setup) -> Program:
    """Shapes first, then shardings, then the step that is compiled for them."""
    mesh, optimizer = setup.mesh, make_optimizer(setup.optimizer)
    key, stats = jax.random.key(config.seed), initial_stats(setup)
    make_init_of = functools.partial(
        make_init,
        setup.net,
        optimizer=optimizer,
        sigma_rels=config.ema_sigma_rels,
        selection=setup.selection,
        has_target=setup.step.objective.target_ema > 0,
    )
    abstract = jax.eval_shape(make_init_of(stats=stats), key)
    shardings = sharding.state_shardings(abstract, mesh, setup.model.num_heads)
    layout = Layout(mesh, shardings.params, shardings.frozen)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    step = functools.partial(
        train_step,
        net=setup.net,
        optimizer=optimizer,
        config=setup.step,
        layout=layout,
        teacher=setup.teacher,
        accumulate=config.accumulate,
        skip_nonfinite=config.on_nonfinite == "skip",
        selection=setup.selection,
    )
    step = jax.jit(
        step,
        in_shardings=(shardings, rows, whole, whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    return Program(
        setup=setup,
        key=key,
        stats=stats,
        abstract=abstract,
        shardings=shardings,
        layout=layout,
        rows=rows,
        whole=whole,
        batch=abstract_batch(setup.model, config.batch_size),
        teacher_variables=_place_teacher(setup, whole),
        _step=step,
        _make_init=make_init_of,
    )
