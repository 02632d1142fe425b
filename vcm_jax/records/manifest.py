"""The manifest of a records folder: what it holds, and with what it was made."""

import base64
import dataclasses
import json
import math

import numpy as np
from etils import epath

from vcm_jax.atomic import atomic_path
from vcm_jax.hashes import open_seal, seal, short_hash
from vcm_jax.records.schema import EMPTY_TEXT, ROW_HASH, VERSION, RecordError
from vcm_jax.records.sequence import SequenceConfig

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes a records folder.

    Attributes:
      sequence: lengths of every clip.
      encoders: `Encoders.spec()` of the encoders that made the features.
      codec: {name, fingerprint, latent_dim} of the codec that made the latents.
      has_video: whether records have clip and sync features.
      num_records: number of records.
      num_failures: number of clips that were left out.
      fields: {name: {"shape": [...], "dtype": str}} of the arrays in each record as it is read.
      latent_mean, latent_std: (C,), statistics of the drawn latents.
      shards: [{"name", "records", "bytes"}] in reading order.
      fingerprint: hash of the records.
      text_table: {"rows", "bytes", "hashes"} of the text table; None if the records hold text
        features. `hashes` are those of the rows (`hash_row`), as base64.
      empty_text: hash of the features of the empty text; None in folders of earlier versions.
      version: of the schema.
    """

    sequence: SequenceConfig
    encoders: dict
    codec: dict
    has_video: bool
    num_records: int
    num_failures: int
    fields: dict
    latent_mean: list[float]
    latent_std: list[float]
    shards: list[dict]
    fingerprint: str
    text_table: dict | None = None
    empty_text: str | None = None
    version: int = VERSION

    @property
    def latent_dim(self) -> int:
        """C, the channels of the latents."""
        return self.codec["latent_dim"]


def write_manifest(folder, manifest: Manifest) -> None:
    """Write manifest.json atomically; with it the folder is complete."""
    content = seal(dataclasses.asdict(manifest))
    with atomic_path(epath.Path(folder) / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(folder) -> Manifest:
    """Read manifest.json.

    Raises:
      RecordError: no such folder, no manifest, a damaged manifest, or one of another version.
    """
    folder = epath.Path(folder)
    path = folder / MANIFEST
    try:
        there = folder.is_dir()
    except ImportError as error:  # epath imports the client of a remote file system when it is used
        raise RecordError(f"{folder}: {error}") from error
    if not there:
        raise RecordError(f"{folder}: no such records folder")
    if not path.exists():
        raise RecordError(
            f"{folder}: no {MANIFEST}: not a records folder, or the extraction is not finished "
            "(rerun its command)"
        )
    try:
        content = json.loads(path.read_text())
        version = content["version"]
        if version == VERSION:
            content = open_seal(content, path)
            content["sequence"] = SequenceConfig(**content["sequence"])
            manifest = Manifest(**content)
            _check(manifest)
            return manifest
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RecordError(f"{path}: damaged ({error})") from error
    raise RecordError(
        f"{folder}: records of version {version}, this program reads version {VERSION}: extract "
        "them again"
    )


def _check(manifest: Manifest) -> None:
    """Raises ValueError, KeyError or TypeError for values that no extraction writes."""
    for name in ("encoders", "codec", "fields"):
        if not isinstance(getattr(manifest, name), dict):
            raise TypeError(f"{name} must be an object")
    for name in ("latent_mean", "latent_std"):
        values = getattr(manifest, name)
        if len(values) != manifest.latent_dim or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be {manifest.latent_dim} finite numbers")
    if min(manifest.latent_std) < 0:
        raise ValueError("latent_std is negative")
    for name, field in manifest.fields.items():
        np.dtype(field["dtype"])
        if not all(isinstance(length, int) and length >= 0 for length in field["shape"]):
            raise ValueError(f"the shape of {name} must be whole numbers, not {field['shape']}")
    files = [*manifest.shards, manifest.text_table] if manifest.text_table else manifest.shards
    for file in files:
        count = file["rows"] if file is manifest.text_table else file["records"]
        if not (isinstance(count, int) and isinstance(file["bytes"], int)):
            raise TypeError("sizes of its files must be whole numbers")
    names = [shard["name"] for shard in manifest.shards]
    if any("/" in name or not name.endswith(".array_record") for name in names):
        raise ValueError(f"names of shards must end in .array_record: {names}")
    if manifest.text_table and len(row_hashes(manifest)) not in (0, manifest.text_table["rows"]):
        raise ValueError("the hashes of the text table are not one for each row")


def row_hashes(manifest: Manifest) -> list[bytes]:
    """The hashes of the rows of the text table; none in folders of earlier versions."""
    data = base64.b64decode((manifest.text_table or {}).get("hashes", ""), validate=True)
    return [data[i : i + ROW_HASH] for i in range(0, len(data), ROW_HASH)]


def write_empty_text(folder, features: np.ndarray) -> str:
    """Write the text encoder's features of the empty text; returns Manifest.empty_text."""
    features = np.asarray(features, np.float32)
    with atomic_path(epath.Path(folder) / EMPTY_TEXT) as temporary, open(temporary, "wb") as file:
        np.save(file, features)
    return hash_empty_text(features)


def hash_empty_text(features: np.ndarray) -> str:
    """`Manifest.empty_text` of features (Tt, Dt) float32."""
    return short_hash(str(features.shape).encode(), np.ascontiguousarray(features))
