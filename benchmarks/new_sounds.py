"""New sounds for a flow-matching model, and what it forgets of the old ones, on Impacts.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python benchmarks/new_sounds.py --codec=codecs/impacts --out=runs/new_sounds

A model learns balls of metal, wood and rubber. Then every way of `WAYS` trains it for `--steps`
steps of 16 clips on 64 clips of glass and stone. OUT/new_sounds.md gives onset F1, log-mel Frechet
distance and material, in 25 guided steps, on test clips of the new and of the old materials. The
codec is the demo's. If interrupted, rerun the command: it resumes.
"""

import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags
from finetune import METRICS, ROOT, Scores

from vcm_jax.atomic import atomic_path, write_json
from vcm_jax.cli import show_ours
from vcm_jax.generation.run import load_run

MATERIALS = {"old": "metal,wood,rubber", "new": "glass,stone"}
CLIPS = {"old": 2400, "new": 64}
CONFIG = "configs/impacts.py:flow_matching"
BASE = "before"
_LORA = {"adapter.rank": 8, "optimizer.learning_rate": 3e-3}
# {name: (share of old clips in a batch, settings)}
WAYS = {
    "all weights": (0, {}),
    "all weights, a quarter of old clips": (0.25, {}),
    "LoRA 8": (0, _LORA),
    "LoRA 8, a quarter of old clips": (0.25, _LORA),
}


def command(module: str, *arguments: str) -> None:
    line = [sys.executable, "-m", module, *arguments]
    print("+", " ".join(line), flush=True)
    subprocess.run(line, check=True, cwd=ROOT)


def make_records(out: Path, codec: str, clips: int) -> None:
    """Simulates both sets and extracts their training clips, unless that is done."""
    for name, materials in MATERIALS.items():
        data, records = out / f"data/{name}", out / f"records/{name}"
        counts = (f"--train={CLIPS[name]}", "--val=0", f"--test={clips}")
        command("vcm_jax.impacts", f"--out={data}", f"--materials={materials}", *counts)
        command(
            "vcm_jax.features.extract",
            *(f"--videos={data}/train", f"--captions={data}/train.tsv", f"--out={records}"),
            *("--duration=2.56", "--clip_dim=64", "--sync_dim=256", "--text_dim=32"),
            *("--workers=2", f"--codec={Path(codec).absolute()}"),
        )


def train(out: Path, way: str, steps: int) -> None:
    """Trains a run with `vcm_jax.main`, which leaves a finished run as it is."""
    records = {name: out / f"records/{name}" for name in MATERIALS}
    settings = {"data.sources": f"('{records['old']}=1',)"}
    if way != BASE:
        share, settings = WAYS[way]
        sources = [f"'{records['new']}={1 - share}'"]
        sources += [f"'{records['old']}={share}'"] * (share > 0)
        settings = {"optimizer.learning_rate": 5e-4} | settings
        settings |= {
            "data.sources": f"({', '.join(sources)},)",
            "init_from": str(workdir(out, BASE)),
            "steps": steps,
            "optimizer.warmup_steps": max(1, steps // 16),
            "optimizer.decay_steps": (round(0.75 * steps),),
            "checkpoint_every": steps,
        }
    settings |= {"data.val_sources": "()", "eval_every": 0, "sample_every": 0}
    arguments = [f"--config.{key}={value}" for key, value in settings.items()]
    command("vcm_jax.main", f"--config={CONFIG}", f"--workdir={workdir(out, way)}", *arguments)


def workdir(out: Path, way: str) -> Path:
    return out / "runs" / way.replace(", ", "_").replace(" ", "_")


def score(out: Path, clips: int, train_clips: int) -> dict[str, dict]:
    """{way: {"new" or "old": metrics}}, kept in OUT/scores.json."""
    path = out / "scores.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    scores = {}
    for way in (BASE, *WAYS):
        if way in found:
            continue
        run = load_run(workdir(out, way), with_encoders=not scores)
        if not scores:
            for name in MATERIALS:
                data = out / f"data/{name}"
                scores[name] = Scores(data, clips, min(train_clips, CLIPS[name]), run)
        found[way] = {name: scores[name](run, (25,))["25"] for name in MATERIALS}
        print(way, json.dumps(found[way]), flush=True)
        write_json(path, found)
    return found


def write_table(out: Path, found, steps: int) -> Path:
    """OUT/new_sounds.md."""
    heads = [f"{title}, {name}" for name in MATERIALS for title in METRICS.values()]
    lines = [f"# New sounds on Impacts, {steps} steps of 16 clips, 25 guided sampler steps", ""]
    lines += ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for way, sets in found.items():
        values = [f"{sets[name][metric]:.3f}" for name in MATERIALS for metric in METRICS]
        lines.append(f"| {way} | " + " | ".join(values) + " |")
    with atomic_path(out / "new_sounds.md") as path:
        path.write_text("\n".join(lines) + "\n")
    return out / "new_sounds.md"


def _define_flags():
    flags.DEFINE_string("codec", "codecs/impacts", "Codec of the demo.")
    flags.DEFINE_string("out", None, "Folder of data, runs and table.", required=True)
    flags.DEFINE_integer("steps", 320, "Further training steps.", lower_bound=8)
    flags.DEFINE_integer("clips", 100, "Test clips of each set.", lower_bound=2)
    flags.DEFINE_integer("train_clips", 400, "Training clips for the material classifier.")


def main(argv):
    args = flags.FLAGS
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    out = Path(args.out).absolute()
    try:
        make_records(out, args.codec, args.clips)
        for way in (BASE, *WAYS):
            train(out, way, args.steps)
        print(write_table(out, score(out, args.clips, args.train_clips), args.steps))
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
