"""Batches from weighted sources of records, in an order that depends on (seed, index) alone."""

import bisect
import ctypes
import dataclasses
import itertools
import signal
import sys
from collections.abc import Sequence

import grain
import numpy as np
from absl import logging

from vcm_jax.records.schema import RecordError

MAX_DAMAGED = 100  # different damaged records that one process passes over before it gives up
# Of a source: beyond these bounds sums of weights are no longer precise.
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6
_THREADS = 8  # threads that fill batches, and the number of batches that are read ahead
_FEATURES = ("latent_mean", "latent_std", "clip", "sync", "text")


def parse_source(text: str) -> tuple[str, float]:
    """'PATH=WEIGHT' -> (PATH, WEIGHT); without '=WEIGHT' the weight is 1.

    Raises:
      ValueError: the weight is not a number between LEAST_WEIGHT and LARGEST_WEIGHT.
    """
    path, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
    try:
        value = float(weight)
    except ValueError:
        value = -1.0
    if not path or not LEAST_WEIGHT <= value <= LARGEST_WEIGHT:
        raise ValueError(
            f"data source {text!r} must be 'PATH=WEIGHT' with a weight between {LEAST_WEIGHT:g} "
            f"and {LARGEST_WEIGHT:g}"
        )
    return path, value


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of a record's clip (Tc, Dc) and sync (Ts, Ds) features, which records may lack."""

    clip: tuple[int, int]
    sync: tuple[int, int]


def check_sources(sources: Sequence, weights: Sequence[float]) -> None:
    """Raises ValueError: no or empty sources, a bad weight, a source given twice."""
    names = [str(getattr(source, "path", i)) for i, source in enumerate(sources)]
    if not names or len(names) != len(weights):
        raise ValueError(f"{len(names)} data sources and {len(weights)} weights")
    for i, (name, source, weight) in enumerate(zip(names, sources, weights)):
        if not LEAST_WEIGHT <= weight <= LARGEST_WEIGHT:
            raise ValueError(
                f"data source {name}: weight {weight} must lie between {LEAST_WEIGHT:g} and "
                f"{LARGEST_WEIGHT:g}"
            )
        if not len(source):
            raise ValueError(f"data source {name}: no records")
        if name in names[:i]:
            raise ValueError(f"data source {name} is listed twice: give it one, larger weight")


class Mixture:
    """An endless sequence of records, which depends on the sources, weights and seed alone.

    Sources take turns according to their weights, whatever their sizes. Each is shuffled again in
    every epoch. A mixture has random access and no state, and can be pickled.

    Args:
      sources: random-access sequences of records (RecordSource).
      weights: one positive number each.
      seed: determines the order.

    Raises:
      ValueError: see `check_sources`.
    """

    def __init__(self, sources: Sequence, weights: Sequence[float], seed: int):
        self.sources = list(sources)
        check_sources(self.sources, weights)
        # The records of all sources have consecutive numbers; the order is a sequence of these.
        self._ends = list(itertools.accumulate(map(len, self.sources)))
        orders = [
            grain.MapDataset.range(end - len(source), end).seed(seed + i).shuffle().repeat()
            for i, (source, end) in enumerate(zip(self.sources, self._ends))
        ]
        self._order = orders[0]
        if len(orders) > 1:
            share = np.divide(weights, sum(weights)).tolist()
            self._order = grain.MapDataset.mix(orders, weights=share)

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the source, number of the record in it) at a global index."""
        number = int(self._order[index])
        source = bisect.bisect_right(self._ends, number)
        return source, number - self._ends[source] + len(self.sources[source])

    def __getitem__(self, index: int) -> dict:
        """The record at a global index; RecordError if it is damaged."""
        source, record = self.locate(index)
        return self.sources[source][record]

    def read(self, index: int) -> tuple[dict, dict[tuple[int, int], str]]:
        """The record at a global index; for a damaged one, the next whole record of its source.

        Returns:
          The record, and what is wrong with the damaged ones before it, by (source, record).

        Raises:
          RecordError: all records of the source, or more than MAX_DAMAGED in a row, are damaged.
        """
        number, first = self.locate(index)
        source, damaged = self.sources[number], {}
        for offset in range(min(len(source), MAX_DAMAGED + 1)):
            record = (first + offset) % len(source)
            try:
                return source[record], damaged
            except RecordError as error:
                damaged[number, record] = str(error)
        raise RecordError(
            f"{len(damaged)} records in a row are damaged, the last: {damaged[number, record]}"
        )


def mix(sources: Sequence, weights: Sequence[float], seed: int) -> Mixture:
    """`Mixture(sources, weights, seed)`."""
    return Mixture(sources, weights, seed)


class _ReadBatch(grain.transforms.Map):
    """Step -> this process's rows of the batch, and the damaged records that were passed over."""

    def __init__(
        self, mixed: Mixture, shapes: Shapes, batch_size: int, process: int, processes: int
    ):
        self.mixed, self.shapes = mixed, shapes
        self.batch_size, self.rows = batch_size, batch_size // processes
        self.offset = process * self.rows

    def map(self, step: int):
        batch, skipped = None, {}
        first = int(step) * self.batch_size + self.offset
        for row in range(self.rows):
            record, damaged = self.mixed.read(first + row)
            skipped |= damaged
            if batch is None:
                batch = self._allocate(record)
            for name in _FEATURES:
                # The step replaces these zeros by the learned features of an empty condition.
                _copy(record.get(name), batch[name][row])
            batch["has_video"][row] = "clip" in record
            batch["has_text"][row] = record["caption"] != ""
        return batch, skipped

    def _allocate(self, record: dict) -> dict[str, np.ndarray]:
        arrays = {name: (record[name].shape, np.float32) for name in ("latent_mean", "latent_std")}
        arrays["text"] = (record["text"].shape, np.float16)
        for name in ("clip", "sync"):
            arrays[name] = (getattr(self.shapes, name), np.float16)
        arrays["has_video"] = arrays["has_text"] = ((), np.bool_)
        return {n: np.empty((self.rows, *shape), dtype) for n, (shape, dtype) in arrays.items()}


def _copy(source: np.ndarray | None, target: np.ndarray) -> None:
    """Copy bytes: the arrays of a record are not aligned, and numpy copies such arrays slowly."""
    if source is None:
        target[...] = 0
    elif source.shape == target.shape and source.dtype == target.dtype:
        target.reshape(-1).view(np.uint8)[:] = source.reshape(-1).view(np.uint8)
    else:
        raise ValueError(f"a record has features {source.shape}, the batch {target.shape}")


def batches(
    mixed: Mixture,
    shapes: Shapes,
    *,
    batch_size: int,
    first_step: int,
    last_step: int,
    process: int = 0,
    processes: int = 1,
    num_workers: int = 0,
    max_damaged: int = MAX_DAMAGED,
):
    """Iterate over this process's rows of the batches `first_step` ... `last_step` - 1.

    Args:
      mixed: of `mix`.
      shapes: of clip and sync features.
      batch_size: global.
      first_step, last_step: of the run. Sample i of step k has the index k batch_size + i in the
        mixture, so that a run resumes at any step, with any number of processes, on the same data.
      process, processes: index and number of processes; each gets a block of rows, in order.
      num_workers: processes that read ahead. 0 reads in threads, which is faster on local disks.
      max_damaged: different damaged records that are passed over, each with one line in the log.

    Yields:
      dicts of numpy arrays with the leading axis `batch_size / processes`.

    Raises:
      RecordError: more than `max_damaged` records are damaged.
      ValueError: the processes do not divide the batch.
    """
    if batch_size % processes:
        raise ValueError(f"batch_size {batch_size} does not divide over {processes} processes")
    dataset = grain.MapDataset.range(first_step, last_step)
    dataset = dataset.map(_ReadBatch(mixed, shapes, batch_size, process, processes))
    ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    dataset = dataset.to_iter_dataset(ahead)
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    return _report_damage(iter(dataset), max_damaged)


def _report_damage(found, max_damaged: int):
    """The batches alone. A damaged record comes again in every epoch, and counts once."""
    known = set()
    for batch, skipped in found:
        for place, line in skipped.items():
            if place in known:
                continue
            known.add(place)
            logging.warning("damaged record %d passed over: %s", len(known), line)
            if len(known) > max_damaged:
                raise RecordError(f"{len(known)} damaged records, the last: {line}")
        yield batch


def _start_worker(index: int, count: int) -> None:
    """Make a worker ignore SIGTERM and Ctrl-C, which the run handles, and die with the run."""
    del index, count
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def record_ids(mixed: Mixture, step: int, batch_size: int) -> list[str]:
    """The ids of the batch on which step `step` (from 0 on) trains; reads the records."""
    return [mixed.read(step * batch_size + row)[0]["id"] for row in range(batch_size)]
