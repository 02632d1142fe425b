"""Impacts, the embedded data set: simulated videos of bouncing balls with sound.

One to three balls of metal, wood, glass, rubber or stone bounce in a box seen from the side, and
each impact on floor or walls sounds. The picture shows when and how hard which material hits. It
does not determine the sound: each ball's pitch within an octave, its modes, the room and the
background noise are hidden draws, so that many sounds fit one picture. The impact times are known
exactly, which makes synchrony measurable.

    python -m vcm_jax.impacts --out=data/impacts
    python -m vcm_jax.impacts --out=data/small --train=100 --val=10 --test=10
    python -m vcm_jax.impacts --out=data/long --train=0 --val=0 --test=20 --duration=60
    python -m vcm_jax.impacts --out=data/new --train=64 --val=16 --materials=glass,stone

It writes OUT/train/000000.mp4 ..., OUT/train.tsv (columns id, caption) and OUT/train_impacts.jsonl
(what happened in each clip), and the same for val and test. If interrupted, run it again: it keeps
the clips that are there.
"""

from absl import flags

from vcm_jax.cli import run
from vcm_jax.impacts.dataset import write_dataset
from vcm_jax.impacts.scene import MATERIALS, SPLITS


def define_flags() -> None:
    flags.DEFINE_string("out", None, "Folder to write to.", required=True)
    for split, count in {"train": 2400, "val": 100, "test": 200}.items():
        flags.DEFINE_integer(split, count, f"Number of {split} clips.", lower_bound=0)
    flags.DEFINE_float("duration", 2.56, "Seconds per clip.", lower_bound=0.5)
    flags.DEFINE_integer("seed", 0, "Another seed gives other clips.", lower_bound=0)
    flags.DEFINE_list("materials", list(MATERIALS), "Materials of the balls.")
    flags.DEFINE_integer("workers", 2, "Number of processes.", lower_bound=1)


def main(args) -> None:
    counts = {split: args[split].value for split in SPLITS}
    write_dataset(args.out, counts, args.duration, args.seed, args.workers, args.materials)


if __name__ == "__main__":
    run(main, define_flags)
