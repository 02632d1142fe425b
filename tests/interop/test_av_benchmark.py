"""What av-benchmark is given, and how what it leaves is checked, with a stand-in for it."""

import json
import shutil
import sys

import numpy as np
import pytest
import soundfile

from vcm_jax.interop import av_benchmark
from vcm_jax.interop.av_benchmark import BenchmarkError, clean_sample_name, safe_name
from vcm_jax.media.read import probe
from vcm_jax.media.write import write_mp4

torch = pytest.importorskip("torch")
RATE = 16_000

# Writes what the real one does, for the files that it finds; it drops a clip where it is told to.
EXTRACT = """
import torch
def extract(audio_path, output_path, *, audio_length, batch_size, num_workers, device, skip_clap):
    output_path.mkdir()
    names = sorted(path.stem for path in audio_path.glob("*.wav"))
    kinds = ["vggish_features", "passt_features_embed", "passt_logits", "imagebind_audio",
             "synchformer_audio"] + ["clap_laion_audio", "clap_ms_audio"] * (not skip_clap)
    for kind in kinds:
        torch.save({name: torch.zeros(3) for name in names}, output_path / f"{kind}.pth")
    layers = {name: {"2048": torch.zeros(3), "logits": torch.zeros(3)} for name in names}
    torch.save(layers, output_path / "pann_features.pth")
"""
SCRIPT = """
import argparse, pathlib, torch
parser = argparse.ArgumentParser()
for name in ("gt_cache", "video_path", "audio_length", "gt_batch_size", "num_workers"):
    parser.add_argument("--" + name)
args = parser.parse_args()
names = sorted(path.stem for path in pathlib.Path(args.video_path).glob("*.mp4"))
dropped = pathlib.Path(__file__).with_name("drops").exists()
for kind in ("imagebind_video", "synchformer_video"):
    torch.save({name: torch.zeros(3) for name in names[dropped:]},
               pathlib.Path(args.gt_cache) / f"{kind}.pth")
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for av-benchmark's checkout, on a machine that says it has a GPU."""
    root = tmp_path / "checkout"
    (root / "av_bench").mkdir(parents=True)
    (root / "av_bench/__init__.py").write_text("")
    (root / "av_bench/extract.py").write_text(EXTRACT)
    (root / "extract_video.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield root
    for name in [name for name in sys.modules if name.startswith("av_bench")]:
        del sys.modules[name]


def noise(seconds, rate=RATE, channels=1, seed=0):
    shape = (round(seconds * rate), channels)
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def folders(tmp_path):
    """Sounds of 2 s in several rates and names, and their videos."""
    audio, videos = tmp_path / "audio", tmp_path / "videos"
    (audio / "deep").mkdir(parents=True)
    (videos / "deep").mkdir(parents=True)
    names = ("clip", "zxpo56cpUBU_000007-0", "deep/other")
    for name, rate, channels, seconds in zip(
        names, (RATE, 44_100, 48_000), (1, 2, 1), (2, 3, 1.95)
    ):
        soundfile.write(audio / f"{name}.wav", noise(seconds, rate, channels), rate)
        frames = np.random.default_rng(0).integers(0, 255, (50, 32, 32, 3), np.uint8)
        write_mp4(videos / f"{name}.mp4", frames, 25)
    return audio, videos


def test_names_survive_the_rule():
    for clip in ("clip", "x" * 20, "x" * 21, "x" * 30, "a/b", "y" * 18 + "/z", "x" * 19 + "_"):
        name = safe_name(clip)
        assert clean_sample_name(name) == name and "/" not in name
    assert clean_sample_name("x" * 20) != "x" * 20
    assert safe_name("clip_0001") == "clip_0001"


def test_from_sounds_and_videos_to_a_checked_cache(folders, installed, tmp_path):
    out = tmp_path / "out"
    wanted = av_benchmark.plan(*folders, duration=2.0)
    av_benchmark.prepare(wanted, out)
    names = ["clip", "deep__other", "zxpo56cpUBU_000007-0__"]
    rates = [16_000, 48_000, 44_100]
    assert sorted(path.stem for path in (out / "audio").iterdir()) == names
    for name, rate in zip(names, rates):
        sound, found = soundfile.read(out / "audio" / f"{name}.wav", always_2d=True)
        assert found == rate and sound.shape == (2 * rate, 1), "exact, mono, in its own rate"
        assert probe(out / "videos" / f"{name}.mp4").duration == pytest.approx(2)
    rows = (out / "names.tsv").read_text().splitlines()
    assert "zxpo56cpUBU_000007-0\tzxpo56cpUBU_000007-0__" in rows

    av_benchmark.extract_features(wanted, out, batch_size=2, num_workers=0)
    assert set(av_benchmark.read_cache(out / "cache/synchformer_video.pth")) == set(names)
    assert not list(out.glob(".*"))

    # Another sound under an old name: nothing of the old cache may stay.
    (out / "cache/marker").write_text("old")
    soundfile.write(folders[0] / "clip.wav", noise(2, seed=1), RATE)
    changed = av_benchmark.plan(*folders, duration=2.0)
    assert changed != wanted
    av_benchmark.prepare(changed, out)
    assert not (out / "cache").exists()
    # A clip that is dropped on the way is not passed over.
    (installed / "drops").write_text("")
    with pytest.raises(BenchmarkError, match="imagebind_video.pth lacks 1 of 3 .* dropped: clip"):
        av_benchmark.extract_features(changed, out, batch_size=2, num_workers=0)
    assert not (out / "cache").exists()
    (installed / "drops").unlink()
    av_benchmark.extract_features(changed, out, batch_size=2, num_workers=0)
    (out / "cache/marker").write_text("kept")
    av_benchmark.prepare(changed, out)
    av_benchmark.extract_features(changed, out, batch_size=2, num_workers=0)
    assert (out / "cache/marker").exists(), "what is complete is left alone"


def test_captions_lead_to_clap(folders, installed, tmp_path):
    captions = tmp_path / "captions.tsv"
    captions.write_text('id\tcaption\nclip\ta "bell", loud\ndeep/other\train\n')
    wanted = av_benchmark.plan(folders[0], None, captions, 2.0)
    av_benchmark.prepare(wanted, tmp_path / "out")
    assert (tmp_path / "out/captions.csv").read_text().splitlines() == [
        "name,caption",
        'clip,"a ""bell"", loud"',
        "deep__other,rain",
    ]
    with pytest.raises(BenchmarkError, match="no extract_text.py"):
        av_benchmark.extract_features(wanted, tmp_path / "out", 2, 0)
    assert "clap_ms_text" in av_benchmark.expected_files(wanted)


def test_where_it_is_not_installed(folders, tmp_path, monkeypatch):
    wanted = av_benchmark.plan(folders[0], duration=1.9)
    if av_benchmark.importlib.util.find_spec("av_bench") is not None:
        pytest.skip("av-benchmark is installed here")
    with pytest.raises(
        BenchmarkError, match="git clone https://github.com/hkchengrex/av-benchmark"
    ):
        av_benchmark.extract_features(wanted, tmp_path / "out", 2, 0)


def test_what_it_cannot_be_run_on(folders, tmp_path):
    audio, videos = folders

    def refused(message, *arguments, **changes):
        with pytest.raises(ValueError, match=message) as error:
            av_benchmark.prepare(av_benchmark.plan(*arguments, **changes), tmp_path / "out")
        assert "\n" not in str(error.value)

    refused("nowhere: no such folder", tmp_path / "nowhere")
    refused("wav: 2.00 s, av-benchmark takes clips of 8 s", audio)
    (tmp_path / "long").mkdir()
    soundfile.write(tmp_path / "long/clip.wav", noise(8), RATE)
    (tmp_path / "short").mkdir()
    shutil.copy(videos / "clip.mp4", tmp_path / "short")
    refused("mp4: 2.00 s, av-benchmark takes clips of 8 s", tmp_path / "long", tmp_path / "short")
    assert not (tmp_path / "out/manifest.json").exists()
    (videos / "clip.mp4").rename(videos / "else.mp4")
    refused("has no video of 1 clips: clip", audio, videos, duration=2.0)
    (audio / "clip.wav").unlink()
    refused("has no sound of 1 clips: else", audio, videos, duration=2.0)
    (audio / "deep__other.wav").write_bytes((audio / "deep/other.wav").read_bytes())
    refused("would both be called deep__other", audio, duration=1.9)
    taken = tmp_path / "taken"
    (taken / "audio").mkdir(parents=True)
    (audio / "deep__other.wav").unlink()
    with pytest.raises(BenchmarkError, match="holds something else"):
        av_benchmark.prepare(av_benchmark.plan(audio, duration=1.9), taken)


def test_manifest_is_plain_json(folders, tmp_path):
    av_benchmark.prepare(av_benchmark.plan(*folders, duration=2.0), tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["duration"] == 2.0 and len(manifest["clips"]) == 3
