"""One network with guidance as an input against networks with fixed guidance, on Impacts.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python benchmarks/guidance_input.py --data=data/impacts --records=records/impacts \\
        --out=runs/guidance --samples=51200

The same number of samples trains one network with `objective.guidance=conditioned` and one for each
fixed scale in `--scales`. All are sampled in `--steps` steps, the conditioned one at every scale.
OUT/guidance.md gives onset F1, material accuracy, log-mel Frechet distance and sharpness against
the true sound of the test clips, and the network evaluations of a training step. If interrupted,
rerun the command: it resumes.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from absl import app, flags
from compare_objectives import ROOT, load_config
from comparison_report import METRICS, spread

from vcm_jax import sampling
from vcm_jax.atomic import atomic_path, write_json
from vcm_jax.cli import show_ours
from vcm_jax.generation.clips import Request, encode_request, generate_latents
from vcm_jax.generation.run import load_run
from vcm_jax.impacts import scores
from vcm_jax.objectives import read_section

CONFIG = "configs/impacts.py:vcm"
CONDITIONED = "conditioned"


def changes(name: str) -> dict:
    """The settings of the objective that make a run: `conditioned`, or a fixed scale."""
    if name == CONDITIONED:
        return {"objective.guidance": CONDITIONED}
    return {"objective.guidance_scale": float(name)}


def passes(name: str) -> float:
    """Network evaluations of a training step, in forward passes over the batch."""
    config = load_config(CONFIG)
    config.update_from_flattened_dict(changes(name))
    return read_section(config.objective)[0].passes().forward


def train(workdir: Path, name: str, seed: int, samples: int, records: Path) -> None:
    """Trains a run with the command `vcm_jax.main`, which leaves a finished run as it is."""
    config = load_config(CONFIG)
    steps = max(1, round(samples / config.batch_size))
    share = steps / config.steps
    given = changes(name) | {
        "seed": seed,
        "data.dir": str(records.absolute()),
        "steps": steps,
        "optimizer.warmup_steps": max(1, round(config.optimizer.warmup_steps * min(1, share))),
        "optimizer.decay_steps": tuple(round(d * share) for d in config.optimizer.decay_steps),
        "checkpoint_every": max(1, steps // 8),
        "eval_every": 0,
        "sample_every": 0,
        "log_every": max(1, steps // 20),
    }
    command = [sys.executable, "-m", "vcm_jax.main", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in given.items()]
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


class Scorer:
    """Scores runs on test clips; what does not depend on the run is computed once."""

    def __init__(self, data: Path, num_clips: int, num_train: int):
        self._size, self._score, self._items = (data, num_clips, num_train), None, None

    def __call__(self, workdir: Path, scales, steps: int) -> dict[str, dict]:
        """{scale: metrics} of a run; None among the scales is the run's own way."""
        run = load_run(workdir)
        if self._score is None:
            self._score = scores.Scorer(*self._size, run.codec.sample_rate)
            clips = self._score.clips
            asked = [Request(clip["id"], clip["path"], clip["caption"]) for clip in clips]
            self._items = [encode_request(request, run) for request in asked]
        found, items = {}, self._items
        for scale in scales:
            sampled = dataclasses.replace(run, sampler=sampling.Sampler(scale))
            times = sampling.uniform_times(steps)
            latents = generate_latents(sampled, items, times, seed=0, batch_size=len(items))
            lengths = [round(item.seconds * run.codec.sample_rate) for item in items]
            sounds = [run.codec.decode(x)[:n] for n, x in zip(lengths, latents)]
            metrics = self._score(sounds)
            found["own" if scale is None else f"{scale:g}"] = {n: metrics[n] for n in METRICS}
        return found


def write_report(out: Path, scales, seeds, samples: int, clips: int, steps: int) -> Path:
    """OUT/guidance.md: a table for each metric, a row for each network, a column for each scale."""
    names = [f"{scale:g}" for scale in scales]
    rows = {
        seed: {
            name: json.loads((out / f"{name}-{seed}" / "scores.json").read_text())
            for name in (CONDITIONED, *names)
        }
        for seed in seeds
    }
    lines = [
        "# Guidance as an input on Impacts",
        "",
        f"{samples} training samples, {clips} test clips, {steps} step{'s' * (steps > 1)}, seeds "
        f"{', '.join(map(str, seeds))}. Forward passes of a training step: "
        + ", ".join(f"{name} {passes(name):g}" for name in (CONDITIONED, *names))
        + ".",
    ]
    for metric, (title, better) in METRICS.items():
        lines += ["", f"## {title} ({better})", ""]
        lines += ["| network | " + " | ".join(f"w = {name}" for name in names) + " |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        one = [spread([rows[s][CONDITIONED][name][metric] for s in seeds]) for name in names]
        own = [spread([rows[s][name]["own"][metric] for s in seeds]) for name in names]
        lines += ["| one, w is an input | " + " | ".join(one) + " |"]
        lines += ["| one for each w | " + " | ".join(own) + " |"]
    with atomic_path(out / "guidance.md") as path:
        path.write_text("\n".join(lines) + "\n")
    return out / "guidance.md"


def _define_flags():
    flags.DEFINE_string("data", "data/impacts", "Folder of the Impacts set.")
    flags.DEFINE_string("records", "records/impacts", "Folder of its records.")
    flags.DEFINE_string("out", None, "Folder of runs and report.", required=True)
    flags.DEFINE_list("scales", ["1", "1.5", "2.5", "4"], "Guidance scales.")
    flags.DEFINE_list("seeds", ["0"], "Seeds of training.")
    flags.DEFINE_integer("samples", 51_200, "Training samples of a run.", lower_bound=1)
    flags.DEFINE_integer("steps", 1, "Steps of the sampler.", lower_bound=1)
    flags.DEFINE_integer("clips", 200, "Number of test clips to score.", lower_bound=2)
    flags.DEFINE_integer("train_clips", 400, "Training clips of the material classifier.")


def main(argv):
    args = flags.FLAGS
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    out, scales = Path(args.out), [float(scale) for scale in args.scales]
    seeds = [int(seed) for seed in args.seeds]
    score = Scorer(Path(args.data), args.clips, args.train_clips)
    try:
        for seed in seeds:
            for name in (CONDITIONED, *(f"{scale:g}" for scale in scales)):
                workdir = out / f"{name}-{seed}"
                train(workdir, name, seed, args.samples, Path(args.records))
                if not (workdir / "scores.json").exists():
                    wanted = scales if name == CONDITIONED else [None]
                    write_json(workdir / "scores.json", score(workdir, wanted, args.steps))
        print(write_report(out, scales, seeds, args.samples, args.clips, args.steps))
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
