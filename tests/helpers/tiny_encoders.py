"""Folders of tiny weights for CLIP and Synchformer, under open_clip's and the original's names."""

import gzip
import json

import numpy as np
import torch

from vcm_jax.interop import clip, synchformer

# The first merges that a vocabulary of English would learn; those below use those above.
MERGES = [("t", "h"), ("th", "e</w>"), ("a", "l"), ("d", "o"), ("do", "g</w>"), ("al", "l</w>")]
MERGES += [("b", "all</w>"), ("'", "s</w>"), ("r", "e"), ("!", "!</w>"), ("Ã", "©</w>")]
CLIP = clip.ClipSize(
    vision_width=20, vision_layers=2, vision_heads=2, vision_mlp=80, patch=14, grid=2,
    text_width=16, text_layers=2, text_heads=4, text_mlp=64, vocabulary=514 + len(MERGES),
    projection=12,
)  # fmt: skip
IMAGE = 34  # 2 patches of 14, and 6 pixels that are not looked at
SYNCHFORMER = synchformer.SynchformerSize(width=16, heads=2, depth=2, image=32)


def use_tiny_sizes(monkeypatch):
    monkeypatch.setattr(clip, "SIZE", CLIP)
    monkeypatch.setattr(clip, "IMAGE", IMAGE)
    monkeypatch.setattr(synchformer, "SIZE", SYNCHFORMER)


def letters() -> list[str]:
    """GPT-2's letters for bytes, in the order of CLIP's ids."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in order]
    return [chr(b) for b in order] + [chr(256 + i) for i in range(len(rest))]


def write_vocabulary(folder, form="gzip"):
    """The same vocabulary as open_clip's file, a pair of files, or tokenizer.json."""
    pairs = [f"{first} {second}" for first, second in MERGES]
    words = (
        letters() + [letter + "</w>" for letter in letters()] + [p.replace(" ", "") for p in pairs]
    )
    ids = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    if form == "gzip":
        text = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *pairs]) + "\n"
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text.encode()))
    elif form == "pair":
        (folder / "vocab.json").write_text(json.dumps(ids))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    else:
        special = [{"content": word, "id": ids[word]} for word in list(ids)[-2:]]
        model = {"vocab": ids, "merges": pairs if form == "old" else [p.split() for p in pairs]}
        (folder / "tokenizer.json").write_text(
            json.dumps({"added_tokens": special, "model": model})
        )


def open_clip_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under open_clip's names."""
    rng = np.random.default_rng(seed)
    weights = {}

    def add(name, *shape, scale=0.3, offset=0.0):
        weights[name] = np.asarray(offset + scale * rng.standard_normal(shape), np.float32)

    def norm(name, width):
        add(f"{name}.weight", width, offset=1.0)
        add(f"{name}.bias", width)

    def linear(name, outputs, inputs):
        add(f"{name}.weight", outputs, inputs, scale=inputs**-0.5)
        add(f"{name}.bias", outputs)

    def tower(prefix, width, layers):
        for i in range(layers):
            name = f"{prefix}transformer.resblocks.{i}"
            norm(f"{name}.ln_1", width)
            add(f"{name}.attn.in_proj_weight", 3 * width, width)
            add(f"{name}.attn.in_proj_bias", 3 * width)
            linear(f"{name}.attn.out_proj", width, width)
            norm(f"{name}.ln_2", width)
            linear(f"{name}.mlp.c_fc", 4 * width, width)
            linear(f"{name}.mlp.c_proj", width, 4 * width)

    vision, text = CLIP.vision_width, CLIP.text_width
    add("positional_embedding", CLIP.context, text)
    add("text_projection", text, CLIP.projection)
    add("logit_scale")
    add("visual.class_embedding", vision)
    add("visual.positional_embedding", CLIP.grid**2 + 1, vision)
    add("visual.proj", vision, CLIP.projection)
    add("visual.conv1.weight", vision, 3, CLIP.patch, CLIP.patch, scale=0.05)
    norm("visual.ln_pre", vision)
    tower("visual.", vision, CLIP.vision_layers)
    norm("visual.ln_post", vision)
    tower("", text, CLIP.text_layers)
    add("token_embedding.weight", CLIP.vocabulary, text)
    norm("ln_final", text)
    return weights


OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": CLIP.projection,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 28,
            "layers": 2,
            "width": 20,
            "head_width": 10,
            "patch_size": 14,
        },
        "text_cfg": {"vocab_size": CLIP.vocabulary, "width": 16, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0, 0, 0]},
}


def write_open_clip(folder, weights=None):
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "open_clip_pytorch_model.bin", weights or open_clip_weights())
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    write_vocabulary(folder)


def save(path, weights):
    torch.save({name: torch.from_numpy(np.array(v)) for name, v in weights.items()}, path)


def write_weights(folder, seed: int = 0):
    """A folder for --encoders, of the tiny sizes: call `use_tiny_sizes`, too."""
    write_open_clip(folder / "clip", open_clip_weights(seed))
    generator = torch.Generator().manual_seed(seed)
    weights = synchformer.Synchformer(SYNCHFORMER).state_dict()
    for name, value in weights.items():
        scale = 1.0 if "cls_token" in name or "embed" in name else 0.3
        weights[name] = scale * torch.randn(value.shape, generator=generator)
    torch.save(weights, folder / "synchformer_state_dict.pth")
    return folder
