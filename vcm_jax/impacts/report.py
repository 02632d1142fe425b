"""The demo's report: one self-contained HTML page with players, spectrograms and metrics.

    python -m vcm_jax.impacts.report --workdir=runs/impacts --data=data/impacts
    python -m vcm_jax.impacts.report --workdir=runs/impacts --data=data/impacts --clips=40
    python -m vcm_jax.impacts.report --workdir=runs/impacts --data=data/impacts --shown=20

`--data` is a folder made by `python -m vcm_jax.impacts`. The impact times of its clips are known,
so that synchrony can be measured. All metrics are this project's own, not the papers'.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from absl import flags, logging
from matplotlib import pyplot as plt

from vcm_jax import sampling
from vcm_jax.atomic import write_json
from vcm_jax.cli import run
from vcm_jax.generation.clips import Request, decode, encode_request, generate_latents
from vcm_jax.generation.run import load_run
from vcm_jax.impacts.scores import Scorer, other_true_sounds
from vcm_jax.media import page

STEPS = (1, 4)
MIN_CLIPS = 2

TRUE, OTHER, CODEC = "true sound", "another true sound of the same picture", "codec round trip"
ONE, CONTROL = "1 step", "1 step, another clip's video"

# Label, key of `Scorer`'s result, format, factor.
_COLUMNS = (
    ("precision", "precision", ".3f", 1),
    ("recall", "recall", ".3f", 1),
    ("timing error, ms", "timing_error_ms", ".0f", 1),
    ("log-mel FD", "frechet", ".3f", 1),
    ("sharpness", "sharpness", ".3f", 1),
    ("material, %", "material", ".0f", 100),
)
_CURVES = (
    ("train/loss", "val/loss"),
    ("train/mse_instant", "train/mse_jump", "val/mse_jump", "train/mse_instant_to_velocity"),
    ("train/grad_norm",),
)


def steps_label(count: int) -> str:
    return f"{count} step" + "s" * (count > 1)


def generate_sounds(loaded, items, steps: int) -> tuple[list[np.ndarray], float]:
    """Sounds of items of equal length, and the network's seconds per clip after compilation."""
    times, batch_size = sampling.uniform_times(steps), min(16, len(items))
    generate_latents(loaded, items[:batch_size], times, seed=0, batch_size=batch_size)
    started = time.perf_counter()
    latents = generate_latents(loaded, items, times, seed=0, batch_size=batch_size)
    seconds = (time.perf_counter() - started) / len(items)
    return [decode(loaded, x, item.seconds) for item, x in zip(items, latents)], seconds


@dataclasses.dataclass
class Results:
    """What the page shows.

    Attributes:
      scorer: with the test clips.
      num_train: number of sounds that the material classifier was trained on.
      metrics: by kind of sound.
      sounds: by kind, for the kinds that the page plays.
      seconds: of the network per clip, by number of steps.
    """

    scorer: Scorer
    num_train: int
    metrics: dict[str, dict[str, float]]
    sounds: dict[str, list[np.ndarray]]
    seconds: dict[int, float]


def score_run(loaded, data: Path, num_clips: int, num_train: int) -> Results:
    """Generates sound for the test clips and scores it.

    Raises:
      ValueError: data that are missing, or too few clips.
    """
    logging.info("reading %d test clips and %d training sounds", num_clips, num_train)
    scorer = Scorer(data, num_clips, num_train, loaded.codec.sample_rate)
    clips, truth, codec = scorer.clips, scorer.truth, loaded.codec
    items = [encode_request(Request(c["id"], c["path"], c["caption"]), loaded) for c in clips]
    logging.info("scoring true sounds")
    round_trip = [codec.decode(codec.encode(s)[0])[: len(s)] for s in truth]
    metrics = {
        TRUE: scorer(truth),
        OTHER: scorer(other_true_sounds(data, clips)),
        CODEC: scorer(round_trip),
    }
    sounds, seconds = {TRUE: truth, CODEC: round_trip}, {}
    for steps in STEPS:
        logging.info("generating and scoring, %s", steps_label(steps))
        name = steps_label(steps)
        sounds[name], seconds[steps] = generate_sounds(loaded, items, steps)
        metrics[name] = scorer(sounds[name])
    # The control compares every sound with the next clip, for whose video it was not made.
    metrics[CONTROL] = scorer(sounds[ONE], clips[1:] + clips[:1])
    return Results(scorer, num_train, metrics, sounds, seconds)


def _curves(workdir: Path) -> page.Html:
    """Training and validation curves from metrics.jsonl; the lines of a resumed run count."""
    text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3))
    for axis, names in zip(axes, _CURVES):
        for name in names:
            points = sorted({line["step"]: line[name] for line in lines if name in line}.items())
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=7)
    axes[1].set_yscale("log")
    return page.plot(figure)


def _table(metrics: dict[str, dict[str, float]]) -> page.Html:
    ceiling = metrics[TRUE]["f1"]
    head = ["", "onset F1", "of the true sound's", *(label for label, *_ in _COLUMNS)]
    rows = [
        [
            name,
            f"{row['f1']:.3f}",
            f"{row['f1'] / max(ceiling, 1e-9):.2f}",
            *(f"{factor * row[key]:{form}}" for _, key, form, factor in _COLUMNS),
        ]
        for name, row in metrics.items()
    ]
    return page.table(head, rows)


def _note(results: Results) -> str:
    times = ", ".join(f"{steps_label(n)} {1000 * s:.0f} ms" for n, s in results.seconds.items())
    return (
        "Onset F1: detected onsets against simulated impact times, with a tolerance of 50 ms. "
        f"Log-mel FD: Frechet distance of log-mel frames ({results.scorer.sample_rate} Hz) to "
        "the true sounds. Many sounds fit one picture, so that a model can at best reach another "
        "true sound. Sharpness: mean second difference over mel bands. Material: share of the "
        "impacts whose material is recognised by a classifier that was trained on "
        f"{results.num_train} true sounds. Time of the network per clip: {times}."
    )


def _clip(results: Results, index: int) -> page.Html:
    """One clip: its picture, and a player and a spectrogram for every kind of sound."""
    clip, rate = results.scorer.clips[index], results.scorer.sample_rate
    marks = [impact["time"] for impact in clip["impacts"]]
    rows = [
        page.element("h3", f"{clip['id']}: {clip['caption']}"),
        page.element("div"),
        page.element("figure", page.film_strip(clip["path"], clip["duration"])),
    ]
    for number, (name, sounds) in enumerate(results.sounds.items(), 1):
        last = number == len(results.sounds)
        shown = page.spectrogram(sounds[index], rate, marks, label=last)
        rows.append(page.element("div", name, page.player(sounds[index], rate)))
        rows.append(page.element("figure", shown))
    return page.element("div", rows, class_="clip")


def make_report(workdir: Path, data: Path, num_clips: int, num_train: int, shown: int) -> dict:
    """Scores a run on test clips and writes WORKDIR/report.html and report.json.

    Args:
      workdir: of the run.
      data: folder of the Impacts set.
      num_clips: number of test clips that are scored.
      num_train: number of training clips whose true sounds train the material classifier.
      shown: number of clips in the page.

    Returns:
      The metrics, by kind of sound.

    Raises:
      ValueError: run or data are missing, or there are too few clips.
    """
    if num_clips < MIN_CLIPS:
        raise ValueError(f"--clips={num_clips}: at least {MIN_CLIPS}, each needs another's video")
    loaded = load_run(workdir)
    results = score_run(loaded, data, num_clips, num_train)
    metrics = results.metrics
    one = metrics[ONE]["f1"]
    ceiling, control = (max(metrics[name]["f1"], 1e-9) for name in (TRUE, CONTROL))
    page.write_document(
        workdir / "report.html",
        "vcm_jax: impacts",
        page.element("h1", "Sound for silent videos in one step"),
        page.element(
            "p",
            f"{num_clips} test clips that the model has not seen. One step: onset F1 {one:.3f}. "
            f"That is {one / ceiling:.2f} of the true sound's, and {one / control:.1f} times that "
            "of sound for another clip's video.",
        ),
        _table(metrics),
        page.element("p", _note(results), class_="note"),
        page.element("h2", "Training"),
        _curves(workdir),
        page.element("h2", "Clips"),
        [_clip(results, index) for index in range(min(shown, num_clips))],
    )
    write_json(workdir / "report.json", {"clips": num_clips, "metrics": metrics})
    return metrics


def define_flags():
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("data", None, "Folder of the Impacts set.", required=True)
    flags.DEFINE_integer("clips", 200, "Number of test clips to score.", lower_bound=MIN_CLIPS)
    flags.DEFINE_integer(
        "train_clips", 400, "Training clips for the material classifier.", lower_bound=1
    )
    flags.DEFINE_integer("shown", 6, "Clips in the page.", lower_bound=1)


def main(args):
    workdir = Path(args.workdir)
    results = make_report(workdir, Path(args.data), args.clips, args.train_clips, args.shown)
    print(f"{'':38}  onset F1  log-mel FD  material")
    for name, row in results.items():
        print(f"{name:38}  {row['f1']:8.3f}  {row['frechet']:10.3f}  {100 * row['material']:7.0f}%")
    print(f"{workdir / 'report.html'}")


if __name__ == "__main__":
    run(main, define_flags)
