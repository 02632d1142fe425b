"""CLIP ViT-H/14 (DFN5B) through transformers, from a transformers or an open_clip checkpoint.

MMAudio conditions on it at 384 x 384 pixels. The checkpoint was trained at 378; both give 27 x 27
patches of 14, and the rest of the larger picture is not looked at.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from vcm_jax.interop.state_dict import StateDictError, check_names, read_state_dict
from vcm_jax.interop.tokenizer import Tokenizer

WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclasses.dataclass(frozen=True)
class ClipSize:
    """Sizes; the defaults are those of DFN5B's ViT-H/14."""

    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    vision_mlp: int = 5120
    patch: int = 14
    grid: int = 27  # patches per side
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    text_mlp: int = 4096
    vocabulary: int = 49408
    context: int = 77
    projection: int = 1024
    activation: str = "quick_gelu"


SIZE, IMAGE = ClipSize(), 384  # IMAGE: pixels of a side of the pictures that it is given


def _size_from_transformers(content: dict) -> ClipSize:
    config = CLIPConfig.from_dict(content)  # its files leave out what is the default
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    return ClipSize(
        vision_width=vision.hidden_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        patch=vision.patch_size,
        grid=vision.image_size // vision.patch_size,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        text_mlp=text.intermediate_size,
        vocabulary=text.vocab_size,
        context=text.max_position_embeddings,
        projection=config.projection_dim,
        activation=" and ".join(sorted(acts)),
    )


def _size_from_open_clip(content: dict) -> ClipSize:
    model = content["model_cfg"]
    vision = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16}
    vision |= {"image_size": 224} | model["vision_cfg"]
    text = {"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "vocab_size": 49408}
    text |= {"context_length": 77} | model["text_cfg"]
    return ClipSize(
        vision_width=vision["width"],
        vision_layers=vision["layers"],
        vision_heads=vision["width"] // vision["head_width"],
        vision_mlp=int(vision["width"] * vision["mlp_ratio"]),
        patch=vision["patch_size"],
        grid=vision["image_size"] // vision["patch_size"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        text_mlp=int(text["width"] * text["mlp_ratio"]),
        vocabulary=text["vocab_size"],
        context=text["context_length"],
        projection=model["embed_dim"],
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
    )


def _check_size(folder: Path, open_clip: bool) -> None:
    """Refuses a checkpoint whose config describes another CLIP; says how it differs."""
    path = folder / ("open_clip_config.json" if open_clip else "config.json")
    read = _size_from_open_clip if open_clip else _size_from_transformers
    try:
        found = dataclasses.asdict(read(json.loads(path.read_text("utf-8"))))
    except FileNotFoundError:
        raise StateDictError(f"{path}: no such file; it belongs to the weights") from None
    except Exception as error:  # json, KeyError, TypeError, what transformers' checks raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise StateDictError(f"{path}: not the config of a CLIP ({reason})") from error
    wanted = dataclasses.asdict(SIZE)
    differing = [f"{k} {found[k]} instead of {wanted[k]}" for k in wanted if found[k] != wanted[k]]
    if differing:
        raise StateDictError(
            f"{path}: not the CLIP that MMAudio uses (DFN5B ViT-H/14): {', '.join(differing)}"
        )


_OPEN_CLIP_NAMES = [
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"(layers\.\d+)\.ln_(\d)\.", r"\1.layer_norm\2."),
    (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]


def from_open_clip(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """open_clip's names and layouts to those of transformers.

    Joint projections (rows q, k, v) are split; `visual.proj` and `text_projection`, which open_clip
    multiplies from the right, are transposed.
    """
    converted = {}
    for name, value in state_dict.items():
        for pattern, replacement in _OPEN_CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            for letter, part in zip("qkv", np.split(value, 3)):
                converted[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            converted[name] = value.T if "_projection." in name else value
    return converted


def _model() -> CLIPModel:
    """The network without weights, given pictures of IMAGE pixels."""
    vision = dict(
        hidden_size=SIZE.vision_width,
        num_hidden_layers=SIZE.vision_layers,
        num_attention_heads=SIZE.vision_heads,
        intermediate_size=SIZE.vision_mlp,
        patch_size=SIZE.patch,
        image_size=IMAGE,
        hidden_act=SIZE.activation,
    )
    text = dict(
        hidden_size=SIZE.text_width,
        num_hidden_layers=SIZE.text_layers,
        num_attention_heads=SIZE.text_heads,
        intermediate_size=SIZE.text_mlp,
        vocab_size=SIZE.vocabulary,
        max_position_embeddings=SIZE.context,
        bos_token_id=SIZE.vocabulary - 2,
        eos_token_id=SIZE.vocabulary - 1,
        pad_token_id=0,
        hidden_act=SIZE.activation,
    )
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=SIZE.projection)
    with torch.device("meta"):
        return CLIPModel(config)


def load_clip(folder: Path) -> tuple[CLIPModel, Tokenizer, dict[str, np.ndarray]]:
    """The network with the weights of a folder, its tokenizer, and the weights.

    Args:
      folder: a transformers checkpoint (config.json and model.safetensors or pytorch_model.bin) or
        an open_clip one (open_clip_config.json and open_clip_model.safetensors or
        open_clip_pytorch_model.bin), with the vocabulary in any of its forms.

    Raises:
      StateDictError: files that are missing or damaged, or another CLIP.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        raise StateDictError(f"{folder}: no weights of CLIP ({', '.join(WEIGHTS)})")
    _check_size(folder, path.name.startswith("open_clip"))
    tokenizer = Tokenizer(folder)
    if (tokenizer.start, tokenizer.end) != (SIZE.vocabulary - 2, SIZE.vocabulary - 1):
        raise StateDictError(
            f"{folder}: a vocabulary of {tokenizer.size} that ends with ids {tokenizer.start} and "
            f"{tokenizer.end}, the weights have {SIZE.vocabulary}"
        )
    found = read_state_dict(path)
    if "visual.conv1.weight" in found:
        found = from_open_clip(found)
    model = _model()
    # Older files hold the numbers 0, 1, 2, ... of the positions; the scale is for training alone.
    found = {k: v for k, v in found.items() if not k.endswith(("position_ids", "logit_scale"))}
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if k != "logit_scale"}
    shapes = {name: value.shape for name, value in found.items()}
    check_names(shapes, expected, str(path), " (names as transformers has them)")
    arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in found.items()}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    model.load_state_dict(tensors | {"logit_scale": torch.tensor(0.0)}, assign=True)
    for part in (model.vision_model, model.text_model):  # not in the file, and empty until now
        embeddings = part.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    return model.requires_grad_(False).eval(), tokenizer, found


def image_features(model: CLIPModel, pictures: torch.Tensor) -> torch.Tensor:
    """Normalised pictures B 3 H W -> pooled, projected features B D of unit length, float32."""
    pooled = model.vision_model(pixel_values=pictures).pooler_output
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)


def text_features(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Ids B L -> hidden states B L D after the last LayerNorm, of unit length each, float32.

    No padding mask, as in MMAudio: the positions after the end count. The mask stays causal.
    """
    return F.normalize(model.text_model(input_ids=ids).last_hidden_state.float(), dim=-1)
