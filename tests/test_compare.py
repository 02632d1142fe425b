"""Runs and folders side by side: who wins, what is refused, what a browser makes of the page."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from commands import run_command
from measured import measured

from vcm_jax import compare as command
from vcm_jax.compare import compare
from vcm_jax.evaluation import comparison
from vcm_jax.evaluation.caches import EvaluateError
from vcm_jax.evaluation.comparison import parse_entries, true_clips, winners
from vcm_jax.media.read import read_audio

RATE = 16_000

# Counts what the browser could decode, and writes it where --dump-dom shows it.
PROBE = """<script>
const sounds = [...document.querySelectorAll("audio")];
const loaded = sounds.map(a => new Promise(done => {
  a.addEventListener("loadedmetadata", () => done(1)); a.addEventListener("error", () => done(0));
  a.preload = "auto"; a.load(); }));
window.addEventListener("load", () => Promise.all(loaded).then(found => {
  const images = [...document.images].filter(i => i.naturalWidth > 50).length;
  const seconds = sounds.map(a => a.duration.toFixed(2));
  document.title = `${images} pictures ${found.filter(x => x).length} sounds ${seconds[0]} s`;
}));
</script>"""


def tones(level, count=4):
    time = np.arange(RATE) / RATE
    return [np.float32(level * (i + 1) * np.sin(2 * np.pi * 500 * time)) for i in range(count)]


def test_winners():
    truth = tones(0.1)
    score = lambda sounds: measured(
        ((str(i), a, b) for i, (a, b) in enumerate(zip(sounds, truth))), RATE
    )
    mixed = tones(0.05)[:2] + tones(0.1)[2:]
    sets = {"exact": score(truth), "half": score(tones(0.05)), "mixed": score(mixed)}
    assert winners(sets, "loudness_error_db") == ["exact", "exact", None, None]
    assert winners({"half": sets["half"], "mixed": sets["mixed"]}, "loudness_error_db") == [
        None,
        None,
        "mixed",
        "mixed",
    ]
    assert winners(sets, "onset_f1") == [None] * 4


@pytest.fixture(scope="module")
def page(world):
    """A run in one and in two steps, and a folder with the true sounds themselves, three clips."""
    folder = world / "sounds"
    folder.mkdir()
    for path in (world / "data/test").glob("*.mp4"):
        sound = read_audio(path, 44_100)
        soundfile.write(folder / f"{path.stem}.flac", np.stack([sound, sound], 1), 44_100)
    entries = parse_entries([str(world / "run"), f"{world / 'run'}@2", str(folder)], steps=1)
    clips = true_clips(world / "data/test", world / "data/test.tsv", 10)
    out = world / "compare.html"
    return compare(entries, clips, out, shown=2, draws=100).sets, out


def test_the_page(page):
    sets, out = page
    assert list(sets) == ["run, 1 step", "run, 2 steps", "sounds"]
    # The true sounds, once through 44.1 kHz and back.
    assert sets["sounds"].values()["onset_f1"] > 0.95
    assert sets["sounds"].values()["spectral_convergence"] < 0.05
    assert sets["sounds"].values()["log_mel_fd"] < 0.2 * sets["run, 1 step"].values()["log_mel_fd"]
    text = out.read_text()
    assert text.count("<audio") == 2 * 4 and text.count("<img") == 2 * 5
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "the page is self-contained"
    wins = re.search(r"<td>sounds</td>((?:<td>\d+</td>)+)</tr><tr><td>nobody", text).group(1)
    assert re.findall(r"\d+", wins)[1:] == ["3", "3", "3"]
    assert f"{sets['sounds'].values()['loudness_error_db']:.2f}" in text


def test_a_browser_shows_every_picture_and_plays_every_sound(page, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    copy = tmp_path / "page.html"
    copy.write_text(page[1].read_text() + PROBE)
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=20000",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.search("<title>(.*?)</title>", done.stdout).group(1) == "10 pictures 8 sounds 1.28 s"


def test_sets_that_cannot_be_compared(world, tmp_path):
    clips = true_clips(world / "data/test", None, 10)
    run = str(world / "run")
    for arguments, message in (
        ([], "name at least one"),
        (["nowhere"], "nowhere: no such folder"),
        ([f"{world / 'data'}@4"], "is not the workdir of a run"),
        ([run, f"{run}@1"], "named twice"),
    ):
        with pytest.raises(EvaluateError, match=message):
            parse_entries(arguments, steps=1)
    some = tmp_path / "some"
    some.mkdir()
    soundfile.write(some / "000001.wav", tones(0.1)[0], RATE)
    lacking, out = parse_entries([str(some)], 1), tmp_path / "x.html"
    with pytest.raises(EvaluateError, match="no sound for 2 of 3 clips: 000000, 000002"):
        compare(lacking, clips, out)
    for name in ("000000", "000002"):
        soundfile.write(some / f"{name}.wav", tones(0.1)[0], RATE)
    with pytest.raises(EvaluateError, match="1.00 s, the true sound .* 1.28 s: give --duration"):
        compare(lacking, clips, out)
    with pytest.raises(EvaluateError, match="has only sounds for 000000"):
        compare(parse_entries([run], 1), true_clips(some, None, 10), out)
    assert not out.exists()


def test_steps_after_the_name(world, tmp_path):
    run = str(world / "run")
    (entry,) = parse_entries([run], steps=4)
    assert (entry.label, entry.steps) == ("run, 4 steps", 4)
    (entry,) = parse_entries([f"{run}@3"], steps=4)
    assert entry.steps == 3
    for argument, message in (
        (f"{run}@0", "at least 1 step"),
        (f"{run}@00", "at least 1 step"),
        (f"{run}@-1", "no such folder"),
        (f"{run}@", "no such folder"),
        ("@4", "no such folder"),
        (f"{run}@4@-1", "no such folder"),
        (f"{run}@4@", "no such folder"),
    ):
        with pytest.raises(EvaluateError, match=message):
            parse_entries([argument], steps=1)
    one, two = parse_entries([f"{run}@1", f"{run}@1@2.5"], steps=4)
    assert (two.label, two.steps, two.guidance_scale) == ("run, 1 step, guidance 2.5", 1, 2.5)
    assert one.guidance_scale is None and one.path == two.path
    odd = tmp_path / "sounds@2"
    odd.mkdir()
    assert parse_entries([str(odd)], steps=1)[0].path == odd  # that is its name
    other = tmp_path / "run"
    other.mkdir()
    both = parse_entries([str(other), str(odd), run], 1)
    assert [entry.label for entry in both] == ["run", "sounds@2", "run, 1 step"]


def test_the_command_leaves_bad_clips_out_of_all_sets(world, tmp_path):
    truth, sounds = tmp_path / "truth", tmp_path / "sounds"
    shutil.copytree(world / "data/test", truth)
    sounds.mkdir()
    for path in truth.iterdir():
        soundfile.write(sounds / f"{path.stem}.wav", read_audio(path, RATE), RATE)
    (truth / "000001.mp4").write_bytes(b"no video")
    table = tmp_path / "list.tsv"
    nasty = "<script>alert(1)</script>"
    rows = [f"{nasty.replace('/', '_')}\tx\t000000", f"b\t{nasty}\t000001", "c.mp4\ty\t000002"]
    table.write_text("\n".join(["id\tcaption\tfile", *rows]))
    named = tmp_path / "named"
    named.mkdir()
    for path, name in zip(sorted(sounds.iterdir()), (nasty.replace("/", "_"), "b", "c")):
        path.rename(named / f"{name}.wav")
    out = tmp_path / "page.html"
    arguments = [world / "run", named, f"--truth={truth}", f"--captions={table}", "--draws=100"]
    done = run_command(command, *arguments, f"--out={out}", "--seed=-1", positional="sets")
    assert done.code == 3, done.err
    assert "2 clips: " in done.out and "left out: b: run, 1 step: " in done.err
    text = out.read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "1 clips were left out" in text
    (truth / "000000.mp4").write_bytes(b"no video")
    done = run_command(command, *arguments, f"--out={out}", positional="sets")
    assert done.code == 1 and "fewer than 2 clips can be compared" in done.err
    done = run_command(
        command, f"{world / 'run'}@0", *arguments[2:], f"--out={out}", positional="sets"
    )
    assert done.code == 1 and "at least 1 step" in done.err and done.err.count("\n") == 1


def test_what_is_missing_is_said_before_any_sound_is_generated(world, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "load_run", None)
    some = tmp_path / "some"
    some.mkdir()
    soundfile.write(some / "000001.wav", tones(0.1)[0], RATE)
    entries = parse_entries([str(world / "run"), str(some)], 1)
    with pytest.raises(EvaluateError, match="no sound for 2 of 3 clips"):
        compare(entries, true_clips(world / "data/test", None, 10), tmp_path / "x.html")
