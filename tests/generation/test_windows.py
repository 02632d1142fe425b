"""Clips longer than those of training: windows, their mixture, and sounds of any length."""

import argparse
import dataclasses

import jax
import numpy as np
import pytest

from vcm_jax import generate as command
from vcm_jax import sampling
from vcm_jax.generation import clips
from vcm_jax.generation.clips import Features, Request, encode_request, generate, generate_latents
from vcm_jax.generation.run import load_run
from vcm_jax.generation.windows import Windowing, sample_in_windows
from vcm_jax.media.read import read_frames
from vcm_jax.media.write import write_mp4
from vcm_jax.objectives import common
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.sampling import Sampler, uniform_times

TRAINING = SequenceConfig(duration=2.56)  # 80 latents
SECOND = 31.25  # latents


@pytest.fixture(scope="module")
def run(world):
    return load_run(world / "run")  # of clips of 1.28 s, 40 latents


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """4 s of moving noise at 30 fps."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("videos") / "long.mp4"
    write_mp4(path, rng.integers(0, 255, (120, 32, 32, 3), np.uint8), 30)
    return path


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seconds", [2.6, 3.9, 10.24, 60.0, 600.0])
def test_windows_cover_the_clip_and_their_weights_add_up_to_one(seconds, overlap):
    plan = Windowing(2.56, overlap).plan(TRAINING, seconds)
    assert plan.sequence == TRAINING and plan.size == 80
    assert plan.starts[0] == 0 and plan.starts[-1] + 80 == plan.length
    assert 0 <= plan.length - seconds * SECOND < 1
    shared = 80 - np.diff(plan.starts)
    assert (shared >= int(80 * overlap)).all() and np.ptp(shared) <= 1
    # No window more than the overlap asks for.
    assert len(plan.starts) == 1 + np.ceil((plan.length - 80) / (80 - round(80 * overlap)))
    np.testing.assert_allclose(plan.times, np.array(plan.starts) / SECOND)
    weights, total = plan.weights(), np.zeros(plan.length)
    for start, row in zip(plan.starts, weights):
        total[start : start + 80] += row
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert (weights > 0).all()
    if overlap >= 0.25:
        inner = weights[1:-1]
        assert (inner[:, [0, -1]] < 0.02).all()  # windows fade in and out
        assert (abs(np.diff(inner, axis=1)) < 0.1).all()


def test_which_clips_are_divided():
    plan = lambda seconds, *setting: Windowing(*setting).plan(TRAINING, seconds)
    assert plan(3.84) is None and plan(3.9).size == 80
    assert plan(600, 0) is None
    assert plan(5.1, 5.12) is None and plan(5.2, 5.12).size == 160
    assert plan(2.0, 1.28).size == 40
    with pytest.raises(ValueError, match="0.5 s is too short"):
        plan(9, 0.5)
    for setting, message in (
        ((-1.0,), "window must be 0 or more seconds, not -1"),
        ((float("nan"),), "window must be 0 or more seconds, not nan"),
        ((8.0, 1.0), "window_overlap must be from 0 to 0.9, not 1"),
        ((8.0, -0.1), "window_overlap must be from 0 to 0.9, not -0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(9, *setting)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_network_that_sees_one_latent_at_a_time_samples_as_the_whole_clip(restart, batch_size):
    plan = Windowing(2.56, 0.4).plan(TRAINING, 10.0)
    rng = np.random.default_rng(0)
    noise, place = (rng.standard_normal((plan.length, 3), np.float32) for _ in range(2))
    u = lambda x, place, t, s: x * (0.3 + t) + s * place
    key, times = jax.random.key(1), (1.0, 0.7, 0.2, 0.0)
    seen = []

    def velocity(x, indices, t, s):
        seen.append(list(indices))
        return u(x, plan.cut(place, indices), t, s)

    found = sample_in_windows(
        velocity, plan, noise, times, batch_size, restart=restart, noised=common.noised, key=key
    )
    whole = lambda x, t, s, cond: u(x, cond, t[:, None, None], s[:, None, None])
    if restart:
        wanted = sampling.restart_sample(whole, noise[None], times, place[None], key)
    else:
        wanted = sampling.sample(whole, noise[None], times, place[None])
    np.testing.assert_allclose(found, wanted[0], atol=1e-5)
    assert all(len(indices) == batch_size for indices in seen)  # one program for all batches
    assert set(sum(seen, [])) == set(range(len(plan.starts)))


def test_predictions_are_averaged_by_their_weights():
    plan = Windowing(2.56, 0.5).plan(TRAINING, 5.12)
    found = sample_in_windows(
        lambda x, indices, t, s: np.ones_like(x) * indices[:, None, None],
        plan,
        np.zeros((plan.length, 1)),
        (1, 0),
        2,
        restart=False,
        noised=common.noised,
        key=jax.random.key(0),
    )[:, 0]
    # From window 0 to 1 to 2, without a jump.
    np.testing.assert_allclose(-found[[0, 60, 100, 159]], [0, 0.5, 1.5, 2], atol=0.05)
    assert (np.diff(-found) >= -1e-6).all() and np.diff(-found).max() < 0.1


def test_each_window_is_a_clip_of_its_own(run, video):
    """Without overlap, windows have the latents of separate clips with their frames and noise."""
    run = dataclasses.replace(run, windowing=Windowing(1.28, 0.0))
    item = encode_request(Request("a", video, "glass"), run, duration=3.84)
    assert item.windows.starts == (0, 40, 80) and len(item.clip) == 3
    (found,) = generate_latents(run, [item], uniform_times(2), 5, 2)
    noise = clips._noise(5, "a", (120, 20))
    transforms = run.encoders.frame_transforms(run.sequence)
    for number, start in enumerate((0, 1.28, 2.56)):
        frames = read_frames(video, transforms, 1.28, start)
        clip, sync = run.encoders.encode_frames(frames, run.sequence)
        np.testing.assert_allclose(item.clip[number], clip, atol=2e-3)
        alone = Features(
            item.request, run.sequence, 1.28, item.clip[number], item.sync[number], item.text
        )
        part = slice(40 * number, 40 * number + 40)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clips, "_noise", lambda *_, part=part: noise[part])
            (wanted,) = generate_latents(run, [alone], uniform_times(2), 5, 1)
        np.testing.assert_allclose(found[part], wanted, atol=2e-5)


SAMPLERS = [Sampler(), Sampler(guidance_scale=2.0), Sampler(restart=True)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["own", "guidance", "restart"])
def test_every_sampler_depends_on_video_and_prompt_in_every_window(run, video, sampler):
    run = dataclasses.replace(run, sampler=sampler)
    times = (1.0, 0.4, 0.0)
    item = encode_request(Request("a", video, "glass"), run)
    assert len(item.windows.starts) == 4
    (found,) = generate_latents(run, [item], times, 0, 3)
    (again,) = generate_latents(run, [item], times, 0, 8)
    np.testing.assert_allclose(found, again, atol=1e-4)
    alone = encode_request(Request("a", None, "glass"), run, duration=4.0)
    assert alone.clip is None and alone.windows == item.windows
    text = dataclasses.replace(item, text=item.text + 1)
    zeros = dataclasses.replace(item, clip=0 * item.clip, sync=0 * item.sync)
    for other in (alone, text, zeros):
        (differs,) = generate_latents(run, [other], times, 0, 3)
        assert differs.shape == found.shape == (125, 20)
        assert (abs(differs - found).max(1) > 1e-4).all()


def test_any_length_takes_one_program_and_gives_its_sound(run, monkeypatch):
    seen = []
    decode = run.codec.decode
    monkeypatch.setattr(
        run.codec, "decode", lambda latents, *rest: seen.append(len(latents)) or decode(latents)
    )
    items = [
        encode_request(Request(f"rain {seconds}", None, "rain"), run, duration=seconds)
        for seconds in (2.0, 3.0, 121.0, 1.28)
    ]
    sounds = dict(
        (item.seconds, len(sound))
        for item, sound in generate(run, items, uniform_times(1), batch_size=8)
    )
    assert sounds == {s: round(s * 16_000) for s in (1.28, 2.0, 3.0, 121.0)}
    assert sorted(seen) == [40, 63, 94, 3782]
    before = clips._velocity._cache_size()
    longer = encode_request(Request("rain", None, "rain"), run, duration=7.0)
    assert len(generate_latents(run, [longer], uniform_times(1), 0, 8)[0]) == 219
    assert clips._velocity._cache_size() == before > 0


def test_the_flags():
    read = lambda window, overlap=0.25: command.read_windowing(
        argparse.Namespace(window=window, window_overlap=overlap)
    )
    assert read("auto") == Windowing() and read("0") == Windowing(0.0)
    assert read("8.5", 0.5) == Windowing(8.5, 0.5)
    for window, message in (
        ("soon", "--window=soon: give seconds, 0 or auto"),
        ("-3", "window must be 0 or more seconds"),
        ("inf", "window must be 0 or more seconds"),
    ):
        with pytest.raises(ValueError, match=message):
            read(window)
    with pytest.raises(ValueError, match="window_overlap must be from 0 to 0.9"):
        read("auto", 2.0)
