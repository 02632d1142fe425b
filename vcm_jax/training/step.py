"""One training step: a pure function of (state, batch, key)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from vcm_jax import ema, sampling
from vcm_jax.devices.layout import Layout, Weight
from vcm_jax.devices.sharding import BATCH_AXES
from vcm_jax.models import MMDiT
from vcm_jax.models.conditioned import encode_features, sample_latents, zero_inputs
from vcm_jax.models.mmdit import STACKED, stack_blocks, unstack_blocks
from vcm_jax.objectives import Objective
from vcm_jax.objectives.common import identity
from vcm_jax.training.rows import (
    StepConfig,
    draw_rows,
    instant_first,
    normalised,
    take_microbatch,
)
from vcm_jax.training.selection import ALL, Selection

TIME_BINS = 5
ONE_DEVICE = Layout()


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network that turns noise into data, for reflow; everything here is static.

    Attributes:
      net: the network; its variables are an argument of the step.
      objective: the objective that it was trained with.
      steps: steps of its sampler.
    """

    net: MMDiT
    objective: Objective
    steps: int


def check_network(net, config: StepConfig) -> None:
    """Checks, before anything is compiled, that the objective can use the network.

    Some objectives take a JVP, which fused attention kernels do not have.

    Raises:
      ValueError: when it cannot.
    """
    if not config.objective.needs_jvp:
        return
    x, t, s, cond = zero_inputs(net.config)

    def derivative(key):
        variables = net.init(key, x, t, s, cond)

        def apply(x):
            return net.apply(variables, x, t, s, cond)

        # Under a gradient, as in the loss: alone, some kernels fail only when they are run.
        return jax.grad(lambda x: jax.jvp(apply, (x,), (x,))[0].sum())(x)

    try:
        jax.eval_shape(derivative, jax.random.key(0))
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"objective {config.objective.name} takes a JVP, which this attention implementation "
            f"does not have ({str(error).splitlines()[0]}): choose another one, or "
            "config.objective.derivative=central"
        ) from None


def teacher_data(teacher: Teacher, variables, stats, batch, x1, is_null):
    """The teacher's samples from the noise x1 `B N C`, normalised with the student's `stats`.

    Args:
      teacher: the teacher.
      variables: its variables.
      stats: the student's, whose normalisation the result has.
      batch: as `train_step`'s; its conditions are the teacher's too.
      x1: noise `B N C`.
      is_null: bool `B`, rows whose whole condition is dropped.
    """
    present = {name: batch[name] & ~is_null for name in ("has_video", "has_text")}
    times = sampling.uniform_times(teacher.steps)
    latents = sample_latents(teacher.net, variables, batch | present, x1, times, teacher.objective)
    return jax.lax.stop_gradient(normalised(latents, stats))


def loss_fn(
    params,
    stats,
    batch,
    key,
    step,
    teacher_variables=None,
    *,
    net,
    config: StepConfig,
    constrain=identity,
    teacher: Teacher | None = None,
):
    """The loss of one batch, a scalar, and its metrics, a dict of `clu.metrics`."""
    rows = draw_rows(stats, batch, key, step, config)
    num_instant = config.num_instant(batch["latent_mean"].shape[0])
    rows = instant_first(rows, num_instant)
    options = dict(net=net, config=config, teacher=teacher, constrain=constrain)
    return rows_loss(params, stats, rows, num_instant, teacher_variables, **options)


def rows_loss(
    params,
    stats,
    rows,
    num_instant: int,
    teacher_variables=None,
    *,
    net,
    config: StepConfig,
    constrain=identity,
    teacher: Teacher | None = None,
    target=None,
    target_net=None,
):
    """As `loss_fn`, from what `draw_rows` drew, with the rows of s = t first.

    `target` are the parameters of the objective's targets, which `target_net` takes (`net` if it is
    None); None for `params`.
    """
    batch, x0, x1, guidance, t, s, lam, is_null = rows
    if teacher is not None:
        x0 = teacher_data(teacher, teacher_variables, stats, batch, x1, is_null)
    options = dict(num_instant=num_instant, constrain=constrain)
    if guidance is not None:
        options["guidance"] = guidance
    networks = [encode_features(net, {"params": params, "stats": stats}, batch, guidance)]
    if target is not None:
        variables = {"params": target, "stats": stats}
        networks.append(encode_features(target_net or net, variables, batch, guidance))
    (u, *others), cond, null_cond = _side_by_side(networks)
    options |= dict(zip(["target_u"] * (target is not None), others))
    loss, aux = config.objective.loss(u, x0, x1, t, s, lam, cond, null_cond, is_null, **options)
    return loss, step_metrics(loss, aux, t, num_instant)


def _side_by_side(networks):
    """Several networks on one pair of conditions, which holds what each has encoded by itself.

    Args:
      networks: (u, cond, null_cond) of each.

    Returns:
      The functions u, cond and null_cond: objectives take all of them with the same conditions.
    """
    functions, *conditions = zip(*networks)

    def of(u, place):
        return lambda x, t, s, cond: u(x, t, s, cond[place])

    return [of(u, place) for place, u in enumerate(functions)], *conditions


def step_metrics(loss, aux, t, num_instant: int):
    """Metrics to log: the loss, and the unweighted mse by kind of row and by t.

    With p = 1 the weighted loss stays near 1 throughout training; the mse shows the progress.
    """
    average = clu_metrics.Average.from_model_output
    instant = jnp.arange(t.shape[0]) < num_instant
    bins = jnp.minimum((t * TIME_BINS).astype(jnp.int32), TIME_BINS - 1)
    metrics = {"loss": average(loss), "mse": average(aux["mse"])}
    for kind, rows in (("instant", instant), ("jump", ~instant)):
        metrics[f"mse_{kind}"] = average(aux["mse"], rows)
        for i in range(TIME_BINS):
            metrics[f"mse_{kind}_t{i}"] = average(aux["mse"], rows & (bins == i))
    if num_instant:
        metrics["mse_instant_to_velocity"] = average(aux["velocity_mse"])
    return metrics


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
        targets = dict(target=target, target_net=target_net)
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
