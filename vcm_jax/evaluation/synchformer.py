"""Synchformer's comparing transformer, which estimates the offset between sound and picture.

Iashin et al. 2024 (Synchformer). The DeSync score rests on it: from the features of 14 segments
(4.8 s) of picture and sound it predicts one of 21 offsets. It is written in JAX from the names and
shapes in `synchformer_state_dict.pth`; the feature extractors are elsewhere (`vcm_jax.interop`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.interop.state_dict import check_names, read_state_dict

SEGMENTS, WIDTH, CLASSES = 14, 768, 21
ROWS = {"video": 8, "audio": 6}  # tokens per segment
_HEADS, _BLOCKS = 8, 3
_TOKENS = 2 + SEGMENTS * sum(ROWS.values())  # OFF, video, MOD, audio
_EXTRACTORS = ("vfeat_extractor.", "afeat_extractor.")


def _linear_shapes(name: str, out: int, size: int = WIDTH) -> dict[str, tuple]:
    return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}


def _norm_shapes(name: str) -> dict[str, tuple]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def _expected() -> dict[str, tuple]:
    """Names and shapes of the comparing transformer's arrays in the state dict."""
    shapes = _linear_shapes("vproj", WIDTH) | _linear_shapes("aproj", WIDTH)
    for name in ("OFF_tok", "MOD_tok"):
        shapes[f"transformer.{name}"] = (1, 1, WIDTH)
    shapes["transformer.pos_emb_cfg.pos_emb"] = (1, _TOKENS, WIDTH)
    for name in ("vis_in_lnorm", "aud_in_lnorm", "ln_f"):
        shapes |= _norm_shapes(f"transformer.{name}")
    for i in range(_BLOCKS):
        block = f"transformer.blocks.{i}"
        shapes |= _norm_shapes(f"{block}.ln1") | _norm_shapes(f"{block}.ln2")
        for name in ("key", "query", "value", "proj"):
            shapes |= _linear_shapes(f"{block}.attn.{name}", WIDTH)
        shapes |= _linear_shapes(f"{block}.mlp.0", 4 * WIDTH)
        shapes |= _linear_shapes(f"{block}.mlp.2", WIDTH, 4 * WIDTH)
    return shapes | _linear_shapes("transformer.off_head", CLASSES)


def load_compare(path) -> dict[str, np.ndarray]:
    """The comparing transformer's parameters from `synchformer_state_dict.pth`.

    Raises:
      StateDictError: unreadable, or not that file.
    """
    found = read_state_dict(path)
    found = {name: value for name, value in found.items() if not name.startswith(_EXTRACTORS)}
    check_names({name: value.shape for name, value in found.items()}, _expected(), str(path))
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def _vector(params: dict, name: str, x: jax.Array) -> jax.Array:
    """A parameter (d,) with as many axes as x."""
    return jnp.expand_dims(params[name], range(x.ndim - 1))


def _linear(params: dict, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + _vector(params, f"{name}.bias", x)


def _norm(params: dict, name: str, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)
    return x * _vector(params, f"{name}.weight", x) + _vector(params, f"{name}.bias", x)


def _block(params: dict, name: str, x: jax.Array) -> jax.Array:
    """A pre-norm transformer block, (B, tokens, width)."""
    y = _norm(params, f"{name}.ln1", x)
    qkv = [_linear(params, f"{name}.attn.{part}", y) for part in ("query", "key", "value")]
    y = jax.nn.dot_product_attention(*(a.reshape(*x.shape[:2], _HEADS, -1) for a in qkv))
    x = x + _linear(params, f"{name}.attn.proj", y.reshape(x.shape))
    y = _linear(params, f"{name}.mlp.0", _norm(params, f"{name}.ln2", x))
    return x + _linear(params, f"{name}.mlp.2", jax.nn.gelu(y, approximate=False))


@jax.jit
def _compare(params: dict, video: jax.Array, audio: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        batch = len(video)
        parts = []
        for token, kind, features in (("OFF", "v", video), ("MOD", "a", audio)):
            norm = {"v": "vis_in_lnorm", "a": "aud_in_lnorm"}[kind]
            marker = params[f"transformer.{token}_tok"]
            rows = _linear(params, f"{kind}proj", features.reshape(batch, -1, WIDTH))
            parts.append(jnp.broadcast_to(marker, (batch, 1, WIDTH)))
            parts.append(_norm(params, f"transformer.{norm}", rows))
        x = jnp.concatenate(parts, 1) + params["transformer.pos_emb_cfg.pos_emb"]
        for i in range(_BLOCKS):
            x = _block(params, f"transformer.blocks.{i}", x)
        x = _norm(params, "transformer.ln_f", x)[:, 0]
        return _linear(params, "transformer.off_head", x)


def offset_logits(params, video, audio) -> np.ndarray:
    """Logits (B, 21) of the offset between picture and sound.

    Args:
      params: from `load_compare`.
      video: (B, 14, 8, 768), Synchformer's visual features of 14 segments.
      audio: (B, 14, 6, 768), its sound features of the same segments.

    Raises:
      ValueError: other shapes.
    """
    for name, value in (("video", video), ("audio", audio)):
        wanted = (len(video), SEGMENTS, ROWS[name], WIDTH)
        if np.shape(value) != wanted:
            raise ValueError(f"{name} features must be {wanted}, got {np.shape(value)}")
    return np.asarray(_compare(params, jnp.asarray(video), jnp.asarray(audio)))
