"""What is wrong or odd with records by themselves, for the validator and the end of extraction."""

import dataclasses
from collections import defaultdict

import numpy as np

from vcm_jax.records.schema import latent_statistics
from vcm_jax.records.source import RecordSource
from vcm_jax.records.survey import Survey

FEW = 0.01  # up to this share of the records, clips that are merely odd give a warning


@dataclasses.dataclass(frozen=True)
class Finding:
    """A result of a check.

    Attributes:
      level: "error" or "warning".
      what: the problem.
      count: number of records that have it.
      examples: ids of some of them.
    """

    level: str
    what: str
    count: int = 1
    examples: tuple[str, ...] = ()

    def __str__(self):
        some = f", for example {', '.join(self.examples)}" if self.examples else ""
        return f"{self.level}: {self.what} ({self.count}){some}"


def finding(level: str, what: str, ids) -> list[Finding]:
    ids = list(ids)
    return [Finding(level, what, len(ids), tuple(map(str, ids[:5])))] if ids else []


def odd(what: str, ids, total: int) -> list[Finding]:
    """An error if many of `total` records are odd, a warning if few are."""
    return finding("error" if len(ids) > FEW * total else "warning", what, ids)


def base(clip_id: str) -> str:
    """The id without the #2, #3, ... of a clip's further captions."""
    return clip_id.split("#")[0]


def check_content(source: RecordSource, found: Survey) -> list[Finding]:
    """Check ids, captions, values and latent statistics of the records by themselves."""
    total = len(source)
    findings = finding("error", "damaged records", found.damaged)
    for what, ids in found.wrong.items():
        findings += finding("error", what, ids)
    counts, by_hash = defaultdict(int), defaultdict(set)
    for clip_id, digest in zip(found.ids, found.hashes):
        counts[clip_id] += 1
        by_hash[digest].add(base(clip_id))
    findings += finding("error", "ids that occur twice", [i for i, n in counts.items() if n > 1])
    same = [" = ".join(sorted(ids)) for ids in by_hash.values() if len(ids) > 1]
    findings += odd("clips with the same sound under other ids", same, total)
    mute = [i for i, c in zip(found.ids, found.captions) if not c]
    # Without a list of captions all are empty, and the network learns from pictures alone.
    if len(mute) == len(found.ids):
        findings += finding("warning", "no captions", mute)
    else:
        findings += odd("no caption", mute, total)

    def unchanging(name: str) -> list[str]:
        spread = found.values.get(name, np.zeros(0))
        return [found.ids[i] for i in np.flatnonzero(spread < 1e-3)]

    silent = unchanging("spread of the latents over time")
    findings += odd("sound that never changes (silence?)", silent, total)
    for kind in ("sync", "clip"):  # many real clips show a still
        what = f"still picture ({kind} features never change)"
        findings += finding("warning", what, unchanging(f"spread of {kind} over time"))
    return findings + _check_statistics(source, found)


def _check_statistics(source: RecordSource, found: Survey) -> list[Finding]:
    """Compare the manifest's latent statistics with those of all records."""
    if not found.ids:
        return []
    mean, std = latent_statistics(found.sums)
    off = max(
        np.max(abs(mean - source.manifest.latent_mean) / np.maximum(std, 1e-6)),
        np.max(abs(std - source.manifest.latent_std) / np.maximum(std, 1e-6)),
    )
    if off <= 1e-3:
        return []
    return [Finding("error", f"latent statistics in the manifest are off by {off:.2g} std")]
