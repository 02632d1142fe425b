"""Requirements and extras name what is imported."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

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


def test_the_extras():
    assert {"gpu", "tpu", "torch", "test"} <= extras().keys()
