"""One network with guidance as an input, and networks with fixed guidance, on a known flow.

    python benchmarks/toy_guidance.py --out=runs/toy

The data are two Gaussian classes in the plane. The guided flow follows from their velocities, which
have a closed form, so that the distribution of samples with guidance w is known for every w. The
same small network is trained once with `guidance="conditioned"` and once for each fixed w, and
makes samples in one step.

OUT/guidance.md gives the energy distance of the samples to the exact flow's for every w, and
OUT/guidance.png shows both.
"""

import functools
from pathlib import Path

import jax
import matplotlib
import numpy as np
from absl import app, flags
from toy_flows import Mixture, condition, energy_distance, train

from vcm_jax.atomic import atomic_path
from vcm_jax.objectives.guidance import Guidance
from vcm_jax.sampling import sample

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SCALES = (1.0, 2.0, 4.0)
PROBLEM = Mixture(np.array([[-1.0, 0.0], [1.0, 0.0]]), 0.5, np.array([0, 1]))
OBJECTIVE = "shortcut"
# Times near 1, from which one step starts, and a plain squared error: in two dimensions an adaptive
# weight moves the velocity away from the mean.
SETTINGS = dict(
    mix_ratio=0.25, instant_ratio=0.5, time_mean=0.0, time_std=1.5, finest=16, guidance_max=4.0
)


class Samples:
    """Noise and classes, and what the exact flow makes of other noise for every scale."""

    def __init__(self, size: int):
        keys = jax.random.split(jax.random.key(5))
        _, self.label = PROBLEM.draw(keys[0], size)
        self.one_hot = jax.nn.one_hot(self.label, PROBLEM.num_classes)
        self.x1, other = jax.random.normal(keys[1], (2, size, 2))
        exact = functools.partial(PROBLEM.flow, t=1.0, s=0.0, label=self.label)
        self.truth = {w: np.asarray(exact(other, scale=w)) for w in SCALES}
        again = {w: np.asarray(exact(self.x1, scale=w)) for w in SCALES}
        self.floor = {w: energy_distance(again[w], self.truth[w]) for w in SCALES}

    def of(self, scale: float | None, steps: int, batch_size: int, seed: int = 0):
        """{w: samples in one step} of a network that is trained for one scale, or told w (None)."""
        given = {"guidance": "conditioned"} if scale is None else {"guidance_scale": scale}
        u, _ = train(OBJECTIVE, PROBLEM, seed, steps, batch_size, **SETTINGS | given)

        def draw(w):
            guidance = Guidance(w) if scale is None else None
            return np.asarray(sample(u, self.x1, (1.0, 0.0), condition(self.one_hot, guidance)))

        return {w: draw(w) for w in SCALES}

    def distances(self, found) -> dict[float, float]:
        """{w: energy distance to the exact distribution}."""
        return {w: energy_distance(found[w], self.truth[w]) for w in SCALES}


def picture(samples: Samples, found):
    """A figure: exact samples above, those of one network below, a column for each scale."""
    figure, axes = plt.subplots(2, len(SCALES), figsize=(3 * len(SCALES), 6))
    colours = plt.get_cmap("tab10")(np.asarray(samples.label))
    for row, name, points in zip(axes, ("exact", "one network, one step"), (samples.truth, found)):
        for axis, w in zip(row, SCALES):
            axis.scatter(*points[w].T, s=1, color=colours)
            axis.set_title(f"{name}, w = {w:g}", fontsize=9)
            axis.set(xlim=(-6, 6), ylim=(-3, 3), xticks=[], yticks=[])
    figure.tight_layout()
    return figure


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    args = flags.FLAGS
    samples, rows = Samples(args.samples), []

    def add(name, distances):
        rows.append([name, *(f"{distances[w]:.4f}" for w in SCALES)])
        print(" | ".join(rows[-1]), flush=True)

    add("floor", samples.floor)
    given = args.steps, args.batch_size, args.seed
    one = samples.of(None, *given)
    add("one network, w is an input", samples.distances(one))
    for w in SCALES:
        add(f"trained for w = {w:g}", samples.distances(samples.of(w, *given)))
    lines = [
        "# Guidance as an input, two Gaussian classes",
        "",
        f"Objective {OBJECTIVE}, {args.steps} steps of {args.batch_size} samples, seed "
        f"{args.seed}; energy distance of {args.samples} samples in one step to the exact flow's.",
        "",
        "| | " + " | ".join(f"w = {w:g}" for w in SCALES) + " |",
        "|---" * (len(SCALES) + 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        "![](guidance.png)",
    ]
    out = Path(args.out)
    with atomic_path(out / "guidance.png") as path:
        picture(samples, one).savefig(path, format="png", dpi=110)
    with atomic_path(out / "guidance.md") as path:
        path.write_text("\n".join(lines) + "\n")
    print(out / "guidance.md")


def _define_flags():
    flags.DEFINE_string("out", "runs/toy", "Folder for the table and the figure.")
    flags.DEFINE_integer("steps", 4000, "Training steps of each network.", lower_bound=10)
    flags.DEFINE_integer("batch_size", 256, "Samples in a training step.", lower_bound=8)
    flags.DEFINE_integer("samples", 2000, "Samples to score.", lower_bound=100)
    flags.DEFINE_integer("seed", 0, "Seed of training.")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
