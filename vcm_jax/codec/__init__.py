"""Codecs: sound to latents and back."""

from pathlib import Path

from vcm_jax.codec.folders import copy_codec as copy_codec
from vcm_jax.codec.folders import read_description
from vcm_jax.codec.learned import LearnedCodec as LearnedCodec
from vcm_jax.codec.linear import LinearCodec as LinearCodec
from vcm_jax.codec.linear import fit_linear_codec as fit_linear_codec
from vcm_jax.codec.neural import NeuralCodec as NeuralCodec

_KINDS = {kind.name: kind for kind in (LinearCodec, LearnedCodec, NeuralCodec)}


def load_codec(folder, dtype="float32"):
    """Load a codec folder (codec.json and its arrays).

    Args:
      folder: of the codec.
      dtype: of the neural codec's convolutions, float32 or bfloat16.

    Returns:
      An object with `name`, `sample_rate` (Hz), `hop`, `latent_downsample`, `latent_dim`,
      `fingerprint`, `on_device`, `encode(audio) -> (mean, std)` and
      `decode(latents, seed) -> audio`; see `LearnedCodec`.

    Raises:
      ValueError: no codec in the folder, an unknown kind or version, or damaged files.
    """
    name = read_description(folder)["name"]
    if name not in list(_KINDS):
        path = Path(folder) / "codec.json"
        raise ValueError(f"{path}: unknown codec {name!r}, known: {', '.join(_KINDS)}")
    kind = _KINDS[name]
    return kind.load(folder, dtype) if kind is NeuralCodec else kind.load(folder)


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
