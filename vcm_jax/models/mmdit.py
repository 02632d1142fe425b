"""MMAudio's multimodal transformer with a second time embedding (SoundVCM 3.5, B)."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.models import layers
from vcm_jax.models.config import ModelConfig


@flax.struct.dataclass
class Conditions:
    """Raw features of a clip; any of them may be the learned empty ones.

    Attributes:
      clip: `B Tc clip_dim`, what is seen (8 fps).
      sync: `B Ts sync_dim`, how it moves, aligned with the sound.
      text: `B Tt text_dim`, the prompt's tokens.
    """

    clip: jax.Array
    sync: jax.Array
    text: jax.Array


@flax.struct.dataclass
class EncodedConditions:
    """What the network derives from the conditions alone, before it knows x, t and s.

    Attributes:
      clip: `B Tc D` tokens.
      sync: `B Ts D`, not yet spread over the latent tokens.
      text: `B Tt D` tokens.
      pooled: `B D`, the global condition without its times.
    """

    clip: jax.Array
    sync: jax.Array
    text: jax.Array
    pooled: jax.Array


def nearest_exact_rows(source: int, target: int) -> np.ndarray:
    """Which of `source` rows each of `target` rows takes: PyTorch's "nearest-exact".

    The position is computed in float32, as PyTorch does: 192 -> 345 has two positions that are
    whole numbers and whose float32 product falls just below them.
    """
    scale = np.float32(source) / np.float32(target)
    rows = np.floor((np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale)
    return np.minimum(rows.astype(np.int32), source - 1)


def nearest_time_rows(source: int, target: int, latent_rate: float) -> np.ndarray:
    """Which of Synchformer's `source` rows is nearest in time to each of `target` latent tokens.

    Segments of 16 frames at 25 fps start every 8 frames and give 8 rows, each of 2 frames, so that
    rows of neighbouring segments share their times: of two the one that is further inside its
    segment is taken, which sees as much of what comes as of what was.
    """
    segment, row = np.divmod(np.arange(source), 8)
    times = (8 * segment + 2 * row + 1) / 25
    tokens = (np.arange(target) + 0.5) / latent_rate
    distance = np.abs(tokens[:, None] - times[None]) + 1e-6 * np.abs(row - 3.5)[None]
    return distance.argmin(1).astype(np.int32)


def _products(primitive, *_, **__) -> bool:
    return primitive in (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)


# What a block keeps of its activations for the backward pass; the rest is computed again.
REMAT = {"none": None, "products": _products, "full": jax.checkpoint_policies.nothing_saveable}


class MMDiT(nn.Module):
    """The average velocity u(x, t, s, c) (SoundVCM 3.5; MMAudio, model/networks.py).

    Parameters are in the collection "params"; "stats" holds what the data determine and no
    gradient changes: `latent_mean`, `latent_std` (`C`) and `empty_text` (`Tt text_dim`).

    Attributes:
      config: sizes.
      dtype: of activations and matrix products; parameters are float32, and so are
        normalisations, softmax and the result (at least).
      remat: what a block keeps for the backward pass, a key of `REMAT`.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    def setup(self):
        c, zeros = self.config, nn.initializers.zeros
        dense = lambda *args, **kwargs: layers.Dense(*args, **kwargs, dtype=self.dtype)
        mlp = lambda kernel_size=None: layers.GatedMLP(c.mlp_dim, kernel_size, dtype=self.dtype)
        width = c.hidden_dim

        self.audio_input_proj_0 = dense(width, 7)
        self.audio_input_proj_2 = mlp(c.audio_kernel)
        self.clip_input_proj_0 = dense(width)
        self.clip_input_proj_1 = mlp(3)
        self.sync_input_proj_0 = dense(width, 7)
        self.sync_input_proj_2 = mlp(3)
        self.text_input_proj_0 = dense(width)
        self.text_input_proj_1 = mlp()
        self.clip_cond_proj = dense(width)
        self.text_cond_proj = dense(width)
        self.global_cond_mlp = mlp()
        self.t_embed = layers.TimestepEmbedder(width, dtype=self.dtype)
        self.h_embed = layers.TimestepEmbedder(width, dtype=self.dtype)

        sizes = (width, c.num_heads, c.mlp_dim)
        self.joint_blocks = [
            layers.JointBlock(*sizes, last=i == c.joint_depth - 1, dtype=self.dtype)
            for i in range(c.joint_depth)
        ]
        self.fused_blocks = [
            layers.FusedBlock(*sizes, dtype=self.dtype) for _ in range(c.fused_depth)
        ]
        self.final_layer = FinalLayer(c.latent_dim, dtype=self.dtype)

        self.sync_pos_emb = self.param("sync_pos_emb", zeros, (8, c.sync_dim))
        self.empty_clip_feat = self.param("empty_clip_feat", zeros, (c.clip_dim,))
        self.empty_sync_feat = self.param("empty_sync_feat", zeros, (c.sync_dim,))
        self.latent_mean = self.variable("stats", "latent_mean", jnp.zeros, (c.latent_dim,))
        self.latent_std = self.variable("stats", "latent_std", jnp.ones, (c.latent_dim,))
        self.empty_text = self.variable(
            "stats", "empty_text", jnp.zeros, (c.text_seq_len, c.text_dim)
        )

    def __call__(self, x, t, s, cond: Conditions):
        """Average velocity from t to s: x `B N C`, t and s `B`, raw features -> `B N C`."""
        return self.velocity(x, t, s, self.encode_conditions(cond))

    def null_conditions(self, batch_size: int) -> Conditions:
        """Raw features of the empty condition: learned for video, the text encoder's for ""."""
        c = self.config
        fill = lambda row, length: jnp.broadcast_to(row, (batch_size, length, row.shape[-1]))
        return Conditions(
            clip=fill(self.empty_clip_feat[None, None], c.clip_seq_len),
            sync=fill(self.empty_sync_feat[None, None], c.sync_seq_len),
            text=fill(self.empty_text.value[None], c.text_seq_len),
        )

    def encode_conditions(self, cond: Conditions) -> EncodedConditions:
        """All that does not depend on x, t and s; once per clip, whatever the number of steps.

        Raises:
          ValueError: when a feature has another shape than the config says.
        """
        c = self.config
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
        clip = self.clip_input_proj_1(self.clip_input_proj_0(cond.clip))
        text = self.text_input_proj_1(self.text_input_proj_0(cond.text))
        position = jnp.tile(self.sync_pos_emb, (c.sync_seq_len // 8, 1))[None]
        sync = self.sync_input_proj_2(nn.selu(self.sync_input_proj_0(cond.sync + position)))
        mean = lambda tokens: layers.at_least_float32(tokens).mean(1)
        pooled = self.clip_cond_proj(mean(clip)) + self.text_cond_proj(mean(text))
        return EncodedConditions(clip, sync, text, self.global_cond_mlp(pooled))

    def velocity(self, x, t, s, enc: EncodedConditions):
        """As `__call__`, from encoded conditions: `B N C` in at least float32."""
        c = self.config
        if x.shape[1:] != (c.latent_seq_len, c.latent_dim):
            raise ValueError(
                f"latents have shape {x.shape}, the model takes "
                f"(B, {c.latent_seq_len}, {c.latent_dim})"
            )
        global_c = (self.t_embed(t) + self.h_embed(s - t) + enc.pooled)[:, None]
        # The frame-aligned condition has only Ts distinct rows: modulations are computed on those
        # and then spread over the N latent tokens.
        frame_c = nn.silu(global_c + enc.sync)
        active_c = nn.silu(global_c)
        if c.sync_alignment == "time":
            rows = nearest_time_rows(c.sync_seq_len, c.latent_seq_len, c.latent_rate)
        else:
            rows = nearest_exact_rows(c.sync_seq_len, c.latent_seq_len)
        latent_angles = layers.rope_table(c.latent_seq_len, c.head_dim)
        clip_angles = layers.rope_table(
            c.clip_seq_len, c.head_dim, stretch=c.latent_seq_len / c.clip_seq_len
        )

        latent = self.audio_input_proj_2(nn.selu(self.audio_input_proj_0(x)))
        clip, text = enc.clip, enc.text
        joint = lambda block, *args: block(*args, rows, latent_angles, clip_angles)
        fused = lambda block, *args: block(*args, rows, latent_angles)
        if self.remat != "none":
            joint, fused = (nn.remat(call, policy=REMAT[self.remat]) for call in (joint, fused))
        for block in self.joint_blocks:
            latent, clip, text = joint(block, latent, clip, text, frame_c, active_c)
        for block in self.fused_blocks:
            latent = fused(block, latent, frame_c)
        return layers.at_least_float32(self.final_layer(latent, active_c))


class FinalLayer(nn.Module):
    """Modulation by the global condition and a convolution to the latent's channels."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, c):
        m = layers.zero_dense(2 * x.shape[-1], dtype=self.dtype, name="adaLN_modulation_1")(c)
        shift, scale = jnp.split(m, 2, -1)
        x = layers.modulated_norm(x, shift, scale)
        return layers.zero_dense(self.features, 7, dtype=self.dtype, name="conv")(x)
