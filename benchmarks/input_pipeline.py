"""The rate at which batches are read from the page cache, in samples/s and MB/s: one JSON line.

    python benchmarks/input_pipeline.py --dir=runs/pipeline

It writes records of full size (8 s at 16 kHz: 609 KiB of features) into --dir and reads them
through `vcm_jax.records.mixture`, with threads and with 1, 2, ... worker processes. It compares
this with plain memory maps of the same features, read by as many threads in the same order. Each
rate is the best of --repeats (other programs may use the machine), printed beside the slowest. A
corpus of the same shards, linked many times, shows how much memory a large corpus takes, and that a
run resumes after 1,000 batches in well under a second.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from vcm_jax.records import mixture
from vcm_jax.records.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from vcm_jax.records.schema import TEXT_TABLE, serialize, write_shard, write_text_table
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.records.source import RecordSource

DIR = flags.DEFINE_string("dir", None, "Folder for the records; it is kept.", required=True)
RECORDS = flags.DEFINE_integer("records", 512, "Number of records to write.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 32, "Rows per batch.", lower_bound=1)
BATCHES = flags.DEFINE_integer("batches", 40, "Batches per measurement.", lower_bound=1)
WORKERS = flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of worker processes.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Number of measurements of each kind.", lower_bound=1)
LARGE = flags.DEFINE_float("large_gb", 20.0, "Size of the linked corpus; 0 leaves it out.")

_CAPTIONS = 309  # VGGSound has as many different ones
_SHARD = 128
_FEATURES = {
    "latent_mean": ((250, 20), np.float32),
    "latent_std": ((250, 20), np.float32),
    "clip": ((64, 1024), np.float16),
    "sync": ((192, 768), np.float16),
    "text": ((77, 1024), np.float16),
}
SHAPES = mixture.Shapes(clip=_FEATURES["clip"][0], sync=_FEATURES["sync"][0])
SAMPLE_BYTES = sum(int(np.prod(s)) * np.dtype(d).itemsize for s, d in _FEATURES.values())


def _random(rng, name):
    shape, dtype = _FEATURES[name]
    return rng.standard_normal(shape, np.float32).astype(dtype)


def write_corpus(folder: Path, count: int, in_table: bool) -> Path:
    """Writes records of random features, with text features in them or in the text table."""
    if (folder / MANIFEST).exists():
        if read_manifest(folder).num_records == count:
            return folder
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, shards, table = np.random.default_rng(0), [], None
    for first in range(0, count, _SHARD):
        packed = []
        for i in range(first, min(first + _SHARD, count)):
            record = {"id": str(i), "caption": f"caption {i % _CAPTIONS}"}
            record |= {name: _random(rng, name) for name in _FEATURES}
            if in_table:
                del record["text"]
                record["text_row"] = i % _CAPTIONS
            packed.append(serialize(record))
        path = folder / f"part-{first // _SHARD:05d}.array_record"
        write_shard(path, packed)
        shards.append({"name": path.name, "records": len(packed), "bytes": path.stat().st_size})
    if in_table:
        table = write_text_table(folder, (_random(rng, "text") for _ in range(_CAPTIONS)))
    write_manifest(
        folder,
        Manifest(
            sequence=SequenceConfig(),
            encoders={},
            codec={"latent_dim": 20},
            has_video=True,
            num_records=count,
            num_failures=0,
            fields={n: {"shape": s, "dtype": np.dtype(d).name} for n, (s, d) in _FEATURES.items()},
            latent_mean=[0.0] * 20,
            latent_std=[1.0] * 20,
            shards=shards,
            fingerprint="random",
            text_table=table,
        ),
    )
    return folder


def link_corpus(folder: Path, small: Path, gigabytes: float) -> Path:
    """Makes a corpus of the given size from hard links to the shards of a small one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    manifest = read_manifest(small)
    shards, size = [], 0
    while size < gigabytes * 1e9:
        shard = manifest.shards[len(shards) % len(manifest.shards)]
        name = f"part-{len(shards):05d}.array_record"
        os.link(small / shard["name"], folder / name)
        shards.append(shard | {"name": name})
        size += shard["bytes"]
    os.link(small / TEXT_TABLE, folder / TEXT_TABLE)
    records = sum(shard["records"] for shard in shards)
    write_manifest(folder, dataclasses.replace(manifest, shards=shards, num_records=records))
    return folder


def rate(make_batches) -> dict:
    """Samples/s and MB/s of the best repeat, and samples/s of the slowest one.

    The first batch of each repeat, which starts threads or processes, is not counted.

    Args:
      make_batches: a function n -> iterator of n batches.
    """
    rates = []
    for _ in range(REPEATS.value):
        found = make_batches(BATCHES.value + 1)
        next(found)
        start = time.perf_counter()
        for _ in range(BATCHES.value):
            next(found)
        rates.append(BATCH.value * BATCHES.value / (time.perf_counter() - start))
    best = max(rates)
    return {
        "samples_per_s": round(best),
        "mb_per_s": round(best * SAMPLE_BYTES / 1e6),
        "slowest": round(min(rates)),
    }


def reader(folder: Path, workers: int, batch_size: int):
    """A function n -> iterator of n batches, read through the library."""
    mixed = mixture.mix([RecordSource(folder)], [1.0], 0)
    return lambda count: mixture.batches(
        mixed, SHAPES, batch_size=batch_size, first_step=0, last_step=count, num_workers=workers
    )


def memmap_reader(folder: Path):
    """A function n -> iterator of n batches, read from one memory map for each feature."""
    maps, rng = {}, np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for name, (shape, dtype) in _FEATURES.items():
        path, whole = folder / f"{name}.memmap", (RECORDS.value, *shape)
        if not path.exists() or path.stat().st_size != np.prod(whole) * np.dtype(dtype).itemsize:
            written = np.memmap(path, dtype, "w+", shape=whole)
            for i in range(RECORDS.value):
                written[i] = _random(rng, name)
        maps[name] = np.memmap(path, dtype, "r", shape=whole)
    mixed = mixture.mix([range(RECORDS.value)], [1.0], 0)

    def read(step):
        batch = {n: np.empty((BATCH.value, *s), d) for n, (s, d) in _FEATURES.items()}
        for row in range(BATCH.value):
            _, index = mixed.locate(step * BATCH.value + row)
            for name, array in batch.items():
                array[row] = maps[name][index]
        return batch

    def batches(count):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(read, step) for step in range(min(8, count))]
            for step in range(8, count + 8):
                yield waiting.pop(0).result()
                if step < count:
                    waiting.append(pool.submit(read, step))

    return batches


def _private_mb() -> float:
    """Memory of this process in MB, without mapped files and page cache."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def memory(folder: Path, batch_size: int) -> dict:
    """Private memory in MB before and after reading 50 batches from all over a corpus."""
    before = _private_mb()
    for _ in reader(folder, 0, batch_size)(50):
        pass
    return {"before": round(before), "after": round(_private_mb())}


def resume_seconds(folder: Path) -> float:
    """Seconds from opening the records to batch 1,000."""
    start = time.perf_counter()
    mixed = mixture.mix([RecordSource(folder)], [1.0], 0)
    next(mixture.batches(mixed, SHAPES, batch_size=BATCH.value, first_step=1000, last_step=1001))
    return time.perf_counter() - start


def main(_):
    root = Path(DIR.value)
    table = write_corpus(root / "table", RECORDS.value, in_table=True)
    inline = write_corpus(root / "inline", RECORDS.value, in_table=False)

    def size(folder):
        return sum(shard["bytes"] for shard in read_manifest(folder).shards)

    result = {
        "benchmark": "input_pipeline",
        "cores": len(os.sched_getaffinity(0)),
        "sample_kib": round(SAMPLE_BYTES / 1024, 1),
        "stored_kib": {
            "text_in_table": round(size(table) / RECORDS.value / 1024, 1),
            "text_in_records": round(size(inline) / RECORDS.value / 1024, 1),
        },
        "memmap": rate(memmap_reader(root / "memmap")),
        "text_in_records": rate(reader(inline, 0, BATCH.value)),
    }
    for workers in map(int, WORKERS.value):
        result[f"workers_{workers}"] = rate(reader(table, workers, BATCH.value))
    result["resume_s"] = round(min(resume_seconds(table) for _ in range(3)), 3)
    if LARGE.value:
        large = link_corpus(root / "large", table, LARGE.value)
        result["large_gb"] = round(size(large) / 1e9, 1)
        result["large_resume_s"] = round(min(resume_seconds(large) for _ in range(3)), 3)
        for name, folder in (("small", table), ("large", large)):
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, spawn) as fresh:
                found = fresh.submit(memory, folder, BATCH.value).result()
            result[f"{name}_private_mb"] = found
        shutil.rmtree(large)
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
