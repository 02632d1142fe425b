"""Codecs: sound to latents and back."""

import json
import os
import shutil
from pathlib import Path

from vcm_jax.codec.linear import LinearCodec as LinearCodec
from vcm_jax.codec.linear import fit_linear_codec as fit_linear_codec
from vcm_jax.codec.neural import NeuralCodec as NeuralCodec

_KINDS = {kind.name: kind for kind in (LinearCodec, NeuralCodec)}


def load_codec(folder):
    """Load a codec folder (codec.json and its arrays).

    Returns:
      An object with `name`, `sample_rate` (Hz), `hop`, `latent_downsample`, `latent_dim`,
      `fingerprint`, `on_device`, `encode(audio) -> (mean, std)` and `decode(latents) -> audio`;
      see `LinearCodec`.

    Raises:
      ValueError: no codec in the folder, an unknown kind or version, or damaged files.
    """
    path = Path(folder) / "codec.json"
    try:
        name = json.loads(path.read_text())["name"]
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a codec folder (it has no codec.json)") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    if name not in _KINDS:
        raise ValueError(f"{path}: unknown codec {name!r}, known: {', '.join(_KINDS)}")
    return _KINDS[name].load(folder)


def copy_codec(source, folder) -> None:
    """Copy a codec folder. Hard links share its files, which never change, where possible."""

    def copy(path, target):
        try:
            os.link(path, target)
        except OSError:  # another file system, or no hard links
            shutil.copyfile(path, target)

    shutil.copytree(source, folder, copy_function=copy)


def check_codec(codec, sequence) -> None:
    """Refuse a codec whose latents have another rate than the data.

    Args:
      codec: of `load_codec`.
      sequence: SequenceConfig of the data.

    Raises:
      ValueError: the sample rate, the hop or the number of frames per latent differs.
    """
    for key in ("sample_rate", "hop", "latent_downsample"):
        if getattr(codec, key) != getattr(sequence, key):
            raise ValueError(
                f"the {codec.name} codec has {key} {getattr(codec, key)}, "
                f"the data {getattr(sequence, key)}"
            )
