"""Lengths of the clips are looked at before any work."""

import numpy as np
import pytest

from vcm_jax.features import extract as extraction
from vcm_jax.features import lengths
from vcm_jax.features.extract import ExtractError, extract
from vcm_jax.features.lengths import check_lengths
from vcm_jax.media.clips import Clip, list_clips
from vcm_jax.media.write import write_mp4
from vcm_jax.records.sequence import SequenceConfig


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten clips: two of 1 s, seven of 2 s, one of 3 s; and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for i, seconds in enumerate([1, 2, 2, 2, 1, 2, 2, 2, 2, 3]):
        frames = np.random.default_rng(i).integers(0, 255, (25 * seconds, 16, 16, 3), np.uint8)
        write_mp4(folder / f"{i}.mp4", frames, 25, np.zeros(16_000 * seconds), 16_000)
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture
def warned(monkeypatch):
    lines = []
    monkeypatch.setattr(lengths.logging, "warning", lines.append)
    return lines


def check(videos, duration):
    check_lengths(list_clips(videos)[0], SequenceConfig(duration=duration))


def test_clips_that_are_long_enough(videos, warned):
    check(videos, 1)
    check(videos, 1.04)  # the last frame may be missing
    assert not warned


def test_most_are_too_short(videos, warned):
    check(videos, 3)
    assert warned == [
        "9 of 10 clips are shorter than --duration=3 s; --duration=1 keeps 10 of them"
    ]


def test_some_are_too_short(videos, warned):
    clips = [Clip(str(i), videos / ("1.mp4" if i else "0.mp4")) for i in range(10)]
    check_lengths(clips, SequenceConfig(duration=2))
    assert not warned, "one in ten may be left out without a word: failures.tsv lists it"
    check(videos, 2)
    assert warned == [
        "2 of 10 clips are shorter than --duration=2 s; --duration=1 keeps 10 of them"
    ]


def test_all_are_too_short_before_the_codec_is_fitted(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "prepare_codec", None)  # it would fail if it were called
    with pytest.raises(
        ExtractError, match="^10 of 10 clips are shorter than --duration=8 s; --dur"
    ):
        extract(tmp_path / "records", videos=videos)
    assert not (tmp_path / "records").exists()


def test_start_times_count(videos, warned):
    clips = [Clip(str(i), videos / "9.mp4", start=i) for i in (0.5, 1.0)]
    check_lengths(clips, SequenceConfig(duration=2))
    assert not warned
    with pytest.raises(ExtractError, match="2 of 2 .*--duration=2 keeps 2 of them"):
        check_lengths(clips, SequenceConfig(duration=3))


def test_clips_that_no_duration_keeps(videos, tmp_path):
    frames = np.zeros((10, 16, 16, 3), np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, 25)
    with pytest.raises(ExtractError, match="most are shorter than 0.64 s, the shortest possible"):
        check(tmp_path, 1)


def test_many_clips_are_sampled(videos, warned, monkeypatch):
    monkeypatch.setattr(lengths, "_CLIPS", 5)
    with pytest.raises(ExtractError, match=r"of them \(5 of 11 clips were looked at\)$"):
        check(videos, 8)


def test_unreadable_clips_are_left_to_the_extraction(tmp_path, warned):
    (tmp_path / "a.mp4").write_text("no video")
    check(tmp_path, 1)
    assert not warned
