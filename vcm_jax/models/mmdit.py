"""MMAudio's multimodal transformer with a second time embedding (SoundVCM 3.5 and appendix B)."""

import functools
import operator
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.models import layers
from vcm_jax.models.config import ModelConfig
from vcm_jax.objectives.common import identity
from vcm_jax.objectives.guidance import Guidance
from vcm_jax.records.sequence import SYNC_ROWS, sync_row_times


@flax.struct.dataclass
class Conditions:
    """Raw features of a clip; any of them may be the empty ones.

    Attributes:
      clip: `B Tc clip_dim`, CLIP's features of the frames (8 fps).
      sync: `B Ts sync_dim`, Synchformer's features of the motion.
      text: `B Tt text_dim`, features of the prompt's tokens.
    """

    clip: jax.Array
    sync: jax.Array
    text: jax.Array


@flax.struct.dataclass
class EncodedConditions:
    """What the network computes from conditions and guidance alone, without x, t and s.

    Attributes:
      clip: `B Tc D` tokens.
      sync: `B Ts D`, not yet spread over the latent tokens.
      text: `B Tt D` tokens.
      pooled: `B D`, the global condition without the embedded times.
    """

    clip: jax.Array
    sync: jax.Array
    text: jax.Array
    pooled: jax.Array


def nearest_exact_rows(source: int, target: int) -> np.ndarray:
    """The index of the source row that each target row takes, as PyTorch's "nearest-exact" mode.

    The position is computed in float32, as PyTorch does: from 192 to 345 rows two positions are
    whole numbers whose float32 products fall just below them.

    Args:
      source, target: numbers of rows.

    Returns:
      int32 `target`.
    """
    scale = np.float32(source) / np.float32(target)
    rows = np.floor((np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale)
    return np.minimum(rows.astype(np.int32), source - 1)


def nearest_time_rows(source: int, target: int, latent_rate: float) -> np.ndarray:
    """The index of the Synchformer row that is nearest in time to each latent token.

    Rows of neighbouring segments share their times. Of two such rows the one nearer to the centre
    of its segment is taken: it has seen as many frames before its time as after it.

    Args:
      source, target: numbers of sync rows and of latent tokens.
      latent_rate: latent tokens per second.

    Returns:
      int32 `target`.
    """
    times, off_centre = sync_row_times(source)
    tokens = (np.arange(target) + 0.5) / latent_rate
    distance = np.abs(tokens[:, None] - times[None]) + 1e-6 * off_centre[None]
    return distance.argmin(1).astype(np.int32)


def _products(primitive, *_, **params) -> bool:
    """A policy of `jax.checkpoint`: keep the results of products with weights.

    Those of attention have batch axes. They are large and cheap, so that they are computed again.
    """
    if primitive is jax.lax.dot_general_p:
        return not params["dimension_numbers"][1][0]
    return primitive is jax.lax.conv_general_dilated_p


# What a block keeps of its activations for the backward pass; it recomputes the rest.
REMAT = {"none": None, "products": _products, "full": jax.checkpoint_policies.nothing_saveable}

# The parameters that embed guidance; weights without them fit a network that has this input.
GUIDANCE_INPUT = "g_embed"


STACKED = ("joint_blocks", "fused_blocks")  # the names of stacked weights


def _scanned(config: ModelConfig) -> dict[str, int]:
    """How many blocks of a kind a scan can apply; the last joint block differs from the others."""
    counts = dict(zip(STACKED, (config.joint_depth - 1, config.fused_depth)))
    return {name: count for name, count in counts.items() if count > 1}


def stack_blocks(params, config: ModelConfig, stack=jnp.stack):
    """The parameters of a network, those of equal blocks stacked: `joint_blocks`, `fused_blocks`.

    `MMDiT` takes both forms. States and checkpoints hold the parameters of each block by itself.
    `stack` makes one leaf from those of all blocks.
    """
    params = dict(params)
    for name, count in _scanned(config).items():
        blocks = [params.pop(f"{name}_{i}") for i in range(count)]
        params[name] = jax.tree.map(lambda *leaves: stack(leaves), *blocks)
    return params


def unstack_blocks(params, config: ModelConfig):
    """The inverse of `stack_blocks`."""
    params = dict(params)
    for name, count in _scanned(config).items():
        stacked = params.pop(name)
        for i in range(count):
            params[f"{name}_{i}"] = jax.tree.map(operator.itemgetter(i), stacked)
    return params


class MMDiT(nn.Module):
    """The average velocity u(x, t, s, c) (SoundVCM 3.5; MMAudio, model/networks.py).

    Parameters are in the collection "params". The collection "stats" holds what the data determine
    and no gradient changes: `latent_mean`, `latent_std` (`C`) and `empty_text` (`Tt text_dim`).

    Attributes:
      config: sizes.
      dtype: dtype of activations and matrix products. Parameters are float32; normalisations,
        softmax and the result are at least float32.
      remat: what a block keeps for the backward pass, a key of `REMAT`.
      attention: how it is computed, one of `layers.ATTENTION`.
      scan: whether equal blocks are one program that runs several times. That compiles sooner, and
        is as fast on GPUs and TPUs; on CPUs convolutions in it are slow.
      unpack: turns the weights of a scanned block, as `params` have them, into arrays.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    scan: bool = False
    unpack: Callable = identity

    def setup(self):
        c, zeros = self.config, nn.initializers.zeros
        width = c.hidden_dim
        dense = functools.partial(layers.Dense, dtype=self.dtype)
        mlp = functools.partial(layers.GatedMLP, c.mlp_dim, dtype=self.dtype)

        self.audio_input_proj_0 = dense(width, 7)
        self.audio_input_proj_2 = mlp(c.audio_kernel)
        self.clip_input_proj_0 = dense(width)
        self.sync_input_proj_0 = dense(width, 7)
        self.sync_input_proj_2 = mlp(3)
        self.text_input_proj_0 = dense(width)
        # The number is the place in MMAudio's sequence, where version 2 has an activation before.
        setattr(self, f"clip_input_proj_{c.version}", mlp(3))
        setattr(self, f"text_input_proj_{c.version}", mlp())
        self.clip_cond_proj = dense(width)
        self.text_cond_proj = dense(width)
        self.global_cond_mlp = mlp()
        self.t_embed = layers.TimestepEmbedder(width, c.version, dtype=self.dtype)
        self.h_embed = layers.TimestepEmbedder(width, c.version, dtype=self.dtype)
        if c.guidance_input:
            # Zero at first, so that weights of a network without this input start unchanged.
            self.g_embed = layers.TimestepEmbedder(width, c.version, dtype=self.dtype, zero=True)

        sizes = dict(features=width, num_heads=c.num_heads, mlp_dim=c.mlp_dim)
        how = dict(attention=self.attention, dtype=self.dtype)
        self.joint_blocks = [
            layers.JointBlock(**sizes, **how, last=i == c.joint_depth - 1)
            for i in range(c.joint_depth)
        ]
        self.fused_blocks = [layers.FusedBlock(**sizes, **how) for _ in range(c.fused_depth)]
        self.final_layer = FinalLayer(c.latent_dim, dtype=self.dtype)

        self.sync_pos_emb = self.param("sync_pos_emb", zeros, (SYNC_ROWS, c.sync_dim))
        self.empty_clip_feat = self.param("empty_clip_feat", zeros, (c.clip_dim,))
        self.empty_sync_feat = self.param("empty_sync_feat", zeros, (c.sync_dim,))
        self.latent_mean = self.variable("stats", "latent_mean", jnp.zeros, (c.latent_dim,))
        self.latent_std = self.variable("stats", "latent_std", jnp.ones, (c.latent_dim,))
        self.empty_text = self.variable(
            "stats", "empty_text", jnp.zeros, (c.text_seq_len, c.text_dim)
        )

    def _activation(self, x):
        """The activation between the layers of the projections of latents and sync features."""
        return nn.selu(x) if self.config.version == 1 else nn.silu(x)

    def __call__(self, x, t, s, cond: Conditions, guidance: Guidance | None = None):
        """Average velocity from t to s: x `B N C`, t and s `B`, raw features -> `B N C`.

        `guidance` is as in `encode_conditions`.
        """
        return self.velocity(x, t, s, self.encode_conditions(cond, guidance))

    def null_conditions(self, batch_size: int) -> Conditions:
        """Raw features of the empty condition: learned for video, the text encoder's for ""."""
        c = self.config

        def fill(row, length):
            return jnp.broadcast_to(row, (batch_size, length, row.shape[-1]))

        return Conditions(
            clip=fill(self.empty_clip_feat[None, None], c.clip_seq_len),
            sync=fill(self.empty_sync_feat[None, None], c.sync_seq_len),
            text=fill(self.empty_text.value[None], c.text_seq_len),
        )

    def encode_conditions(
        self, cond: Conditions, guidance: Guidance | None = None
    ) -> EncodedConditions:
        """Everything that does not depend on x, t and s; computed once per clip, for any number of
        steps.

        Args:
          cond: raw features.
          guidance: with `guidance_input`, the guidance: numbers, or arrays `B`. None is w = 1, no
            guidance.

        Raises:
          ValueError: when the shape of a feature is not that of the config, or when guidance is
            given to a network that has no input for it.
        """
        c = self.config
        if guidance is not None and not c.guidance_input:
            raise ValueError("this network has no input for guidance (guidance_input)")
        for name, length, width in (
            ("clip", c.clip_seq_len, c.clip_dim),
            ("sync", c.sync_seq_len, c.sync_dim),
            ("text", c.text_seq_len, c.text_dim),
        ):
            shape = getattr(cond, name).shape
            if shape[1:] != (length, width):
                raise ValueError(
                    f"{name} features have shape {shape}, the model takes (B, {length}, {width})"
                )
        clip, text = self.clip_input_proj_0(cond.clip), self.text_input_proj_0(cond.text)
        if c.version == 2:
            clip, text = nn.silu(clip), nn.silu(text)
        clip = getattr(self, f"clip_input_proj_{c.version}")(clip)
        text = getattr(self, f"text_input_proj_{c.version}")(text)
        position = jnp.tile(self.sync_pos_emb, (c.sync_seq_len // SYNC_ROWS, 1))[None]
        sync = self.sync_input_proj_0(cond.sync + position)
        sync = self.sync_input_proj_2(self._activation(sync))

        def mean(tokens):
            return layers.at_least_float32(tokens).mean(1)

        pooled = self.clip_cond_proj(mean(clip)) + self.text_cond_proj(mean(text))
        pooled = self.global_cond_mlp(pooled)
        if c.guidance_input:
            scale, low, high = (guidance or Guidance()).rows(len(pooled))
            pooled = pooled + self.g_embed(jnp.log(scale), low, high)
        return EncodedConditions(clip, sync, text, pooled)

    def velocity(self, x, t, s, enc: EncodedConditions):
        """As `__call__`, from encoded conditions: `B N C`, at least float32.

        Raises:
          ValueError: when the shape of x is not that of the config.
        """
        latent, active_c = self._latent(x, t, s, enc, self.config.depth)
        return layers.at_least_float32(self.final_layer(latent, active_c))

    def features(self, x, t, s, enc: EncodedConditions):
        """The mean of the latent tokens after the first `feature_depth` blocks: `B D`.

        Arguments as `velocity`'s; at least float32.
        """
        latent, _ = self._latent(x, t, s, enc, self.config.feature_depth)
        return layers.at_least_float32(latent).mean(1)

    def _latent(self, x, t, s, enc: EncodedConditions, depth: int):
        """(latent tokens after so many blocks `B N D`, condition of the final layer `B 1 D`)."""
        c = self.config
        if x.shape[1:] != (c.latent_seq_len, c.latent_dim):
            raise ValueError(
                f"latents have shape {x.shape}, the model takes "
                f"(B, {c.latent_seq_len}, {c.latent_dim})"
            )

        def conditions(time):
            """The activated conditions of the latent tokens' and of the other layers."""
            global_c = (self.t_embed(time) + self.h_embed(s - t) + enc.pooled)[:, None]
            # The frame-aligned condition has only Ts distinct rows. Modulations are computed from
            # those and then spread over the N latent tokens, which saves matrix products.
            return nn.silu(global_c + enc.sync), nn.silu(global_c)

        at_t = conditions(t)
        at_s = conditions(s) if c.blocks_at_s else at_t
        if c.sync_alignment == "time":
            rows = nearest_time_rows(c.sync_seq_len, c.latent_seq_len, c.latent_rate)
        else:
            rows = nearest_exact_rows(c.sync_seq_len, c.latent_seq_len)
        latent_angles = layers.rope_table(c.latent_seq_len, c.head_dim)
        clip_angles = layers.rope_table(
            c.clip_seq_len, c.head_dim, stretch=c.latent_seq_len / c.clip_seq_len
        )

        latent = self.audio_input_proj_2(self._activation(self.audio_input_proj_0(x)))
        clip, text = enc.clip, enc.text

        def joint(block, latent, clip, text, frame_c, active_c):
            return block(latent, clip, text, frame_c, active_c, rows, latent_angles, clip_angles)

        def fused(block, latent, frame_c):
            return (block(latent, frame_c, rows, latent_angles),)

        streams, late = (latent, clip, text), c.depth - c.blocks_at_s
        streams = self._blocks("joint_blocks", joint, streams, at_t, at_s, late, depth)
        late, depth = late - c.joint_depth, depth - c.joint_depth
        conditions = at_t[:1], at_s[:1]
        (latent,) = self._blocks("fused_blocks", fused, streams[:1], *conditions, late, depth)
        return latent, at_s[1]

    def _blocks(self, name: str, call, streams, at_t, at_s, late: int, stop: int):
        """The streams after the blocks of a kind; `call(block, *streams, *conditions)` is one.

        The conditions are `at_s` from the block number `late` on, and `at_t` before. The block
        number `stop` and those after it are left out.
        """
        blocks = getattr(self, name)[: max(stop, 0)]
        if not blocks:
            return streams
        late = max(late, 0)
        policy = REMAT[self.remat]
        stacked = None
        if not self.is_initializing():
            params = self.variables["params"]
            if self.scan and name in _scanned(self.config) and name not in params:
                params = stack_blocks(params, self.config)
            stacked = params.get(name)
        if stacked is not None:
            block = blocks[0].clone(parent=None)
            whole = _scanned(self.config)[name]
            count = min(whole, len(blocks))
            split = min(late, count)
            for conditions, part in ((at_t, slice(0, split)), (at_s, slice(split, count))):
                if part.start == part.stop:
                    continue

                def body(streams, weights, conditions=conditions):
                    bound = block.bind({"params": self.unpack(weights)})
                    return call(bound, *streams, *conditions), None

                if self.remat != "none":
                    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
                weights = stacked
                if part != slice(0, whole):
                    weights = jax.tree.map(operator.itemgetter(part), stacked)
                streams, _ = jax.lax.scan(body, streams, weights)
            blocks, late = blocks[count:], max(late - count, 0)
        if self.remat != "none":
            call = nn.remat(call, policy=policy)
        for i, block in enumerate(blocks):
            streams = call(block, *streams, *(at_t if i < late else at_s))
        return streams


class FinalLayer(nn.Module):
    """Modulation by the global condition, then a convolution to the channels of the latents."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, c):
        m = layers.zero_dense(2 * x.shape[-1], dtype=self.dtype, name="adaLN_modulation_1")(c)
        shift, scale = jnp.split(m, 2, -1)
        x = layers.modulated_norm(x, shift, scale)
        return layers.zero_dense(self.features, 7, dtype=self.dtype, name="conv")(x)
