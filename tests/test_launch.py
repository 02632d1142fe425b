"""The scripts say what they would do, and the commands they name exist."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("launch/*.sh"))


def dry_run(script, tmp_path):
    return subprocess.run(
        ["bash", str(script), "--dry-run"], capture_output=True, text=True, check=True,
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv")},
    ).stdout  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", str(script)], check=True)


@pytest.mark.parametrize("name", ["demo", "test"])
def test_dry_runs_change_nothing(name, tmp_path):
    before = set(ROOT.iterdir())
    lines = dry_run(ROOT / f"launch/{name}.sh", tmp_path).splitlines()
    assert set(ROOT.iterdir()) == before and not list(tmp_path.iterdir())
    assert lines[0].startswith("making the environment") and lines[1].startswith("+ ")
    assert any("pip install" in line for line in lines)


def test_the_demo_runs_every_part(tmp_path):
    lines = dry_run(ROOT / "launch/demo.sh", tmp_path).splitlines()
    modules = [line.split()[3] for line in lines if line.startswith("+ python -m vcm_jax")]
    assert modules == [
        "vcm_jax.data.impacts", *["vcm_jax.features.extract"] * 3, "vcm_jax.main",
        "vcm_jax.generate", "vcm_jax.report",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config, change, message",
    [
        ("impacts", "optimizer.learning_rat=1", "learning_rat"),
        ("impacts", "stepz=10", 'Did you mean "steps"'),
        ("impact", "steps=10", "configs/impact.py"),
    ],
)
def test_a_config_that_is_not_understood_is_one_error_line(tmp_path, config, change, message):
    found = subprocess.run(
        [sys.executable, "-m", "vcm_jax.main", f"--config=configs/{config}.py",
         f"--workdir={tmp_path}/run", f"--config.{change}"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert found.returncode != 0
    assert message in found.stderr and found.stderr.startswith("error: config: ")
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config, line",
    [
        ("configs/s16k.py:gan", "error: objective.name 'gan' is not one of vcm, flow_matching, "),
        ("configs/ablations.py:q=1", "error: ablation 'q' is not one of w, m, r, p, lambda_end, "),
        ("nowhere.py", "error: config: Configuration is not available"),
    ],
)
def test_a_config_that_cannot_be_made_is_one_error_line(tmp_path, config, line):
    found = subprocess.run(
        [sys.executable, "-m", "vcm_jax.main", f"--config={config}", f"--workdir={tmp_path}/run"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert found.returncode != 0 and found.stderr.startswith(line)
    assert len(found.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
