"""Requirements and extras name what is imported."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from vcm_jax import console

ROOT = Path(__file__).parents[1]

# Distributions whose packages have other names, for environments in which they are not installed.
RENAMED = {
    "PIL": "pillow",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}
# The launch of av-benchmark says how to install it: no package index has it.
ELSEWHERE = {"av_bench"}
# A program, which users start: `tensorboard --logdir runs`.
NOT_IMPORTED = {"tensorboard"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements) -> set[str]:
    """Names of distributions from lines such as `etils[epath]>=1.13`."""
    found = (re.match(r"[A-Za-z0-9._-]+", line.strip()) for line in requirements)
    return {canonical(match.group()) for match in found if match}


def base() -> set[str]:
    return names((ROOT / "requirements.txt").read_text().splitlines())


def extras() -> dict[str, set[str]]:
    """The extras of setup.py, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "extras_require":
            return {extra: names(lines) for extra, lines in ast.literal_eval(node.value).items()}
    raise AssertionError("setup.py has no extras_require")


def third_party(folder: str) -> dict[str, tuple[set[str], list[str]]]:
    """Package -> (names that its distribution may have, modules that import it, lazily or not)."""
    local = {path.stem for name in ("tests", "benchmarks") for path in ROOT.glob(f"{name}/**/*.py")}
    local |= {path.name for path in ROOT.iterdir()} | set(sys.stdlib_module_names) | ELSEWHERE
    providers = importlib.metadata.packages_distributions()
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module]
            for package in {name.split(".")[0] for name in imported} - local:
                options = {canonical(name) for name in providers.get(package, [])}
                options.add(canonical(RENAMED.get(package, package)))
                found.setdefault(package, (options, []))[1].append(str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    "folder, allowed",
    [
        ("vcm_jax", base() | extras()["torch"] | extras().get("web", set())),
        ("configs", base()),
        ("benchmarks", base() | extras()["torch"]),
        ("tests", base() | set().union(*extras().values())),
    ],
)
def test_every_import_is_required(folder, allowed):
    for package, (options, modules) in third_party(folder).items():
        assert options & allowed, f"{package}: {modules} import it, no requirement names it"


def test_every_requirement_is_used():
    imported = set().union(*(options for options, _ in third_party("vcm_jax").values()))
    assert not (base() | extras()["torch"]) - imported - NOT_IMPORTED


def test_console_commands_run_modules_that_can_be_run(monkeypatch):
    for module in console.COMMANDS.values():
        path = ROOT / module.replace(".", "/")
        file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert 'if __name__ == "__main__":' in file.read_text()
    wanted = {"train", "generate", "extract", "evaluate", "compare", "pretrained"}
    assert {f"vcm-{name}" for name in wanted} <= console.COMMANDS.keys()
    started = []
    monkeypatch.setattr("runpy.run_module", lambda module, **options: started.append(module))
    for name in ("/usr/bin/vcm-train", "vcm-generate.exe"):
        monkeypatch.setattr("sys.argv", [name, "--help"])
        assert console.start() is None
    assert started == ["vcm_jax.main", "vcm_jax.generate"]


@pytest.mark.slow
def test_the_installed_package(tmp_path):
    """`pip install .` into an environment of its own; commands and configs from another folder."""
    source, environment = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in ("vcm_jax", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(environment, with_pip=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # What it needs comes from here; the package itself must be the installed one.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    pip = [environment / "bin/pip", "install", "--no-deps", "--quiet", source]
    subprocess.run(pip, check=True)

    def run(*command):
        line = [environment / "bin" / command[0], *command[1:]]
        kept = os.environ.keys() - {"PYTHONPATH", "XLA_FLAGS"}  # the tests ask for 8 devices
        env = {key: os.environ[key] for key in kept}
        return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)

    where = run("python", "-c", "import vcm_jax; print(vcm_jax.__file__)").stdout
    assert where.startswith(str(packages))
    for name in console.COMMANDS:
        done = run(name, "--help")
        assert done.returncode == 0 and "python -m vcm_jax" in done.stdout, done.stderr
    data = run("vcm-impacts", "--out=data", "--train=2", "--val=0", "--test=0", "--workers=2")
    assert data.returncode == 0 and len(list(tmp_path.glob("data/train/*.mp4"))) == 2, data.stderr
    widths = "--clip_dim=64", "--sync_dim=256", "--text_dim=32"
    made = run("vcm-extract", "--videos=data/train", "--duration=2.56", "--out=records", *widths)
    assert made.returncode == 0, made.stderr
    for config in ("impacts", "impacts:soflow", f"{source}/configs/impacts.py"):
        dry = run(
            "vcm-train",
            f"--config={config}",
            "--workdir=run",
            "--dry_run",
            "--config.data.sources=('records=1',)",
            "--config.data.val_sources=()",
            "--config.data.dir=",
            "--config.batch_size=2",
        )
        assert dry.returncode == 0 and "per step" in dry.stdout, dry.stderr
    wrong = run("vcm-train", "--config=impact", "--workdir=run")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: --config=impact: no such")
    built = run("python", "-c", "from vcm_jax.training import configs; print(configs.folder())")
    assert built.stdout.strip() == str(packages / "vcm_jax/configs")


def test_the_extras():
    assert {"gpu", "tpu", "torch", "test"} <= extras().keys()
