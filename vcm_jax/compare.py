"""Compares runs and folders of sounds side by side, in one self-contained HTML page.

    python -m vcm_jax.compare RUN_A RUN_B --truth=VIDEOS --out=report.html
    python -m vcm_jax.compare RUN@1 RUN@4 RUN@1@3 --truth=VIDEOS --captions=TSV --out=report.html
    python -m vcm_jax.compare RUN SOUNDS MORE_SOUNDS --truth=SOUNDS_TRUE --out=report.html

The page shows metrics against the true sounds with bootstrap intervals, differences to the first
set, how many clips each set wins, and some clips to hear and see. A run (a workdir of
`vcm_jax.main`) generates sound for the videos of --truth, in --steps network evaluations or in as
many as follow its @; a second @ gives its guidance scale. A folder holds one sound for each clip,
under its name. All metrics are this project's own, from waveforms alone: they compare sets with
each other, not with papers. A clip that cannot be read or generated is left out of all sets; the
exit code is then 3.
"""

import sys
import tempfile
from pathlib import Path

from absl import flags, logging

from vcm_jax.cli import LEFT_OUT, define_truth_flags, run
from vcm_jax.evaluation.caches import EvaluateError
from vcm_jax.evaluation.comparison import Compared, Entry, parse_entries, score_entries, true_clips
from vcm_jax.evaluation.comparison_page import write_comparison
from vcm_jax.media.clips import Clip
from vcm_jax.metrics import bootstrap
from vcm_jax.metrics.sounds import METRICS


def define_flags():
    define_truth_flags()
    flags.DEFINE_string("truth", None, "Folder of the videos (or true sounds).", required=True)
    flags.DEFINE_string("out", None, "The page, an .html file.", required=True)
    flags.DEFINE_integer("steps", 1, "Network evaluations of a run without @N.", lower_bound=1)
    flags.DEFINE_integer("clips", 200, "Maximum number of clips.", lower_bound=2)
    flags.DEFINE_integer("shown", 6, "Clips in the page.", lower_bound=1)
    flags.DEFINE_integer("draws", 1000, "Bootstrap draws.", 100, 1_000_000)
    flags.DEFINE_integer("seed", 0, "Seed of the runs' noise and of the bootstrap, any integer.")


def compare(
    entries: list[Entry],
    clips: list[Clip],
    out: Path,
    *,
    shown: int = 6,
    draws: int = 1000,
    seed: int = 0,
    duration: float = 0.0,
) -> Compared:
    """Scores all sets on all clips and writes the page.

    Args:
      entries: from `parse_entries`.
      clips: from `true_clips`.
      out: the HTML file.
      shown: number of clips in the page, evenly spaced over all of them.
      draws: number of bootstrap draws.
      seed: of the bootstrap and of the runs' noise.
      duration: seconds compared, from the start; 0: whole sounds, which must have equal lengths.

    Raises:
      ValueError: a set that lacks clips or cannot be compared; nothing is written then.
    """
    with tempfile.TemporaryDirectory() as folder:
        compared = score_entries(entries, clips, Path(folder), seed=seed, duration=duration)
        logging.info("bootstrap, %d draws of %d clips", draws, len(compared.clips))
        drawn = bootstrap(compared.sets, draws, seed)
        write_comparison(out, compared, drawn, shown, duration)
    return compared


def main(args, rest) -> int:
    out = Path(args.out)
    entries = parse_entries(rest, args.steps)
    if out.suffix.lower() != ".html" or out.is_dir():
        raise EvaluateError(f"--out={out}: must be an .html file")
    clips = true_clips(args.truth, args.captions, args.clips)
    compared = compare(
        entries,
        clips,
        out,
        shown=args.shown,
        draws=args.draws,
        seed=args.seed,
        duration=args.duration,
    )
    for name, metrics in compared.sets.items():
        shown = [
            f"{METRICS[key].label} {value:{METRICS[key].format}}"
            for key, value in metrics.values().items()
        ]
        print(f"{name}: {'  '.join(shown)}")
    for clip_id, reason in compared.left_out.items():
        print(f"left out: {clip_id}: {reason}", file=sys.stderr)
    print(f"{len(compared.clips)} clips: {out}")
    return LEFT_OUT if compared.left_out else 0


if __name__ == "__main__":
    run(main, define_flags, positional="runs and folders of sounds")
