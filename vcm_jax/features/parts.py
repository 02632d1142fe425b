"""The parts of an extraction: files of a fixed share of the clips, and journals of those begun."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

from flax import serialization

from vcm_jax.atomic import atomic_path
from vcm_jax.records.schema import describe_fields, deserialize, write_shard

_HEADER = struct.Struct("<QI")  # bytes of an entry of a journal, and their CRC


def part_paths(out: Path, chunk: int) -> tuple[Path, Path]:
    """(records, description) of a chunk; the description is written last."""
    return out / f"part-{chunk:05d}.array_record", out / f"part-{chunk:05d}.json"


def write_part(out: Path, chunk: int, packed: list[bytes], sums: list, failures: list) -> None:
    """Write a chunk's records, and what `read_part` returns about them.

    Args:
      out: records folder.
      chunk: number of the part.
      packed: serialized records.
      sums: `records.latent_sums` of each.
      failures: [(id, reason)] of what was left out.
    """
    path, description = part_paths(out, chunk)
    content = {"records": len(packed), "bytes": 0, "failures": failures}
    content["hash"] = hashlib.sha256(b"".join(packed)).hexdigest()[:16]
    if packed:
        write_shard(path, packed)
        content["bytes"] = path.stat().st_size
        content["sums"] = sum(sums[1:], start=sums[0]).tolist()
        content["fields"] = describe_fields(deserialize(packed[0]))
    with atomic_path(description) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def read_part(out: Path, chunk: int) -> dict:
    """{records, bytes, failures, hash[, sums, fields]} of a chunk that is done."""
    return json.loads(part_paths(out, chunk)[1].read_text())


class Journal:
    """What is done of a chunk that is not: each clip's results, safe from a kill.

    Attributes:
      entries: of the first clips of the chunk, in order: [(id, serialized record, sums)] or
        [(id, None, reason)] each.
    """

    def __init__(self, out: Path, chunk: int):
        self._path = out / f"part-{chunk:05d}.journal"
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
        if good < len(data):  # killed while it wrote
            with open(self._path, "r+b") as file:
                file.truncate(good)

    def append(self, results: list[tuple]) -> None:
        """Note the results of the next clip."""
        entry = serialization.msgpack_serialize(
            {str(i): {str(k): v for k, v in enumerate(r)} for i, r in enumerate(results)}
        )
        with open(self._path, "ab") as file:
            file.write(_HEADER.pack(len(entry), zlib.crc32(entry)) + entry)
        self.entries.append(results)

    def finish(self, out: Path, chunk: int) -> None:
        """Make the part of it."""
        results = [result for entry in self.entries for result in entry]
        done = [(packed, other) for _, packed, other in results if packed is not None]
        failures = [(name, other) for name, packed, other in results if packed is None]
        write_part(out, chunk, [p for p, _ in done], [sums for _, sums in done], failures)
        self._path.unlink(missing_ok=True)
