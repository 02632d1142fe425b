"""A run that an older version of the program began.

`fixtures/runs/old_run.tar.xz` was made at commit 3c1693e, before the modules moved into folders and
before checkpoints had fingerprints. It holds `records`; `run`, the workdir of a run of four steps
that was killed after the checkpoint of step 2; and `end.npz`, the parameters after step 4 of a run
that the same version finished. Most entries of the wide layers are zero, so that it compresses.
"""

import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from absl import logging
from commands import run_command
from small_runs import final_state, load_config

from vcm_jax import generate
from vcm_jax.generation.run import load_run
from vcm_jax.runs import averages
from vcm_jax.training import loop, rows

FIXTURE = Path(__file__).parents[1] / "fixtures/runs/old_run.tar.xz"


@pytest.fixture
def old(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        # Python before 3.11.4 knows no filters.
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **options)
    return tmp_path


def config(folder):
    sizes = dict(
        clip_dim=6,
        sync_dim=5,
        text_dim=4,
        hidden_dim=4,
        num_heads=1,
        depth=2,
        fused_depth=1,
        audio_kernel=3,
    )
    found = load_config("impacts")
    found.update_from_flattened_dict({
        "steps": 4, "batch_size": 4, "data.dir": str(folder), "data.sources": ("records=1",),
        "data.val_sources": (), "log_every": 1, "checkpoint_every": 2, "sample_every": 0,
        "snapshot_every": 2, "eval_every": 0, "ema_sigma_rels": (0.05,),
        "optimizer.warmup_steps": 1, "objective.guidance_scale": 3.0,
        "objective.time_mean": -0.4, "objective.time_std": 1.0,
        "optimizer.decay_steps": (1_700, 2_000), "optimizer.learning_rate": 2e-3,
        **{f"model_overrides.{name}": size for name, size in sizes.items()},
    })  # fmt: skip
    # The old run used one device; batch_size 4 does not divide over the eight of the tests.
    found.mesh.data, found.mesh.fsdp, found.mesh.tensor = 4, 1, 2
    return found


def test_it_resumes(old, caplog, monkeypatch):
    # That version gave s = t to the first rows of a batch; now they are spread over the devices.
    monkeypatch.setattr(rows, "instant_places", lambda size, count: np.arange(size) < count)
    caplog.set_level("INFO")
    logging.set_verbosity(logging.INFO)
    loop.train(config(old), old / "run")
    assert "resuming after step 2" in caplog.text
    assert "checkpoints/2 was saved without fingerprints" in caplog.text
    params = final_state(old / "run")["params"]
    with np.load(old / "end.npz") as end:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            np.testing.assert_allclose(leaf, end[name], rtol=0, atol=1e-5, err_msg=name)
    assert len(jax.tree.leaves(params)) == len(np.load(old / "end.npz").files)
    lines = (old / "run/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4, "the lines of the first two steps are the old version's"


def test_it_generates(old):
    run = load_run(old / "run", with_encoders=False)
    assert run.model.hidden_dim == 4 and run.objective.guidance_scale == 3.0
    found = averages.reconstruct(old / "run", 0.08)
    assert found.name == "2_0.08.npz"
    for arguments in ([], ["--checkpoint=2", "--sigma_rel=0.08"]):
        out = old / "sound.wav"
        done = run_command(
            generate,
            f"--workdir={old / 'run'}",
            "--prompt=x",
            "--duration=0.64",
            f"--out={out}",
            *arguments,
        )
        assert done.code == 0, done.err
        sound, rate = soundfile.read(out)
        assert rate == 16_000 and len(sound) == 10_240 and np.isfinite(sound).all()
        out.unlink()
