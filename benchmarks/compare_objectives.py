"""Trains every objective on Impacts, with one network, data set and budget, and compares them.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python benchmarks/compare_objectives.py --data=data/impacts --records=records/impacts \\
        --out=runs/compare --minutes=3 --seeds=0,1

It writes OUT/comparison.html and comparison.md: onset F1, material, log-mel Frechet distance (with
its standard error over the clips) and spectral sharpness at 1, 2, 4 and 25 steps, and time and
memory of a training step, with mean and standard deviation over seeds. Data and records are those
of `launch/demo.sh`; --true_clips=1000 needs data made with --test=1000. `--minutes` is a
budget of training time. Measured step times, kept in OUT/steps.json, turn it into a number of steps
(the configs take turns, and the fastest time counts). `--samples` gives all runs the same number of
steps instead. If interrupted, rerun the command: it resumes. `--config`, given several times,
compares other runs: --config=configs/ablations.py:base=impacts,r=0. Settings may follow, as in
--config="configs/impacts.py:vcm optimizer.learning_rate=7e-4".

`--shard=i/n` trains and scores every n-th run from the i-th on, so that several machines or nights
share the work: they need the same OUT, with a steps.json that `--stage=measure` made, or --samples.
`--stage=report` then writes the page of what is scored.
"""

import ast
import dataclasses
import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import harness
import jax
import librosa
from absl import app, flags
from comparison_report import ERROR, METRICS, OWN, STEPS, UNGUIDED, write_report
from sync_layout import overlapping

from vcm_jax import sampling
from vcm_jax.atomic import write_json
from vcm_jax.cli import show_ours
from vcm_jax.devices import sharding
from vcm_jax.devices.layout import Layout
from vcm_jax.generation.clips import Request, encode_request, generate_latents
from vcm_jax.generation.run import load_run
from vcm_jax.impacts import scores
from vcm_jax.models import MMDiT
from vcm_jax.objectives import OBJECTIVES
from vcm_jax.records import mixture
from vcm_jax.training import configs, setup
from vcm_jax.training.state import OptimizerConfig, make_init, make_optimizer
from vcm_jax.training.step import train_step
from vcm_jax.training.teacher import load_teacher

ROOT = Path(__file__).parents[1]
STAGES = ("measure", "train", "score", "report")
NOTE = (
    "The network is `demo`; the last table gives its training steps. Values are mean and standard "
    "deviation over seeds. Flow matching, wcfm and reflow are sampled with Euler steps, the first "
    "two with a guidance scale of 3, so that a step takes two evaluations, and without guidance; "
    "one Euler step without guidance gives the conditional mean. Reflow starts from the "
    "flow-matching run of its seed, whose time is not counted. The others train without guidance."
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run to be compared: its config string, its seed, and the folder of the comparison.

    The config string is FILE.py:ARGUMENT, then KEY=VALUE of settings that differ, after spaces.
    """

    config: str
    seed: int
    out: Path

    @property
    def file(self) -> str:
        """The config file and its argument."""
        return self.config.split()[0]

    @property
    def settings(self) -> dict[str, str]:
        """The settings that differ from the config's, as they are written."""
        return dict(text.split("=", 1) for text in self.config.split()[1:])

    @property
    def learns_from_teacher(self) -> bool:
        """Whether it starts from the flow-matching run of its seed."""
        return self.file.endswith(":reflow")

    @property
    def name(self) -> str:
        """The name in the tables: the argument of the config, or else its file."""
        name = self.config.rpartition(":")[2].removeprefix("base=impacts,")
        return name if ":" in self.config else Path(name).stem

    @property
    def workdir(self) -> Path:
        return self.out / f"{self.name.replace('/', '_').replace(' ', '_')}-{self.seed}"


def load_config(text: str):
    """The ConfigDict of 'FILE.py' or 'FILE.py:ARGUMENT'."""
    path, _, argument = text.partition(":")
    configs.resolve([f"--config={ROOT / path}"])  # so that the file can import other configs
    spec = importlib.util.spec_from_file_location("compared", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*filter(None, [argument]))


def make_step(config):
    """(a function that runs one training step on real records, the compiled step, its FLOPs).

    The FLOPs are None with a teacher: XLA counts the body of its sampler's loop once.
    """
    sources, weights = setup.open_sources(config.data.sources, config.data.dir, "sources")
    model = setup.model_config(config, sources[0].manifest)
    net, settings = MMDiT(model), setup.step_config(config)
    optimizer = make_optimizer(OptimizerConfig(**config.optimizer))
    mesh = sharding.make_mesh(-1, 1, 1)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    stats = setup.mixed_statistics(sources, weights) | {"empty_text": sources[0].empty_text}
    has_target = settings.objective.target_ema > 0
    init = make_init(net, stats, optimizer, config.ema_sigma_rels, has_target=has_target)
    state = jax.jit(init, out_shardings=whole)(jax.random.key(0))
    teacher, variables = load_teacher(settings.objective, net, sources[0].manifest)
    shapes = mixture.Shapes(
        clip=(model.clip_seq_len, model.clip_dim), sync=(model.sync_seq_len, model.sync_dim)
    )
    mixed = mixture.mix(sources, weights, 0)
    (batch,) = mixture.batches(
        mixed, shapes, batch_size=config.batch_size, first_step=0, last_step=1
    )
    layout = Layout(mesh, jax.tree.map(lambda _: whole, state.params))
    options = dict(net=net, optimizer=optimizer, config=settings, teacher=teacher, layout=layout)
    step = jax.jit(functools.partial(train_step, **options))
    args = (state, jax.device_put(batch, rows), jax.random.key(1), jax.device_put(variables, whole))
    compiled = step.lower(*args).compile()
    flops = harness.xla_flops(compiled) if teacher is None else None
    return lambda: jax.block_until_ready(compiled(*args)), compiled, flops


def measure(entries, out: Path, turns: int = 5, calls: int = 2) -> dict:
    """Measures a training step of every config; results are kept in OUT/steps.json.

    Returns:
      {name: {"seconds": of the fastest turn, "temporary_bytes": of one device, without the
      arguments, "flops": XLA's count or None}}.
    """
    path = out / "steps.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    wanted = {entry.name: entry for entry in entries if entry.name not in found}
    steps, compiled, flops = {}, {}, {}
    for name, entry in wanted.items():
        print(f"measuring {name}", flush=True)
        steps[name], compiled[name], flops[name] = make_step(entry_config(entry))
        steps[name]()
    seconds = {name: [] for name in wanted}
    for _ in range(turns):
        for name, step in steps.items():
            started = time.perf_counter()
            for _ in range(calls):
                step()
            seconds[name].append((time.perf_counter() - started) / calls)
    for name in wanted:
        found[name] = {
            "seconds": min(seconds[name]),
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "flops": flops[name],
        }
    write_json(path, found)
    return found


def entry_config(entry: Entry):
    """The config of a run."""
    config = load_config(entry.file)
    for key, value in overrides(entry).items():
        config.update_from_flattened_dict({key: value})
    for key, text in entry.settings.items():
        *path, name = key.split(".")
        kind = functools.reduce(getattr, path, config).get_type(name)
        config.update_from_flattened_dict({key: text if kind is str else ast.literal_eval(text)})
    return config


def overrides(entry: Entry) -> dict:
    """Config entries that the comparison changes.

    Reflow learns from, and starts as, the flow-matching run of its seed.
    """
    changed = {"seed": entry.seed, "data.dir": str(Path(flags.FLAGS.records).absolute())}
    if entry.learns_from_teacher:
        teacher = dataclasses.replace(entry, config="configs/impacts.py:flow_matching").workdir
        changed |= {"objective.teacher": str(teacher), "objective.teacher_steps": 8}
        changed |= {"init_from": str(teacher)}
    return changed


def num_steps(entry: Entry, measured: dict, minutes: float, samples: int) -> int:
    """The number of training steps of a run, from its budget in samples or else in minutes.

    Raises:
      ValueError: when its step was not measured.
    """
    if samples:
        batch = entry.settings.get("batch_size", load_config(entry.file).batch_size)
        return max(1, round(samples / int(batch)))
    if entry.name not in measured:
        raise ValueError(f"{entry.out}/steps.json has no {entry.name}: --stage=measure comes first")
    return max(1, round(60 * minutes / measured[entry.name]["seconds"]))


def shard(entries: list[Entry], text: str) -> list[Entry]:
    """Every n-th entry from the i-th on, for "i/n".

    Raises:
      ValueError: it is not i/n with 0 <= i < n.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard={text}: must be i/n with 0 <= i < n")
    return entries[int(index) :: int(count)]


def train_run(entry: Entry, steps: int) -> None:
    """Trains a run with the command `vcm_jax.main`, which leaves a finished run as it is."""
    config = load_config(entry.file)
    share = steps / config.steps
    changed = overrides(entry) | {
        "steps": steps,
        "optimizer.warmup_steps": max(1, round(config.optimizer.warmup_steps * min(1, share))),
        "optimizer.decay_steps": tuple(round(d * share) for d in config.optimizer.decay_steps),
        "checkpoint_every": max(1, steps // 4),
        "keep_every": 0,
        "eval_every": 0,
        "log_every": max(1, steps // 20),
    }
    changed |= entry.settings
    command = [sys.executable, "-m", "vcm_jax.main", f"--config={entry.file}"]
    command += [f"--workdir={entry.workdir}", *(f"--config.{k}={v}" for k, v in changed.items())]
    print("+", " ".join(command), flush=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    print(f"{entry.workdir}: {time.perf_counter() - started:.0f} s", flush=True)


class Scorer:
    """Scores runs on test clips; computes once what does not depend on the run."""

    def __init__(self, data: Path, num_clips: int, num_train: int, rate: int):
        self.overlapping = flags.FLAGS.overlapping
        num_true = flags.FLAGS.true_clips
        self.score = scores.Scorer(data, num_clips, num_train, rate, num_true)
        self.clips, self.truth = self.score.clips, self.score.truth
        self.other = scores.other_true_sounds(data, self.clips)

    def metrics(self, sounds) -> dict[str, float]:
        found = self.score(sounds)
        return {name: found[name] for name in METRICS | ERROR}

    def run(self, entry: Entry) -> dict[str, dict]:
        """The metrics of a run by sampler and number of steps."""
        run = load_run(entry.workdir)
        items = [encode_request(Request(c["id"], c["path"], c["caption"]), run) for c in self.clips]
        if self.overlapping:
            items = [
                dataclasses.replace(item, sync=overlapping(item.sync, item.sequence.duration))
                for item in items
            ]
        lengths = [round(item.seconds * run.codec.sample_rate) for item in items]
        ways = {OWN: sampling.OWN_SAMPLER}
        if entry.file.endswith((":flow_matching", ":wcfm")):
            ways[UNGUIDED] = sampling.Sampler(guidance_scale=1.0)
        found = {way: {} for way in ways}
        for (way, sampler), n in itertools.product(ways.items(), STEPS):
            sampled, times = dataclasses.replace(run, sampler=sampler), sampling.uniform_times(n)
            latents = generate_latents(sampled, items, times, seed=0, batch_size=len(items))
            try:
                sounds = [run.codec.decode(x)[:length] for length, x in zip(lengths, latents)]
                found[way][str(n)] = self.metrics(sounds)
            except (ValueError, librosa.ParameterError) as error:  # the sound cannot be decoded
                print(f"{entry.workdir}, {way}, {n} steps: no metrics ({error})", flush=True)
                found[way][str(n)] = dict.fromkeys(METRICS | ERROR, float("nan"))
        return found


def score(entries, data: Path, out: Path, num_clips: int, num_train: int) -> None:
    """Scores the runs that have no scores yet, into WORKDIR/scores.json."""
    scorer = None
    for entry in entries:
        path = entry.workdir / "scores.json"
        if path.exists():
            continue
        if scorer is None:
            rate = load_run(entry.workdir).codec.sample_rate
            scorer = Scorer(data, num_clips, num_train, rate)
            truth = {"true sound": scorer.metrics(scorer.truth)}
            truth["another true sound"] = scorer.metrics(scorer.other)
            write_json(out / "truth.json", truth)
        print(f"scoring {entry.workdir}", flush=True)
        lines = (entry.workdir / "metrics.jsonl").read_text().splitlines()
        steps, count = json.loads(lines[-1])["step"], len(scorer.clips)
        write_json(path, {"steps": steps, "clips": count, "metrics": scorer.run(entry)})


def _define_flags():
    objectives = [f"configs/impacts.py:{name}" for name in OBJECTIVES]
    flags.DEFINE_string("data", "data/impacts", "Folder of the Impacts set.")
    flags.DEFINE_string("records", "records/impacts", "Folder of its records.")
    flags.DEFINE_string("out", None, "Folder of runs and report.", required=True)
    flags.DEFINE_multi_string(
        "config", objectives, "Config of a run to compare; give the flag several times."
    )
    flags.DEFINE_list("seeds", ["0"], "Seeds of training.")
    flags.DEFINE_float("minutes", 3.0, "Training time of a run in minutes.")
    flags.DEFINE_integer("samples", 0, "Training samples of a run, instead of --minutes.")
    flags.DEFINE_integer("clips", 100, "Number of test clips to score.", lower_bound=2)
    flags.DEFINE_integer(
        "true_clips", 0, "Number of true test clips for the distance; 0: those that are scored."
    )
    flags.DEFINE_integer(
        "train_clips", 400, "Number of training clips for the material classifier."
    )
    flags.DEFINE_bool("overlapping", False, "Score with the features of `sync_layout.py`.")
    flags.DEFINE_string("shard", "0/1", "i/n: train and score every n-th run from the i-th on.")
    flags.DEFINE_multi_enum("stage", STAGES, STAGES, "Stages to run; all by default.")


def main(argv):
    args = flags.FLAGS
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    show_ours()
    out = Path(args.out)
    try:
        entries = [Entry(c, int(seed), out) for seed in args.seeds for c in args.config]
        # A teacher comes before its student.
        entries.sort(key=lambda entry: entry.learns_from_teacher)
        out.mkdir(parents=True, exist_ok=True)
        mine = shard(entries, args.shard)
        students = [entry for entry in mine if entry.learns_from_teacher]
        others = [entry for entry in mine if entry not in students]
        for group in (others, students):
            if group and "measure" in args.stage:
                measure(group, out)
            if "train" in args.stage:
                measured = {} if args.samples else json.loads((out / "steps.json").read_text())
                for entry in group:
                    train_run(entry, num_steps(entry, measured, args.minutes, args.samples))
        if "score" in args.stage:
            score(mine, Path(args.data), out, args.clips, args.train_clips)
        if "report" in args.stage:
            print(write_report(entries, out, NOTE))
    except (ValueError, FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
