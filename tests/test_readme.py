"""The README: its size, its map, its library example, its picture."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import make_world

from vcm_jax.impacts.dataset import write_dataset
from vcm_jax.media.read import probe, read_audio

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 9216, "move what is too much to docs/"


def test_the_map_names_every_folder():
    folders = [path.parent.name for path in ROOT.glob("vcm_jax/*/__init__.py")]
    tops = ["benchmarks", "configs", "docs", "launch", "tests"]
    missing = [name for name in folders + tops if f"`{name}/`" not in README.read_text()]
    assert not missing


# Sound for a video with a trained run; and the functions that need none.
EXAMPLES = [
    example
    for page in (README, ROOT / "docs/objectives.md")
    for example in re.findall(
        r"```python\n(import jax\n.*?|from vcm_jax.*?)```", page.read_text(), flags=re.S
    )
]


def run_example(number: int) -> dict:
    names = {}
    exec(compile(EXAMPLES[number], "README.md", "exec"), names)
    return names


def test_there_are_two_examples():
    assert len(EXAMPLES) == 2


def test_the_example_with_a_run_runs_as_written(tmp_path, monkeypatch):
    """A small run and a video of 1.28 s, under the names that the example gives them."""
    world = make_world(tmp_path, clips=4)
    (tmp_path / "runs").mkdir()
    (world / "run").rename(tmp_path / "runs/mine")
    (world / "data/test/000000.mp4").rename(tmp_path / "silent.mp4")
    monkeypatch.chdir(tmp_path)
    names = run_example(0)
    info = probe(tmp_path / "out.mp4")
    assert info.has_video and info.has_audio and info.duration == pytest.approx(1.28, abs=0.01)
    assert names["sound"].shape == (round(1.28 * 16_000),)
    heard = read_audio(tmp_path / "out.mp4", 16_000, len(names["sound"]))
    assert np.corrcoef(heard, names["sound"])[0, 1] > 0.9


def test_the_example_without_a_run_runs_as_written():
    names = run_example(1)
    latents, config = names["latents"], names["config"]
    assert latents.shape == (4, config.latent_seq_len, config.latent_dim)
    assert jnp.isfinite(latents).all() and jnp.isfinite(names["value"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_use_what_they_import(example):
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,I", "-"]
    done = subprocess.run(command, input=example, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_picture(tmp_path):
    import readme_picture

    write_dataset(tmp_path / "data", {"test": 2}, 1.28, seed=0, workers=1)
    out = tmp_path / "picture.png"
    arguments = [f"--data={tmp_path / 'data'}", f"--video={tmp_path / 'data/test/000001.mp4'}"]
    readme_picture.main([*arguments, "--clip=1", f"--out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"--clip=2: .*test_impacts.jsonl has the clips 0 to 1"):
        readme_picture.main([*arguments, "--clip=2", f"--out={out}"])
    with pytest.raises(SystemExit, match="000000.mp4: no such file"):
        readme_picture.main([arguments[0], f"--video={tmp_path}/000000.mp4", f"--out={out}"])


def test_pictures_are_small():
    for path in ROOT.glob("docs/*.png"):
        assert path.stat().st_size < 300_000, path.name
