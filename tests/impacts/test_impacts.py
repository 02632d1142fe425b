"""Impacts: the physics, the picture, the sound, the files."""

import dataclasses
import json
import subprocess
import sys

import librosa
import numpy as np
import pytest
from commands import run_command

from vcm_jax.claim import ClaimError, hold
from vcm_jax.impacts import __main__ as command
from vcm_jax.impacts.dataset import write_dataset
from vcm_jax.impacts.render import SCALE, render_frames, render_sound
from vcm_jax.impacts.scene import (
    AUDIBLE,
    BOX,
    GRAVITY,
    MARGIN,
    SPLITS,
    Ball,
    Scene,
    caption,
    record,
    simulate,
)
from vcm_jax.impacts.scores import other_true_sounds, read_split
from vcm_jax.media.read import read_audio, read_frames

SCENES = [simulate(0, "train", i) for i in range(40)]


def test_motion_is_free_fall_within_the_box():
    dt = 1e-3
    times = np.arange(dt, 2.56 - dt, dt)
    for scene in SCENES:
        for ball in scene.balls:
            x, y = ball.position(times)
            tiny = 1e-9
            assert np.all((x > ball.radius - tiny) & (x < BOX - ball.radius + tiny))
            assert np.all(y > ball.radius - tiny)
            events = ball.path[:, 0]
            away = np.abs(times[:, None] - events).min(1) > 2 * dt
            ahead, behind = ball.position(times + dt), ball.position(times - dt)
            fall = (ahead[1] - 2 * y + behind[1]) / dt**2
            flying = away & (y > ball.radius + 0.01) & (ahead[1] != y)
            np.testing.assert_allclose(fall[flying], -GRAVITY, atol=1e-3)
            # Continuous, also at the events: no faster than 7 m/s.
            gap = np.hypot(*np.subtract(ball.position(events + 1e-9), ball.position(events - 1e-9)))
            assert np.all(gap[events > 0] < 2e-8)


def test_impacts_are_where_and_when_the_ball_touches():
    eps = 1e-6
    for scene in SCENES:
        times = [impact.time for impact in scene.impacts]
        assert times == sorted(times) and 3 <= len(times) <= 11
        for impact in scene.impacts:
            ball = scene.balls[impact.ball]
            assert impact.material == ball.material and impact.speed >= AUDIBLE
            at, before, after = (
                np.array(ball.position(impact.time + step)) for step in (0, -eps, eps)
            )
            axis = 1 if impact.surface == "floor" else 0
            gap = at[1] - ball.radius if axis else min(at[0], BOX - at[0]) - ball.radius
            assert abs(gap) < 1e-9
            speed_in, speed_out = (at - before)[axis] / eps, (after - at)[axis] / eps
            assert abs(abs(speed_in) - impact.speed) < 1e-3
            assert speed_in * speed_out <= 0 and abs(speed_out) < 0.9 * impact.speed
            assert at[1] < BOX + MARGIN  # in sight


def test_every_fast_bounce_is_listed():
    times = np.arange(0.0, 2.56, 1e-4)
    for scene in SCENES:
        for number, ball in enumerate(scene.balls):
            speed = np.diff(ball.position(times)[1]) / 1e-4
            bounces = times[1:-1][np.diff(speed) > 1.7 * AUDIBLE]
            listed = [i.time for i in scene.impacts if i.ball == number and i.surface == "floor"]
            tosses = [p[0] for p in ball.path if p[4] > 0 and abs(p[2] - ball.radius) < 1e-9]
            for time in bounces:
                assert np.abs(np.array(listed + tosses) - time).min() < 3e-4


def test_scenes_are_functions_of_their_arguments():
    again = simulate(0, "train", 3)
    np.testing.assert_array_equal(render_frames(again), render_frames(SCENES[3]))
    np.testing.assert_array_equal(render_sound(again), render_sound(SCENES[3]))
    others = [simulate(0, "val", 3), simulate(0, "test", 3), simulate(1, "train", 3), SCENES[4]]
    for one in others:
        assert one.impacts != SCENES[3].impacts
    assert len({one.impacts for one in others}) == len(others)


def test_hidden_draws_are_heard_and_not_seen():
    one, other = SCENES[3], dataclasses.replace(SCENES[3], hidden=1)
    np.testing.assert_array_equal(render_frames(one), render_frames(other))
    levels = [
        librosa.power_to_db(
            librosa.feature.melspectrogram(y=render_sound(s), sr=16_000), top_db=None
        )
        for s in (one, other)
    ]
    assert np.mean(np.abs(levels[0] - levels[1])) > 3  # decibels


@pytest.mark.parametrize(
    "duration, frames, samples", [(2.56, 64, 40_960), (1.0, 25, 16_000), (5.5, 138, 88_000)]
)
def test_lengths(duration, frames, samples):
    scene = simulate(0, "val", 0, duration)
    assert render_frames(scene).shape == (frames, 112, 112, 3)
    assert render_sound(scene).shape == (samples,)
    assert all(impact.time < duration for impact in scene.impacts)


def test_the_picture_shows_where_the_ball_is():
    scenes = [s for s in SCENES if len(s.balls) == 1]
    for scene in scenes:
        ball = scene.balls[0]
        frames = render_frames(scene).astype(float)
        empty = np.median(frames, axis=(0, 2), keepdims=True)  # rows of one colour, but the walls
        edge = int(np.ceil(SCALE * MARGIN)) + 1
        mask = (np.abs(frames - empty).max(-1) > 20)[:, : 112 - edge, edge : 112 - edge]
        x, y = ball.position(np.arange(len(frames)) / 25)
        inside = (y < BOX - ball.radius) & (
            np.sum(mask, (1, 2)) > 3 * (SCALE * ball.radius) ** 2 / 2
        )
        inside &= (y > 2 * ball.radius) & (np.abs(x - BOX / 2) < BOX / 2 - 1.5 * ball.radius)
        for k in np.flatnonzero(inside)[::5]:
            rows, cols = np.nonzero(mask[k])
            seen = (cols.min() + cols.max() + 1) / 2 + edge, (rows.min() + rows.max() + 1) / 2
            expected = SCALE * (MARGIN + x[k]), SCALE * (MARGIN + BOX - y[k])
            np.testing.assert_allclose(seen, expected, atol=1.0)


def test_an_impact_sounds_at_its_time_and_louder_when_faster():
    scene = SCENES[0]
    background = render_sound(dataclasses.replace(scene, impacts=()))
    impact = dataclasses.replace(scene.impacts[0], speed=1.5)
    peaks = []
    for speed in (1.5, 3.0):
        impact = dataclasses.replace(impact, speed=speed)
        sound = render_sound(dataclasses.replace(scene, impacts=(impact,))) - background
        first = np.flatnonzero(np.abs(sound) > 1e-5)[0]
        assert 0 <= first - impact.time * 16_000 < 8
        peaks.append(np.abs(sound).max())
    assert 1.8 < peaks[1] / peaks[0] < 3.5


def test_sounds_are_neither_clipped_nor_silent():
    for scene in SCENES:
        sound = render_sound(scene)
        assert sound.dtype == np.float32 and 0.02 < np.abs(sound).max() < 1
        assert np.sqrt(np.mean(sound.reshape(-1, 512) ** 2, axis=1)).min() > 1e-4


@pytest.mark.parametrize(
    "materials, expected",
    [
        (["metal"], "a metal ball bouncing"),
        (["wood", "metal"], "a metal ball and a wooden ball bouncing"),
        (["glass", "glass"], "two glass balls bouncing"),
        (["rubber", "glass", "glass"], "two glass balls and a rubber ball bouncing"),
        (["stone", "metal", "wood"], "a metal ball, a wooden ball and a stone ball bouncing"),
        (["stone"] * 3, "three stone balls bouncing"),
    ],
)
def test_captions(materials, expected):
    balls = tuple(Ball(m, 0.1, np.zeros((1, 7))) for m in materials)
    assert caption(Scene(2.56, balls, (), (0, 0, 0))) == expected


def test_bad_arguments():
    with pytest.raises(ValueError, match="'dev' is not one of train, val, test"):
        simulate(0, "dev", 0)
    with pytest.raises(ValueError, match="too short"):
        simulate(0, "train", 0, duration=0.2)


def write(out, counts, seed=0):
    write_dataset(out, counts, duration=2.56, seed=seed, workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("impacts") / "set"
    write(out, {"train": 2, "test": 3})
    return out


def test_files(folder):
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    clips = {f"train/{i:06d}.mp4" for i in range(2)} | {f"test/{i:06d}.mp4" for i in range(3)}
    lists = {f"{split}{end}" for split in ("train", "test") for end in (".tsv", "_impacts.jsonl")}
    assert names == clips | lists | {"impacts.json"}
    rows = (folder / "test.tsv").read_text().splitlines()
    lines = [json.loads(line) for line in (folder / "test_impacts.jsonl").open()]
    assert rows == ["id\tcaption"] + [f"{line['id']}\t{line['caption']}" for line in lines]
    scene = simulate(0, "test", 2)
    assert lines[2]["caption"] == caption(scene) and lines[2]["duration"] == 2.56
    assert [i["material"] for i in lines[2]["impacts"]] == [i.material for i in scene.impacts]
    times = [i["time"] for i in lines[2]["impacts"]]
    np.testing.assert_allclose(times, [i.time for i in scene.impacts], atol=1e-6)


def test_picture_and_sound_come_back_from_the_mp4_in_step(folder):
    for index in range(3):
        path, scene = folder / "test" / f"{index:06d}.mp4", simulate(0, "test", index)
        sound, read = render_sound(scene), read_audio(path, 16_000)
        assert len(read) == len(sound) == 40_960
        pair = np.fft.rfft([read, sound], 2 * len(sound))
        assert np.argmax(np.fft.irfft(pair[0] * pair[1].conj())) == 0  # the lag, in samples
        assert np.sqrt(np.mean((read - sound) ** 2)) < 0.3 * np.sqrt(np.mean(sound**2))
        frames = read_frames(path, {25: lambda frame: frame})[25]
        true = render_frames(scene)
        assert frames.shape == true.shape
        errors = [
            np.abs(np.roll(frames, s, 0)[2:-2] - true[2:-2].astype(int)).mean() for s in (-1, 0, 1)
        ]
        assert np.argmin(errors) == 1 and errors[1] < 8


def test_existing_clips_are_kept_and_more_can_be_added(folder):
    kept = folder / "train" / "000001.mp4"
    times = kept.stat().st_mtime_ns
    (folder / "train" / "000000.mp4").unlink()
    write(folder, {"train": 3})
    assert kept.stat().st_mtime_ns == times
    assert (folder / "train" / "000000.mp4").exists()
    assert len((folder / "train.tsv").read_text().splitlines()) == 4


def test_other_settings_or_a_strange_folder_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="was made with other settings .seed 0, not 1."):
        write(folder, {"train": 1}, seed=1)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files and no impacts.json"):
        write(tmp_path, {"train": 1})


def test_materials_can_be_left_out(folder, tmp_path):
    new = ("glass", "stone")
    scenes = [simulate(0, "train", i, materials=new) for i in range(20)]
    assert {ball.material for scene in scenes for ball in scene.balls} == set(new)
    done = run_command(
        command, f"--out={tmp_path}", "--train=1", "--val=0", "--test=2", "--materials=stone,glass"
    )
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "test_impacts.jsonl").open()]
    assert lines == [record(simulate(0, "test", i, materials=new)) for i in range(2)]
    same_picture = other_true_sounds(tmp_path, lines)[0]
    expected = render_sound(simulate(0, "test", 0, hidden=1, materials=new))
    np.testing.assert_array_equal(same_picture, expected)
    for out, materials, message in (
        (tmp_path / "more", "glass,steel", "materials glass, steel: give some of metal, wood"),
        (folder, "glass", "was made with other settings"),
    ):
        done = run_command(command, f"--out={out}", "--train=1", f"--materials={materials}")
        assert done.code == 1 and message in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_the_command_with_two_processes_writes_the_same(folder, tmp_path):
    command = [sys.executable, "-m", "vcm_jax.impacts", f"--out={tmp_path / 'set'}"]
    counts = [f"--{split}={2 * (split != 'val')}" for split in SPLITS]
    subprocess.run([*command, *counts, "--workers=2"], check=True)
    for name in ("train/000001.mp4", "test/000000.mp4", "impacts.json"):
        assert (tmp_path / "set" / name).read_bytes() == (folder / name).read_bytes()
    bad = subprocess.run([*command, "--seed=5"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and "seed" in bad.stderr


def test_two_processes_do_not_write_the_same_set(folder, tmp_path):
    with hold(tmp_path):
        with pytest.raises(ClaimError, match="works in this folder"):
            write(tmp_path, {"train": 1})
    with hold(folder):
        done = run_command(command, f"--out={folder}", "--train=1", "--val=0", "--test=0")
    assert done.code == 1 and "works in this folder" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("content", ["", "[]", "{", "{}"])
def test_damaged_settings_are_one_line(tmp_path, content):
    (tmp_path / "impacts.json").write_text(content)
    done = run_command(command, f"--out={tmp_path}")
    assert done.code == 1 and done.err.count("\n") == 1
    assert str(tmp_path) in done.err and not (tmp_path / "train").exists()


@pytest.mark.parametrize("content", ["", "{\n", "[]\n", "{}\n", '{"id": 5}\n'])
def test_damaged_lines_name_the_file(tmp_path, content):
    (tmp_path / "test_impacts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"test_impacts.jsonl (is damaged|has)"):
        read_split(tmp_path, "test", 2)
