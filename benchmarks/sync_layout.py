"""Rewrites records of the weights-free encoders with sync rows where Synchformer has them.

    python benchmarks/sync_layout.py --records=records/impacts/train --out=records/overlapping/train

Synchformer's segments of 16 frames overlap by half, so that its row j does not lie at
(j + 1/2) / Ts of the clip, where the rows of the weights-free encoders lie. This program
interpolates their rows at Synchformer's times. `compare_objectives.py --overlapping` trains on such
records and scores on such features, to compare --config=configs/impacts.py with
--config=configs/ablations.py:base=impacts,sync=time.
"""

import dataclasses
import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from vcm_jax.records.manifest import write_manifest
from vcm_jax.records.schema import EMPTY_TEXT, RecordError, serialize, write_shard
from vcm_jax.records.sequence import sync_row_times
from vcm_jax.records.source import RecordSource


def overlapping(sync: np.ndarray, duration: float) -> np.ndarray:
    """Sync rows `Ts D`, even in time over `duration` seconds, at the times of Synchformer's rows.

    The values at those times are interpolated.
    """
    times, _ = sync_row_times(len(sync))
    place = times / duration * len(sync) - 0.5
    place = np.clip(place, 0, len(sync) - 1)
    before = np.floor(place).astype(int)
    after = np.minimum(before + 1, len(sync) - 1)
    weight = (place - before)[:, None].astype(np.float32)
    return (1 - weight) * sync[before] + weight * sync[after]


def rewrite(source: Path, out: Path) -> int:
    """Writes the records of a folder with overlapping sync rows to another; returns how many.

    Raises:
      RecordError: a folder that is not one of records.
    """
    there = RecordSource(source)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    duration, digest = there.manifest.sequence.duration, hashlib.sha256()

    def packed():
        for i in range(len(there)):
            record = there[i]
            record["sync"] = overlapping(record["sync"].astype(np.float32), duration)
            data = serialize(record)
            digest.update(data)
            yield data

    path = out / "part-00000.array_record"
    write_shard(path, packed())
    shutil.copy(source / EMPTY_TEXT, out / EMPTY_TEXT)
    shutil.copytree(source / "codec", out / "codec")
    shard = {"name": path.name, "records": len(there), "bytes": path.stat().st_size}
    write_manifest(
        out,
        dataclasses.replace(
            there.manifest, shards=[shard], text_table=None, fingerprint=digest.hexdigest()[:16]
        ),
    )
    return len(there)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    args = flags.FLAGS
    try:
        count = rewrite(Path(args.records), Path(args.out))
    except RecordError as error:
        sys.exit(f"error: {error}")
    print(f"{args.out}: {count} records")


if __name__ == "__main__":
    flags.DEFINE_string("records", None, "Folder of the records.", required=True)
    flags.DEFINE_string("out", None, "Folder to write; its contents are replaced.", required=True)
    app.run(main)
