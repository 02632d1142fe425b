"""Converts MMAudio's VAE and a BigVGAN vocoder from their PyTorch files to a codec folder."""

from pathlib import Path

import numpy as np

from vcm_jax.atomic import atomic_folder
from vcm_jax.codec.neural import MODES, Mode, NeuralCodec
from vcm_jax.interop.state_dict import StateDictError, check_names, check_new, read_state_dict


def vae_shapes(mode: Mode) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the VAE's state dict (`v1-16.pth`, `v1-44.pth`)."""
    bands, w = mode.mel.bands, mode.width
    shapes = {"data_mean": (1, bands, 1), "data_std": (1, bands, 1)}

    def conv(name, inputs, outputs, kernel=3):
        shapes[f"{name}.weight"] = (outputs, inputs, kernel)

    def block(name, inputs, outputs):
        conv(f"{name}.conv1", inputs, outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def level(name, inputs, outputs, count):
        for i in range(count):
            block(f"{name}.block.{i}", outputs if i else inputs, outputs)

    for network in ("encoder", "decoder"):
        shapes[f"{network}.learnable_gain"] = ()
        block(f"{network}.mid.block_1", 4 * w, 4 * w)
        conv(f"{network}.mid.attn_1.qkv", 4 * w, 12 * w, 1)
        conv(f"{network}.mid.attn_1.proj_out", 4 * w, 4 * w, 1)
        block(f"{network}.mid.block_2", 4 * w, 4 * w)
    conv("encoder.conv_in", bands, w)
    for i, (inputs, outputs) in enumerate(((w, w), (w, 2 * w), (2 * w, 4 * w))):
        level(f"encoder.down.{i}", inputs, outputs, 2)
    conv("encoder.down.0.downsample.conv1", w, w, 1)
    conv("encoder.down.0.downsample.conv2", w, w, 1)
    conv("encoder.conv_out", 4 * w, 2 * mode.latent_dim)
    conv("decoder.conv_in", mode.latent_dim, 4 * w)
    for i, (inputs, outputs) in enumerate(((2 * w, w), (4 * w, 2 * w), (4 * w, 4 * w))):
        level(f"decoder.up.{i}", inputs, outputs, 3)
    conv("decoder.up.1.upsample.conv", 2 * w, 2 * w)
    conv("decoder.conv_out", w, bands)
    return shapes


def vocoder_shapes(mode: Mode) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vocoder's state dict with weight norm folded, without filters."""
    shapes = {}

    def conv(name, weight, bias):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = (bias,)

    def activation(name, width):
        shapes[f"{name}.act.alpha"] = shapes[f"{name}.act.beta"] = (width,)

    width = mode.vocoder_width
    conv("conv_pre", (width, mode.mel.bands, 7), width)
    for i, rate in enumerate(mode.rates):
        conv(f"ups.{i}.0", (width, width // 2, 2 * rate), width // 2)
        width //= 2
        for j, kernel in enumerate((3, 7, 11)):
            name = f"resblocks.{3 * i + j}"
            for n in range(3):
                conv(f"{name}.convs1.{n}", (width, width, kernel), width)
                conv(f"{name}.convs2.{n}", (width, width, kernel), width)
            for n in range(6):
                activation(f"{name}.activations.{n}", width)
    activation("activation_post", width)
    conv("conv_post", (1, width, 7), 1 if mode.tanh else 0)
    return shapes


def normalize_magnitude(weight: np.ndarray) -> np.ndarray:
    """The weight (out, in, k) of a magnitude-preserving convolution, as the convolution uses it.

    Every output channel becomes a unit vector (Karras et al. 2024; the epsilon is MMAudio's).
    """
    fan_in = weight[0].size
    norm = np.sqrt(np.sum(np.square(weight, dtype=np.float64), axis=(1, 2), keepdims=True))
    scale = 1 / (1e-4 + norm / np.sqrt(fan_in)) / np.sqrt(fan_in)
    return (weight * scale).astype(np.float32)


def fold_weight_norm(state_dict: dict) -> dict:
    """Folds weight norm into plain weights: v g / ||v||, the norm over all axes but the first.

    Takes `weight_g` and `weight_v`, the newer `parametrizations.weight.original0` and `original1`,
    and plain weights. The filters of the anti-aliased activations are constants and are left out.
    """
    folded = {}
    for name, value in state_dict.items():
        if name.endswith(".filter"):
            continue
        for g, v in (
            (".weight_g", ".weight_v"),
            (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
        ):
            magnitude = state_dict.get(name.removesuffix(v) + g)
            if name.endswith(v) and magnitude is not None:
                axes = tuple(range(1, value.ndim))
                norm = np.sqrt(np.sum(np.square(value, dtype=np.float64), axes, keepdims=True))
                name, value = name.removesuffix(v) + ".weight", value * (magnitude / norm)
            elif name.endswith(g) and name.removesuffix(g) + v in state_dict:
                value = None
                break
        if value is not None:
            folded[name] = np.asarray(value, np.float32)
    return folded


def _looks_like(state_dict: dict) -> str:
    """The end of a message: what the file holds, if its names and shapes show it."""
    found = {name: np.shape(value) for name, value in fold_weight_norm(state_dict).items()}
    known = {
        f"the {what} of mode {mode}": shapes(sizes)
        for mode, sizes in MODES.items()
        for what, shapes in (("VAE", vae_shapes), ("vocoder", vocoder_shapes))
    }
    share = {
        what: len(shapes.items() & found.items()) / len(shapes) for what, shapes in known.items()
    }
    best = max(share, key=share.get)
    return f" (it looks like {best})" if share[best] > 0.5 else ""


def codec_from_torch(vae: dict, vocoder: dict, mode: str, files=("VAE", "vocoder")) -> NeuralCodec:
    """The codec from two state dicts of NumPy arrays.

    Args:
      vae: raw weights under the original names.
      vocoder: weights with or without weight norm.
      mode: a key of MODES.
      files: names of the two state dicts in messages.

    Raises:
      StateDictError: missing or extra names, other shapes, or numbers that are not finite.
    """
    vocoder = fold_weight_norm(vocoder)
    both = ((vae, vae_shapes, "VAE"), (vocoder, vocoder_shapes, "vocoder"))
    for (found, shapes, what), file in zip(both, files, strict=True):
        check_names(
            {name: np.shape(value) for name, value in found.items()},
            shapes(MODES[mode]),
            f"{file}: as the {what} of mode {mode} it",
            _looks_like(found),
        )
        for name, value in found.items():
            if not np.isfinite(value).all():
                raise StateDictError(f"{file}: {name} has numbers that are not finite")
    arrays = {name: np.ravel(vae[name]).astype(np.float32) for name in ("data_mean", "data_std")}
    for name, value in vae.items():
        if name.endswith(".weight"):
            value = normalize_magnitude(value)
            if name.endswith("conv_out.weight"):
                network = name.partition(".")[0]
                value = value * (1 + vae[f"{network}.learnable_gain"]).astype(np.float32)
            arrays[name] = _time_first(value)
    for name, value in vocoder.items():
        if value.ndim == 3 and name.startswith("ups."):  # transposed: (in, out, k)
            value = np.ascontiguousarray(np.moveaxis(value, -1, 0))
        elif value.ndim == 3:
            value = _time_first(value)
        arrays[f"vocoder.{name}"] = value
    return NeuralCodec(mode, arrays)


def _time_first(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(weight.transpose(2, 1, 0))


def _guess_mode(vae: dict, file) -> str:
    """The mode whose latents the VAE's decoder takes.

    Raises:
      StateDictError: it takes those of no mode; the line says what the file looks like.
    """
    shape = np.shape(vae.get("decoder.conv_in.weight"))
    for mode, sizes in MODES.items():
        if shape == vae_shapes(sizes)["decoder.conv_in.weight"]:
            return mode
    raise StateDictError(
        f"{file}: not a VAE of the modes {' and '.join(MODES)}: "
        f"decoder.conv_in.weight {f'is {shape}' if shape else 'is missing'}{_looks_like(vae)}"
    )


def convert(vae, vocoder, out) -> None:
    """Reads both files, then writes the codec folder.

    Args:
      vae: path of `v1-16.pth` or `v1-44.pth`.
      vocoder: path of `best_netG.pt` or `bigvgan_generator.pt`.
      out: folder to write, new or empty.

    Raises:
      StateDictError: files that do not fit, or no PyTorch.
      ClaimError: `out` is there already and not an empty folder.
    """
    out = Path(out)
    check_new(out)
    weights = read_state_dict(vae)
    mode = _guess_mode(weights, vae)
    codec = codec_from_torch(weights, read_state_dict(vocoder), mode, (vae, vocoder))
    with atomic_folder(out) as temporary:
        codec.save(temporary)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: codec of mode {mode}, {size / 1e6:.0f} MB, fingerprint {codec.fingerprint}")
