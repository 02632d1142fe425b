"""Synchformer's comparing transformer: by how much are sound and picture out of step?

Iashin et al. 2024 (Synchformer); the part behind the DeSync score, which sees the features of 14
segments (4.8 s) of picture and sound and names one of 21 offsets. Written in JAX from the names and
shapes of `synchformer_state_dict.pth`; the extractors of the features are not in here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.interop.state_dict import check_names, read_state_dict

SEGMENTS, WIDTH, CLASSES = 14, 768, 21
ROWS = {"video": 8, "audio": 6}  # tokens of a segment
_HEADS, _BLOCKS = 8, 3
_TOKENS = 2 + SEGMENTS * sum(ROWS.values())  # OFF, video, MOD, audio
_EXTRACTORS = ("vfeat_extractor.", "afeat_extractor.")


def _expected() -> dict[str, tuple]:
    """Names and shapes of the comparing part of the state dict."""
    linear = lambda name, out, size=WIDTH: {f"{name}.weight": (out, size), f"{name}.bias": (out,)}
    norm = lambda name: {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    shapes = linear("vproj", WIDTH) | linear("aproj", WIDTH)
    for name in ("OFF_tok", "MOD_tok"):
        shapes[f"transformer.{name}"] = (1, 1, WIDTH)
    shapes["transformer.pos_emb_cfg.pos_emb"] = (1, _TOKENS, WIDTH)
    for name in ("vis_in_lnorm", "aud_in_lnorm", "ln_f"):
        shapes |= norm(f"transformer.{name}")
    for i in range(_BLOCKS):
        block = f"transformer.blocks.{i}"
        shapes |= norm(f"{block}.ln1") | norm(f"{block}.ln2")
        for name in ("key", "query", "value", "proj"):
            shapes |= linear(f"{block}.attn.{name}", WIDTH)
        shapes |= linear(f"{block}.mlp.0", 4 * WIDTH) | linear(f"{block}.mlp.2", WIDTH, 4 * WIDTH)
    return shapes | linear("transformer.off_head", CLASSES)


def load_compare(path) -> dict[str, np.ndarray]:
    """The comparing transformer's parameters from `synchformer_state_dict.pth`.

    Raises:
      StateDictError: unreadable, or not that file.
    """
    found = read_state_dict(path)
    found = {name: value for name, value in found.items() if not name.startswith(_EXTRACTORS)}
    check_names({name: value.shape for name, value in found.items()}, _expected(), str(path))
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


@jax.jit
def _compare(params, video, audio):
    with jax.default_matmul_precision("highest"):
        vector = lambda name, x: jnp.expand_dims(params[name], range(x.ndim - 1))
        linear = lambda name, x: x @ params[f"{name}.weight"].T + vector(f"{name}.bias", x)

        def norm(name, x):
            x = x - x.mean(-1, keepdims=True)
            x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
            return x * vector(f"{name}.weight", x) + vector(f"{name}.bias", x)

        batch = len(video)
        flat = lambda x: x.reshape(batch, -1, WIDTH)
        token = lambda name: jnp.broadcast_to(params[f"transformer.{name}"], (batch, 1, WIDTH))
        tokens = [
            token("OFF_tok"),
            norm("transformer.vis_in_lnorm", linear("vproj", flat(video))),
            token("MOD_tok"),
            norm("transformer.aud_in_lnorm", linear("aproj", flat(audio))),
        ]
        x = jnp.concatenate(tokens, 1) + params["transformer.pos_emb_cfg.pos_emb"]
        for i in range(_BLOCKS):
            block = f"transformer.blocks.{i}"
            y = norm(f"{block}.ln1", x)
            qkv = [linear(f"{block}.attn.{name}", y) for name in ("query", "key", "value")]
            qkv = [value.reshape(batch, _TOKENS, _HEADS, -1) for value in qkv]
            y = jax.nn.dot_product_attention(*qkv)
            x = x + linear(f"{block}.attn.proj", flat(y))
            y = linear(f"{block}.mlp.0", norm(f"{block}.ln2", x))
            x = x + linear(f"{block}.mlp.2", jax.nn.gelu(y, approximate=False))
        return linear("transformer.off_head", norm("transformer.ln_f", x)[:, 0])


def offset_logits(params, video, audio) -> np.ndarray:
    """Logits (B, 21) of the offset between picture and sound.

    Args:
      params: from `load_compare`.
      video: (B, 14, 8, 768) Synchformer's visual features of 14 segments.
      audio: (B, 14, 6, 768) its sound features of the same ones.

    Raises:
      ValueError: other shapes.
    """
    for name, value in (("video", video), ("audio", audio)):
        wanted = (len(video), SEGMENTS, ROWS[name], WIDTH)
        if np.shape(value) != wanted:
            raise ValueError(f"{name} features must be {wanted}, got {np.shape(value)}")
    return np.asarray(_compare(params, jnp.asarray(video), jnp.asarray(audio)))
