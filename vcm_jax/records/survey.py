"""One pass over a records folder: what the validator needs to know of every record."""

import dataclasses
import hashlib
from collections import defaultdict

import numpy as np
from tqdm import tqdm

from vcm_jax.records.schema import RecordError, latent_sums
from vcm_jax.records.source import RecordSource

SIGNATURE_BINS = 32  # intervals of time into which a signature divides the clip
_LIMIT = 1e3  # features of an encoder are smaller


@dataclasses.dataclass
class Survey:
    """Facts about the records of a folder, in their order.

    Attributes:
      ids, captions: of each readable record.
      hashes: of its latents.
      signatures: (records, SIGNATURE_BINS * C) float16, see `signature`.
      values: {name: (records,)}, the statistics that the page shows as histograms.
      damaged: messages of the records that cannot be read.
      wrong: {problem: ids} of records with values that no encoder gives.
      sums: `latent_sums` over all records.
    """

    ids: list[str]
    captions: list[str]
    hashes: list[bytes]
    signatures: np.ndarray
    values: dict[str, np.ndarray]
    damaged: list[str]
    wrong: dict[str, list[str]]
    sums: np.ndarray


def signature(latent_mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """A unit vector (SIGNATURE_BINS * C,) by which to recognise a recording.

    The latents (N, C) are divided by the square root of their stds (dividing by the stds would
    give noise in the small channels too much weight), averaged over SIGNATURE_BINS intervals of
    the clip, and their mean over time, which is similar in many clips, is subtracted.

    Measured with the linear codec on 308 sounds of all kinds: the cosine with the same sound at
    half the level or after MP3 compression is above 0.97 in 19 of 20 clips, with the same sound
    50 ms later above 0.9. Two different sounds that fill the clip reached 0.73, drum beats
    followed by silence 0.98. Larger shifts are not recognised.

    Args:
      latent_mean: (N, C).
      std: (C,), of the latents of the whole corpus.
    """
    scaled = np.asarray(latent_mean, np.float64) / np.sqrt(np.maximum(std, 1e-6))
    edges = np.arange(SIGNATURE_BINS) * len(scaled) // SIGNATURE_BINS
    counts = np.diff(np.append(edges, len(scaled)))[:, None]
    bins = np.add.reduceat(scaled, edges, axis=0) / np.maximum(counts, 1)
    bins = (bins - bins.mean(axis=0)).reshape(-1)
    return (bins / max(np.linalg.norm(bins), 1e-12)).astype(np.float16)


def _check_arrays(record_id: str, arrays: dict[str, np.ndarray], wrong: dict) -> None:
    """Add to `wrong` what is wrong with the values of a record."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            wrong[f"{name} is not finite"].append(record_id)
        elif abs(array).max(initial=0) > _LIMIT:
            wrong[f"{name} exceeds {_LIMIT:g}"].append(record_id)
    if (arrays["latent_std"] < 0).any():
        wrong["latent_std is negative"].append(record_id)


def survey(source: RecordSource) -> Survey:
    """Read every record once. Memory grows by less than 2 KB per record."""
    found = Survey([], [], [], np.zeros(0), {}, [], defaultdict(list), 0.0)
    std = np.array(source.manifest.latent_std)
    values, signatures = defaultdict(list), []
    for index in tqdm(range(len(source)), desc=f"Reading {source.path.name}", unit="record"):
        try:
            record = source[index]
        except RecordError as error:
            found.damaged.append(str(error))
            continue
        latents = record["latent_mean"]
        arrays = {name: record[name].astype(np.float32) for name in source.manifest.fields}
        _check_arrays(record["id"], arrays, found.wrong)
        for name, array in arrays.items():
            values[f"rms of {name}"].append(np.sqrt(np.mean(np.square(array, dtype=np.float64))))
        values["spread of the latents over time"].append(latents.std(axis=0).mean())
        if "sync" in arrays:
            values["spread of sync over time"].append(arrays["sync"].std(axis=0).mean())
            values["spread of clip over time"].append(arrays["clip"].std(axis=0).mean())
        values["words in the caption"].append(len(record["caption"].split()))
        found.ids.append(record["id"])
        found.captions.append(record["caption"])
        found.hashes.append(hashlib.sha256(np.ascontiguousarray(latents).tobytes()).digest()[:16])
        signatures.append(signature(latents, std))
        found.sums = found.sums + latent_sums(latents, arrays["latent_std"])
    found.signatures = np.array(signatures)
    found.values = {name: np.array(v) for name, v in values.items()}
    return found
