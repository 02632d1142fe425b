"""Records: the schema of extracted clips and their files.

A records folder holds shards (NAME.array_record), manifest.json (written last), empty_text.npy
(the text encoder's features of ""), codec/ (the codec that turns the latents into sound) and
text_table (an ArrayRecord file with the text features of each caption, stored once). A record is a
tf.train.Example whose arrays are bytes, as TensorFlow Datasets writes them, so that
`tfds.data_source` reads the same files. Nothing here needs TensorFlow.

ArrayRecord files carry a checksum of every record, and their reader checks it.
"""

import base64
import errno
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
from array_record.python import array_record_module
from etils import epath

from vcm_jax.atomic import atomic_path
from vcm_jax.media.names import IdError, check_id
from vcm_jax.records import example

VERSION = 2
EMPTY_TEXT, TEXT_TABLE = "empty_text.npy", "text_table"
ROW_HASH = 8  # bytes
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
      RecordError: a value that is not finite or too large for float16, or an id that leads out of
        a folder.
    """
    try:
        check_id(record["id"])
    except IdError as error:
        raise RecordError(str(error)) from None
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
      RecordError: not a record, or one of another version, or with an id that leads out of a
        folder, as earlier versions allowed.
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
    if record["id"].startswith("/") or ".." in record["id"].split("/"):
        raise RecordError(f"its id {record['id']!r} leads out of a folder")
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
            reason = "could not be written completely (is the disk full?)"
            raise OSError(errno.ENOSPC, reason, str(path))


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
    path, hashes = epath.Path(folder) / TEXT_TABLE, []

    def packed():
        for row, array in enumerate(features):
            with np.errstate(over="ignore"):
                array = np.asarray(array).astype(np.float16)
            if not np.isfinite(array).all():
                raise RecordError(f"{path}: text features of row {row} are not finite as float16")
            hashes.append(hash_row(array.tobytes()))
            yield array.tobytes()

    write_shard(path, packed())
    encoded = base64.b64encode(b"".join(hashes)).decode()
    return {"rows": len(hashes), "bytes": path.stat().length, "hashes": encoded}


def hash_row(data: bytes) -> bytes:
    """Hash (ROW_HASH bytes) of a row of the text table."""
    return hashlib.sha256(data).digest()[:ROW_HASH]


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


def describe_fields(record: Mapping) -> dict:
    """`Manifest.fields` for a record."""
    return {
        name: {"shape": list(record[name].shape), "dtype": record[name].dtype.name}
        for name in _DTYPES
        if name in record
    }
