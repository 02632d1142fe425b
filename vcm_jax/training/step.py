"""One training step: a pure function of (state, batch, key)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from vcm_jax import ema, sampling, settings
from vcm_jax.devices.sharding import Layout
from vcm_jax.models import MMDiT, ModelConfig
from vcm_jax.models.conditioned import encode_features, sample_latents, zero_inputs
from vcm_jax.objectives import Objective
from vcm_jax.objectives.common import identity
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.settings import integer, number, setting

TIME_BINS = 5
ONE_DEVICE = Layout()


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of the training step that are not those of the network or the optimizer.

    Attributes:
      steps: steps of the whole run; schedules end there.
      objective: the objective.
      null_prob: probability that a row's whole condition is dropped.
      video_drop_prob, text_drop_prob: probabilities that one modality is dropped, as in MMAudio.

    Raises:
      ValueError: when a setting is out of its range.
    """

    steps: int
    objective: Objective = dataclasses.field(default_factory=VCMConfig)
    null_prob: float = setting(0.1, number(0, 1))
    video_drop_prob: float = setting(0.0, number(0, 1))
    text_drop_prob: float = setting(0.0, number(0, 1))

    def __post_init__(self):
        if not isinstance(self.objective, Objective):
            raise TypeError(f"{type(self.objective).__name__} are not settings of an objective")
        if not integer(1).holds(self.steps):
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        settings.check(self, "objective")

    def num_instant(self, batch_size: int) -> int:
        """How many rows of a batch have s = t; they come first."""
        return self.objective.num_instant(batch_size)


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
            f"does not have ({str(error).splitlines()[0]}): choose another one"
        ) from None


def abstract_batch(model: ModelConfig, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the batches that `train_step` takes."""

    def like(dtype, *shape):
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    latent = like(jnp.float32, model.latent_seq_len, model.latent_dim)
    return {
        "latent_mean": latent,
        "latent_std": latent,
        "clip": like(jnp.float16, model.clip_seq_len, model.clip_dim),
        "sync": like(jnp.float16, model.sync_seq_len, model.sync_dim),
        "text": like(jnp.float16, model.text_seq_len, model.text_dim),
        "has_video": like(jnp.bool_),
        "has_text": like(jnp.bool_),
    }


def normalised(latents, stats):
    """Latents `B N C` with the mean and std of the training data removed, per channel."""
    latents = latents - stats["latent_mean"][None, None]
    return latents / stats["latent_std"][None, None]


def draw_latents(batch, stats, key):
    """Normalised latents x0 `B N C`, float32, drawn from the codec's mean and std of each clip."""
    mean, std = batch["latent_mean"], batch["latent_std"]
    return normalised(mean + std * jax.random.normal(key, mean.shape), stats)


def take_microbatch(tree, index: int | jax.Array, count: int):
    """Rows index, index + count, index + 2 count, ... of a pytree with leading axis `B`.

    With this stride each device of a sharded batch finds its rows among those that it holds, and
    the first rows (with s = t) come first again. Scalars are kept.
    """
    if count == 1:
        return tree
    return jax.tree.map(
        lambda a: a.reshape(-1, count, *a.shape[1:])[:, index] if a.ndim else a, tree
    )


def drop_modalities(batch, key, config: StepConfig):
    """The batch, with `has_video` and `has_text` set to false at random."""

    def keep(key, prob, has):
        return has & ~jax.random.bernoulli(key, prob, has.shape)

    keys = jax.random.split(key)
    return batch | {
        "has_video": keep(keys[0], config.video_drop_prob, batch["has_video"]),
        "has_text": keep(keys[1], config.text_drop_prob, batch["has_text"]),
    }


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
    microbatch=0,
    *,
    net,
    config: StepConfig,
    constrain=identity,
    teacher: Teacher | None = None,
    accumulate: int = 1,
):
    """The loss of one batch, a scalar, and its metrics, a dict of `clu.metrics`.

    With `accumulate` it is the loss of one of so many microbatches; random numbers are drawn for
    the whole batch.
    """
    objective, batch_size = config.objective, batch["latent_mean"].shape[0]
    num_instant = config.num_instant(batch_size)
    keys = jax.random.split(key, 5)
    x0 = draw_latents(batch, stats, keys[0])
    x1 = jax.random.normal(keys[1], x0.shape)
    t, s, lam = objective.draw(keys[2], batch_size, num_instant, step, config.steps)
    is_null = jax.random.bernoulli(keys[3], config.null_prob, (batch_size,))
    batch = drop_modalities(batch, keys[4], config)
    batch, x0, x1, t, s, lam, is_null = take_microbatch(
        (batch, x0, x1, t, s, lam, is_null), microbatch, accumulate
    )
    num_instant //= accumulate
    if teacher is not None:
        x0 = teacher_data(teacher, teacher_variables, stats, batch, x1, is_null)

    u, cond, null_cond = encode_features(net, {"params": params, "stats": stats}, batch)
    rows = dict(num_instant=num_instant, constrain=constrain)
    loss, aux = objective.loss(u, x0, x1, t, s, lam, cond, null_cond, is_null, **rows)
    return loss, step_metrics(loss, aux, t, num_instant)


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


def gradients(params, *args, accumulate: int, **options):
    """Gradients and metrics of `loss_fn`, accumulated over microbatches one after another.

    Microbatches bound the memory of activations; the result is that of the whole batch at once.
    """
    compute = jax.grad(functools.partial(loss_fn, accumulate=accumulate, **options), has_aux=True)
    if accumulate == 1:
        return compute(params, *args)

    def add(total, microbatch):
        grads, metrics = compute(params, *args, microbatch)
        return jax.tree.map(lambda a, g: a + g / accumulate, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, jnp.arange(accumulate))
    return grads, jax.tree.map(lambda a: a.sum(0), metrics)  # an Average is a total and a count


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

    Returns:
      The new state, and a `clu.metrics.Collection` of this step; its `nonfinite` is 1 when the loss
      or a gradient is not finite.
    """
    key = jax.random.fold_in(key, state.step)
    grads, metrics = gradients(
        layout.gather(state.params),
        state.stats,
        batch,
        key,
        state.step,
        teacher_variables,
        net=net,
        config=config,
        constrain=layout.rows,
        teacher=teacher,
        accumulate=accumulate,
    )
    grads = layout.scatter(grads)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    ema_weights = {
        width: ema.update(weights, params, step, ema.gamma_from_sigma_rel(float(width)))
        for width, weights in state.ema.items()
    }
    finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(grad_norm)
    average = clu_metrics.Average.from_model_output
    metrics |= {
        "grad_norm": average(grad_norm),
        "update_norm": average(optax.tree.norm(updates)),
        "nonfinite": average(1.0 - finite),
    }
    changed = state.replace(params=params, opt_state=opt_state, ema=ema_weights)
    if skip_nonfinite:
        changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
    return changed.replace(step=step), clu_metrics.Collection.create_collection(**metrics)
