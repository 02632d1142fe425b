"""The data set of simulated clips: videos, captions, and what happened in each clip."""

import concurrent.futures
import functools
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from vcm_jax.atomic import atomic_path
from vcm_jax.claim import claim, hold
from vcm_jax.impacts.render import FPS, SAMPLE_RATE, SIZE, render_frames, render_sound
from vcm_jax.impacts.scene import MATERIALS, SPLITS, VERSION, record, simulate
from vcm_jax.media.write import write_mp4


def _make_clip(job: tuple[str, str, int], seed: int, duration: float, materials) -> dict:
    """Writes one clip unless it exists; returns its record. job: (folder, split, index)."""
    out, split, index = job
    scene = simulate(seed, split, index, duration, materials=materials)
    line = record(scene)
    path = Path(out, split, f"{line['id']}.mp4")
    if not path.exists():
        write_mp4(path, render_frames(scene), FPS, render_sound(scene), SAMPLE_RATE)
    return line


def write_dataset(
    out: str | Path,
    counts: Mapping[str, int],
    duration: float,
    seed: int,
    workers: int,
    materials: Sequence[str] = MATERIALS,
) -> None:
    """Writes the clips 0 .. counts[split] - 1 of each split and their lists (see `__main__`).

    Clips that exist are kept, so that an interrupted run resumes and a larger count adds clips. A
    clip depends neither on the counts nor on the number of worker processes.

    Raises:
      ClaimError: `out` holds something else, was made with other settings, or another process
        writes to it.
      ValueError: a duration or a seed that is out of range, or an unknown material.
    """
    out = Path(out)
    # This checks its arguments before anything is written.
    simulate(seed, "train", 0, duration, materials=materials)
    settings = dict(
        version=VERSION, seed=seed, duration=duration, fps=FPS, sample_rate=SAMPLE_RATE, size=SIZE
    )
    if set(materials) < set(MATERIALS):
        settings["materials"] = sorted(materials)
    with hold(out):
        claim(out, settings, "impacts.json")
        _write_clips(out, counts, duration, seed, workers, materials)


def _write_clips(
    out: Path, counts: Mapping[str, int], duration: float, seed: int, workers: int, materials
) -> None:
    jobs = [(str(out), split, i) for split in SPLITS for i in range(counts.get(split, 0))]
    make = functools.partial(_make_clip, seed=seed, duration=duration, materials=materials)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(workers, 1), spawn) as pool:
        lines = pool.map(make, jobs, chunksize=8) if workers > 1 else map(make, jobs)
        lines = list(tqdm(lines, "Impacts", len(jobs), unit="clip"))
    for split in SPLITS:
        of_split = [line for line, job in zip(lines, jobs, strict=True) if job[1] == split]
        if not of_split:
            continue
        with atomic_path(out / f"{split}_impacts.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in of_split))
        with atomic_path(out / f"{split}.tsv") as temporary:
            rows = [f"{line['id']}\t{line['caption']}\n" for line in of_split]
            temporary.write_text("".join(["id\tcaption\n", *rows]))
