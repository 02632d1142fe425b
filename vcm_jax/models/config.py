"""Sizes of the network."""

import dataclasses
import math

from vcm_jax import settings
from vcm_jax.records.sequence import SYNC_ROWS, SequenceConfig
from vcm_jax.settings import BOOLEAN, choice, integer, number, setting

_SIZE = integer(1)
SYNC_ALIGNMENTS = ("index", "time")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of MMAudio's multimodal transformer; lengths are those of one clip.

    `SequenceConfig` computes the lengths from a duration; `with_lengths` puts them in.

    Attributes:
      latent_dim, clip_dim, sync_dim, text_dim: channels of the latents and of the raw features.
      hidden_dim, num_heads: D and H; the head size D / H must be even (rotary embedding).
      depth: number of all blocks, joint and fused.
      fused_depth: number of fused blocks, which see the latent tokens alone.
      latent_seq_len, clip_seq_len, sync_seq_len, text_seq_len: N, Tc, Ts (a multiple of the 8 rows
        of a Synchformer segment), Tt.
      audio_kernel: kernel size of the ConvMLP in the audio projector. MMAudio's released weights
        have 7; SoundVCM's appendix B.3 says 3.
      sync_alignment: which sync row a latent token takes. "index" spreads the rows evenly, as
        MMAudio does; "time" takes the row nearest in time, as Synchformer's segments overlap.
      latent_rate: latent tokens per second; used with "time" alone.
      version: MMAudio's, 1 or 2. Version 2 has SiLU where version 1 has SELU, one more SiLU in the
        projections of clip and text, and other frequencies (`layers.time_frequencies`).
      guidance_input: whether the guidance scale and its interval are an input, which is added to
        the global condition. Training sets it to what the objective needs.
      blocks_at_s: how many of the last blocks are conditioned on s in place of t, and with them the
        final layer (Decoupled MeanFlow, arXiv 2510.24474). u(x, t, t, c) does not depend on it.

    Raises:
      ValueError: when the sizes do not fit each other.
    """

    latent_dim: int = setting(accepts=_SIZE)
    clip_dim: int = setting(accepts=_SIZE)
    sync_dim: int = setting(accepts=_SIZE)
    text_dim: int = setting(accepts=_SIZE)
    hidden_dim: int = setting(accepts=_SIZE)
    num_heads: int = setting(accepts=_SIZE)
    depth: int = setting(accepts=_SIZE)
    fused_depth: int = setting(accepts=integer(0))
    latent_seq_len: int = setting(accepts=_SIZE)
    clip_seq_len: int = setting(accepts=_SIZE)
    sync_seq_len: int = setting(accepts=_SIZE)
    text_seq_len: int = setting(77, _SIZE)
    audio_kernel: int = setting(7, _SIZE)
    sync_alignment: str = setting("index", choice(*SYNC_ALIGNMENTS))
    latent_rate: float = setting(31.25, number(above=0))
    version: int = setting(1, integer(1, 2))
    guidance_input: bool = setting(False, BOOLEAN)
    blocks_at_s: int = setting(0, integer(0))

    def __post_init__(self):
        settings.check(self, "model")
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(
                f"hidden_dim {self.hidden_dim} over {self.num_heads} heads is not an even head size"
            )
        if not self.depth > self.fused_depth:
            raise ValueError(
                f"depth {self.depth} counts joint and fused blocks: it must be larger than "
                f"fused_depth {self.fused_depth}"
            )
        if not self.blocks_at_s < self.depth:
            raise ValueError(
                f"blocks_at_s {self.blocks_at_s} must be less than depth {self.depth}: the first "
                "block sees t"
            )
        if self.sync_seq_len % SYNC_ROWS:
            raise ValueError(f"sync_seq_len {self.sync_seq_len} must be a multiple of {SYNC_ROWS}")
        if self.audio_kernel % 2 == 0:
            raise ValueError(f"audio_kernel {self.audio_kernel} must be odd")

    @property
    def head_dim(self) -> int:
        return self.hidden_dim // self.num_heads

    @property
    def joint_depth(self) -> int:
        return self.depth - self.fused_depth

    @property
    def feature_depth(self) -> int:
        """After how many blocks `MMDiT.features` looks at the latent tokens: a quarter of them."""
        return max(1, self.depth // 4)

    @property
    def mlp_dim(self) -> int:
        """Inner width of the gated MLPs: 2/3 of 4 D, rounded up to a multiple of 256."""
        return 256 * math.ceil(8 * self.hidden_dim // 3 / 256)

    def with_lengths(self, sequence: SequenceConfig) -> "ModelConfig":
        """The same network for clips of another duration; its parameters do not change shape."""
        return dataclasses.replace(
            self,
            latent_seq_len=sequence.latent_seq_len,
            clip_seq_len=sequence.clip_seq_len,
            sync_seq_len=sequence.sync_seq_len,
            text_seq_len=sequence.text_seq_len,
            latent_rate=sequence.sample_rate / sequence.hop / sequence.latent_downsample,
        )


def _mmaudio(
    mode: str, hidden_dim: int, num_heads: int, depth: int, fused_depth: int, version: int = 1
):
    sequence = SequenceConfig.mode_44k() if mode == "44k" else SequenceConfig()
    config = ModelConfig(
        latent_dim=40 if mode == "44k" else 20,
        clip_dim=1024,
        sync_dim=768,
        text_dim=1024,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        depth=depth,
        fused_depth=fused_depth,
        latent_seq_len=sequence.latent_seq_len,
        clip_seq_len=sequence.clip_seq_len,
        sync_seq_len=sequence.sync_seq_len,
        version=version,
    )
    return config.with_lengths(sequence)


# MMAudio's sizes (its model/networks.py). large_16k is BiTCAM's; `laptop` and `demo` train on a
# laptop's CPU.
MODELS = {
    "small_16k": _mmaudio("16k", 448, 7, 12, 8),
    "small_44k": _mmaudio("44k", 448, 7, 12, 8),
    "medium_44k": _mmaudio("44k", 896, 14, 12, 8),
    "large_44k": _mmaudio("44k", 896, 14, 21, 14),
    "large_44k_v2": _mmaudio("44k", 896, 14, 21, 14, version=2),
    "large_16k": _mmaudio("16k", 896, 14, 21, 14),
    "laptop": _mmaudio("16k", 192, 3, 4, 3),
    "demo": ModelConfig(
        latent_dim=20,
        clip_dim=64,
        sync_dim=256,
        text_dim=32,
        hidden_dim=64,
        num_heads=2,
        depth=3,
        fused_depth=2,
        latent_seq_len=80,
        clip_seq_len=20,
        sync_seq_len=56,
    ),
}
# Networks whose widths are those of the records that they are trained on, whatever those are.
WIDTHS_OF_DATA = ("laptop",)
