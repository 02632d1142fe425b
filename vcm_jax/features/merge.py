"""The end of an extraction: finished shards become a records folder with a manifest."""

from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax.features.shards import read_summary, shard_paths
from vcm_jax.features.work import ExtractError, Job
from vcm_jax.hashes import short_hash
from vcm_jax.media.tables import write_table
from vcm_jax.records.manifest import Manifest, write_empty_text, write_manifest
from vcm_jax.records.schema import latent_statistics, write_text_table


def write_failures(out: Path, failures: list[tuple[str, str]]) -> None:
    """Write OUT/failures.tsv: the (id, reason) of every clip that was left out."""
    write_table(out / "failures.tsv", ("id", "reason"), failures)


def _write_texts(out: Path, job: Job) -> dict:
    """Write the features of the empty text and of all captions.

    Returns:
      {"text_table", "empty_text", "text"}: the manifest's entries, and its field `text`.
    """
    empty_text = job.encoders.encode_text("", job.sequence)
    captions = tqdm(job.text_rows, desc="Captions", unit="caption")
    table = write_text_table(out, job.encoders.encode_texts(captions, job.sequence))
    return {
        "text_table": table,
        "empty_text": write_empty_text(out, empty_text),
        "text": {"shape": list(empty_text.shape), "dtype": "float16"},
    }


def merge(out: Path, count: int, failures: list[tuple[str, str]], job: Job) -> Manifest:
    """Write failures.tsv, the text features and, last, the manifest.

    Args:
      out: records folder.
      count: number of shards; all are done.
      failures: (id, reason) of the rows that no clip belongs to.
      job: the settings of the extraction.

    Raises:
      ExtractError: no clip could be used; failures.tsv has the reasons.
    """
    summaries = [read_summary(out, number) for number in range(count)]
    failures = failures + [failure for summary in summaries for failure in summary["failures"]]
    write_failures(out, failures)
    used = [(number, summary) for number, summary in enumerate(summaries) if summary["records"]]
    if not used:
        for number in range(count):  # a corrected list of captions then starts afresh
            shard_paths(out, number)[1].unlink()
        raise ExtractError(
            f"none of {len(failures)} clips could be used, the first: {failures[0][1]}"
        )
    texts = _write_texts(out, job)
    fields = {k: v for k, v in used[0][1]["fields"].items() if k != "text_row"}
    mean, std = latent_statistics(np.sum([summary["sums"] for _, summary in used], axis=0))
    digests = "".join(summary["digest"] for summary in summaries)
    manifest = Manifest(
        sequence=job.sequence,
        encoders=job.encoders.spec(),
        codec={key: getattr(job.codec, key) for key in ("name", "fingerprint", "latent_dim")},
        has_video=job.transforms is not None,
        num_records=sum(summary["records"] for _, summary in used),
        num_failures=len(failures),
        fields=fields | {"text": texts.pop("text")},
        latent_mean=mean.tolist(),
        latent_std=std.tolist(),
        shards=[
            {
                "name": shard_paths(out, number)[0].name,
                "records": summary["records"],
                "bytes": summary["bytes"],
            }
            for number, summary in used
        ],
        fingerprint=short_hash(digests.encode()),
        **texts,
    )
    write_manifest(out, manifest)
    return manifest
