"""The shards of an extraction: each holds a fixed range of the clips, and a journal while it grows.

On disk a shard is called part-NNNNN, as it was in the first version: its records
(part-NNNNN.array_record) and a summary of them (part-NNNNN.json), which is written last.
"""

import struct
import zlib
from pathlib import Path

from flax import serialization

from vcm_jax.atomic import read_json, write_json
from vcm_jax.hashes import open_seal, seal, short_hash
from vcm_jax.records.schema import describe_fields, deserialize, write_shard

# Of a summary by an earlier version, whose hash is that of the records alone.
_FORMER_KEYS = {"records", "bytes", "failures", "hash", "sums", "fields"}
_HEADER = struct.Struct("<QI")  # length in bytes of a journal entry, and its CRC


def shard_paths(out: Path, number: int) -> tuple[Path, Path]:
    """Paths of a shard's records and of its summary; the shard is done if the summary exists."""
    return out / f"part-{number:05d}.array_record", out / f"part-{number:05d}.json"


def finish_shard(out: Path, number: int, packed: list[bytes], sums: list, failures: list) -> None:
    """Write a shard's records and its summary.

    Args:
      out: records folder.
      number: of the shard.
      packed: serialized records.
      sums: `records.schema.latent_sums` of each record.
      failures: [(id, reason)] of the clips that were left out.
    """
    path, summary = shard_paths(out, number)
    content = {"records": len(packed), "bytes": 0, "failures": failures}
    content["digest"] = short_hash(*packed)
    if packed:
        write_shard(path, packed)
        content["bytes"] = path.stat().st_size
        content["sums"] = sum(sums[1:], start=sums[0]).tolist()
        content["fields"] = describe_fields(deserialize(packed[0]))
    write_json(summary, seal(content), indent=None)


def read_summary(out: Path, number: int) -> dict:
    """{records, bytes, failures, digest[, sums, fields]} of a shard that is done.

    Raises:
      ValueError: it is damaged.
    """
    path = shard_paths(out, number)[1]
    content = read_json(path, ["records", "bytes", "failures", "hash"])
    if content.keys() <= _FORMER_KEYS:
        return content | {"digest": content["hash"]}
    try:
        return open_seal(content, path)
    except ValueError as error:
        raise ValueError(f"{error}; or delete it: its shard is then made again") from None


class Journal:
    """The results of a shard's clips so far; a kill at any moment costs the current clip at most.

    Attributes:
      entries: the results of the shard's first clips, in order. The results of one clip are a list
        of (id, serialized record, latent sums) and (id, None, reason).
    """

    def __init__(self, out: Path, number: int):
        self._path = out / f"part-{number:05d}.journal"
        self.entries, good = [], 0
        data = self._path.read_bytes() if self._path.exists() else b""
        while len(data) >= good + _HEADER.size:
            size, crc = _HEADER.unpack_from(data, good)
            entry = data[good + _HEADER.size :][:size]
            if len(entry) < size or zlib.crc32(entry) != crc:
                break
            # msgpack restores a list as a dict of numbered items.
            content = serialization.msgpack_restore(entry)
            self.entries.append([tuple(item.values()) for item in content.values()])
            good += _HEADER.size + size
        if good < len(data):  # the process was killed while it wrote the last entry
            with open(self._path, "r+b") as file:
                file.truncate(good)

    def append(self, results: list[tuple]) -> None:
        """Add the results of the next clip.

        Raises:
          OSError: the journal cannot be written; its `filename` is the journal.
        """
        entry = serialization.msgpack_serialize(
            {str(i): {str(k): v for k, v in enumerate(r)} for i, r in enumerate(results)}
        )
        try:
            with open(self._path, "ab") as file:
                file.write(_HEADER.pack(len(entry), zlib.crc32(entry)) + entry)
        except OSError as error:  # Python does not name the file on a full disk
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.entries.append(results)

    def finish(self, out: Path, number: int) -> None:
        """Write the shard from the entries, and remove the journal."""
        results = [result for entry in self.entries for result in entry]
        done = [(packed, other) for _, packed, other in results if packed is not None]
        failures = [(name, other) for name, packed, other in results if packed is None]
        finish_shard(out, number, [p for p, _ in done], [sums for _, sums in done], failures)
        self._path.unlink(missing_ok=True)
