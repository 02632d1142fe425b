"""`generate --model` with files of the published sizes: from an empty cache to a video with sound.

It takes 30 GB of disk, 10 GB of memory, and half an hour of two cores.
"""

import shutil
import sys
import time

import numpy as np
import pytest
from commands import run_command
from weight_server import WeightServer, use_server

from vcm_jax import generate as command
from vcm_jax import pretrained
from vcm_jax.media.read import probe, read_audio
from vcm_jax.media.write import write_mp4

pytest.importorskip("torch", reason="makes PyTorch files")


@pytest.mark.slow
def test_the_default_model(tmp_path, monkeypatch):
    import full_weights

    full_weights.write_served(tmp_path / "served")
    server = WeightServer(tmp_path / "served")
    use_server(monkeypatch, server, tmp_path / "home")
    frames = np.random.default_rng(0).integers(0, 255, (200, 64, 96, 3), np.uint8)
    video, out = tmp_path / "silent.mp4", tmp_path / "out.mp4"
    write_mp4(video, frames, 25)
    flags = [f"--model={full_weights.NAME}", f"--video={video}", "--prompt=waves, seagulls"]
    flags += [f"--out={out}", "--steps=2", "--dtype=float32"]
    start = time.perf_counter()
    done = run_command(command, *flags)
    print(f"from an empty cache: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    server.close()  # the second start asks nobody
    assert done.code == 0, done.err
    assert probe(out).duration == pytest.approx(8, abs=0.01)
    sound = read_audio(out, 44_100, 8 * 44_100)
    assert np.isfinite(sound).all() and np.abs(sound).max() > 1e-3
    start = time.perf_counter()
    found = pretrained.load(full_weights.NAME)
    seconds = time.perf_counter() - start
    variables = pretrained.read_network(found.network)
    print(f"second start: {seconds:.1f} s, ", file=sys.stderr)
    print(f"with the network: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    assert seconds < 10 and variables["stats"]["latent_mean"].shape == (40,)
    shutil.rmtree(tmp_path / "home")
    shutil.rmtree(tmp_path / "served")
