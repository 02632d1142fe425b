"""One training step: a pure function of (state, batch, key)."""

import functools

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from vcm_jax import ema
from vcm_jax.devices.layout import Layout, Weight
from vcm_jax.devices.sharding import BATCH_AXES
from vcm_jax.models.mmdit import STACKED, stack_blocks, unstack_blocks
from vcm_jax.training.loss import Teacher, rows_loss
from vcm_jax.training.rows import StepConfig, draw_rows, instant_first, take_microbatch
from vcm_jax.training.selection import ALL, Selection

ONE_DEVICE = Layout()


def accumulated(compute, params, rows, accumulate: int):
    """(gradients, metrics) of `compute(params, microbatch)` over the microbatches of some rows.

    Microbatches bound the memory of activations; the result is that of all rows at once.
    """
    if accumulate == 1:
        return compute(params, rows)

    def add(total, index):
        grads, metrics = compute(params, take_microbatch(rows, index, accumulate))
        return jax.tree.map(lambda a, g: a + g / accumulate, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, jnp.arange(accumulate))
    return grads, jax.tree.map(lambda a: a.sum(0), metrics)  # an Average is a total and a count


def gradients(
    params,
    stats,
    rows,
    num_instant: int,
    teacher_variables,
    layout: Layout,
    accumulate: int,
    frozen=None,
    target=None,
    selection: Selection = ALL,
    **options,
):
    """(gradients, metrics) of a batch.

    Args:
      params: what is trained.
      stats: of the network.
      rows: from `draw_rows`.
      num_instant: how many of them have s = t.
      teacher_variables: None without a teacher.
      layout: of the step; `vcm_jax.devices.layout` explains the two ways.
      accumulate: number of microbatches.
      frozen: the network's other parameters.
      target: the parameters of the objective's targets, like `params`; None for `params`.
      selection: which parameters are which.
      options: of `rows_loss`.
    """
    parts = layout.shards * accumulate
    if options["config"].objective.couples_rows or num_instant % parts:
        rows = layout.rows(instant_first(rows, num_instant))
        frozen = layout.gather_frozen(frozen)
        options["constrain"] = layout.rows
        if target is not None:
            options["target"] = selection.complete(layout.gather(target), frozen)

        def loss(params, rows):
            params, count = selection.complete(params, frozen), num_instant // accumulate
            return rows_loss(params, stats, rows, count, teacher_variables, **options)

        compute = jax.grad(loss, has_aux=True)
        grads, metrics = accumulated(compute, layout.gather(params), rows, accumulate)
        return layout.scatter(grads), metrics

    def by_device(params, target, rows, whole):
        args = (num_instant // parts, layout, accumulate, selection)
        return device_gradients(params, target, rows, *whole, *args, **options)

    whole = (stats, teacher_variables, layout.gather_frozen(frozen))
    return layout.by_device(by_device, params, target, rows, whole)


def device_gradients(
    params,
    target,
    rows,
    stats,
    teacher_variables,
    frozen,
    num_instant: int,
    layout,
    accumulate: int,
    selection: Selection,
    *,
    net,
    **options,
):
    """As `gradients`, from this device's rows; `num_instant` counts those of a microbatch."""
    axes, stacked, target_net = layout.fsdp_axes(params), (), net
    # With frozen parameters the network stacks its blocks itself, when they are complete.
    stacks = net.scan and selection.is_whole
    if stacks:
        stacked = STACKED
        params = stack_blocks(params, net.config)
        target = None if target is None else stack_blocks(target, net.config)
        axes = stack_blocks(axes, net.config, stack=lambda leaves: leaves[0])
    whole = layout.gather_by_device(params, axes, net.dtype, stacked)
    if target is not None:
        target = layout.gather_by_device(target, axes, net.dtype, stacked)
        target = selection.complete(target, frozen)
    # Summed at once where each gradient is complete, so that other work hides the communication.
    at_once = ("data", "fsdp") if accumulate == 1 else ("fsdp",)
    use = functools.partial(layout.use, reduce=at_once)
    if stacks:
        net = net.clone(unpack=use)

    def loss(params, rows):
        weights = jax.tree.map(Weight, params, whole, axes)
        weights = {k: w if k in stacked else use(w) for k, w in weights.items()}
        weights = selection.complete(weights, frozen)
        targets = dict(target=target, target_net=target_net, gather=layout.gather_rows)
        return rows_loss(
            weights, stats, rows, num_instant, teacher_variables, net=net, **targets, **options
        )

    rows = instant_first(rows, num_instant * accumulate)
    grads, metrics = accumulated(jax.grad(loss, has_aux=True), params, rows, accumulate)
    if stacks:
        grads = unstack_blocks(grads, net.config)
    late = [axis for axis in BATCH_AXES if axis not in at_once]
    grads = layout.sum(jax.tree.map(lambda g: g / layout.shards, grads), late)
    return grads, layout.sum(metrics)


def train_step(
    state,
    batch,
    key,
    teacher_variables=None,
    *,
    net,
    optimizer,
    config: StepConfig,
    layout: Layout = ONE_DEVICE,
    teacher: Teacher | None = None,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    selection: Selection = ALL,
):
    """One update of parameters, optimizer and EMA weights.

    Args:
      state: TrainState.
      batch: arrays with leading axis `B`: `latent_mean`, `latent_std` `N C`; `clip` `Tc clip_dim`,
        `sync` `Ts sync_dim`, `text` `Tt text_dim`; bool `has_video`, `has_text`.
      key: of the run; the key of the step is `fold_in(key, state.step)`.
      teacher_variables, teacher: for an objective that needs a teacher.
      net, optimizer, config: static.
      layout: where rows, weights and gradients live on the devices.
      accumulate: number of microbatches; it divides the batch and the number of s = t rows.
      skip_nonfinite: whether a step whose loss or gradient is not finite changes nothing but the
        number of the step.
      selection: what of the network's parameters is trained.

    Returns:
      The new state, and a `clu.metrics.Collection` of this step; its `nonfinite` is 1 when the loss
      or a gradient is not finite.
    """
    key = jax.random.fold_in(key, state.step)
    rows = draw_rows(state.stats, batch, key, state.step, config)
    grads, metrics = gradients(
        state.params,
        state.stats,
        rows,
        config.num_instant(batch["latent_mean"].shape[0]),
        teacher_variables,
        layout,
        accumulate,
        frozen=state.frozen,
        target=state.target,
        selection=selection,
        net=net,
        config=config,
        teacher=teacher,
    )
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema_weights = {
        width: ema.update(weights, params, step, ema.gamma_from_sigma_rel(float(width)))
        for width, weights in state.ema.items()
    }
    target = state.target
    if target is not None:
        target = ema.follow(target, params, step, config.objective.target_ema)
    finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(grad_norm)
    average = clu_metrics.Average.from_model_output
    metrics |= {
        "grad_norm": average(grad_norm),
        "update_norm": average(optax.tree.norm(updates)),
        "nonfinite": average(1.0 - finite),
    }
    changed = state.replace(params=params, opt_state=opt_state, ema=ema_weights, target=target)
    if skip_nonfinite:
        changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
    return changed.replace(step=step), clu_metrics.Collection.create_collection(**metrics)
