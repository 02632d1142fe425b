"""Sound for a whole set of records: batched over all devices, shared between hosts, resumable.

    python -m vcm_jax.generate --workdir=RUN --records=RECORDS --steps=1 --out=SOUNDS

A sound is a function of the weights, its record, the seed and its id. Batch size and numbers of
devices and hosts change it by rounding errors only. If interrupted, run the same command again: it
keeps the sounds that are there.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from vcm_jax.claim import claim, hold
from vcm_jax.devices import sharding
from vcm_jax.generation.clips import Features, Request, decode, start_latents
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.outputs import is_hopeless, reason
from vcm_jax.generation.run import Run
from vcm_jax.media.names import IdError, output_name
from vcm_jax.records.schema import RecordError
from vcm_jax.records.source import RecordSource

_SETTINGS = "generate.json"  # in the output folder: what the sounds there were made with

Item = tuple[Path, Features]  # a sound to generate, and its file


class RecordsError(ValueError):
    """Records for which this run cannot generate sound; one line."""


@dataclasses.dataclass
class Summary:
    """What was done.

    Attributes:
      written, kept: sounds of this process that were generated now, and that were there before.
      left_out: (id, reason) of clips without a sound.
      seconds: from the end of the first batch, which includes compilation, to the end.
      timed: sounds that were generated in these seconds.
      limited: one line that says what the limiter did; "" if it did nothing.
    """

    written: int = 0
    kept: int = 0
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    timed: int = 0
    limited: str = ""


def check_records(run: Run, source: RecordSource) -> None:
    """Raises RecordsError if features or rates differ from those that the run was trained on.

    The duration may differ.
    """
    manifest = source.manifest
    duration = run.sequence.duration
    widths = [f"{kind}_dim" for kind in ("clip", "sync", "text")]
    if run.encoder_spec is None:  # public weights: nobody has noted which encoders made theirs
        theirs = {name: manifest.encoders[name] for name in widths}
        encoders = theirs, {name: getattr(run.model, name) for name in widths}
    else:
        encoders = manifest.encoders, run.encoder_spec
    pairs = {
        "encoders": encoders,
        "latent_dim": (manifest.latent_dim, run.model.latent_dim),
        "sequence": (dataclasses.replace(manifest.sequence, duration=duration), run.sequence),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise RecordsError(f"{source.path} is not for this run: {what} {theirs}, not {ours}")


def settings(run: Run, source: RecordSource, times, seed: int, lufs: float | None = None) -> dict:
    """Everything that the sounds follow from, as JSON; weights and records as hashes."""
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
    } | ({} if lufs is None else {"loudness": lufs})


def generate_records(
    run: Run,
    source: RecordSource,
    out,
    times,
    *,
    seed: int = 0,
    batch_size: int = 8,
    suffix: str = "wav",
    part: int = 0,
    parts: int = 1,
    lufs: float | None = None,
) -> Summary:
    """Writes OUT/ID.wav or .flac for every record, on all devices of this process.

    A record that cannot be read and a sound that cannot be made or written are left out. The true
    peak of the sounds is limited to -1 dBTP; of those that this changes, evaluation finds what the
    network made in OUT/.as_made.

    Args:
      run: from `load_run`.
      source: the records.
      out: folder of the sounds; made if it is missing.
      times: as `sampling.sample`'s.
      seed: of the noise, any integer; the noise also depends on the record's id.
      batch_size: clips at a time, over all devices; rounded up to a multiple of their number.
      suffix: "wav" or "flac", 16 bits, mono.
      part, parts: this process generates every `parts`-th record, from `part` on.
      lufs: the integrated loudness of all sounds, before the limiter; None: as they are.

    Raises:
      RecordsError: the records do not fit the run, or their ids do not name different files.
      ClaimError: `out` holds something else, or another process works on these records there.
      OSError: the disk is full or read-only.
    """
    out = Path(out)
    check_records(run, source)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(out, (part, parts)))
        run = stack.enter_context(run.stage("variables"))
        run = stack.enter_context(run.stage("codec"))
        claim(out, settings(run, source, times, seed, lufs), _SETTINGS)
        mesh = sharding.make_mesh(devices=jax.local_devices())
        variables = jax.device_put(run.variables, sharding.replicated(mesh))
        run = dataclasses.replace(run, variables=variables)
        batch_size += -batch_size % mesh.size
        put = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))

        def start(batch: list[Item]):
            items = [item for _, item in batch]
            return start_latents(run, items, times, seed, batch_size, put)

        indices = range(part, len(source), parts)
        with tqdm(total=len(indices), desc="Generating", unit="clip") as progress:
            summary = Summary()
            todo = _todo(source, indices, out, suffix, summary, progress.update)
            batches = _pipelined(_batches(todo, batch_size), start)
            finish = Finish(lufs, keep=True)
            write = functools.partial(_write, run, finish, seed)
            _write_all(run, batches, write, summary, progress.update)
            summary.limited = finish.summary()
    return summary


def _todo(
    source: RecordSource,
    indices: Iterable[int],
    out: Path,
    suffix: str,
    summary: Summary,
    update: Callable[[], None],
) -> Iterator[Item]:
    """The records whose sounds are not there yet."""
    sequence, seen = source.manifest.sequence, set()
    for index in indices:
        try:
            record = source[index]
        except RecordError as error:
            summary.left_out.append((f"record {index}", reason(error)))
            update()
            continue
        try:
            path = out / f"{output_name(record['id'])}.{suffix}"
        except IdError as error:
            raise RecordsError(f"{source.path}: {error}") from None
        if path in seen:
            raise RecordsError(f"{source.path}: the id {record['id']} occurs twice")
        seen.add(path)
        if path.exists():
            summary.kept += 1
            update()
            continue
        request = Request(record["id"], None, record["caption"])
        clip, sync = (record.get(name) for name in ("clip", "sync"))
        yield path, Features(request, sequence, sequence.duration, clip, sync, record["text"])


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _pipelined(batches: Iterable[list[Item]], start: Callable) -> Iterator[tuple[list[Item], list]]:
    """(batch, latents) of every batch; meanwhile the devices work on the next batch."""
    before = None
    for batch in batches:
        started = batch, start(batch)
        if before is not None:
            yield before
        before = started
    if before is not None:
        yield before


def _write_all(
    run: Run, batches: Iterable, write: Callable, summary: Summary, update: Callable[[], None]
) -> None:
    """Decodes and writes all sounds, with a thread per core unless the codec uses the devices."""
    started = time.perf_counter()
    threads = 1 if run.codec.on_device else os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for number, (batch, latents) in enumerate(batches):
            latents = np.asarray(latents)  # waits for the devices
            futures = [pool.submit(write, *item) for item in zip(batch, latents)]
            before = summary.written
            for (_, item), future in zip(batch, futures):
                error = future.exception()
                if is_hopeless(error):
                    raise error
                if error is None:
                    summary.written += 1
                else:
                    summary.left_out.append((item.request.id, reason(error)))
                update()
            if number:
                summary.timed += summary.written - before
            else:
                started = time.perf_counter()
    summary.seconds = time.perf_counter() - started


def _write(run: Run, finish: Finish, seed: int, item: Item, latent: np.ndarray) -> None:
    path, features = item
    finish.write_sound(path, decode(run, features, latent, seed), run.codec.sample_rate)
