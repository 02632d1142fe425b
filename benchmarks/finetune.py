"""From a flow-matching model of Impacts to one step: every start, in a fraction of its training.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python benchmarks/finetune.py --data=data/impacts --records=records/impacts \\
        --teacher=runs/impacts_fm --reference=runs/impacts --out=runs/finetune --seeds=0,1,2

The teacher is trained with `--config=configs/impacts.py:flow_matching`, the reference (VCM from
random weights) by `launch/demo.sh`; data and records are the demo's. Every way of `WAYS` starts
from the teacher and trains `--steps` steps of 16 clips. Checkpoints at an eighth, a quarter, half
and all of them are scored in one and four steps on the test clips: onset F1, log-mel Frechet
distance, material. OUT/finetune.md, .png and .html show them against the number of further steps.

If interrupted, rerun it: what is trained and scored is kept. Several processes can share the work:
give each its own `--way` or `--seeds`, and run `--stage=report` at the end.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import librosa
import matplotlib
import numpy as np
from absl import app, flags

from vcm_jax.atomic import atomic_path, write_json
from vcm_jax.cli import show_ours
from vcm_jax.generation.clips import Request, decode, encode_request, generate_latents
from vcm_jax.generation.run import load_run
from vcm_jax.impacts.score_run import TIMES
from vcm_jax.impacts.scores import Scorer
from vcm_jax.media import page

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
STAGES = ("train", "score", "report")
METRICS = {"f1": "onset F1", "frechet": "log-mel Frechet distance", "material": "material"}
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)  # of the steps, after which a run is scored
LEARNING_RATE = 1e-3

_DECOUPLED = {"model_overrides.blocks_at_s": 1}
_ANNEALED = {"objective.anneal_steps": "half"}
# The velocity is known already: most rows are jumps, and long first legs (lambda) carry what the
# network knows of short jumps to long ones in few steps.
_JUMPS = {
    "objective.instant_ratio": 0.25,
    "objective.lambda_init": 0.5,
    "objective.lambda_end": 0.02,
}
# Between the demo's settings and those: the ones of configs/finetune.py.
_SOME_JUMPS = {
    "objective.instant_ratio": 0.5,
    "objective.lambda_init": 0.3,
    "objective.lambda_end": 0.01,
}
_LORA = {"optimizer.train_only": ("h_embed",), "optimizer.learning_rate": 3e-3}
# {name: (objective, settings)}; "half" stands for half of the steps.
WAYS = {
    "vcm from scratch": ("vcm", {"init_from": ""}),
    "vcm": ("vcm", {}),
    "vcm, decoupled": ("vcm", _DECOUPLED),
    "vcm, annealed": ("vcm", _ANNEALED),
    "vcm, both": ("vcm", _DECOUPLED | _ANNEALED),
    "vcm, more jumps": ("vcm", _JUMPS),
    "vcm, more jumps, decoupled": ("vcm", _JUMPS | _DECOUPLED),
    "vcm, more jumps, both": ("vcm", _JUMPS | _DECOUPLED | _ANNEALED),
    "vcm, some jumps, decoupled": ("vcm", _SOME_JUMPS | _DECOUPLED),
    "vcm, some jumps, decoupled, early decay": (
        "vcm",
        _SOME_JUMPS | _DECOUPLED | {"optimizer.decay_steps": "half"},
    ),
    "vcm, some jumps, decoupled, faster": (
        "vcm",
        _SOME_JUMPS | _DECOUPLED | {"optimizer.learning_rate": 1.5e-3},
    ),
    "vcm, more jumps, decoupled, lambda 0.3": (
        "vcm",
        _JUMPS | _DECOUPLED | {"objective.lambda_init": 0.3, "objective.lambda_end": 0.01},
    ),
    "vcm, more jumps, decoupled, faster": (
        "vcm",
        _JUMPS | _DECOUPLED | {"optimizer.learning_rate": 1.5e-3},
    ),
    "meanflow": ("meanflow", {}),
    "meanflow, decoupled": ("meanflow", _DECOUPLED),
    "shortcut": ("shortcut", {}),
    "shortcut, decoupled": ("shortcut", _DECOUPLED),
    "reflow": ("reflow", {"objective.teacher": "teacher", "objective.teacher_steps": 8}),
    "vcm, LoRA 8": ("vcm", _LORA | {"adapter.rank": 8}),
    "vcm, LoRA 32": ("vcm", _LORA | {"adapter.rank": 32}),
    "vcm, last blocks": (
        "vcm",
        {"optimizer.train_only": ("fused_blocks_1", "final_layer", "h_embed")},
    ),
}


def checkpoints(steps: int) -> list[int]:
    """The numbers of steps after which a run is scored."""
    return [max(1, round(share * steps)) for share in SHARES]


def workdir(out: Path, way: str, seed: int) -> Path:
    return out / f"{way.replace(', ', '_').replace(' ', '_')}-{seed}"


def overrides(way: str, seed: int, args) -> dict:
    """The settings of a run that differ from those of configs/impacts.py."""
    teacher = str(Path(args.teacher).absolute())
    changed = {
        "seed": seed,
        "steps": args.steps,
        "data.dir": str(Path(args.records).absolute()),
        "init_from": teacher,
        "optimizer.learning_rate": LEARNING_RATE,
        "optimizer.warmup_steps": max(1, args.steps // 16),
        "optimizer.decay_steps": (round(0.75 * args.steps),),
        "checkpoint_every": checkpoints(args.steps)[0],
        "keep_every": checkpoints(args.steps)[0],
        "eval_every": 0,
        "sample_every": 0,
        "log_every": max(1, args.steps // 8),
    }
    special = {"half": args.steps // 2, "teacher": teacher}
    for key, value in WAYS[way][1].items():
        value = special.get(value, value) if isinstance(value, str) else value
        changed[key] = (value,) if key == "optimizer.decay_steps" else value
    return changed


def train(way: str, seed: int, args) -> None:
    """Trains a run with the command `vcm_jax.main`, which leaves a finished run as it is."""
    folder = workdir(Path(args.out), way, seed)
    command = [sys.executable, "-m", "vcm_jax.main", f"--workdir={folder.absolute()}"]
    command += [f"--config=configs/impacts.py:{WAYS[way][0]}"]
    command += [f"--config.{key}={value}" for key, value in overrides(way, seed, args).items()]
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


class Scores:
    """Scores runs on test clips, whose features are made once: all runs have the same encoders."""

    def __init__(self, data: Path, num_clips: int, num_train: int, first):
        self._score = Scorer(data, num_clips, num_train, first.codec.sample_rate)
        requests = [Request(c["id"], c["path"], c["caption"]) for c in self._score.clips]
        self._items = [encode_request(request, first) for request in requests]

    def __call__(self, run, counts=tuple(TIMES)) -> dict[str, dict]:
        """{number of sampler steps: metrics}; NaN where a sound cannot be decoded."""
        found = {}
        for count in counts:
            times = TIMES.get(count) or tuple(np.linspace(1, 0, count + 1))
            latents = generate_latents(run, self._items, times, seed=0, batch_size=16)
            try:
                sounds = [decode(run, item, x, 0) for item, x in zip(self._items, latents)]
                metrics = self._score(sounds)
            except (ValueError, librosa.ParameterError) as error:
                print(f"no metrics in {count} steps: {error}", flush=True)
                metrics = dict.fromkeys(METRICS, float("nan"))
            found[str(count)] = {name: float(metrics[name]) for name in METRICS}
        return found


def score(runs, args) -> None:
    """Scores the checkpoints that have no scores yet, into WORKDIR/scores.json."""
    scores = None
    wanted = []
    for way, seed in runs:
        folder = workdir(Path(args.out), way, seed)
        wanted += [(folder, step, tuple(TIMES)) for step in reversed(checkpoints(args.steps))]
    wanted += [(Path(args.reference), None, tuple(TIMES)), (Path(args.teacher), None, (25,))]
    for folder, step, counts in wanted:
        path = Path(args.out) / f"scores/{folder.name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        key = str(step or "last")
        saved = folder / "checkpoints" / (str(step) if step else "")
        if key in known or not saved.is_dir():
            continue
        run = load_run(folder, step, with_encoders=scores is None)
        if scores is None:
            scores = Scores(Path(args.data), args.clips, args.train_clips, run)
        known[key] = scores(run, counts)
        print(f"{folder} {key}: {json.dumps(known[key])}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)


def read_scores(args) -> dict[str, list[dict]]:
    """{way: scores of its seeds}; those of the last checkpoint are there."""
    found = {}
    for way in WAYS:
        for seed in range(100):
            path = Path(args.out) / f"scores/{workdir(Path(args.out), way, seed).name}.json"
            if path.exists() and str(args.steps) in (known := json.loads(path.read_text())):
                found.setdefault(way, []).append(known)
    return found


def spread(values) -> str:
    """The mean, and the standard deviation if there are several values."""
    text = f"{statistics.fmean(values):.3f}"
    return text + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def tables(results, lines, steps: int) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of a table for each number of sampler steps, after all further steps."""
    found = []
    for count in map(str, TIMES):
        rows = [["", *METRICS.values(), "seeds"]]
        for name, scores in lines.items():
            if count in scores:
                rows.append([name, *(f"{scores[count][m]:.3f}" for m in METRICS), ""])
        for way, seeds in results.items():
            values = [[known[str(steps)][count][m] for known in seeds] for m in METRICS]
            rows.append([way, *map(spread, values), str(len(seeds))])
        found.append((f"{steps} further steps, {count} sampler step(s)", rows))
    return found


def plot(results, lines, steps: int):
    """Every metric in one sampler step over the number of further steps, one line for each way."""
    figure, axes = plt.subplots(1, len(METRICS), figsize=(5 * len(METRICS), 4))
    colours, at = plt.get_cmap("tab20").colors, checkpoints(steps)
    for axis, (metric, title) in zip(axes, METRICS.items()):
        for colour, (way, seeds) in zip(colours, results.items()):
            values = np.array(
                [[known[str(k)]["1"][metric] for k in at if str(k) in known] for known in seeds]
            )
            x = at[-values.shape[1] :]
            axis.plot(x, values.mean(0), "o-", ms=3, lw=1.2, color=colour, label=way)
            axis.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)
        for name, scores in lines.items():
            if "1" in scores:
                axis.axhline(scores["1"][metric], color="black", lw=1, ls="--", label=name)
        axis.set_xscale("log")
        axis.set_xticks(at, list(map(str, at)))
        axis.minorticks_off()
        axis.set_xlabel("further training steps of 16 clips")
        axis.set_title(f"{title}, 1 sampler step", fontsize=9)
        if metric == "frechet":
            axis.set_yscale("log")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def report(args) -> Path:
    """Writes OUT/finetune.md, .png and .html; ValueError if there are no scores."""
    out, results = Path(args.out), read_scores(args)
    if not results:
        raise ValueError(f"{out}: no run of {args.steps} steps is scored yet")
    lines = {}
    for name, folder in (("teacher", args.teacher), ("vcm, whole training", args.reference)):
        path = out / f"scores/{Path(folder).name}.json"
        if path.exists():
            lines[name] = json.loads(path.read_text())["last"]
    title, found = "From flow matching to one step on Impacts", tables(results, lines, args.steps)
    if "25" in lines.get("teacher", {}):
        values = ", ".join(f"{t} {lines['teacher']['25'][m]:.3f}" for m, t in METRICS.items())
        title += f" (teacher in 25 guided steps: {values})"
    figure, text = plot(results, lines, args.steps), [f"# {title}", ""]
    for name, rows in found:
        text += [f"## {name}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
        text += ["| " + " | ".join(row) + " |" for row in rows[1:]] + [""]
    with atomic_path(out / "finetune.png") as path:
        figure.savefig(path, format="png", dpi=90)
    with atomic_path(out / "finetune.md") as path:
        path.write_text("\n".join([*text, "![](finetune.png)", ""]))
    page.write_document(
        out / "finetune.html",
        title,
        page.element("h1", title),
        page.plot(figure),
        [(page.element("h2", name), page.table(head, rows)) for name, (head, *rows) in found],
    )
    return out / "finetune.html"


def _define_flags():
    flags.DEFINE_string("data", "data/impacts", "Folder of the Impacts set.")
    flags.DEFINE_string("records", "records/impacts", "Folder of its records.")
    flags.DEFINE_string("teacher", None, "Workdir of the flow-matching run.", required=True)
    flags.DEFINE_string("reference", "runs/impacts", "Workdir of VCM's whole training.")
    flags.DEFINE_string("out", None, "Folder of runs and report.", required=True)
    flags.DEFINE_multi_enum("way", list(WAYS), list(WAYS), "How to start; may be given again.")
    flags.DEFINE_list("seeds", ["0"], "Seeds of training.")
    flags.DEFINE_integer("steps", 640, "Further training steps.", lower_bound=8)
    flags.DEFINE_integer("clips", 200, "Number of test clips to score.", lower_bound=2)
    flags.DEFINE_integer("train_clips", 400, "Training clips for the material classifier.")
    flags.DEFINE_multi_enum("stage", STAGES, STAGES, "Stages to run; all by default.")


def main(argv):
    args = flags.FLAGS
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    runs = [(way, int(seed)) for seed in args.seeds for way in args.way]
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for way, seed in runs if "train" in args.stage else ():
            train(way, seed, args)
        if "score" in args.stage:
            score(runs, args)
        if "report" in args.stage:
            print(report(args))
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
