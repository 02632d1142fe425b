"""Faults, tried systematically: bad command lines, flipped bytes, full disks.

    XLA_FLAGS=--xla_backend_optimization_level=0 python benchmarks/faults.py \\
        [--only=commands,flips,disk] [--flips=6]

It makes a small world (simulated clips, records, a run) with the helpers of the tests, and prints
one line of counts for each trial, after every case that was not answered as it should be:

* commands: made from the flags of every command. Each must end with an exit code other than 0 and a
  line that names the flag or the value, without a traceback.
* flips: one changed byte in every file that is read later. It must be noticed, or change nothing of
  what is read.
* disk: every command that writes, with a limit on the size of files. It must end like a bad command
  and leave no file that looks whole. Send the output of this program
  through a pipe (`| cat`): a log file meets the limit, too.

Kills at every moment of a run are tried by `tests/training/test_survival.py --slow`.
"""

import collections
import contextlib
import dataclasses
import importlib
import itertools
import json
import resource
import shutil
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from commands import run_command
from small_runs import make_world

from vcm_jax.codec import load_codec
from vcm_jax.records.source import RecordSource
from vcm_jax.runs import averages, checkpoint, description

FOLDERS = {"workdir", "video", "videos", "sounds", "records", "pred", "truth", "codec", "encoders",
           "data", "against"}  # fmt: skip
FILES = {"captions", "synchformer"}
OUTPUTS = {"out", "json", "page"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that works: its module, flags, and arguments besides the flags."""

    module: str
    flags: dict
    positional: tuple = ()
    options: dict = dataclasses.field(default_factory=dict)

    def run(self, **changes):
        """Runs it in this process, with some flags changed."""
        given = [f"--{name}={value}" for name, value in (self.flags | changes).items()]
        module = importlib.import_module(self.module)
        return run_command(module, *self.positional, *given, **self.options)


def add_snapshots(workdir: Path) -> None:
    """Snapshots of a run's EMA weights, as of two training steps."""
    weights = averages.restore_weights(workdir)
    with checkpoint.Saver(averages.open_snapshots(workdir)) as saver:
        for step in (50, 100):
            ema = {"0.05": weights["params"], "0.1": weights["params"]}
            state = types.SimpleNamespace(step=step, ema=ema, stats=weights["stats"])
            averages.save_snapshot(saver, state)


def good_commands(world: Path, out: Path) -> dict[str, Command]:
    """One command line of each command; `out` is for what they write."""
    run, data, records = world / "run", world / "data", world / "records"
    captions = data / "test.tsv"
    several = {"positional": "arguments"}
    return {
        "generate": Command(
            "vcm_jax.generate",
            {"workdir": run, "video": data / "test", "captions": captions, "out": out / "videos"},
        ),
        "generate --records": Command(
            "vcm_jax.generate", {"workdir": run, "records": records, "out": out / "sounds"}
        ),
        "features.extract": Command(
            "vcm_jax.features.extract",
            {
                "videos": data / "test",
                "captions": captions,
                "out": out / "records",
                "duration": 1.28,
                "codec": records / "codec",
            },
        ),  # fmt: skip
        "evaluate": Command(
            "vcm_jax.evaluate",
            {
                "pred": world / "copies",
                "truth": data / "test",
                "captions": captions,
                "json": out / "scores.json",
            },
        ),  # fmt: skip
        "compare": Command(
            "vcm_jax.compare",
            {"truth": data / "test", "captions": captions, "out": out / "page.html", "draws": 100},
            (data / "test",),
            several,
        ),
        "search_times": Command(
            "vcm_jax.search_times", {"workdir": run, "records": records, "clips": 2, "grid": 8}
        ),
        "reconstruct": Command("vcm_jax.reconstruct", {"workdir": run, "sigma_rel": 0.1}),
        "data.validate": Command(
            "vcm_jax.data.validate",
            {
                "videos": data / "train",
                "captions": data / "train.tsv",
                "page": out / "v.html",
                "media_clips": 1,
            },
            (records,),
            several,
        ),
        "impacts": Command(
            "vcm_jax.impacts.__main__", {"out": out / "data", "train": 1, "val": 0, "test": 0}
        ),
        "impacts.report": Command(
            "vcm_jax.impacts.report",
            {"workdir": run, "data": data, "clips": 3, "train_clips": 8, "shown": 1},
        ),
    }


def bad_paths(folder: Path) -> dict[str, Path]:
    """Paths that no input and no output may be."""
    folder.mkdir()
    (folder / "garbage").write_bytes(np.random.default_rng(0).bytes(500))
    (folder / "empty").write_bytes(b"")
    (folder / "empty_folder").mkdir()
    for name, content in (("object", "{}"), ("list", "[]"), ("number", "3")):
        (folder / name).write_text(content)
        foreign = folder / f"foreign_{name}"
        foreign.mkdir()
        for file in ("run.json", "manifest.json", "codec.json", "settings.json", "generate.json"):
            (foreign / file).write_text(content)
    return {path.name: path for path in folder.iterdir()} | {"missing": folder / "missing"}


def bad_values(name: str, flag, paths: dict[str, Path]) -> Iterator[object]:
    """Values that a flag must not have."""
    kind = flag.flag_type()
    if name in FOLDERS:
        yield from (path for key, path in paths.items() if key != "empty")
    elif name in FILES:
        yield from (path for key, path in paths.items() if key != "number")
    elif name in OUTPUTS:
        yield from (paths["garbage"] / "x", "/proc/nowhere/x")
        yield paths["garbage"] if name == "out" else paths["empty_folder"]
    elif kind in ("int", "float"):
        yield from ("many", "", "1e", "--")
        if kind == "float":
            yield from ("nan", "inf", "-inf")
        elif flag.parser.lower_bound is not None:
            yield flag.parser.lower_bound - 1
        elif name != "seed":
            yield from (-7, 10**9)
    elif kind == "bool":
        yield from ("maybe", "2")
    elif "enum" in kind:
        yield from ("other", "")
    elif "list" in kind or "comma" in kind:
        yield from ("a,b", "nan,0", "0,1,2", "inf,0")
    elif name == "shard":
        yield from ("x", "3/2", "1", "-1/2", "1/0")
    if flag.required and not isinstance(flag.value, bool):
        yield ""


def command_flags(module: str) -> dict:
    """The flags that a command defines, by name."""
    before = set(flags.FLAGS)
    importlib.import_module(module).define_flags()
    found = {name: flags.FLAGS[name] for name in set(flags.FLAGS) - before}
    for name in found:
        delattr(flags.FLAGS, name)
    for name, flag in found.items():
        flag.required = flag.default is None and name in ("workdir", "out", "pred", "truth")
    return dict(sorted(found.items()))


def complaint(done, names: tuple[str, ...]) -> str | None:
    """What is wrong with the answer to a bad command; None if nothing is."""
    lines = [line for line in (done.err + done.out).splitlines() if line.strip()]
    if done.code == 0:
        return "exit code 0"
    if "Traceback" in done.err:
        return "a traceback"
    if not any(name in line for line in lines for name in names):
        return f"no line names it: {lines[-1:]}"
    return None


def try_commands(world: Path, out: Path) -> collections.Counter:
    """Every flag of every command with every bad value."""
    paths, counts = bad_paths(out / "bad"), collections.Counter()
    for title, command in good_commands(world, out).items():
        if (done := command.run()).code:
            raise RuntimeError(f"{title} fails without a fault: {done.err}")
        for path in out.iterdir():
            if path.name != "bad":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, flag in command_flags(command.module).items():
            for value in bad_values(name, flag, paths):
                shown = f"{title} --{name}={value}"
                try:
                    done = command.run(**{name: value})
                except Exception as error:
                    wrong = f"raised {type(error).__name__}: {error}"
                else:
                    wrong = complaint(done, (name, *Path(str(value)).parts[-2:]))
                counts["bad commands"] += 1
                if wrong:
                    counts["not answered"] += 1
                    print(f"commands: {shown}: {wrong}", flush=True)
                shutil.rmtree(out / "records", ignore_errors=True)
    return counts


def readers(world: Path) -> dict[str, tuple[Path, Callable]]:
    """What is read of the world: (folder, function that reads all of it)."""

    def read_records():
        source = RecordSource(world / "records")
        return [source[i] for i in range(len(source))], source.empty_text

    def read_codec():
        codec = load_codec(world / "run/codec")
        return codec.decode(np.ones((8, codec.latent_dim), np.float32))

    return {
        "records": (world / "records", read_records),
        "codec": (world / "run/codec", read_codec),
        "run.json": (world / "run", lambda: dataclasses.asdict(description.read(world / "run"))),
        "checkpoint": (
            world / "run/checkpoints",
            lambda: averages.restore_weights(world / "run"),
        ),
    }


def same(a, b) -> bool:
    """Whether two nested structures hold the same values."""
    leaves = [jax.tree.leaves(jax.tree.map(np.asarray, tree)) for tree in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(
        np.array_equal(x, y) for x, y in zip(*leaves, strict=True)
    )


def try_flips(world: Path, count: int) -> collections.Counter:
    """One bit of one byte at a time, at `count` places of every file."""
    counts = collections.Counter()
    for title, (folder, read) in readers(world).items():
        wanted = read()
        files = [folder / "run.json"] if title == "run.json" else sorted(folder.rglob("*"))
        for path in (p for p in files if p.is_file() and p.stat().st_size):
            whole = path.read_bytes()
            places = np.unique(np.linspace(0, len(whole) - 1, count).astype(int))
            for place, bit in zip(places, itertools.cycle((0x01, 0x40))):
                changed = bytearray(whole)
                changed[place] ^= bit
                path.unlink()  # codec files are hard links to the records' ones
                path.write_bytes(changed)
                counts["flips"] += 1
                try:
                    found = read()
                except (ValueError, OSError) as error:
                    counts["noticed"] += 1
                    if "\n" in str(error).strip():
                        print(f"flips: {path.relative_to(world)} byte {place}: several lines")
                else:
                    unchanged = same(found, wanted)
                    counts["unused byte" if unchanged else "silent"] += 1
                    if not unchanged:
                        print(f"flips: {path.relative_to(world)} byte {place}: silent", flush=True)
            path.write_bytes(whole)
    return counts


@contextlib.contextmanager
def limited(size: int):
    """No file may grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def try_disk(world: Path, out: Path) -> collections.Counter:
    """Every command that writes, with no space, and with space for little."""
    counts = collections.Counter()
    for size in (0, 300):
        for title, command in good_commands(world, out / f"disk{size}").items():
            if title in ("search_times", "reconstruct", "impacts.report"):
                continue  # they write nothing, or need a longer run
            (out / f"disk{size}").mkdir(exist_ok=True)
            try:
                with limited(size):
                    done = command.run()
                wrong = complaint(done, ("No space", "File too large", "full", "written"))
            except Exception as error:
                wrong = f"raised {type(error).__name__}: {error}"
            counts["full disks"] += 1
            if wrong:
                counts["not answered"] += 1
                print(f"disk: {title} with {size} bytes: {wrong}", flush=True)
    return counts


def main(argv):
    del argv
    args = flags.FLAGS
    only, num_flips = args.only, args.flips
    jax.config.update("jax_compilation_cache_dir", None)  # a full disk must not fill the cache
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", 8)
        shutil.copytree(world / "data/test", world / "copies")
        add_snapshots(world / "run")
        out = Path(folder) / "out"
        out.mkdir()
        trials = {
            "commands": lambda: try_commands(world, out),
            "flips": lambda: try_flips(world, num_flips),
            "disk": lambda: try_disk(world, out),
        }
        for name in only:
            print(json.dumps({"trial": name} | trials[name]()), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("only", ["commands", "flips", "disk"], "Trials to run.")
    flags.DEFINE_integer("flips", 6, "Places in each file.", lower_bound=1)
    app.run(main)
