"""The network on given variables: it encodes conditions once, and samples latents from noise.

Features are a dict, as batches of records are: `clip` `B Tc clip_dim`, `sync` `B Ts sync_dim` and
`text` `B Tt text_dim`, and bool `has_video` and `has_text` `B`, which say where they count.
`has_clip` and `has_sync`, where they are given, take the place of `has_video`. `negative_text`,
`B Tt text_dim`, takes that of the empty text in the condition from which guidance leads away.
"""

import jax
import jax.numpy as jnp

from vcm_jax import sampling
from vcm_jax.models.config import ModelConfig
from vcm_jax.models.mmdit import Conditions
from vcm_jax.objectives.common import rows, select_rows
from vcm_jax.objectives.guidance import Guidance


def zero_inputs(config: ModelConfig):
    """(x, t, s, cond) of one row, zeros: arguments with which a network can be initialised."""
    c = config
    time = jnp.zeros(1)
    cond = Conditions(
        jnp.zeros((1, c.clip_seq_len, c.clip_dim)),
        jnp.zeros((1, c.sync_seq_len, c.sync_dim)),
        jnp.zeros((1, c.text_seq_len, c.text_dim)),
    )
    return jnp.zeros((1, c.latent_seq_len, c.latent_dim)), time, time, cond


def fill_conditions(features, null: Conditions) -> Conditions:
    """The features, with the empty ones (`null`, 1 row) where a modality is missing or dropped."""

    video = features.get("has_video")
    has = {name: features.get(f"has_{name}", video) for name in ("clip", "sync", "text")}
    return Conditions(
        **{name: select_rows(has[name], features[name], getattr(null, name)) for name in has}
    )


def repeat_rows(tree, size: int):
    """A pytree of one row, repeated to `size` rows."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (size, *a.shape[1:])), tree)


def encode_features(net, variables, features, guidance=None, together: bool = False):
    """The network as a velocity, and the encoded conditions that it takes.

    The empty condition is encoded once for the whole batch.

    Args:
      net: MMDiT.
      variables: {"params": ..., "stats": ...}.
      features: see the top of this file.
      guidance: `Guidance`, numbers or arrays `B`, of a network that has an input for it. The empty
        condition has no guidance.
      together: whether the empty condition is one more row of the same pass, which compiles to
        half the code. It is for batches that are not split over devices.

    Returns:
      u(x, t, s, cond), cond and null_cond; the latter two with B rows.
    """

    def u(x, t, s, cond):
        return net.apply(variables, x, t, s, cond, method="velocity")

    def encode(conditions, guidance=None):
        return net.apply(variables, conditions, guidance, method="encode_conditions")

    null = net.apply(variables, 1, method="null_conditions")
    cond, size = fill_conditions(features, null), features["has_text"].shape[0]
    if "negative_text" in features:
        negative = repeat_rows(null, size).replace(text=features["negative_text"])
        return u, encode(cond, guidance), encode(negative)
    if not together:
        return u, encode(cond, guidance), repeat_rows(encode(null), size)
    if guidance is not None:
        guidance = _join(guidance.rows(size), Guidance().rows(1))
    both = encode(_join(cond, null), guidance)
    first, last = rows(0, size)(both), rows(size, None)(both)
    return u, first, repeat_rows(last, size)


def _join(a, b):
    """The rows of two pytrees, one after the other."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), a, b)


def sample_latents(
    net,
    variables,
    features,
    noise,
    times,
    objective,
    sampler: sampling.Sampler = sampling.OWN_SAMPLER,
    keys=None,
):
    """Latents sampled from noise, in the units of the training data (not normalised): `B N C`.

    Args:
      net, variables, features: as `encode_features`'s.
      noise: standard normal, `B N C`.
      times: of the sampler, decreasing, as `sampling.sample`'s.
      objective: the objective that the network was trained with.
      sampler: how it is sampled.
      keys: random keys of a restart sampler, one for each row.
    """
    guidance = sampler.guidance_input(objective)
    u, cond, null_cond = encode_features(net, variables, features, guidance)
    x0 = sampler(objective, u, noise, times, cond, null_cond, keys)
    stats = variables["stats"]
    return x0 * stats["latent_std"][None, None] + stats["latent_mean"][None, None]


def velocity_of_features(net, variables, features, x, t, s, objective, sampler):
    """The velocity with which a sampler jumps from time t to s, `B N C`.

    Args:
      net, variables, features: as `encode_features`'s.
      x: the sample at time t, in the network's units, `B N C`.
      t, s: scalars.
      objective, sampler: as `sample_latents`'s.
    """
    guidance = sampler.guidance_input(objective)
    u, cond, null_cond = encode_features(net, variables, features, guidance)
    rows = lambda time: jnp.full(x.shape[0], time, jnp.promote_types(jnp.float32, x.dtype))
    return sampler.velocity(objective, u, null_cond)(x, rows(t), rows(s), cond)
