"""What is written never clips, and evaluation sees what the network made."""

import dataclasses
import shutil

import numpy as np
import pytest
import soundfile
from commands import run_command
from scipy import signal
from small_runs import extract_test_records

from vcm_jax import evaluate
from vcm_jax import generate as command
from vcm_jax.evaluation import comparison
from vcm_jax.generation import clips
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.run import load_run
from vcm_jax.interop.av_benchmark import plan
from vcm_jax.media.clips import list_clips
from vcm_jax.media.read import read_audio
from vcm_jax.media.write import find_as_made

RATE = 16_000


def peak(sound) -> float:
    """True peak in dB."""
    return 20 * np.log10(np.abs(signal.resample_poly(sound, 16, 1)).max())


@pytest.fixture
def loud(world, monkeypatch):
    """Makes sounds 20 times as loud; {number: (samples,)} of what the network made."""
    made = {}
    decode = clips.decode

    def louder(*args):
        sound = 20 * decode(*args)
        made[len(made)] = sound
        return sound

    monkeypatch.setattr(clips, "decode", louder)
    monkeypatch.setattr("vcm_jax.generation.records.decode", louder)
    return made


@pytest.fixture(scope="module")
def records(world):
    return extract_test_records(world, "finish_records")


def generate(world, *flags):
    return run_command(command, f"--workdir={world / 'run'}", *flags)


def stored(folder, suffix="wav"):
    return {path.stem: soundfile.read(path)[0] for path in sorted(folder.glob(f"*.{suffix}"))}


def same_sounds(folder, made, suffix="wav"):
    """Whether evaluation reads exactly the sounds that were made, in any order."""
    read = [soundfile.read(find_as_made(p))[0] for p in sorted(folder.glob(f"*.{suffix}"))]
    return all(any(np.array_equal(a, np.float32(b)) for b in made.values()) for a in read)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_records_are_limited_and_evaluated_as_they_were_made(world, records, loud, tmp_path, kind):
    out = tmp_path / "sounds"
    done = generate(world, f"--records={records}", f"--out={out}", f"--format={kind}")
    assert done.code == 0, done.err
    assert "limited to a true peak of -1 dB: 3 of 3 sounds, by up to " in done.out
    heard = stored(out, kind)
    assert len(heard) == 3 and all(peak(sound) <= -1 for sound in heard.values())
    assert all(peak(sound) > 0 for sound in loud.values()) and same_sounds(out, loud, kind)
    assert [clip.id for clip in list_clips(out, None, (f".{kind}",))[0]] == list(heard)


def test_what_fits_is_neither_changed_nor_kept_twice(world, records, tmp_path):
    done = generate(world, f"--records={records}", f"--out={tmp_path / 'a'}")
    assert "limited" not in done.out and not (tmp_path / "a/.as_made").exists()
    assert all(find_as_made(path) == path for path in (tmp_path / "a").glob("*.wav"))


def test_videos_and_prompts_are_limited(world, loud, tmp_path):
    videos = f"--video={world / 'data/test'}"
    done = generate(world, videos, f"--out={tmp_path / 'mp4'}")
    assert "limited to a true peak of -1 dB: 3 of 3 sounds" in done.out, done.err
    for path in (tmp_path / "mp4").glob("*.mp4"):  # AAC adds its own error
        assert np.abs(read_audio(path, RATE)).max() < 1
    assert not (tmp_path / "mp4/.as_made").exists()

    loud.clear()
    generate(world, videos, f"--out={tmp_path / 'wav'}", "--format=wav")
    assert len(stored(tmp_path / "wav")) == 3 and same_sounds(tmp_path / "wav", loud)

    done = generate(world, "--prompt=rain", f"--out={tmp_path / 'rain.flac'}")
    assert "1 of 1 sounds" in done.out
    assert peak(soundfile.read(tmp_path / "rain.flac")[0]) <= -1
    assert not (tmp_path / ".as_made").exists(), "a file's folder is not littered"


def test_the_library_limits_too(world, loud, tmp_path):
    run = load_run(world / "run")
    item = clips.encode_request(clips.Request("x", world / "data/test/000000.mp4"), run)
    ((_, sound),) = clips.generate(run, [item], (1.0, 0.0))
    assert peak(sound) > 0, "generate gives what the network made"
    clips.write(item, sound, RATE, str(tmp_path / "x.wav"))
    assert peak(soundfile.read(tmp_path / "x.wav")[0]) <= -1


def scores(folder, truth):
    done = run_command(evaluate, f"--pred={folder}", f"--truth={truth}", "--duration=1.28")
    assert done.code == 0, done.err
    return done.out


def test_metrics_are_those_of_what_was_made(world, records, loud, tmp_path):
    """evaluate, compare and av-benchmark read the same floats that the network made."""
    out, truth = tmp_path / "out", world / "data/test"
    generate(world, f"--records={records}", f"--out={out}")
    floats = tmp_path / "floats"
    floats.mkdir()
    for path in out.glob("*.wav"):
        shutil.copy(find_as_made(path), floats / path.name)
    limited = tmp_path / "limited"
    shutil.copytree(out, limited, ignore=shutil.ignore_patterns(".as_made"))
    assert scores(out, truth) == scores(floats, truth) != scores(limited, truth)

    first, *_ = plan(out, duration=1.28)["clips"]
    assert np.abs(soundfile.read(first["sound"])[0]).max() > 1

    names = [str(floats), str(out), str(limited), f"{world / 'run'}@1"]
    entries = comparison.parse_entries(names, 1)
    clips = comparison.true_clips(truth, world / "data/test.tsv", 3)
    sets = comparison.score_entries(entries, clips, tmp_path / "new", duration=1.28).sets
    exact, kept, clipped, new = (metrics.values() for metrics in sets.values())
    assert exact == kept != clipped
    # A run's features are float32, records hold float16.
    assert new["loudness_error_db"] == pytest.approx(exact["loudness_error_db"], rel=5e-3)
    assert clipped["loudness_error_db"] != pytest.approx(exact["loudness_error_db"], rel=0.05)


def test_an_edited_sound_is_read_as_it_is(world, records, loud, tmp_path):
    generate(world, f"--records={records}", f"--out={tmp_path}")
    path, *_ = tmp_path.glob("*.wav")
    assert find_as_made(path) != path
    soundfile.write(path, np.zeros(100), RATE)
    assert find_as_made(path) == path


def lufs(sound) -> float:
    import pyloudnorm

    return pyloudnorm.Meter(RATE).integrated_loudness(sound)


def test_loudness_of_the_command(world, records, loud, tmp_path):
    arguments = [f"--records={records}", f"--out={tmp_path / 'a'}"]
    assert generate(world, *arguments, "--loudness=-40").code == 0
    for sound in stored(tmp_path / "a").values():
        assert lufs(sound) == pytest.approx(-40, abs=0.1)
    assert same_sounds(tmp_path / "a", loud), "scaled sounds are evaluated as they were made"
    done = generate(world, *arguments, "--loudness=-30")
    assert done.code == 1 and "other settings (loudness -40.0, not -30.0)" in done.err
    assert generate(world, "--prompt=x", f"--out={tmp_path / 'x.wav'}", "--loudness=-5").code == 0
    assert peak(soundfile.read(tmp_path / "x.wav")[0]) <= -1


def test_loudness_that_cannot_be(world, tmp_path, monkeypatch):
    out = tmp_path / "x.wav"
    for value in ("3", "-80", "nan", "loud"):
        done = generate(world, "--prompt=x", f"--out={out}", f"--loudness={value}")
        assert done.code == 1 and "--loudness" in done.err and done.err.count("\n") == 1
    monkeypatch.setattr(clips, "decode", lambda *args: np.zeros(RATE))
    done = generate(world, "--prompt=x", f"--out={out}", "--loudness=-23")
    assert done.code == 1 and "left out: x: silence has no loudness in LUFS" in done.err
    monkeypatch.setattr(clips, "decode", lambda *args: np.full(RATE, np.nan))
    done = generate(world, "--prompt=x", f"--out={out}")
    assert done.code == 1 and "must be finite" in done.err and not out.exists()


def test_the_line_counts_every_sound(tmp_path):
    finish = Finish()
    for number, level in enumerate((0.1, 2.0, 4.0)):
        sound = level * np.sin(np.arange(4000) / 7)
        finish.write_sound(tmp_path / f"{number}.wav", sound, RATE)
    assert finish.summary() == "limited to a true peak of -1 dB: 2 of 3 sounds, by up to 13.1 dB"
    assert dataclasses.replace(finish, reductions=[0.0, 0.0]).summary() == ""
