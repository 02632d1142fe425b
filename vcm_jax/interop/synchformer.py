"""Synchformer's visual encoder: segments of 16 frames to features that know when things happen.

The original is Iashin et al., "Synchformer: Efficient Synchronization from Sparse Cues"
(arXiv:2401.16423), a divided space-time transformer (Motionformer) whose tokens are gathered per
frame; names are those of MMAudio's `synchformer_state_dict.pth`.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vcm_jax.interop.state_dict import check_names, read_state_dict

_PREFIX = "vfeat_extractor."
_UNUSED = "patch_embed.proj."  # of pictures; in the file, but a video has `patch_embed_3d`


@dataclasses.dataclass(frozen=True)
class SynchformerSize:
    """Sizes; the defaults are those of the published weights.

    Attributes:
      width, heads, depth: of the transformer.
      image: pixels of a frame's side.
      patch, tube: pixels of a patch's side, and frames that a token spans.
      frames: of a segment.
    """

    width: int = 768
    heads: int = 12
    depth: int = 12
    image: int = 224
    patch: int = 16
    tube: int = 2
    frames: int = 16


SIZE = SynchformerSize()


class DividedAttention(nn.Module):
    """Attention of each token to the class token and to the tokens of its own group.

    The class token attends to all.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, rows: int, over_time: bool) -> torch.Tensor:
        """x B (1 + rows * P) D -> the same shape.

        A group is a place in all rows (`over_time`), or all places of one row (a frame).
        """
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # (B heads) N d each

        def groups(z):  # (B heads) group member d
            z = z[:, 1:].unflatten(1, (rows, -1))
            return z.transpose(1, 2) if over_time else z

        def with_class(z):
            inside = groups(z)
            first = z[:, None, :1].expand(-1, inside.shape[1], -1, -1)
            return torch.cat([first, inside], dim=2)

        attend = F.scaled_dot_product_attention
        first = attend(q[:, None, :1], k[:, None], v[:, None])[:, 0]
        inside = attend(groups(q), with_class(k), with_class(v))
        inside = (inside.transpose(1, 2) if over_time else inside).flatten(1, 2)
        x = torch.cat([first, inside], dim=1).unflatten(0, (batch, self.heads))
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with an exact GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class DividedBlock(nn.Module):
    """Attention over time, over space, and an MLP, each before a residual sum."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = DividedAttention(width, heads)
        self.timeattn = DividedAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, rows: int):
        x = x + self.timeattn(self.norm3(x), rows, over_time=True)
        x = x + self.attn(self.norm1(x), rows, over_time=False)
        return x + self.mlp(self.norm2(x))


class FrameAggregation(nn.TransformerEncoderLayer):
    """One pre-norm transformer layer over [class token, places]: P x D -> D."""

    def __init__(self, width: int, heads: int):
        super().__init__(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation=F.gelu,
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x):
        return super().forward(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))[:, 0]


class Synchformer(nn.Module):
    """The visual encoder."""

    def __init__(self, size: SynchformerSize = SIZE):
        super().__init__()
        self.size = size
        width = size.width
        places = (size.image // size.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + places, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, size.frames // size.tube, width))
        kernel = (size.tube, size.patch, size.patch)
        self.patch_embed_3d = nn.Sequential()
        self.patch_embed_3d.proj = nn.Conv3d(3, width, kernel, stride=kernel)
        self.blocks = nn.ModuleList(DividedBlock(width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.spatial_attn_agg = FrameAggregation(width, size.heads)

    def forward(self, segments: torch.Tensor) -> torch.Tensor:
        """Segments B T 3 H W in [-1, 1] -> features B (T / tube) D."""
        x = self.patch_embed_3d(segments.transpose(1, 2)).flatten(3)  # B D rows places
        rows = x.shape[2]
        x = x.permute(0, 2, 3, 1) + self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x.flatten(1, 2)], dim=1)
        for block in self.blocks:
            x = block(x, rows)
        x = self.norm(x[:, 1:]).unflatten(1, (rows, -1))
        return self.spatial_attn_agg(x.flatten(0, 1)).unflatten(0, (-1, rows))


def load_synchformer(path: Path) -> tuple[Synchformer, dict[str, np.ndarray]]:
    """The encoder with the weights of a file, and these weights.

    The file is MMAudio's `synchformer_state_dict.pth`, av-benchmark's, or the whole checkpoint of
    Synchformer: what belongs to the visual encoder is taken, with or without its prefix.

    Raises:
      StateDictError: unreadable, or weights that are missing or have other shapes.
    """
    found = read_state_dict(path)
    if any(name.startswith(_PREFIX) for name in found):
        found = {k.removeprefix(_PREFIX): v for k, v in found.items() if k.startswith(_PREFIX)}
    found = {name: value for name, value in found.items() if not name.startswith(_UNUSED)}
    with torch.device("meta"):
        model = Synchformer(SIZE)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: value.shape for name, value in found.items()}
    check_names(shapes, expected, str(path), " (wanted: Synchformer's visual encoder)")
    tensors = {k: torch.from_numpy(v.astype(np.float32, copy=False)) for k, v in found.items()}
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False).eval(), found
