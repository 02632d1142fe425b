"""The demo's report: one self-contained HTML page with videos, spectrograms and metrics.

    python -m vcm_jax.impacts.report --workdir=runs/impacts --data=data/impacts
    python -m vcm_jax.impacts.report --workdir=runs/impacts --data=data/impacts --clips=40
    python -m vcm_jax.impacts.report --workdir=runs/impacts --data=data/impacts --shown=20

`--data` is a folder made by `python -m vcm_jax.impacts`. The impact times of its clips are known,
so that synchrony can be measured. All metrics are this project's own, not the papers'.
"""

from pathlib import Path

from absl import flags

from vcm_jax.atomic import read_json, write_json
from vcm_jax.cli import run
from vcm_jax.generation.run import load_run
from vcm_jax.impacts.score_run import MIN_CLIPS, score_run
from vcm_jax.impacts.story import write_page


def make_report(
    workdir: Path, data: Path, num_clips: int, num_train: int, shown: int, times=None
) -> dict:
    """Scores a run on test clips and writes WORKDIR/report.html, report.json and videos.

    Args:
      workdir: of the run.
      data: folder of the Impacts set.
      num_clips: number of test clips that are scored.
      num_train: number of training clips whose true sounds train the material classifier.
      shown: number of clips in the page.
      times: {stage of the demo: seconds} for the page; None if they are not known.

    Returns:
      The metrics, by kind of sound.

    Raises:
      ValueError: run or data are missing, or there are too few clips.
    """
    if num_clips < MIN_CLIPS:
        raise ValueError(f"--clips={num_clips}: at least {MIN_CLIPS}, each needs another's video")
    results = score_run(load_run(workdir), data, num_clips, num_train)
    write_page(results, workdir, shown, times or {})
    write_json(workdir / "report.json", {"clips": num_clips, "metrics": results.metrics})
    return results.metrics


def define_flags():
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("data", None, "Folder of the Impacts set.", required=True)
    flags.DEFINE_integer("clips", 200, "Number of test clips to score.", lower_bound=MIN_CLIPS)
    flags.DEFINE_integer(
        "train_clips", 400, "Training clips for the material classifier.", lower_bound=1
    )
    flags.DEFINE_integer("shown", 6, "Clips in the page.", lower_bound=1)
    flags.DEFINE_string("times", None, "JSON file {stage: seconds}: how long the stages took.")


def main(args):
    workdir = Path(args.workdir)
    times = read_json(args.times) if args.times else {}
    if not all(isinstance(seconds, int | float) for seconds in times.values()):
        raise ValueError(f"{args.times}: must be {{stage: seconds}}")
    results = make_report(workdir, Path(args.data), args.clips, args.train_clips, args.shown, times)
    print(f"{'':38}  onset F1  log-mel FD  material")
    for name, row in results.items():
        print(f"{name:38}  {row['f1']:8.3f}  {row['frechet']:10.3f}  {100 * row['material']:7.0f}%")
    print(f"{workdir / 'report.html'}")


if __name__ == "__main__":
    run(main, define_flags)
