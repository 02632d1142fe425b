"""Impacts, the embedded data set: simulated videos of bouncing balls with sound.

One to three balls of metal, wood, glass, rubber or stone bounce in a box seen from the side, and
each impact on floor or walls sounds. The picture shows when and what hits how hard; it does not
show everything about the sound (each ball's pitch within an octave, its modes, the room and the
background noise are hidden draws), so that many sounds fit one picture. The impact times are
known exactly, which makes synchrony measurable.

    python -m vcm_jax.impacts --out=data/impacts

writes OUT/train/000000.mp4 ..., OUT/train.tsv (columns id, caption) and OUT/train_impacts.jsonl
(what happened in each clip), and the same for val and test. Running it again keeps the clips that
are there.
"""

import sys

from absl import app, flags

from vcm_jax.impacts.dataset import write_dataset
from vcm_jax.impacts.scene import SPLITS


def _define_flags() -> None:
    # Not at import: other commands that import this module have flags of the same names.
    flags.DEFINE_string("out", None, "Folder to write to.", required=True)
    for split, count in zip(SPLITS, (2400, 100, 200)):
        flags.DEFINE_integer(split, count, f"Number of {split} clips.", lower_bound=0)
    flags.DEFINE_float("duration", 2.56, "Seconds per clip.", lower_bound=0.5)
    flags.DEFINE_integer("seed", 0, "Another seed gives other clips.", lower_bound=0)
    flags.DEFINE_integer("workers", 2, "Processes.", lower_bound=1)


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    args = flags.FLAGS
    counts = {split: args[split].value for split in SPLITS}
    try:
        write_dataset(args.out, counts, args.duration, args.seed, args.workers)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    app.run(_main)
