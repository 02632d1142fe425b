"""Sound for a whole set of records: batched over all devices, shared between hosts, resumable.

    python -m vcm_jax.generate --workdir=RUN --records=RECORDS --steps=1 --out=SOUNDS

What a clip sounds like is a function of (weights, its record, seed, its id): neither the batch
size nor the number of devices or hosts changes more than rounding. To go on after an interruption,
run the same command again: sounds that are there are kept.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import time
from pathlib import Path, PurePosixPath

import jax
import numpy as np
from tqdm import tqdm

from vcm_jax.atomic import atomic_path
from vcm_jax.devices import sharding
from vcm_jax.generation.clips import Features, Request, start_latents
from vcm_jax.media.write import write_sound
from vcm_jax.records.source import RecordSource

_SETTINGS = "generate.json"  # in the output folder: what the sounds there were made with


class RecordsError(ValueError):
    """Records that this run cannot sound, or a folder that holds something else; one line."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was done.

    Attributes:
      written, kept: sounds of this process, made now and found there.
      seconds: from the end of the first batch, whose program has to be compiled, to the end.
      timed: sounds that were made in these seconds.
    """

    written: int
    kept: int
    seconds: float
    timed: int


def check_records(run, source: RecordSource) -> None:
    """Raises RecordsError when features or rates are not those that the run was trained on.

    The duration may differ.
    """
    manifest = source.manifest
    duration = run.sequence.duration
    pairs = {
        "encoders": (manifest.encoders, run.encoder_spec),
        "latent_dim": (manifest.latent_dim, run.model.latent_dim),
        "sequence": (dataclasses.replace(manifest.sequence, duration=duration), run.sequence),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise RecordsError(f"{source.path} is not for this run: {what} {theirs}, not {ours}")


def settings(run, source: RecordSource, times, seed: int) -> dict:
    """What the sounds follow from, as JSON; weights and records as hashes."""
    weights = hashlib.sha256()
    for leaf in jax.tree.leaves(run.variables):
        weights.update(np.ascontiguousarray(leaf))
    return {
        "weights": weights.hexdigest()[:16],
        "codec": run.codec.fingerprint,
        "records": source.manifest.fingerprint,
        "times": [float(time) for time in times],
        "sampler": list(dataclasses.astuple(run.sampler)),
        "seed": seed,
    }


def _claim(out: Path, wanted: dict) -> None:
    """Notes the settings in the folder, or compares them with those of the sounds that are there.

    Raises:
      RecordsError: it holds something else, or cannot be written to.
    """
    path = out / _SETTINGS
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text()) if path.exists() else None
        if there is None:
            if any(out.iterdir()):
                raise RecordsError(f"--out={out} holds other files: give a new or empty folder")
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(wanted, indent=1) + "\n")
            return
    except OSError as error:
        raise RecordsError(f"--out={out}: cannot be written to ({error.strerror})") from None
    if differing := [key for key in wanted if there.get(key) != wanted[key]]:
        raise RecordsError(
            f"--out={out} holds sounds of other {', '.join(differing)}: give another folder"
        )


def _path(out: Path, clip: str, suffix: str) -> Path:
    """Where the sound of a clip goes; an id may name a subfolder, but none outside of `out`."""
    parts = PurePosixPath(clip).parts
    if not parts or ".." in parts or clip.startswith("/"):
        raise RecordsError(f"the id {clip!r} does not name a file inside of --out")
    return out / f"{clip}.{suffix}"


def generate_records(
    run,
    source: RecordSource,
    out,
    times,
    *,
    seed: int = 0,
    batch_size: int = 8,
    suffix: str = "wav",
    part: int = 0,
    parts: int = 1,
) -> Summary:
    """Writes OUT/ID.wav or .flac for every record, on all devices of this process.

    Args:
      run: from `runs.load_run`.
      source: the records.
      out: folder of the sounds; made, or gone on with.
      times: as `sampling.sample`'s.
      seed: of the noise, which also depends on the record's id.
      batch_size: clips at a time, over all devices; rounded up to a multiple of their number.
      suffix: "wav" or "flac", 16 bits, mono.
      part, parts: this process makes every `parts`-th record, from `part` on.

    Raises:
      RecordsError: records that do not fit the run, or a folder that holds something else.
    """
    out, sequence = Path(out), source.manifest.sequence
    check_records(run, source)
    _claim(out, settings(run, source, times, seed))
    mesh = sharding.make_mesh(devices=jax.local_devices())
    rows = sharding.batch_sharding(mesh)
    batch_size += -batch_size % mesh.size
    run = dataclasses.replace(
        run, variables=jax.device_put(run.variables, sharding.replicated(mesh))
    )
    rate = run.codec.sample_rate
    seconds, written, kept, seen = sequence.duration, 0, 0, set()
    started, timed = time.perf_counter(), 0

    def todo():
        nonlocal kept
        for index in range(part, len(source), parts):
            record = source[index]
            path = _path(out, record["id"], suffix)
            if record["id"] in seen:
                raise RecordsError(f"{source.path}: the id {record['id']} occurs twice")
            seen.add(record["id"])
            if path.exists():
                kept += 1
                progress.update()
                continue
            request = Request(record["id"], None, record["caption"])
            features = (record.get(name) for name in ("clip", "sync"))
            yield path, Features(request, sequence, seconds, *features, record["text"])

    def finish(paths, latents):
        nonlocal written, timed, started
        latents = np.asarray(latents)  # waits for the devices
        for done in [pool.submit(write, *item) for item in zip(paths, latents)]:
            done.result()
            progress.update()
        if written:
            timed += len(paths)
        else:
            started = time.perf_counter()
        written += len(paths)

    def write(path, latent):
        sound = run.codec.decode(latent)[: round(seconds * rate)]
        write_sound(path, sound, rate)

    threads = 1 if run.codec.on_device else os.cpu_count()
    put = functools.partial(jax.device_put, device=rows)
    with (
        tqdm(
            total=len(range(part, len(source), parts)), desc="Generating", unit="clip"
        ) as progress,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        # Two batches are under way: the devices work on one while the other becomes sound.
        waiting, batch = [], []

        def start():
            paths, items = zip(*batch)
            batch.clear()
            latents = start_latents(run, list(items), times, seed, batch_size, put)
            waiting.append((paths, latents))
            if len(waiting) > 1:
                finish(*waiting.pop(0))

        for item in todo():
            batch.append(item)
            if len(batch) == batch_size:
                start()
        if batch:
            start()
        for group in waiting:
            finish(*group)
    return Summary(written, kept, time.perf_counter() - started, timed)
