"""One training step: a pure function of (state, batch, key)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from vcm_jax import ema, sampling
from vcm_jax.devices.sharding import Layout
from vcm_jax.models import Conditions, ModelConfig
from vcm_jax.objectives import Objective
from vcm_jax.objectives.common import expand, select_rows
from vcm_jax.objectives.vcm import VCMConfig

TIME_BINS = 5
ONE_DEVICE = Layout()


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of the training step that are not the network's or the optimizer's.

    Attributes:
      steps: of the whole run; schedules end there.
      objective: settings of the objective, and by their class the objective.
      null_prob: probability that a row's whole condition is dropped.
      video_drop_prob, text_drop_prob: MMAudio's separate dropout of one modality.

    Raises:
      ValueError: when a setting is out of its range.
    """

    steps: int
    objective: Objective = dataclasses.field(default_factory=VCMConfig)
    null_prob: float = 0.1
    video_drop_prob: float = 0.0
    text_drop_prob: float = 0.0

    def __post_init__(self):
        if not isinstance(self.objective, Objective):
            raise TypeError(f"{type(self.objective).__name__} are not settings of an objective")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        for name in ("null_prob", "video_drop_prob", "text_drop_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name} must be in [0, 1], not {getattr(self, name)}")

    def num_instant(self, batch_size: int) -> int:
        """How many rows of a batch have s = t; they come first."""
        return self.objective.num_instant(batch_size)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network that makes data out of noise, for reflow; everything here is static.

    Attributes:
      net: the network; its variables are an argument of the step.
      settings: of the objective that it was trained with.
      steps: of its sampler.
    """

    net: Any
    settings: Any
    steps: int


def check_network(net, config: StepConfig) -> None:
    """Raises ValueError, before anything is compiled, for a network that the objective cannot use.

    MeanFlow takes a JVP, which fused attention kernels do not have.
    """
    if not config.objective.needs_jvp:
        return
    c = net.config
    x, time = jnp.zeros((1, c.latent_seq_len, c.latent_dim)), jnp.zeros(1)
    shapes = ((c.clip_seq_len, c.clip_dim), (c.sync_seq_len, c.sync_dim))
    shapes += ((c.text_seq_len, c.text_dim),)
    cond = Conditions(*(jnp.zeros((1, *shape)) for shape in shapes))

    def derivative(key):
        variables = net.init(key, x, time, time, cond)
        apply = lambda x: net.apply(variables, x, time, time, cond)
        # Under a gradient, as in the loss: alone some kernels fail only when they are run.
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
    like = lambda shape, dtype: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
    latent = like((model.latent_seq_len, model.latent_dim), jnp.float32)
    return {
        "latent_mean": latent,
        "latent_std": latent,
        "clip": like((model.clip_seq_len, model.clip_dim), jnp.float16),
        "sync": like((model.sync_seq_len, model.sync_dim), jnp.float16),
        "text": like((model.text_seq_len, model.text_dim), jnp.float16),
        "has_video": like((), jnp.bool_),
        "has_text": like((), jnp.bool_),
    }


def draw_latents(batch, stats, key):
    """Normalised latents x0 `B N C`, float32: drawn from their mean and std."""
    mean, std = batch["latent_mean"], batch["latent_std"]
    latents = mean + std * jax.random.normal(key, mean.shape)
    latents = latents - stats["latent_mean"][None, None]
    return latents / stats["latent_std"][None, None]


def take_part(tree, part: int | jax.Array, parts: int):
    """Rows part, part + parts, part + 2 parts, ... of a pytree with leading axis `B`.

    With the stride every device of a sharded batch takes them from rows that it has, and the first
    rows stay first.
    """
    if parts == 1:
        return tree
    take = lambda a: a.reshape(-1, parts, *a.shape[1:])[:, part] if a.ndim else a
    return jax.tree.map(take, tree)


def drop_modalities(batch, key, config: StepConfig):
    """The batch with `has_video` and `has_text` false where that modality is dropped."""
    keys = jax.random.split(key)
    keep = lambda key, prob, has: has & ~jax.random.bernoulli(key, prob, has.shape)
    return batch | {
        "has_video": keep(keys[0], config.video_drop_prob, batch["has_video"]),
        "has_text": keep(keys[1], config.text_drop_prob, batch["has_text"]),
    }


def fill_conditions(batch, null: Conditions) -> Conditions:
    """Raw features, with the empty ones (`null`, 1 row) where a modality is missing or dropped."""
    fill = lambda mask, value, empty: jnp.where(expand(mask, value), value, empty)
    return Conditions(
        clip=fill(batch["has_video"], batch["clip"], null.clip),
        sync=fill(batch["has_video"], batch["sync"], null.sync),
        text=fill(batch["has_text"], batch["text"], null.text),
    )


def encode_batch(net, variables, batch):
    """The network on given variables, and the batch's conditions encoded by it.

    Returns:
      u(x, t, s, cond), cond, null_cond; the latter with one row for each of the batch.
    """
    batch_size = batch["latent_mean"].shape[0]
    apply = lambda *args: net.apply(variables, *args[:-1], method=args[-1])
    null = apply(1, "null_conditions")
    cond = apply(fill_conditions(batch, null), "encode_conditions")
    # The empty condition is encoded once for the batch.
    null_cond = sampling.repeat_rows(apply(null, "encode_conditions"), batch_size)
    return (lambda x, t, s, cond: apply(x, t, s, cond, "velocity")), cond, null_cond


def teacher_data(teacher: Teacher, variables, stats, batch, x1, is_null):
    """What the teacher makes of the noise x1 under the batch's conditions, in our normalisation."""
    u, cond, null_cond = encode_batch(teacher.net, variables, batch)
    cond = select_rows(is_null, null_cond, cond)
    u = sampling.velocity_for(teacher.settings, u, null_cond)
    x0 = sampling.sample(u, x1, sampling.uniform_times(teacher.steps), cond)
    ours, theirs = (
        {name: s[f"latent_{name}"][None, None] for name in ("mean", "std")}
        for s in (stats, variables["stats"])
    )
    x0 = (x0 * theirs["std"] + theirs["mean"] - ours["mean"]) / ours["std"]
    return jax.lax.stop_gradient(x0)


def loss_fn(
    params, stats, batch, key, step, teacher_variables=None, part=0,
    *, net, config: StepConfig, constrain, teacher: Teacher | None = None, parts: int = 1,
):  # fmt: skip
    """The objective on one batch: scalar loss, and a `clu.metrics` collection.

    With `parts` it is the loss of one part of the rows alone, on what is drawn for the whole batch.
    """
    objective = config.objective
    batch_size = batch["latent_mean"].shape[0]
    num_instant = config.num_instant(batch_size)
    keys = jax.random.split(key, 5)
    x0 = draw_latents(batch, stats, keys[0])
    x1 = jax.random.normal(keys[1], x0.shape)
    t, s, lam = objective.draw(keys[2], batch_size, num_instant, step, config.steps)
    is_null = jax.random.bernoulli(keys[3], config.null_prob, (batch_size,))
    batch = drop_modalities(batch, keys[4], config)
    batch, x0, x1, t, s, lam, is_null = take_part((batch, x0, x1, t, s, lam, is_null), part, parts)
    num_instant //= parts
    if teacher is not None:
        x0 = teacher_data(teacher, teacher_variables, stats, batch, x1, is_null)

    u, cond, null_cond = encode_batch(net, {"params": params, "stats": stats}, batch)
    loss, aux = objective.loss(
        u, x0, x1, t, s, lam, cond, null_cond, is_null,
        num_instant=num_instant, constrain=constrain,
    )  # fmt: skip
    return loss, step_metrics(loss, aux, t, num_instant)


def step_metrics(loss, aux, t, num_instant: int):
    """Averages to log: the loss, and the unweighted mse by kind of row and by t.

    With p = 1 the weighted loss stays near 1 whatever happens; the mse tells.
    """
    average = clu_metrics.Average.from_model_output
    instant = jnp.arange(t.shape[0]) < num_instant
    bins = jnp.minimum((t * TIME_BINS).astype(jnp.int32), TIME_BINS - 1)
    found = {"loss": average(loss), "mse": average(aux["mse"])}
    for kind, rows in (("instant", instant), ("jump", ~instant)):
        found[f"mse_{kind}"] = average(aux["mse"], rows)
        for i in range(TIME_BINS):
            found[f"mse_{kind}_t{i}"] = average(aux["mse"], rows & (bins == i))
    if num_instant:
        found["mse_instant_to_velocity"] = average(aux["velocity_mse"])
    return found


def gradients(params, *args, parts: int, **kwargs):
    """Gradients of `loss_fn` and its metrics, over `parts` microbatches one after another.

    Microbatches bound the memory of activations: the result is that of the whole batch at once.
    """
    compute = jax.grad(functools.partial(loss_fn, parts=parts, **kwargs), has_aux=True)
    if parts == 1:
        return compute(params, *args)

    def add(total, part):
        grads, metrics = compute(params, *args, part)
        return jax.tree.map(lambda a, g: a + g / parts, total, grads), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, metrics = jax.lax.scan(add, zeros, jnp.arange(parts))
    return grads, jax.tree.map(lambda a: a.sum(0), metrics)  # an Average is a total and a count


def train_step(
    state, batch, key, teacher_variables=None,
    *, net, optimizer, config: StepConfig, layout: Layout = ONE_DEVICE,
    teacher: Teacher | None = None, accumulate: int = 1, skip_nonfinite: bool = False,
):  # fmt: skip
    """One update of parameters, optimizer and averages.

    Args:
      state: TrainState.
      batch: arrays with leading axis `B`: `latent_mean`, `latent_std` `N C`; `clip` `Tc clip_dim`,
        `sync` `Ts sync_dim`, `text` `Tt text_dim`; bool `has_video`, `has_text`.
      key: of the run; the step's own key is `fold_in(key, state.step)`.
      teacher_variables, teacher: of reflow.
      net, optimizer, config: static.
      layout: where rows, weights and gradients live on the devices.
      accumulate: number of microbatches; it divides the batch and its s = t rows.
      skip_nonfinite: whether a step whose loss or gradient is not finite changes nothing but the
        step's number.

    Returns:
      The new state and a `clu.metrics.Collection` of this step; its `nonfinite` is 1 when the loss
      or a gradient is not finite.
    """
    key = jax.random.fold_in(key, state.step)
    grads, metrics = gradients(
        layout.gather(state.params), state.stats, batch, key, state.step, teacher_variables,
        net=net, config=config, constrain=layout.rows, teacher=teacher, parts=accumulate,
    )  # fmt: skip
    grads = layout.scatter(grads)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    averages = {
        width: ema.update(average, params, step, ema.gamma_from_sigma_rel(float(width)))
        for width, average in state.ema.items()
    }
    finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(grad_norm)
    average = clu_metrics.Average.from_model_output
    metrics |= {
        "grad_norm": average(grad_norm),
        "update_norm": average(optax.tree.norm(updates)),
        "nonfinite": average(1.0 - finite),
    }
    changed = state.replace(params=params, opt_state=opt_state, ema=averages)
    if skip_nonfinite:
        changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, state)
    return changed.replace(step=step), clu_metrics.Collection.create_collection(**metrics)
