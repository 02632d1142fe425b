"""Figures of generated sounds against the true ones: the papers', or our own from waveforms alone.

    python -m vcm_jax.evaluate --pred=CACHE --truth=CACHE --synchformer=synchformer_state_dict.pth
    python -m vcm_jax.evaluate --pred=SOUNDS --truth=SOUNDS_OR_VIDEOS [--captions=TSV]

With two caches of av-benchmark (`python -m vcm_jax.interop.av_benchmark` makes them) the figures
are those of its protocol, beside the papers' rows. With two folders of sounds they are this
project's own and need no pretrained network: use them to compare runs with each other, not with
papers. Both say how many clips each figure rests on, and refuse sets that do not pair.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

from vcm_jax.atomic import atomic_path
from vcm_jax.evaluation.caches import EvaluateError, evaluate_caches
from vcm_jax.evaluation.sounds import evaluate_sounds
from vcm_jax.interop.av_benchmark import CACHE_FILES
from vcm_jax.interop.state_dict import list_few
from vcm_jax.metrics.sounds import FIGURES

# VGGSound test, as the papers report them (SoundVCM table 1); the IB score is times 100 there.
PAPERS = {
    "SoundVCM, 1 step": (0.88, 5.95, 78.90, 1.78, 1.76, 12.54, 25.31, 0.632),
    "SoundVCM, 4 steps": (0.74, 5.08, 69.75, 1.66, 1.58, 13.62, 27.32, 0.553),
    "MMAudio-S-16k, 25 x 2": (0.79, 5.22, 70.19, 1.65, 1.59, 14.44, 29.13, 0.483),
}
PAPER_FIGURES = (
    "FD-VGG",
    "FD-PANN",
    "FD-PASST",
    "KL-PANNS-softmax",
    "KL-PASST-softmax",
    "ISC-PANNS-mean",
    "IB-Score",
    "DeSync",
)


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a file that av-benchmark's caches have."""
    return any((folder / f"{name}.pth").exists() for name in CACHE_FILES)


def table_of_caches(result: dict) -> str:
    """The protocol's figures and the papers' rows as aligned text."""
    figures = result["figures"]
    names = [*PAPER_FIGURES, *(name for name in figures if name not in PAPER_FIGURES)]
    heads = ["", "this", "clips", *PAPERS]
    rows = []
    for name in names:
        papers = [
            f"{row[PAPER_FIGURES.index(name)]:g}" if name in PAPER_FIGURES else ""
            for row in PAPERS.values()
        ]
        value = figures.get(name)
        scale, label = (100, "IB-Score x 100") if name == "IB-Score" else (1, name)
        shown = "-" if value is None else f"{scale * value:.4g}"
        count = result["clips"].get(name, "-")
        if name in figures and (other := result["truth_clips"][name]) != count:
            count = f"{count} / {other}"
        rows.append([label, shown, str(count), *papers])
    return _aligned([heads, *rows])


def table_of_sounds(result: dict) -> str:
    """Our own figures as aligned text."""
    rows = [["", "this", "clips"]]
    for name, value in result["figures"].items():
        label, form, _ = FIGURES.get(name, (name.replace("_", " "), ".3f", None))
        rows.append([label, format(value, form), str(result["clips"][name])])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    line = lambda row: "  ".join(
        cell.rjust(width) if i else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths))
    )
    return "\n".join(line(row).rstrip() for row in rows)


def _define_flags():
    flags.DEFINE_string("pred", None, "Cache or sounds of what was generated.", required=True)
    flags.DEFINE_string("truth", None, "Cache or sounds (or videos) of the truth.", required=True)
    flags.DEFINE_string("synchformer", None, "synchformer_state_dict.pth, for DeSync (caches).")
    flags.DEFINE_string("captions", None, "TSV with columns id and caption (sounds).")
    flags.DEFINE_float("duration", 0.0, "Seconds compared from the start (sounds; 0: all).")
    flags.DEFINE_bool("allow_unpaired", False, "Figures of those clips that pair.")
    flags.DEFINE_string("json", None, "File for the figures.")


def evaluate(args) -> tuple[dict, str]:
    """(result, table) of what the flags ask for.

    Raises:
      ValueError: flags that do not go together, and what the two evaluations raise.
    """
    pred, truth = Path(args.pred), Path(args.truth)
    for side, folder in (("pred", pred), ("truth", truth)):
        if not folder.is_dir():
            raise EvaluateError(f"--{side}={folder}: no such folder")
    caches = is_cache(pred), is_cache(truth)
    if caches[0] != caches[1]:
        cache, other = (pred, truth) if caches[0] else (truth, pred)
        raise EvaluateError(
            f"{cache} is a cache of av-benchmark, {other} is not: compare two caches or two folders"
        )
    if pred.samefile(truth):
        raise EvaluateError(f"--pred and --truth are the same folder, {pred}")
    if all(caches):
        if args.captions or args.duration:
            raise EvaluateError("--captions and --duration are for folders of sounds, not caches")
        result = evaluate_caches(pred, truth, args.synchformer, args.allow_unpaired)
        table = table_of_caches(result) + (
            "\nThe papers' rows: VGGSound test, about 15,000 clips. FD and ISC change with the "
            "number of clips."
        )
        return {"protocol": "av-benchmark"} | result, table
    if args.synchformer:
        raise EvaluateError("--synchformer is for caches of av-benchmark, not folders of sounds")
    result = evaluate_sounds(pred, truth, args.captions, args.duration, args.allow_unpaired)
    return {"protocol": "vcm_jax, waveforms alone"} | result, table_of_sounds(result)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    args = flags.FLAGS
    try:
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise EvaluateError(f"--json={args.json}: no such folder")
        result, table = evaluate(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table)
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    for name, sides in result["missing"].items():
        for side, clips in sides.items():
            print(f"unpaired: {name}: {len(clips)} only in {side}: {list_few(clips)}")
    for note in result["notes"]:
        print(f"note: {note}")
    if args.json:
        flat = {k: v for k, v in result.items() if k != "figures"}
        with atomic_path(args.json) as path:
            path.write_text(json.dumps(result["figures"] | flat, indent=1) + "\n")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
