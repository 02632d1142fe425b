"""One training step: a pure function of (state, batch, key)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from clu import metrics as clu_metrics

from vcm_jax import ema, times
from vcm_jax.models import Conditions
from vcm_jax.objectives.common import expand
from vcm_jax.objectives.vcm import VCMConfig, vcm_loss

TIME_BINS = 5


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of the training step that are not the network's or the optimizer's.

    Attributes:
      steps: of the whole run; the schedule of lambda ends there.
      vcm: settings of the objective.
      instant_ratio: r, the part of the rows with s = t.
      lambda_init, lambda_end: of eq. 12.
      time_mean, time_std: mu and sigma of the logit-normal times.
      null_prob: probability that a row's whole condition is dropped.
      video_drop_prob, text_drop_prob: MMAudio's separate dropout of one modality.

    Raises:
      ValueError: when a setting is out of its range.
    """

    steps: int
    vcm: VCMConfig = dataclasses.field(default_factory=VCMConfig)
    instant_ratio: float = 0.75
    lambda_init: float = 1 / 10
    lambda_end: float = 1 / 500
    time_mean: float = -0.4
    time_std: float = 1.0
    null_prob: float = 0.1
    video_drop_prob: float = 0.0
    text_drop_prob: float = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        for name in ("instant_ratio", "null_prob", "video_drop_prob", "text_drop_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name} must be in [0, 1], not {getattr(self, name)}")
        for name in ("lambda_init", "lambda_end"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"objective.{name} must be in (0, 1], not {getattr(self, name)}")
        if not self.time_std > 0:
            raise ValueError(f"objective.time_std must be > 0, not {self.time_std}")


def draw_latents(batch, stats, key):
    """Normalised latents x0 `B N C`, float32: drawn from their mean and std."""
    mean, std = batch["latent_mean"], batch["latent_std"]
    latents = mean + std * jax.random.normal(key, mean.shape)
    latents = latents - stats["latent_mean"][None, None]
    return latents / stats["latent_std"][None, None]


def fill_conditions(batch, null: Conditions, key, config: StepConfig) -> Conditions:
    """Raw features, with the empty ones (`null`, 1 row) where a modality is missing or dropped."""
    keys = jax.random.split(key)
    keep = lambda key, prob, has: has & ~jax.random.bernoulli(key, prob, has.shape)
    video = keep(keys[0], config.video_drop_prob, batch["has_video"])
    text = keep(keys[1], config.text_drop_prob, batch["has_text"])
    fill = lambda mask, value, empty: jnp.where(expand(mask, value), value, empty)
    return Conditions(
        clip=fill(video, batch["clip"], null.clip),
        sync=fill(video, batch["sync"], null.sync),
        text=fill(text, batch["text"], null.text),
    )


def loss_fn(params, stats, batch, key, step, *, net, config: StepConfig, constrain):
    """The objective on one batch: scalar loss, and a `clu.metrics` collection."""
    batch_size = batch["latent_mean"].shape[0]
    num_instant = round(config.instant_ratio * batch_size)
    keys = jax.random.split(key, 5)
    x0 = draw_latents(batch, stats, keys[0])
    x1 = jax.random.normal(keys[1], x0.shape)
    t, s = times.sample_times(keys[2], batch_size, num_instant, config.time_mean, config.time_std)
    lam = times.lambda_schedule(step, config.steps, config.lambda_init, config.lambda_end)
    is_null = jax.random.bernoulli(keys[3], config.null_prob, (batch_size,))

    apply = lambda *args: net.apply({"params": params, "stats": stats}, *args[:-1], method=args[-1])
    null = apply(1, "null_conditions")
    cond = apply(fill_conditions(batch, null, keys[4], config), "encode_conditions")
    # The empty condition is encoded once for the batch.
    null_cond = jax.tree.map(
        lambda a: jnp.broadcast_to(a, (batch_size, *a.shape[1:])), apply(null, "encode_conditions")
    )
    u = lambda x, t, s, cond: apply(x, t, s, cond, "velocity")
    loss, aux = vcm_loss(
        u, x0, x1, t, s, lam, cond, null_cond, is_null, config.vcm,
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


def train_step(state, batch, key, *, net, optimizer, config: StepConfig, constrain=lambda x: x):
    """One update of parameters, optimizer and averages.

    Args:
      state: TrainState.
      batch: arrays with leading axis `B`: `latent_mean`, `latent_std` `N C`; `clip` `Tc clip_dim`,
        `sync` `Ts sync_dim`, `text` `Tt text_dim`; bool `has_video`, `has_text`.
      key: of the run; the step's own key is `fold_in(key, state.step)`.
      net, optimizer, config: static.
      constrain: spreads rows over the devices, see `vcm_loss`.

    Returns:
      The new state and a `clu.metrics.Collection` of this step.
    """
    key = jax.random.fold_in(key, state.step)
    grads, metrics = jax.grad(loss_fn, has_aux=True)(
        state.params, state.stats, batch, key, state.step,
        net=net, config=config, constrain=constrain,
    )  # fmt: skip
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    averages = {
        width: ema.update(average, params, step, ema.gamma_from_sigma_rel(float(width)))
        for width, average in state.ema.items()
    }
    average = clu_metrics.Average.from_model_output
    metrics |= {
        "grad_norm": average(optax.tree.norm(grads)),
        "update_norm": average(optax.tree.norm(updates)),
    }
    state = state.replace(step=step, params=params, opt_state=opt_state, ema=averages)
    return state, clu_metrics.Collection.create_collection(**metrics)
