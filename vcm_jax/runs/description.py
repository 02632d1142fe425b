"""The description of a run: run.json and the codec, which generating needs beside the weights."""

import dataclasses
from pathlib import Path

from vcm_jax.atomic import read_json, write_json
from vcm_jax.codec import copy_codec
from vcm_jax.hashes import open_seal, seal
from vcm_jax.models import ModelConfig
from vcm_jax.records.sequence import SequenceConfig

_FILE, _CODEC = "run.json", "codec"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a run was trained with.

    Attributes:
      config: the config of the run, as nested dictionaries.
      model: the sizes of the network.
      sequence: the lengths of the training clips.
      encoders: `Encoders.spec()` of the encoders that made the features.
      codec: {name, fingerprint, latent_dim} of the codec that made the latents.
      base: {place, hash} of the weights that the run's own weights complete (`vcm_jax.weights`);
        None if they are whole.
    """

    config: dict
    model: ModelConfig
    sequence: SequenceConfig
    encoders: dict
    codec: dict
    base: dict | None = None


def is_run(folder) -> bool:
    """Whether a folder is the workdir of a run."""
    return (Path(folder) / _FILE).exists()


def write(
    workdir, config: dict, model: ModelConfig, manifest, codec_folder, base: dict | None = None
) -> None:
    """Writes run.json and, unless it is there, a copy of the codec.

    Args:
      workdir: of the run; made if it is missing.
      config: nested dictionaries that JSON can hold.
      model: the sizes of the network.
      manifest: the `Manifest` of the records that the run trains on.
      codec_folder: the codec of these records.
      base: see `Description`.
    """
    workdir = Path(workdir)
    described = Description(
        config, model, manifest.sequence, manifest.encoders, manifest.codec, base
    )
    fields = {k: v for k, v in dataclasses.asdict(described).items() if v is not None}
    write_json(workdir / _FILE, seal(fields))
    if not (workdir / _CODEC).exists():
        copy_codec(codec_folder, workdir / _CODEC)


def read(workdir) -> Description:
    """Reads run.json.

    Raises:
      ValueError: the folder is not the workdir of a run, or the file is damaged.
    """
    path = Path(workdir) / _FILE
    try:
        names = [f.name for f in dataclasses.fields(Description) if f.name != "base"]
        found = open_seal(read_json(path, names), path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{workdir} is not the workdir of a run: it has no {_FILE}") from None
    for name in ("config", "model", "sequence", "encoders", "codec"):
        if not isinstance(found[name], dict):
            raise ValueError(f"{path} is damaged: its {name!r} is not a JSON object")
    try:
        model, sequence = ModelConfig(**found["model"]), SequenceConfig(**found["sequence"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or a newer version of this program wrote it: {error}"
        ) from None
    return Description(
        found["config"], model, sequence, found["encoders"], found["codec"], found.get("base")
    )
