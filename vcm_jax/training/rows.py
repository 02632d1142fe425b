"""The rows of a batch as a step sees them: its settings, and all that it draws at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax import settings
from vcm_jax.models import ModelConfig
from vcm_jax.objectives import Objective
from vcm_jax.objectives.times import MIN_GAP
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.settings import integer, number, setting


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Settings of the training step that are not those of the network or the optimizer.

    Attributes:
      steps: steps of the whole run; schedules end there.
      objective: the objective.
      null_prob: probability that a row's whole condition is dropped.
      video_drop_prob, text_drop_prob: probabilities that one modality is dropped, as in MMAudio.
      anneal_steps: in so many first steps the jumps grow from none to the length that the objective
        draws: a network that knows the instantaneous velocity alone learns short jumps first.
      dispersive: the weight of `objectives.dispersive.dispersive_loss` in the loss; 0 for none.

    Raises:
      ValueError: when a setting is out of its range.
    """

    steps: int
    objective: Objective = dataclasses.field(default_factory=VCMConfig)
    null_prob: float = setting(0.1, number(0, 1))
    video_drop_prob: float = setting(0.0, number(0, 1))
    text_drop_prob: float = setting(0.0, number(0, 1))
    anneal_steps: int = setting(0, integer(0))
    dispersive: float = setting(0.0, number(0))

    def __post_init__(self):
        if not isinstance(self.objective, Objective):
            raise TypeError(f"{type(self.objective).__name__} are not settings of an objective")
        if not integer(1).holds(self.steps):
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        settings.check(self, "objective")
        kind = self.objective
        fixed = kind.instant_only or kind.to_data or kind.name in ("shortcut", "twinflow")
        if self.anneal_steps and fixed:
            raise ValueError(
                f"objective.anneal_steps shortens jumps to any length, which {self.objective.name} "
                "does not have: it must be 0"
            )

    def num_instant(self, batch_size: int) -> int:
        """How many rows of a batch have s = t."""
        return self.objective.num_instant(batch_size)


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


def anneal(t, s, num_instant: int, step, steps: int):
    """s `B` of the jumps, drawn closer to t: at `step` (from 0) of the first `steps`."""
    if not steps:
        return s
    span = jnp.minimum((jnp.asarray(step, jnp.float32) + 1) / steps, 1.0)
    closer = jnp.minimum(t - span * (t - s), t - MIN_GAP)
    return jnp.where(jnp.arange(t.shape[0]) < num_instant, s, closer)


def instant_places(batch_size: int, num_instant: int) -> np.ndarray:
    """Which rows of a batch have s = t: bool `B`.

    They are spread evenly, so that every device has the same number of them wherever the number of
    devices divides `num_instant`: no row has to leave its device, and which rows they are does not
    depend on the mesh.
    """
    counts = np.arange(batch_size + 1) * num_instant // max(batch_size, 1)
    return np.diff(counts) == 1


def instant_first(tree, num_instant: int):
    """Rows as the objectives take them, those with s = t first; a tree with leading axis `B`."""
    size = next(a.shape[0] for a in jax.tree.leaves(tree) if a.ndim)
    order = np.argsort(~instant_places(size, num_instant), kind="stable")
    return jax.tree.map(lambda a: a[order] if a.ndim else a, tree)


def draw_rows(stats, batch, key, step, config: StepConfig):
    """All that a step draws, for the rows of a batch in their order.

    Returns:
      (batch, x0, x1, guidance, t, s, lam, is_null): the batch with modalities dropped, latents and
      noise `B N C`, the guidance of each row or None, times `B`, lambda of the objective, and bool
      `B`.
    """
    objective, size = config.objective, batch["latent_mean"].shape[0]
    num_instant = config.num_instant(size)
    keys = jax.random.split(key, 5)
    x0 = draw_latents(batch, stats, keys[0])
    x1 = jax.random.normal(keys[1], x0.shape)
    is_null = jax.random.bernoulli(keys[3], config.null_prob, (size,))
    batch = drop_modalities(batch, keys[4], config)
    guidance = objective.draw_guidance(jax.random.fold_in(keys[2], 2), size)
    # Times are drawn with those of s = t rows first; each goes to its row's place.
    t, s, lam = objective.draw(keys[2], size, num_instant, step, config.steps)
    s = anneal(t, s, num_instant, step, config.anneal_steps)
    instant = instant_places(size, num_instant)
    places = np.where(instant, np.cumsum(instant) - 1, num_instant + np.cumsum(~instant) - 1)
    t, s, lam = jax.tree.map(lambda a: a[places] if jnp.ndim(a) else a, (t, s, lam))
    return batch, x0, x1, guidance, t, s, lam, is_null
