"""The demo's page, for readers who know no paper: videos that sound, then how it came about."""

import functools
import json
from pathlib import Path

from matplotlib import pyplot as plt

from vcm_jax.generation.finish import Finish
from vcm_jax.impacts.score_run import CODEC, CONTROL, ONE, OTHER, TRUE, Results, steps_label
from vcm_jax.media import page
from vcm_jax.media.drawing import draw_mel, draw_motion, motion

FOUR = steps_label(4)
_OTHER_CLIP = "another clip's sound"
# What the page calls the videos of a clip, by the names of their files.
_VIDEOS = {"true": "the true sound", "1_step": ONE, "4_steps": FOUR, "other": _OTHER_CLIP}
# Label, key of `Scorer`'s result, format, factor, arrow, and a sentence.
_METRICS = (
    ("onset F1", "f1", ".3f", 1, "↑", "Impacts are heard when they are seen, and only then."),
    ("precision", "precision", ".3f", 1, "↑", "Share of the heard impacts that are real."),
    ("recall", "recall", ".3f", 1, "↑", "Share of the real impacts that are heard."),
    ("timing error, ms", "timing_error_ms", ".1f", 1, "↓", "How far off an impact is heard."),
    (
        "log-mel distance",
        "frechet",
        ".2f",
        1,
        "↓",
        "How far the spectra of all sounds together are from the true ones.",
    ),
    ("sharpness", "sharpness", ".3f", 1, "→", "Detail of the spectra; best is the true sound's."),
    (
        "material, %",
        "material",
        ".0f",
        100,
        "↑",
        "Impacts that sound like what strikes: metal, wood, glass, rubber or stone.",
    ),
)
_CURVES = (
    ("train/loss", "val/loss"),
    ("train/mse_instant", "train/mse_jump", "val/mse_jump", "train/mse_instant_to_velocity"),
    ("train/grad_norm",),
)


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
        axis.set_xlabel("training step")
        if axis.lines:
            axis.legend(fontsize=7)
    axes[1].set_yscale("log")
    return page.plot(figure, "loss, errors and gradient norm over the training steps")


def _table(metrics: dict[str, dict[str, float]]) -> page.Html:
    head = ["", *metrics, "what it says"]
    rows = [
        [
            f"{label} {arrow}",
            *(f"{factor * row[key]:{form}}" for row in metrics.values()),
            page.element("span", sentence, class_="sentence"),
        ]
        for label, key, form, factor, arrow, sentence in _METRICS
    ]
    return page.element("div", page.table(head, rows), class_="wide")


def write_videos(results: Results, index: int, folder: Path) -> dict[str, Path]:
    """Writes a clip's videos with its true sound, generated ones and another clip's sound.

    The sounds are limited to a true peak of -1 dB.

    Returns:
      {what the page calls it: file}.
    """
    clips, rate = results.scorer.clips, results.scorer.sample_rate
    clip, count = clips[index], len(clips)
    sounds = {
        name: results.sounds[kind][index] for name, kind in (("1_step", ONE), ("4_steps", FOUR))
    }
    sounds["true"] = results.sounds[TRUE][index]
    sounds["other"] = results.sounds[ONE][(index + 1) % count]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, label in _VIDEOS.items():
        paths[label] = folder / f"{clip['id']}_{name}.mp4"
        Finish().mux(clip["path"], sounds[name], rate, paths[label], clip["duration"])
    return paths


def _timeline(results: Results, index: int) -> page.Html:
    """The picture's motion and the spectrograms on one time axis, impacts marked."""
    clip, rate = results.scorer.clips[index], results.scorer.sample_rate
    figure, axes = plt.subplots(
        4, 1, figsize=(9, 5.4), sharex=True, height_ratios=(0.7, 1, 1, 1), layout="constrained"
    )
    draw_motion(axes[0], motion(clip["path"]))
    axes[0].set_ylabel("motion")
    kinds = ((TRUE, "true"), (ONE, "1 step"), (FOUR, "4 steps"))
    for axis, (kind, label) in zip(axes[1:], kinds):
        draw_mel(axis, results.sounds[kind][index], rate)
        axis.set_ylabel(label)
    for axis in axes:
        for impact in clip["impacts"]:
            colour = "white" if axis is not axes[0] else "#d62728"
            axis.axvline(impact["time"], color=colour, lw=0.8, ls=":")
    axes[0].set_xlim(0, clip["duration"])
    axes[-1].set_xlabel("seconds (dotted: an impact)")
    return page.plot(figure, "motion of the picture and spectrograms over time")


def _clip(results: Results, index: int, folder: Path) -> page.Html:
    clip = results.scorer.clips[index]
    videos = write_videos(results, index, folder)
    shown = [
        page.element("figure", page.video(path), page.element("figcaption", label))
        for label, path in videos.items()
    ]
    return page.element(
        "section",
        page.element("h3", clip["caption"]),
        page.element("div", shown, class_="videos"),
        page.element("figure", _timeline(results, index), class_="wide"),
    )


def _durations(times: dict[str, float], results: Results) -> list:
    """How long everything took: the stages of the demo, and one clip."""
    network = ", ".join(
        f"{1000 * s:.0f} ms in {steps_label(n)}" for n, s in results.seconds.items()
    )
    sentence = (
        f"For a clip of {results.scorer.clips[0]['duration']:g} s the network takes {network}, and "
        f"the codec {1000 * results.decoding:.0f} ms."
    )
    if not times:
        return [page.element("p", sentence)]
    rows = [[name, f"{seconds / 60:.1f} min"] for name, seconds in times.items()]
    rows.append(["all before this page", f"{sum(times.values()) / 60:.1f} min"])
    return [page.table(["stage", "time in the last start"], rows), page.element("p", sentence)]


def _summary(results: Results) -> str:
    one, true, control = (results.metrics[name] for name in (ONE, TRUE, CONTROL))
    return (
        f"The network has never seen these {len(results.scorer.clips)} clips. With one evaluation "
        f"{100 * one['recall']:.0f}% of the impacts are heard when they are seen, "
        f"{100 * one['precision']:.0f}% of what is heard is an impact, and "
        f"{100 * one['material']:.0f}% sound like their material. The onset F1 is {one['f1']:.2f}; "
        f"that of the true sounds is {true['f1']:.2f}, and that of another clip's sound "
        f"{control['f1']:.2f}."
    )


_NEXT = (
    ("Sound for a video of bouncing balls", "python -m vcm_jax.generate --workdir={workdir} "
     "--video={video} --prompt='{caption}' --out=out.mp4"),
    ("Curves and sounds of the training", "tensorboard --logdir={workdir}"),
    ("Other objectives, such as MeanFlow", "python -m vcm_jax.main "
     "--config=configs/impacts.py:meanflow --workdir=runs/meanflow"),
)  # fmt: skip


def write_page(results: Results, workdir: Path, shown: int, times: dict[str, float]) -> None:
    """Writes WORKDIR/report.html and the videos in it, WORKDIR/videos.

    Args:
      results: from `score_run`.
      workdir: of the run.
      shown: number of clips in the page.
      times: {stage of the demo: seconds}; may be empty.

    Raises:
      OSError: they cannot be written.
    """
    first = results.scorer.clips[0]
    example = {"video": first["path"], "caption": first["caption"]}
    h2, p = (functools.partial(page.element, tag) for tag in ("h2", "p"))
    next_steps = [
        page.element(
            "li", label, ": ", page.element("code", text.format(workdir=workdir, **example))
        )
        for label, text in _NEXT
    ]
    next_steps.append(page.element("li", "Your own clips: README.md, “40 clips on a laptop”"))
    page.write_document(
        workdir / "report.html",
        "Sound for silent videos in one step",
        page.element("h1", "Sound for silent videos in one step"),
        p(
            "Balls of metal, wood, glass, rubber and stone bounce in a box. A small network, "
            "trained on this computer, looks at a silent video and makes its sound: in one "
            "evaluation, or in four. Play the videos, and compare."
        ),
        [
            _clip(results, index, workdir / "videos")
            for index in range(min(shown, len(results.scorer.clips)))
        ],
        h2("What it learned"),
        p(_summary(results)),
        _table(results.metrics),
        p(
            "Many sounds fit one picture: pitch, room and noise cannot be seen. A model can at "
            f"best be as near to the true sounds as “{OTHER}” is. “{CODEC}” is what the codec "
            "alone loses. Impacts are detected in the sound, and count as heard within 50 ms. A "
            f"classifier that was trained on {results.num_train} true sounds judges the material."
        ),
        h2("Training"),
        _curves(workdir),
        h2("How long it took"),
        _durations(times, results),
        h2("What to do next"),
        page.element("ul", next_steps),
    )
