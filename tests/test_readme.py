"""The README: its size, its map, its library example, its picture."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from vcm_jax.impacts.dataset import write_dataset

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 8192, "move what is too much to docs/"


def test_the_map_names_every_folder():
    folders = [path.parent.name for path in ROOT.glob("vcm_jax/*/__init__.py")]
    tops = ["benchmarks", "configs", "docs", "launch", "tests"]
    missing = [name for name in folders + tops if f"`{name}/`" not in README.read_text()]
    assert not missing


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    return block


def test_the_example_runs_as_written():
    names = {}
    exec(compile(example(), "README.md", "exec"), names)
    latents, config = names["latents"], names["config"]
    assert latents.shape == (4, config.latent_seq_len, config.latent_dim)
    assert jnp.isfinite(latents).all() and jnp.isfinite(names["value"])


def test_the_example_uses_what_it_imports():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F,I", "-"]
    done = subprocess.run(command, input=example(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_picture(tmp_path):
    import readme_picture

    write_dataset(tmp_path / "data", {"test": 2}, 1.28, seed=0, workers=1)
    out = tmp_path / "picture.png"
    arguments = [f"--data={tmp_path / 'data'}", f"--videos={tmp_path / 'data/test'}"]
    readme_picture.main([*arguments, "--clip=1", f"--out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"--clip=2: .*test_impacts.jsonl has the clips 0 to 1"):
        readme_picture.main([*arguments, "--clip=2", f"--out={out}"])
    with pytest.raises(SystemExit, match="000000.mp4: no such file"):
        readme_picture.main([arguments[0], f"--videos={tmp_path}", f"--out={out}"])


def test_pictures_are_small():
    for path in ROOT.glob("docs/*.png"):
        assert path.stat().st_size < 300_000, path.name
