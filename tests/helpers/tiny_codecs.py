"""Neural codecs for tests: filled with the reference numbers' deterministic weights."""

import dataclasses

import golden
import numpy as np

from vcm_jax.codec import neural
from vcm_jax.interop import import_codec


def state_dicts(mode: str) -> tuple[dict, dict]:
    """(VAE, vocoder) of a mode as the original files have them, weight norm removed."""

    def filled(shapes):
        rule = lambda name, shape: (
            "fan_in"
            if len(shape) > 1
            else "one_plus"
            if name.endswith((".alpha", ".beta"))
            else "small"
        )
        return golden.fill([name, shape, rule(name, shape)] for name, shape in shapes.items())

    sizes = neural.MODES[mode]
    vae = filled(import_codec.vae_shapes(sizes))
    with np.load(golden.DATA / "codec" / "neural.npz") as arrays:
        for name in ("mean", "std"):
            vae[f"data_{name}"] = arrays[f"{name}_{mode}"].reshape(1, -1, 1)
    return vae, filled(import_codec.vocoder_shapes(sizes))


def shrink(monkeypatch) -> None:
    """Makes both modes' networks tiny; hops and the channels of mel and latent stay."""
    for mode, sizes in neural.MODES.items():
        rates = (sizes.mel.hop // 16, 16)  # two stages compile three times as fast as six
        tiny = dataclasses.replace(sizes, width=8, vocoder_width=32, rates=rates)
        monkeypatch.setitem(neural.MODES, mode, tiny)


def tiny_codec(monkeypatch, mode: str = "16k") -> neural.NeuralCodec:
    shrink(monkeypatch)
    return import_codec.codec_from_torch(*state_dicts(mode), mode)
