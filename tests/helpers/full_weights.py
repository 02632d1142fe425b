"""Files in the layouts, names and sizes of MMAudio's public ones, with deterministic weights."""

import itertools
import json
from pathlib import Path

import golden
import numpy as np
import tiny_codecs
import tiny_encoders
import tiny_weights
import torch

from vcm_jax.interop import clip, synchformer
from vcm_jax.pretrained import table

NAME = "mmaudio_large_44k_v2"


def write_served(folder: Path) -> None:
    """What `weight_server` serves for the default model: 12 GB, one file in memory at a time."""
    files = {file.name: folder / _place(file) for file in table.PUBLIC_MODELS[NAME].files}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    tiny_encoders.save(files[f"{NAME}.pth"], tiny_weights.network("44k"))
    vae, vocoder = tiny_codecs.state_dicts("44k")
    tiny_encoders.save(files["v1-44.pth"], vae)
    tensors = {name: torch.from_numpy(value) for name, value in vocoder.items()}
    torch.save({"generator": tensors}, files["bigvgan_generator.pt"])
    tiny_encoders.save(files["synchformer_state_dict.pth"], _synchformer())
    tiny_encoders.save(files["open_clip_pytorch_model.bin"], _open_clip())
    files["open_clip_config.json"].write_text(json.dumps(_CONFIG))
    words = [*tiny_encoders.letters(), *(f"{letter}</w>" for letter in tiny_encoders.letters())]
    pairs = itertools.product(tiny_encoders.letters(), repeat=2)
    merges = list(itertools.islice(pairs, clip.SIZE.vocabulary - len(words) - 2))
    words += [first + second for first, second in merges]
    ids = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    files["vocab.json"].write_text(json.dumps(ids))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    files["merges.txt"].write_text("\n".join(lines) + "\n")


def _place(file: table.WeightFile) -> str:
    return f"hub/{file.repo}/{file.path}" if file.repo else f"release/{file.name}"


def _rule(name: str, shape) -> str:
    if len(shape) > 1:
        return "fan_in"
    return "one_plus" if "norm" in name or ".ln_" in name or "ln_" in name[:4] else "small"


def _filled(shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    return golden.fill([name, shape, _rule(name, shape)] for name, shape in shapes.items())


def _synchformer() -> dict[str, np.ndarray]:
    with torch.device("meta"):
        state = synchformer.Synchformer(synchformer.SIZE).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    # The public file has a prefix, and the projection of pictures, which videos do not need.
    shapes |= {"patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,)}
    return _filled({f"vfeat_extractor.{name}": shape for name, shape in shapes.items()})


def _open_clip() -> dict[str, np.ndarray]:
    """Weights under open_clip's names, of the size that MMAudio uses."""
    before, tiny_encoders.CLIP = tiny_encoders.CLIP, clip.SIZE
    try:
        return tiny_encoders.open_clip_weights()
    finally:
        tiny_encoders.CLIP = before


_CONFIG = {
    "model_cfg": {
        "embed_dim": 1024,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 378,
            "layers": 32,
            "width": 1280,
            "head_width": 80,
            "patch_size": 14,
        },
        "text_cfg": {"vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
    "preprocess_cfg": {"mean": [0, 0, 0]},
}
