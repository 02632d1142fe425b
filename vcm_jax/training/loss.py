"""The loss of a batch: the objective on the network, its targets' network and its teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

from vcm_jax import sampling
from vcm_jax.models import MMDiT
from vcm_jax.models.conditioned import encode_features, sample_latents, zero_inputs
from vcm_jax.objectives import Objective
from vcm_jax.objectives.common import identity, select_rows
from vcm_jax.objectives.dispersive import dispersive_loss
from vcm_jax.training.rows import StepConfig, draw_rows, instant_first, normalised

TIME_BINS = 5


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network that an objective learns from; everything here is static.

    Attributes:
      net: the network; its variables are an argument of the step.
      objective: the objective that it was trained with.
      steps: steps of the sampler with which it turns noise into the data; 0 keeps the batch's data.
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
    gather=identity,
):
    """As `loss_fn`, from what `draw_rows` drew, with the rows of s = t first.

    `target` are the parameters of the objective's targets, which `target_net` takes (`net` if it is
    None); None for `params`. `gather` returns the rows of all devices.
    """
    batch, x0, x1, guidance, t, s, lam, is_null = rows
    if teacher is not None and teacher.steps:
        x0 = teacher_data(teacher, teacher_variables, stats, batch, x1, is_null)
    options = dict(num_instant=num_instant, constrain=constrain)
    if guidance is not None:
        options["guidance"] = guidance
    variables = {"params": params, "stats": stats}
    together = net.scan and constrain is identity
    networks = {"u": encode_features(net, variables, batch, guidance, together)}
    if target is not None:
        slow = {"params": target, "stats": stats}
        networks["target_u"] = encode_features(target_net or net, slow, batch, guidance, together)
    if teacher is not None and config.objective.teacher_velocity:
        networks["teacher_u"] = _teacher_velocity(
            teacher, teacher_variables, batch, config.objective.teacher_velocity
        )
    functions, cond, null_cond = _side_by_side(networks)
    options |= functions
    loss, aux = config.objective.loss(
        options.pop("u"), x0, x1, t, s, lam, cond, null_cond, is_null, **options
    )
    extra = {}
    if config.dispersive:
        _, own, null = networks["u"]
        x_t, own = config.objective.noised(x0, x1, t), select_rows(is_null, null, own)
        z = net.apply(variables, x_t, t, s, own, method="features")
        extra = {"dispersive": dispersive_loss(gather(z))}
        loss = loss + config.dispersive * extra["dispersive"]
    return loss, step_metrics(loss, aux, t, num_instant, extra)


def _teacher_velocity(teacher: Teacher, variables, batch, kind: str):
    """A teacher's `Objective.teacher_velocity`, as `encode_features` returns a network."""
    objective, guided = teacher.objective, kind == "guided"
    guidance = sampling.OWN_SAMPLER.guidance_input(objective) if guided else None
    net, cond, null_cond = encode_features(teacher.net, variables, batch, guidance)
    if not guided:
        return objective.velocity(net), cond, null_cond

    def velocity(x, t, s, cond):
        cond, null_cond = cond
        return sampling.OWN_SAMPLER.velocity(objective, net, null_cond)(x, t, s, cond)

    return velocity, (cond, null_cond), (null_cond, null_cond)


def _side_by_side(networks):
    """Several networks on one pair of conditions, which holds what each has encoded by itself.

    Args:
      networks: {name: (u, cond, null_cond)}.

    Returns:
      {name: u}, cond and null_cond: objectives take all functions with the same conditions.
    """

    def of(name):
        u = networks[name][0]
        return lambda x, t, s, cond: u(x, t, s, cond[name])

    conditions = ({name: found[i] for name, found in networks.items()} for i in (1, 2))
    return {name: of(name) for name in networks}, *conditions


def step_metrics(loss, aux, t, num_instant: int, extra=None):
    """Metrics to log: the loss, and the unweighted mse by kind of row and by t.

    With p = 1 the weighted loss stays near 1 throughout training; the mse shows the progress.
    `extra` has further scalars, {name: value}.
    """
    average = clu_metrics.Average.from_model_output
    instant = jnp.arange(t.shape[0]) < num_instant
    bins = jnp.minimum((t * TIME_BINS).astype(jnp.int32), TIME_BINS - 1)
    metrics = {name: average(value) for name, value in (extra or {}).items()}
    metrics |= {"loss": average(loss), "mse": average(aux["mse"])}
    for kind, rows in (("instant", instant), ("jump", ~instant)):
        metrics[f"mse_{kind}"] = average(aux["mse"], rows)
        for i in range(TIME_BINS):
            metrics[f"mse_{kind}_t{i}"] = average(aux["mse"], rows & (bins == i))
    if num_instant:
        metrics["mse_instant_to_velocity"] = average(aux["velocity_mse"])
    return metrics
