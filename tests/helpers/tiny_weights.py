"""Tiny files in the layouts of MMAudio's public ones."""

import dataclasses
from pathlib import Path

import golden
import numpy as np
import tiny_codecs
import tiny_encoders
import torch
from weight_server import NAMES

from vcm_jax.interop.weights import torch_shapes
from vcm_jax.models import MODELS
from vcm_jax.pretrained import table

_SIZES = dict(hidden_dim=16, num_heads=2, depth=2, fused_depth=1, clip_dim=12, sync_dim=16)


def _model(mode: str) -> str:
    return NAMES[mode].removeprefix("mmaudio_")


def use_tiny_sizes(monkeypatch) -> None:
    """Makes the networks, codecs and encoders tiny."""
    for name in map(_model, NAMES):
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], text_dim=16, **_SIZES))
    tiny_codecs.shrink(monkeypatch)
    tiny_encoders.use_tiny_sizes(monkeypatch)


def network(mode: str, seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict as MMAudio's files have it."""
    shapes = torch_shapes(MODELS[_model(mode)])

    def rule(name, shape):
        return "fan_in" if len(shape) > 1 else "one_plus" if "_norm." in name else "small"

    table = [
        [name, shape, rule(name, shape)]
        for name, shape in shapes.items()
        if not name.startswith("h_embed.")
    ]
    return golden.fill(table, f"{seed} ")


def write_served(folder: Path) -> None:
    """The files of `weight_server`'s folder; `use_tiny_sizes` comes first."""
    release, hub = folder / "release", folder / "hub"
    mmaudio, clip = hub / "hkchengrex/MMAudio/weights", hub / table.ENCODERS[1].repo
    bigvgan = hub / table.CODECS["44k"][1].repo
    for place in (release, mmaudio, clip, bigvgan):
        place.mkdir(parents=True)
    for mode, name in NAMES.items():
        tiny_encoders.save(mmaudio / f"{name}.pth", network(mode))
        vae, vocoder = tiny_codecs.state_dicts(mode)
        tiny_encoders.save(release / f"v1-{mode[:2]}.pth", vae)
        tensors = {key: torch.from_numpy(value) for key, value in vocoder.items()}
        target = release / "best_netG.pt" if mode == "16k" else bigvgan / "bigvgan_generator.pt"
        torch.save({"generator": tensors}, target)
    encoders = tiny_encoders.write_weights(folder / "encoders")
    (encoders / "synchformer_state_dict.pth").rename(release / "synchformer_state_dict.pth")
    tiny_encoders.write_vocabulary(clip, "pair")
    for name in ("open_clip_pytorch_model.bin", "open_clip_config.json"):
        (encoders / "clip" / name).rename(clip / name)
