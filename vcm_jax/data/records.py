"""Records: the one schema of extracted clips, their files, and the manifest that makes them whole.

A records folder holds NAME.array_record files, manifest.json (written last), empty_text.npy (the
text encoder's features of ""), and codec/ (what turns the latents into sound).
"""

import dataclasses
import json
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from flax import serialization

from vcm_jax.atomic import atomic_path
from vcm_jax.data.sequence import SequenceConfig

VERSION = 1
MANIFEST, EMPTY_TEXT = "manifest.json", "empty_text.npy"
# Any larger group ruins random access; float16 features hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_DTYPES = {
    "latent_mean": np.float32,  # N C
    "latent_std": np.float32,  # N C
    "clip": np.float16,  # Tc Dc
    "sync": np.float16,  # Ts Ds
    "text": np.float16,  # Tt Dt
}


class RecordError(ValueError):
    """Records that cannot be written or read; the one-line message names them and says why."""


def serialize(record: Mapping) -> bytes:
    """Pack a record: {id: str, caption: str, latent_mean, latent_std, text[, clip, sync]: arrays}.

    Latents become float32, features float16. A record without video lacks clip and sync.

    Raises:
      RecordError: a value that is not finite, also one too large for float16.
    """
    packed = {"id": record["id"], "caption": record["caption"], "version": VERSION}
    for name in _DTYPES:
        if name in record:
            with np.errstate(over="ignore"):
                packed[name] = np.asarray(record[name]).astype(_DTYPES[name])
            if not np.isfinite(packed[name]).all():
                kind = np.dtype(_DTYPES[name]).name
                raise RecordError(f"{record['id']}: {name} is not finite as {kind}")
    return serialization.msgpack_serialize(packed)


def deserialize(data: bytes) -> dict:
    """Unpack what `serialize` packed; the arrays are read-only views.

    Raises:
      RecordError: not a record, or one of another version.
    """
    try:
        record = serialization.msgpack_restore(data)
        version = record.pop("version")
    except Exception as error:  # msgpack has no common class for what damaged bytes raise
        raise RecordError(f"not a record: {error}") from error
    if version != VERSION:
        raise RecordError(f"a record of version {version}, this program reads version {VERSION}")
    return record


def write_shard(path, records: Iterable[bytes]) -> None:
    """Write serialized records as one ArrayRecord file, atomically."""
    with atomic_path(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        size = 0
        try:
            for record in records:
                writer.write(record)
                size += len(record)
        finally:
            writer.close()
        if temporary.stat().st_size < size:
            raise OSError(f"{path}: could not be written whole (is the disk full?)")


def latent_sums(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Sums (4, C) float64 over a clip's latents (N, C): 1, mean, mean^2, std^2.

    Sums of clips add up; `latent_statistics` makes of them what training needs.
    """
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return np.stack([np.ones_like(mean), mean, mean**2, std**2]).sum(axis=1)


def latent_statistics(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std per channel, (C,) each, of latents drawn as mean + std * normal.

    The variance is that of the means plus the average of std^2.
    """
    mean, mean_square, variance = sums[1:] / sums[0]
    return mean, np.sqrt(np.maximum(mean_square - mean**2, 0) + variance)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a records folder holds.

    Attributes:
      sequence: lengths of every clip.
      encoders: Encoders.spec() of what made the features.
      codec: {name, fingerprint, latent_dim} of what made the latents.
      has_video: whether records have clip and sync features.
      num_records: in all.
      num_failures: clips left out.
      fields: {name: {"shape": [...], "dtype": str}} of the arrays in each record.
      latent_mean, latent_std: per channel, of the drawn latents.
      shards: [{"name", "records", "bytes"}] in reading order.
      fingerprint: hash of the records.
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
    version: int = VERSION

    @property
    def latent_dim(self) -> int:
        """C: channels of the latents."""
        return self.codec["latent_dim"]


def describe_fields(record: Mapping) -> dict:
    """Manifest.fields of a deserialized record."""
    return {
        name: {"shape": list(record[name].shape), "dtype": record[name].dtype.name}
        for name in _DTYPES
        if name in record
    }


def write_manifest(folder, manifest: Manifest) -> None:
    """Write manifest.json, atomically: from then on the folder counts as whole."""
    with atomic_path(Path(folder) / MANIFEST) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read_manifest(folder) -> Manifest:
    """Read manifest.json.

    Raises:
      RecordError: no such folder, no manifest, a damaged one, or one of another version.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such records folder")
    if not path.exists():
        raise RecordError(
            f"{folder}: no {MANIFEST}: not a records folder, or an extraction that is not "
            "finished (run its command again)"
        )
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise RecordError(
                f"{folder}: records of version {content['version']}, this program reads "
                f"version {VERSION}: extract again"
            )
        return Manifest(**content | {"sequence": SequenceConfig(**content["sequence"])})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: damaged ({error})") from error


class RecordSource:
    """Random access to a records folder: picklable, for any number of threads and processes.

    Attributes:
      path: the folder.
      manifest: its Manifest.

    Raises:
      RecordError: the folder is not whole: no manifest, a shard that is missing, too many or cut
        off, no records.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        shards = {shard["name"]: shard for shard in self.manifest.shards}
        there = {file.name: file for file in self.path.glob("*.array_record")}
        for name, shard in shards.items():
            if name not in there:
                raise RecordError(f"{self.path / name}: missing, the manifest lists it")
            size = there[name].stat().st_size
            if size != shard["bytes"]:
                raise RecordError(
                    f"{self.path / name}: {size} bytes, the manifest says {shard['bytes']}: "
                    "cut off or replaced"
                )
        if extra := sorted(there.keys() - shards.keys()):
            raise RecordError(f"{self.path / extra[0]}: not in the manifest")
        if not shards or not self.manifest.num_records:
            raise RecordError(f"{self.path}: no records")
        try:
            # Picklable itself: each process opens the files when it first reads from them.
            self._reader = array_record_data_source.ArrayRecordDataSource(
                [str(self.path / name) for name in shards]
            )
        except Exception as error:  # its C++ code raises what it likes
            raise RecordError(f"{self.path}: unreadable ({error})") from error
        if len(self._reader) != self.manifest.num_records:
            raise RecordError(
                f"{self.path}: {len(self._reader)} records, the manifest says "
                f"{self.manifest.num_records}"
            )

    @property
    def empty_text(self) -> np.ndarray:
        """The text encoder's features of the empty text, (Tt, Dt) float32."""
        return np.load(self.path / EMPTY_TEXT)

    def __len__(self) -> int:
        return self.manifest.num_records

    def __getitem__(self, index: int) -> dict:
        """Record `index`: see `serialize` for its fields.

        Raises:
          IndexError: no such record.
          RecordError: damaged.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return deserialize(self._reader[index])
