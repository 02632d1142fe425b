"""Records: the schema of extracted clips, their files, and the manifest that describes them.

A records folder holds shards (NAME.array_record), manifest.json (written last), empty_text.npy
(the text encoder's features of ""), codec/ (the codec that turns the latents into sound) and
text_table (an ArrayRecord file with the text features of each caption, stored once). A record is a
tf.train.Example whose arrays are bytes, as TensorFlow Datasets writes them, so that
`tfds.data_source` reads the same files. Nothing here needs TensorFlow.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping

import numpy as np
from array_record.python import array_record_module
from etils import epath

from vcm_jax.atomic import atomic_path
from vcm_jax.records import example
from vcm_jax.records.sequence import SequenceConfig

VERSION = 2
MANIFEST, EMPTY_TEXT, TEXT_TABLE = "manifest.json", "empty_text.npy", "text_table"
# Larger groups make random access slow; float16 features hardly compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_DTYPES = {
    "latent_mean": np.float32,  # N C
    "latent_std": np.float32,  # N C
    "clip": np.float16,  # Tc Dc
    "sync": np.float16,  # Ts Ds
    "text": np.float16,  # Tt Dt
    "text_row": np.int32,  # a scalar that replaces `text`: its row in the text table
}


class RecordError(ValueError):
    """Records that cannot be written or read; the one-line message names them and the reason."""


def serialize(record: Mapping) -> bytes:
    """Pack a record.

    Args:
      record: id and caption (strings), latent_mean and latent_std (N, C), and text (Tt, Dt) or
        text_row (the row of the caption in the text table); records with video also have clip
        (Tc, Dc) and sync (Ts, Ds). Latents become float32, features float16.

    Raises:
      RecordError: a value that is not finite, or too large for float16.
    """
    values, shapes = {}, {}
    for name, dtype in _DTYPES.items():
        if name in record:
            with np.errstate(over="ignore"):
                array = np.asarray(record[name]).astype(dtype)
            if not np.isfinite(array).all():
                raise RecordError(f"{record['id']}: {name} is not finite as {np.dtype(dtype).name}")
            values[name], shapes[name] = array.tobytes(), array.shape
    # TFDS does not know this feature. It makes a record readable without the manifest.
    schema = json.dumps({"version": VERSION, "shapes": shapes}).encode()
    texts = {"schema": schema, "id": record["id"].encode(), "caption": record["caption"].encode()}
    return example.pack(texts | values)


@functools.lru_cache(maxsize=64)
def _parse_schema(schema: bytes) -> dict:
    schema = json.loads(schema)
    if schema["version"] != VERSION:
        raise RecordError(
            f"a record of version {schema['version']}, this program reads version {VERSION}"
        )
    return schema["shapes"]


def deserialize(data: bytes) -> dict:
    """Unpack what `serialize` packed. The arrays are read-only views and not aligned.

    Raises:
      RecordError: not a record, or one of another version.
    """
    record = {}
    try:
        spans = example.unpack(data)
        shapes = _parse_schema(data[slice(*spans["schema"])])
        for name in ("id", "caption"):
            record[name] = data[slice(*spans[name])].decode()
        for name, shape in shapes.items():
            start, end = spans[name]
            dtype = _DTYPES[name]
            count = (end - start) // dtype().itemsize
            record[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
    except RecordError:
        raise
    except Exception as error:  # damaged bytes can raise any error above
        raise RecordError(f"not a record: {type(error).__name__}: {error}") from error
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
            raise OSError(f"{path}: could not be written completely (is the disk full?)")


def write_text_table(folder, features: Iterable[np.ndarray]) -> dict:
    """Write the text features to which the `text_row` of records refers.

    Args:
      folder: of the records.
      features: (Tt, Dt) each, in the order of their rows. They are written as they come.

    Returns:
      Manifest.text_table.

    Raises:
      RecordError: features that are not finite as float16.
    """
    path, rows = epath.Path(folder) / TEXT_TABLE, 0

    def packed():
        nonlocal rows
        for array in features:
            with np.errstate(over="ignore"):
                array = np.asarray(array).astype(np.float16)
            if not np.isfinite(array).all():
                raise RecordError(f"{path}: text features of row {rows} are not finite as float16")
            rows += 1
            yield array.tobytes()

    write_shard(path, packed())
    return {"rows": rows, "bytes": path.stat().length}


def latent_sums(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Sums (4, C) float64 of 1, mean, mean^2 and std^2 over a clip's latents (N, C).

    The sums of several clips can be added; `latent_statistics` takes the total.
    """
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return np.stack([np.ones_like(mean), mean, mean**2, std**2]).sum(axis=1)


def latent_statistics(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std per channel, (C,) each, of latents drawn as mean + std * normal.

    Their variance is the variance of the means plus the mean of std^2.

    Args:
      sums: (4, C), of `latent_sums`.
    """
    mean, mean_square, variance = sums[1:] / sums[0]
    return mean, np.sqrt(np.maximum(mean_square - mean**2, 0) + variance)


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
      text_table: {"rows", "bytes"} of the text table; None if the records hold text features.
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
    version: int = VERSION

    @property
    def latent_dim(self) -> int:
        """C, the channels of the latents."""
        return self.codec["latent_dim"]


def describe_fields(record: Mapping) -> dict:
    """`Manifest.fields` for a record."""
    return {
        name: {"shape": list(record[name].shape), "dtype": record[name].dtype.name}
        for name in _DTYPES
        if name in record
    }


def write_manifest(folder, manifest: Manifest) -> None:
    """Write manifest.json atomically; with it the folder is complete."""
    with atomic_path(epath.Path(folder) / MANIFEST) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


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
        if content["version"] != VERSION:
            raise RecordError(
                f"{folder}: records of version {content['version']}, this program reads "
                f"version {VERSION}: extract them again"
            )
        return Manifest(**content | {"sequence": SequenceConfig(**content["sequence"])})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: damaged ({error})") from error
