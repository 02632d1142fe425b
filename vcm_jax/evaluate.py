"""Scores generated sounds against the true ones: the papers' metrics, or ours from waveforms alone.

    python -m vcm_jax.evaluate --pred=CACHE --truth=CACHE --synchformer=synchformer_state_dict.pth
    python -m vcm_jax.evaluate --pred=SOUNDS --truth=SOUNDS_OR_VIDEOS
    python -m vcm_jax.evaluate --pred=SOUNDS --truth=VIDEOS --captions=TSV --json=metrics.json

With two caches of av-benchmark (`python -m vcm_jax.interop.av_benchmark` makes them) the metrics
are those of its protocol, and the papers' values stand beside them. With two folders of sounds they
are this project's own and need no pretrained network: use them to compare runs with each other, not
with papers. Both say how many clips each metric rests on, and refuse sets that do not pair. With
--allow_unpaired, clips that do not pair or cannot be compared are left out, and the exit code is 3.
"""

from pathlib import Path

from absl import flags

from vcm_jax.atomic import write_json
from vcm_jax.cli import LEFT_OUT, define_truth_flags, run
from vcm_jax.evaluation.caches import EvaluateError, evaluate_caches
from vcm_jax.evaluation.sounds import evaluate_sounds
from vcm_jax.evaluation.tables import table_of_caches, table_of_sounds
from vcm_jax.interop.av_benchmark import CACHE_FILES
from vcm_jax.interop.state_dict import list_few


def define_flags():
    define_truth_flags()
    flags.DEFINE_string("pred", None, "Cache or sounds of what was generated.", required=True)
    flags.DEFINE_string("truth", None, "Cache or sounds (or videos) of the truth.", required=True)
    flags.DEFINE_string("synchformer", None, "synchformer_state_dict.pth, for DeSync (caches).")
    flags.DEFINE_bool("allow_unpaired", False, "Score the clips that pair and can be compared.")
    flags.DEFINE_string("json", None, "File to write the metrics to.")


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a file of av-benchmark's caches."""
    return any((folder / f"{name}.pth").exists() for name in CACHE_FILES)


def evaluate(args) -> tuple[dict, str]:
    """(result, table) for the flags.

    Raises:
      ValueError: flags that do not go together, or what the two evaluations raise.
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
        return {"protocol": "av-benchmark"} | result, table_of_caches(result)
    if args.synchformer:
        raise EvaluateError("--synchformer is for caches of av-benchmark, not folders of sounds")
    result = evaluate_sounds(pred, truth, args.captions, args.duration, args.allow_unpaired)
    return {"protocol": "vcm_jax, waveforms alone"} | result, table_of_sounds(result)


def main(args) -> int:
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise EvaluateError(f"--json={args.json}: no such folder")
    if args.json and Path(args.json).exists() and not Path(args.json).is_file():
        raise EvaluateError(f"--json={args.json} is not a regular file")
    result, table = evaluate(args)
    print(table)
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    for clip, reason in result.get("failed", {}).items():
        print(f"left out: {clip}: {reason}")
    for name, sides in result["missing"].items():
        for side, clips in sides.items():
            print(f"unpaired: {name}: {len(clips)} only in {side}: {list_few(clips)}")
    for note in result["notes"]:
        print(f"note: {note}")
    if args.json:
        others = {key: value for key, value in result.items() if key != "metrics"}
        write_json(args.json, result["metrics"] | others)
    return LEFT_OUT if result["missing"] or result.get("failed") else 0


if __name__ == "__main__":
    run(main, define_flags)
