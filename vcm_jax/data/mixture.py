"""Batches from weighted sources of records, in an order that is a function of (seed, index)."""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np

from vcm_jax.data.records import RecordSource


def parse_source(text: str) -> tuple[str, float]:
    """'PATH=WEIGHT' -> (PATH, WEIGHT); without '=WEIGHT' the weight is 1.

    Raises:
      ValueError: when the weight is not a positive number.
    """
    path, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
    try:
        value = float(weight)
    except ValueError:
        value = -1.0
    if not path or not 0 < value < float("inf"):
        raise ValueError(f"data source {text!r} must be 'PATH=WEIGHT' with a weight above 0")
    return path, value


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Shapes of one record's features, for the modalities that a record may lack."""

    clip: tuple[int, int]
    sync: tuple[int, int]


class _Fetch(grain.transforms.Map):
    """Local position -> the sample at its global index."""

    def __init__(self, mixed, shapes: Shapes, first: int, batch_size: int, part: int, parts: int):
        self.mixed, self.shapes, self.first = mixed, shapes, first
        self.batch_size, self.part, self.local_size = batch_size, part, batch_size // parts

    def map(self, position: int):
        step, row = divmod(int(position), self.local_size)
        index = self.first + step * self.batch_size + self.part * self.local_size + row
        return to_sample(self.mixed[index], self.shapes)


def to_sample(record: dict, shapes: Shapes) -> dict[str, np.ndarray]:
    """A record as the training step takes it: a missing modality becomes a flag."""
    has_video = "clip" in record
    return {
        "latent_mean": record["latent_mean"],
        "latent_std": record["latent_std"],
        # These zeros are never looked at: the step puts the learned empty features there.
        "clip": record["clip"] if has_video else np.zeros(shapes.clip, np.float16),
        "sync": record["sync"] if has_video else np.zeros(shapes.sync, np.float16),
        "text": record["text"],
        "has_video": np.bool_(has_video),
        "has_text": np.bool_(record["caption"] != ""),
    }


def mix(sources: Sequence[RecordSource], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """An endless sequence of records: index -> (source, record), by (seed, index) alone.

    Sources take turns by weight whatever their sizes; each is shuffled anew every epoch.
    """
    shuffled = [
        grain.MapDataset.source(source).seed(seed + i).shuffle().repeat()
        for i, source in enumerate(sources)
    ]
    if len(shuffled) == 1:
        return shuffled[0]
    return grain.MapDataset.mix(shuffled, weights=np.divide(weights, sum(weights)).tolist())


def batches(
    mixed: grain.MapDataset,
    shapes: Shapes,
    *,
    batch_size: int,
    first_step: int,
    last_step: int,
    part: int = 0,
    parts: int = 1,
    num_workers: int = 0,
):
    """An iterator over this process's rows of the batches `first_step` ... `last_step` - 1.

    Args:
      mixed: what `mix` gives.
      shapes: of clip and sync features.
      batch_size: global; each of `parts` processes gets its `part`, in order.
      first_step, last_step: of the run; sample i of step k has global index k batch_size + i, so
        that a run resumes at any step, on any number of processes, on the same data.
      num_workers: processes that read ahead; 0 reads in threads.

    Yields:
      dicts of numpy arrays with leading axis `batch_size / parts`.
    """
    if batch_size % parts:
        raise ValueError(f"batch_size {batch_size} does not divide over {parts} processes")
    fetch = _Fetch(mixed, shapes, first_step * batch_size, batch_size, part, parts)
    local_size = batch_size // parts
    dataset = grain.MapDataset.range((last_step - first_step) * local_size)
    dataset = dataset.map(fetch).batch(local_size)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=8))
    if num_workers:
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)
