"""The demo's report: one self-contained HTML file with players, spectrograms and figures.

    python -m vcm_jax.impacts.report --workdir=runs/impacts --data=data/impacts

`--data` is a folder made by `python -m vcm_jax.impacts`: its impact times are known, so that
synchrony can be scored. All figures are this project's own, not the papers'.
"""

import html
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from matplotlib import pyplot as plt

from vcm_jax import sampling
from vcm_jax.atomic import atomic_path
from vcm_jax.cli import show_ours
from vcm_jax.generation.clips import Request, encode_request, generate_latents
from vcm_jax.generation.run import load_run
from vcm_jax.impacts.materials import fit_material_classifier, material_accuracy
from vcm_jax.impacts.render import render_sound
from vcm_jax.impacts.scene import simulate
from vcm_jax.media import page
from vcm_jax.media.read import read_audio
from vcm_jax.metrics import (
    detect_onsets,
    frechet_distance,
    log_mel_features,
    merge_close,
    onset_scores,
    spectral_sharpness,
)

STEPS = (1, 4)
MIN_CLIPS = 2


def read_split(data: Path, split: str, count: int) -> list[dict]:
    """The first `count` lines of SPLIT_impacts.jsonl, each with the `path` of its clip.

    Raises:
      ValueError: when the split is missing or has fewer clips.
    """
    path = data / f"{split}_impacts.jsonl"
    try:
        with path.open() as lines:
            clips = [json.loads(line) for line in itertools.islice(lines, count)]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: make the data with vcm_jax.impacts") from None
    if len(clips) < count:
        raise ValueError(f"{path} has {len(clips)} clips, {count} are wanted")
    for clip in clips:
        clip["path"] = data / split / f"{clip['id']}.mp4"
    return clips


def read_sounds(clips, sample_rate: int) -> list[np.ndarray]:
    """The true sounds, each as long as its clip says."""
    return [
        read_audio(clip["path"], sample_rate, round(clip["duration"] * sample_rate))
        for clip in clips
    ]


def other_true_sounds(data: Path, clips, sample_rate: int) -> list[np.ndarray]:
    """What the same pictures could have sounded like: other hidden draws of pitch, room, noise."""
    seed = json.loads((data / "impacts.json").read_text())["seed"]
    scenes = [simulate(seed, "test", int(clip["id"]), clip["duration"], hidden=1) for clip in clips]
    return [render_sound(scene) for scene in scenes]


def generate_sounds(run, items, steps: int):
    """(sounds of all items, of one length; seconds a clip for the network, after compilation)."""
    times, batch_size = sampling.uniform_times(steps), min(16, len(items))
    sample = lambda items: generate_latents(run, items, times, seed=0, batch_size=batch_size)
    sample(items[:batch_size])
    started = time.perf_counter()
    latents = sample(items)
    seconds = (time.perf_counter() - started) / len(items)
    length = lambda item: round(item.seconds * run.codec.sample_rate)
    return [run.codec.decode(x)[: length(item)] for item, x in zip(items, latents)], seconds


def figures(sounds, clips, truth, classifier, sample_rate: int) -> dict[str, float]:
    """All figures of one set of sounds against the clips they are for."""
    onsets = [merge_close(detect_onsets(sound, sample_rate)) for sound in sounds]
    times = [merge_close(np.array([i["time"] for i in clip["impacts"]])) for clip in clips]
    features = lambda sounds: np.concatenate([log_mel_features(s, sample_rate) for s in sounds])
    rows = features(sounds)
    return onset_scores(onsets, times) | {
        "frechet": frechet_distance(rows, features(truth)) if sounds is not truth else 0.0,
        "sharpness": spectral_sharpness(rows),
        "material": material_accuracy(
            classifier, sounds, [clip["impacts"] for clip in clips], sample_rate
        ),
    }


def _curves(workdir: Path) -> str:
    """Training and validation curves from metrics.jsonl; a resumed run's later lines count."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3))
    for axis, names in zip(
        axes,
        (
            ("train/loss", "val/loss"),
            (
                "train/mse_instant",
                "train/mse_jump",
                "val/mse_jump",
                "train/mse_instant_to_velocity",
            ),
            ("train/grad_norm",),
        ),
    ):
        for name in names:
            points = sorted({line["step"]: line[name] for line in lines if name in line}.items())
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=7)
    axes[1].set_yscale("log")
    return page.image(figure)


def table(results: dict[str, dict], ceiling: float) -> str:
    """The figures as an HTML table."""
    head = (
        "",
        "onset F1",
        "of the ceiling",
        "precision",
        "recall",
        "timing error",
        "log-mel FD",
        "sharpness",
        "material",
    )
    rows = []
    for name, r in results.items():
        cells = (
            f"{r['f1']:.3f}",
            f"{r['f1'] / ceiling:.2f}",
            f"{r['precision']:.3f}",
            f"{r['recall']:.3f}",
            f"{r['timing_error_ms']:.0f} ms",
            f"{r['frechet']:.3f}",
            f"{r['sharpness']:.3f}",
            f"{100 * r['material']:.0f}%",
        )
        rows.append((html.escape(name), *cells))
    return page.table(head, rows)


def make_report(workdir: Path, data: Path, num_clips: int, num_train: int, shown: int) -> dict:
    """Scores a run on test clips and writes WORKDIR/report.html and report.json.

    Args:
      workdir: of the run.
      data: of the Impacts set.
      num_clips: test clips that are scored.
      num_train: training clips whose true sounds teach the material classifier.
      shown: clips in the page.

    Returns:
      The figures, by kind of sound.

    Raises:
      ValueError: when run or data are not there, or there are too few clips.
    """
    if num_clips < MIN_CLIPS:
        raise ValueError(f"--clips={num_clips}: at least {MIN_CLIPS}, each needs another's video")
    run = load_run(workdir)
    logging.info("reading %d test clips and %d training sounds", num_clips, num_train)
    rate = run.codec.sample_rate
    clips, train = read_split(data, "test", num_clips), read_split(data, "train", num_train)
    classifier = fit_material_classifier(
        read_sounds(train, rate), [clip["impacts"] for clip in train], rate
    )
    truth = read_sounds(clips, rate)
    items = [encode_request(Request(c["id"], c["path"], c["caption"]), run) for c in clips]
    logging.info("scoring true sounds")
    score = lambda sounds, clips: figures(sounds, clips, truth, classifier, rate)

    round_trip = [run.codec.decode(run.codec.encode(s)[0])[: len(s)] for s in truth]
    results = {
        "true sound": score(truth, clips),
        "another true sound of the same picture": score(
            other_true_sounds(data, clips, rate), clips
        ),
        "codec round trip": score(round_trip, clips),
    }
    generated, seconds = {}, {}
    for steps in STEPS:
        logging.info("generating and scoring, %d steps", steps)
        sounds, seconds[steps] = generate_sounds(run, items, steps)
        name = f"{steps} step" + "s" * (steps > 1)
        generated[name] = sounds
        results[name] = score(sounds, clips)
    # The control keeps the sounds and moves the clips on by one: sound of another clip's video.
    results["1 step, another clip's video"] = score(generated["1 step"], clips[1:] + clips[:1])

    ceiling = results["true sound"]["f1"]
    one, control = results["1 step"]["f1"], results["1 step, another clip's video"]["f1"]
    parts = [
        "<h1>Sound for silent videos in one step</h1>",
        f"<p>{num_clips} test clips that the model has not seen. One step: onset F1 {one:.3f}, "
        f"{one / ceiling:.2f} of what the true sound scores and {one / max(control, 1e-9):.1f} "
        "times what sound for another clip's video scores.</p>",
        table(results, ceiling),
        "<p class=note>Onset F1: detected onsets against simulated impact times, 50 ms. "
        f"Log-mel FD: Frechet distance of log-mel frames ({rate} Hz) to the true sounds; many "
        "sounds fit one picture, so that another true sound is what a model can reach. "
        "Sharpness: mean second difference over mel bands. Material: impacts whose material a "
        f"classifier, trained on {num_train} true training sounds, recognises. "
        + ", ".join(
            f"{n} step{'s' * (n > 1)}: {1000 * s:.0f} ms a clip in the network"
            for n, s in seconds.items()
        )
        + ".</p>",
        "<h2>Training</h2>",
        _curves(workdir),
        "<h2>Clips</h2>",
    ]
    for i, clip in enumerate(clips[:shown]):
        sounds = {"true sound": truth[i], "codec round trip": round_trip[i]}
        sounds |= {name: found[i] for name, found in generated.items()}
        strip = page.film_strip(clip["path"], clip["duration"])
        parts.append(
            f"<div class=clip><h3>{clip['id']}: {html.escape(clip['caption'])}</h3>"
            f"<div></div><figure>{strip}</figure>"
        )
        marks = [impact["time"] for impact in clip["impacts"]]
        for name, sound in sounds.items():
            shown = page.spectrogram(sound, rate, marks, label=name == list(sounds)[-1])
            parts.append(f"<div>{name}{page.player(sound, rate)}</div><figure>{shown}</figure>")
        parts.append("</div>")
    with atomic_path(workdir / "report.html") as path:
        path.write_text(page.document("vcm_jax: impacts", parts))
    with atomic_path(workdir / "report.json") as path:
        path.write_text(json.dumps({"clips": num_clips, "figures": results}, indent=1))
    return results


def _define_flags():
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("data", None, "Folder of the Impacts set.", required=True)
    flags.DEFINE_integer("clips", 200, "Test clips to score.")
    flags.DEFINE_integer("train_clips", 400, "Training clips for the material classifier.")
    flags.DEFINE_integer("shown", 6, "Clips in the page.", lower_bound=1)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    args = flags.FLAGS
    workdir = Path(args.workdir)
    try:
        results = make_report(workdir, Path(args.data), args.clips, args.train_clips, args.shown)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{'':38}  onset F1  log-mel FD  material")
    for name, r in results.items():
        print(f"{name:38}  {r['f1']:8.3f}  {r['frechet']:10.3f}  {100 * r['material']:7.0f}%")
    print(f"{workdir / 'report.html'}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
