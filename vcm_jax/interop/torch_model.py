"""The network in PyTorch, for those who have no JAX: it loads what `export_torch` writes.

    state_dict = torch.load("vcm_s16k.pth")
    model = AverageVelocity.from_state_dict(state_dict).to("cuda", torch.bfloat16)
    noise = torch.randn(batch_size, 250, 20, device="cuda")
    latents = model.sample(noise, 4, clip, sync, text)  # SoundVCM, Algorithm 2
    latents = latents.cpu() * state_dict["latent_std"] + state_dict["latent_mean"]  # for the VAE

This file needs PyTorch alone and can be copied. Names and layouts are MMAudio's, plus `h_embed.*`,
the second time embedding of SoundVCM (3.5.2). Times run from 1 (noise) to 0 (data). Lengths are
those of what comes in. A model in bfloat16 takes and gives float32 latents; times, normalisations
and the steps between latents stay float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Conv1d):
    """Convolution over the length of `B L D`, zero-padded to the same length."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class GatedMLP(nn.Module):
    """`w2(silu(w1 x) * w3 x)`, 2/3 of 4 D wide, rounded up to a multiple of 256."""

    def __init__(self, width: int, kernel: int | None = None):
        super().__init__()
        inner = 256 * math.ceil(8 * width // 3 / 256)
        self.transposed = kernel is not None
        if kernel is None:
            layer = lambda *sizes: nn.Linear(*sizes, bias=False)
        else:
            layer = lambda *sizes: nn.Conv1d(*sizes, kernel, padding=kernel // 2, bias=False)
        self.w1, self.w2 = layer(width, inner), layer(inner, width)
        self.w3 = layer(width, inner)

    def forward(self, x):
        if self.transposed:  # once, for all three convolutions
            x = x.transpose(1, 2).contiguous()
        x = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return x.transpose(1, 2) if self.transposed else x


class TimestepEmbedder(nn.Module):
    """Sinusoids of one or several scalars, cosines first, through two layers: `B` -> `B D`.

    Version 1 has 128 frequencies from 1 down to 1e-4, version 2 D / 2 from 1e4 down to 1.
    """

    def __init__(self, width: int, version: int, scalars: int = 1):
        super().__init__()
        self.inputs, self.scale = (256, 1.0) if version == 1 else (width, 10_000.0)
        self.mlp = nn.Sequential(
            nn.Linear(scalars * self.inputs, width), nn.SiLU(), nn.Linear(width, width)
        )

    def features(self, time):
        exponents = torch.arange(0, self.inputs, 2, dtype=torch.float32) / self.inputs
        turns = (self.scale * (1 / 10_000**exponents)).double() / (2 * math.pi)
        # The first 12 binary digits of the time meet the whole turns in exact products: without
        # that, angles of 1e4 would be wrong by 5e-4.
        whole = turns.round()
        turns, whole, part = (
            a.to(time.device, torch.float32) for a in (turns, whole, turns - whole)
        )
        time = time.float()[:, None]
        first = (time * 4096).round() / 4096
        angles = 2 * math.pi * ((first * whole) % 1 + first * part + (time - first) * turns)
        return torch.cat([angles.cos(), angles.sin()], -1)

    def forward(self, *scalars):
        features = torch.cat([self.features(scalar) for scalar in scalars], -1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


def rope(length: int, head_dim: int, stretch: float, device):
    """cos and sin `L dh/2` of the rotary embedding."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = positions[:, None] * (10_000.0**-exponents * stretch)
    return angles.cos(), angles.sin()


def rotate(x, table):
    """Neighbouring channels (2i, 2i + 1) of `B H L dh` turned by the table's angles."""
    cos, sin = table
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class SelfAttention(nn.Module):
    """Queries, keys and values of one stream; row (h dh + d) 3 + j of `qkv` is q, k, v for j."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=torch.finfo(torch.float32).eps)
        self.k_norm = nn.RMSNorm(width // heads, eps=torch.finfo(torch.float32).eps)

    def forward(self, x, table=None):
        # Contiguous: fast attention kernels refuse a v whose channels lie apart.
        parts = self.qkv(x).unflatten(-1, (self.heads, -1, 3)).permute(4, 0, 2, 1, 3)
        q, k, v = parts.contiguous()
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)


def attend(q, k, v):
    """`B H L dh` -> `B L D`."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class StreamBlock(nn.Module):
    """One stream's layers of a block; a `pre_only` one gives q, k, v and is not updated."""

    def __init__(self, width: int, heads: int, kernel: int | None = 3, pre_only: bool = False):
        super().__init__()
        self.chunks = 2 if pre_only else 6
        self.attn = SelfAttention(width, heads)
        if not pre_only:
            self.linear1 = Conv(width, width, kernel) if kernel else nn.Linear(width, width)
            self.ffn = GatedMLP(width, kernel)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulation(self, c, rows=None):
        m = self.adaLN_modulation(c)
        return (m if rows is None else m[:, rows]).chunk(self.chunks, -1)

    def before(self, x, m, table=None):
        return self.attn(modulated_norm(x, m[0], m[1]), table)

    def after(self, x, attended, m):
        x = x + self.linear1(attended) * m[2]
        return x + self.ffn(modulated_norm(x, m[3], m[4])) * m[5]


class FusedBlock(StreamBlock):
    def forward(self, x, c, rows, table):
        m = self.modulation(c, rows)
        return self.after(x, attend(*self.before(x, m, table)), m)


class JointBlock(nn.Module):
    """One attention over latent, clip and text tokens."""

    def __init__(self, width: int, heads: int, last: bool):
        super().__init__()
        self.last = last
        self.latent_block = StreamBlock(width, heads)
        self.clip_block = StreamBlock(width, heads, pre_only=last)
        self.text_block = StreamBlock(width, heads, None, pre_only=last)

    def forward(self, latent, clip, text, frame_c, global_c, rows, latent_table, clip_table):
        streams, tables = (latent, clip, text), (latent_table, clip_table, None)
        blocks = (self.latent_block, self.clip_block, self.text_block)
        m = [self.latent_block.modulation(frame_c, rows)]
        m += [block.modulation(global_c) for block in blocks[1:]]
        parts = [b.before(x, m, table) for b, x, m, table in zip(blocks, streams, m, tables)]
        q, k, v = (torch.cat(part, 2) for part in zip(*parts))
        if self.last:
            attended = attend(parts[0][0], k, v)
            return self.latent_block.after(latent, attended, m[0]), clip, text
        attended = attend(q, k, v).split([x.shape[1] for x in streams], 1)
        return tuple(b.after(x, a, m) for b, x, a, m in zip(blocks, streams, attended, m))


def modulated_norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale) + shift


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.conv = Conv(width, outputs, 7)

    def forward(self, x, c):
        return self.conv(modulated_norm(x, *self.adaLN_modulation(c).chunk(2, -1)))


def nearest_exact_rows(source: int, target: int, device) -> torch.Tensor:
    """Which of `source` rows each of `target` rows takes: "nearest-exact" interpolation."""
    index = torch.arange(source, dtype=torch.float32, device=device)[None, None]
    return F.interpolate(index, size=target, mode="nearest-exact")[0, 0].long()


class AverageVelocity(nn.Module):
    """u(x, t, s, c): MMAudio's multimodal transformer with two times (SoundVCM 3.5)."""

    def __init__(
        self, latent_dim: int, clip_dim: int, sync_dim: int, text_dim: int, text_len: int,
        hidden_dim: int, num_heads: int, joint_depth: int, fused_depth: int, audio_kernel: int = 7,
        version: int = 1, guidance_input: bool = False, blocks_at_s: bool = False,
    ):  # fmt: skip
        super().__init__()
        # How many of the last blocks are conditioned on s in place of t, a scalar of the file.
        self.register_buffer(
            "blocks_at_s", torch.zeros((), dtype=torch.int64) if blocks_at_s else None
        )
        width, heads = hidden_dim, num_heads
        activation = nn.SELU if version == 1 else nn.SiLU
        extra = () if version == 1 else (nn.SiLU(),)
        self.audio_input_proj = nn.Sequential(
            Conv(latent_dim, width, 7), activation(), GatedMLP(width, audio_kernel)
        )
        self.clip_input_proj = nn.Sequential(nn.Linear(clip_dim, width), *extra, GatedMLP(width, 3))
        self.sync_input_proj = nn.Sequential(
            Conv(sync_dim, width, 7), activation(), GatedMLP(width, 3)
        )
        self.text_input_proj = nn.Sequential(nn.Linear(text_dim, width), *extra, GatedMLP(width))
        self.clip_cond_proj = nn.Linear(width, width)
        self.text_cond_proj = nn.Linear(width, width)
        self.global_cond_mlp = GatedMLP(width)
        self.t_embed = TimestepEmbedder(width, version)
        self.h_embed = TimestepEmbedder(width, version)
        self.g_embed = TimestepEmbedder(width, version, 3) if guidance_input else None
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, heads, last=i == joint_depth - 1) for i in range(joint_depth)
        )
        self.fused_blocks = nn.ModuleList(FusedBlock(width, heads) for _ in range(fused_depth))
        self.final_layer = FinalLayer(width, latent_dim)
        self.sync_pos_emb = nn.Parameter(torch.zeros(1, 1, 8, sync_dim))
        self.empty_clip_feat = nn.Parameter(torch.zeros(1, clip_dim))
        self.empty_sync_feat = nn.Parameter(torch.zeros(1, sync_dim))
        self.empty_string_feat = nn.Parameter(torch.zeros(text_len, text_dim), requires_grad=False)
        self.latent_mean = nn.Parameter(torch.zeros(1, 1, latent_dim), requires_grad=False)
        self.latent_std = nn.Parameter(torch.ones(1, 1, latent_dim), requires_grad=False)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, torch.Tensor]) -> "AverageVelocity":
        """The network that fits a state dict, with its weights, strictly loaded.

        Raises:
          RuntimeError: names or shapes that do not fit (torch lists them).
          KeyError: not a state dict of this network.
        """
        shape = {name: tuple(value.shape) for name, value in state_dict.items()}
        width, latent_dim, _ = shape["audio_input_proj.0.weight"]
        text_len, text_dim = shape["empty_string_feat"]
        depth = lambda kind: len({n.split(".")[1] for n in shape if n.startswith(kind)})
        with torch.device("meta"):
            model = cls(
                latent_dim=latent_dim,
                clip_dim=shape["empty_clip_feat"][1],
                sync_dim=shape["empty_sync_feat"][1],
                text_dim=text_dim,
                text_len=text_len,
                hidden_dim=width,
                num_heads=width // shape["joint_blocks.0.latent_block.attn.q_norm.weight"][0],
                joint_depth=depth("joint_blocks."),
                fused_depth=depth("fused_blocks."),
                audio_kernel=shape["audio_input_proj.2.w1.weight"][2],
                version=2 if "clip_input_proj.2.w1.weight" in shape else 1,
                guidance_input="g_embed.mlp.0.weight" in shape,
                blocks_at_s="blocks_at_s" in shape,
            )
        model.load_state_dict(state_dict, strict=True, assign=True)
        return model

    def null_conditions(self, batch_size: int, clip_len: int, sync_len: int):
        """Raw features of the empty condition: clip, sync, text."""
        fill = lambda row, length: row.expand(batch_size, length, -1)
        text = self.empty_string_feat.expand(batch_size, -1, -1)
        return fill(self.empty_clip_feat, clip_len), fill(self.empty_sync_feat, sync_len), text

    def encode_conditions(
        self, clip, sync, text, guidance_scale: float = 1.0, guidance_interval=(0.0, 1.0)
    ):
        """Raw features -> what depends on the conditions alone; once a clip.

        Raises:
          ValueError: a guidance scale for a network that has no input for it.
        """
        if self.g_embed is None and guidance_scale != 1:
            raise ValueError("guidance_scale: this network has its guidance in the weights")
        dtype = self.sync_pos_emb.dtype
        clip, sync, text = clip.to(dtype), sync.to(dtype), text.to(dtype)
        sync = sync + self.sync_pos_emb.expand(1, sync.shape[1] // 8, -1, -1).flatten(1, 2)
        clip, sync = self.clip_input_proj(clip), self.sync_input_proj(sync)
        text = self.text_input_proj(text)
        pooled = self.clip_cond_proj(clip.mean(1)) + self.text_cond_proj(text.mean(1))
        pooled = self.global_cond_mlp(pooled)
        if self.g_embed is not None:
            ones = torch.ones(len(pooled), device=pooled.device)
            values = (math.log(guidance_scale), *guidance_interval)
            pooled = pooled + self.g_embed(*(value * ones for value in values))
        return clip, sync, text, pooled

    def velocity(self, x, t, s, encoded):
        """`B N C`, times `B` -> the average velocity from t to s, `B N C`."""
        clip, sync, text, pooled = encoded
        head_dim = self.joint_blocks[0].latent_block.attn.q_norm.normalized_shape[0]
        length, clip_len, device = x.shape[1], clip.shape[1], x.device

        def conditions(time):
            global_c = (self.t_embed(time) + self.h_embed(s - t) + pooled)[:, None]
            # Modulations are computed on the distinct sync rows, then spread over latent tokens.
            return global_c + sync, global_c

        at_t = at_s = conditions(t)
        late = depth = len(self.joint_blocks) + len(self.fused_blocks)
        if self.blocks_at_s is not None:
            at_s, late = conditions(s), depth - int(self.blocks_at_s)
        rows = nearest_exact_rows(sync.shape[1], length, device)
        latent_table = rope(length, head_dim, 1.0, device)
        clip_table = rope(clip_len, head_dim, length / clip_len, device)
        latent = self.audio_input_proj(x.to(self.sync_pos_emb.dtype))
        for i, block in enumerate((*self.joint_blocks, *self.fused_blocks)):
            frame_c, global_c = at_t if i < late else at_s
            if i < len(self.joint_blocks):
                latent, clip, text = block(
                    latent, clip, text, frame_c, global_c, rows, latent_table, clip_table
                )
            else:
                latent = block(latent, frame_c, rows, latent_table)
        return self.final_layer(latent, at_s[1]).to(torch.promote_types(x.dtype, torch.float32))

    def forward(self, x, t, s, clip, sync, text):
        return self.velocity(x, t, s, self.encode_conditions(clip, sync, text))

    @torch.no_grad()
    def sample(self, x, times, clip, sync, text, **guidance):
        """Normalised latents from noise `B N C`: jumps through decreasing times, or n equal ones.

        One network evaluation a jump (SoundVCM, Algorithm 2). A network with an input for guidance
        takes guidance_scale and guidance_interval, as `encode_conditions`.

        Raises:
          ValueError: less than one step, times that do not decrease within [0, 1], or guidance for
            a network that has no input for it.
        """
        if isinstance(times, int):
            times = [1 - i / max(times, 1) for i in range(times + 1)]
        falling = len(times) > 1 and all(s < t for t, s in zip(times, times[1:]))
        if not falling or times[0] > 1 or times[-1] < 0:
            raise ValueError(f"times must decrease within [0, 1], not {list(times)}")
        encoded = self.encode_conditions(clip, sync, text, **guidance)
        for t, s in zip(times, times[1:]):
            rows = torch.ones(x.shape[0], device=x.device)
            x = x + (s - t) * self.velocity(x, t * rows, s * rows, encoded)
        return x
