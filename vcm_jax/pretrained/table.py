"""The public models by name: their files, origins, sizes, checksums, licences and settings."""

import dataclasses

from vcm_jax.records.sequence import SequenceConfig

# Where MMAudio keeps its release files.
RELEASE = "https://github.com/hkchengrex/MMAudio/releases/download/v0.1"

_MMAUDIO = "CC-BY-NC 4.0"
LICENCES = {
    _MMAUDIO: "https://creativecommons.org/licenses/by-nc/4.0/ (no commercial use)",
    "MIT": "https://opensource.org/license/mit",
    "Apple AMLR": "https://huggingface.co/apple/DFN5B-CLIP-ViT-H-14-384 (research use only)",
}


class PretrainedError(ValueError):
    """Weights that are missing, damaged or cannot be fetched; one line that says what to do."""


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A published file.

    Attributes:
      name: as published.
      folder: subfolder that holds it, as in MMAudio's own layout.
      size: bytes, approximately; the server says the exact number.
      licence: a key of LICENCES.
      repo: repository on Hugging Face; None for a file of the GitHub release.
      path: in that repository.
      checksum: "md5:HEX" as published; None where only the server's ETag says it.
    """

    name: str
    folder: str
    size: int
    licence: str
    repo: str | None = None
    path: str = ""
    checksum: str | None = None

    @property
    def place(self) -> str:
        """Path below the folder of weights."""
        return f"{self.folder}/{self.name}"


def _network(name: str, megabytes: int, md5: str) -> WeightFile:
    path = f"weights/{name}"
    return WeightFile(
        name, "weights", megabytes * 10**6, _MMAUDIO, "hkchengrex/MMAudio", path, f"md5:{md5}"
    )


def _released(name: str, megabytes: int, md5: str) -> WeightFile:
    return WeightFile(name, "ext_weights", megabytes * 10**6, _MMAUDIO, checksum=f"md5:{md5}")


def _clip(name: str, size: int) -> WeightFile:
    repo = "apple/DFN5B-CLIP-ViT-H-14-384"
    return WeightFile(name, "clip", size, "Apple AMLR", repo, name)


# The VAE and the vocoder of each mode.
CODECS = {
    "16k": (
        _released("v1-16.pth", 687, "69f56803f59a549a1a507c93859fd4d7"),
        _released("best_netG.pt", 449, "eeaf372a38a9c31c362120aba2dde292"),
    ),
    "44k": (
        _released("v1-44.pth", 1222, "fab020275fa44c6589820ce025191600"),
        WeightFile(
            "bigvgan_generator.pt",
            "ext_weights",
            489_000_000,
            "MIT",
            "nvidia/bigvgan_v2_44khz_128band_512x",
            "bigvgan_generator.pt",
        ),
    ),
}

# CLIP's weights come first, then its settings and its vocabulary.
ENCODERS = (
    _released("synchformer_state_dict.pth", 951, "5b2f5594b0730f70e41e549b7c94390c"),
    _clip("open_clip_pytorch_model.bin", 3_950_000_000),
    _clip("open_clip_config.json", 735),
    _clip("vocab.json", 862_000),
    _clip("merges.txt", 525_000),
)


@dataclasses.dataclass(frozen=True)
class PublicModel:
    """A public model.

    Attributes:
      model: key of `vcm_jax.models.MODELS`.
      mode: key of CODECS.
      network: file of the flow-matching network.
      duration: seconds that it was trained on.
      steps, guidance_scale: Euler steps and classifier-free guidance of MMAudio's own commands.
    """

    model: str
    mode: str
    network: WeightFile
    duration: float = 8.0
    steps: int = 25
    guidance_scale: float = 4.5

    @property
    def sequence(self) -> SequenceConfig:
        """Lengths at the duration of training."""
        make = SequenceConfig.mode_44k if self.mode == "44k" else SequenceConfig
        return make(duration=self.duration)

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return (self.network, *CODECS[self.mode], *ENCODERS)


_NETWORKS = {
    "small_16k": (629, "af93cde404179f58e3919ac085b8033b"),
    "small_44k": (630, "babd74c884783d13701ea2820a5f5b6d"),
    "medium_44k": (2487, "5a56b6665e45a1e65ada534defa903d0"),
    "large_44k": (4120, "fed96c325a6785b85ce75ae1aafd2673"),
    "large_44k_v2": (4123, "01ad4464f049b2d7efdaa4c1a59b8dfe"),
}

# MMAudio recommends large_44k_v2.
PUBLIC_MODELS = {
    f"mmaudio_{model}": PublicModel(
        model, model.split("_")[1], _network(f"mmaudio_{model}.pth", size, md5)
    )
    for model, (size, md5) in _NETWORKS.items()
}
