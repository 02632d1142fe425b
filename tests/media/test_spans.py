"""Spans of a video are read in one pass, each as if it were read alone."""

import numpy as np
import pytest

from vcm_jax.media import read
from vcm_jax.media.read import MediaError, read_frames, read_spans
from vcm_jax.media.write import write_mp4

TRANSFORMS = {8: lambda frame: frame.mean((0, 1)), 25: lambda frame: frame[:2, :2].copy()}
STARTS = [0.0, 0.55, 0.928, 1.2, 3.0]


def video(path, fps, seconds):
    frames = np.random.default_rng(0).integers(0, 255, (round(seconds * fps), 32, 32, 3), np.uint8)
    write_mp4(path, frames, fps)
    return path


@pytest.mark.parametrize("fps", [0.5, 7, 24, 30, 60])
def test_spans_are_read_as_if_alone(tmp_path, fps):
    path = video(tmp_path / "a.mp4", fps, 4)
    found = list(read_spans(path, TRANSFORMS, STARTS, 1.0, 4.0))
    assert len(found) == len(STARTS)
    for start, span in zip(STARTS, found):
        alone = read_frames(path, TRANSFORMS, 1.0, start)
        assert {fps: len(frames) for fps, frames in span.items()} == {8: 8, 25: 25}
        for rate in TRANSFORMS:
            np.testing.assert_array_equal(span[rate], alone[rate])


def test_the_last_span_may_reach_further_than_the_picture(tmp_path):
    """By less than a latent, which at a high frame rate is more than a frame."""
    path = video(tmp_path / "a.mp4", 60, 2)
    *_, last = read_spans(path, TRANSFORMS, [0.0, 1.03], 1.0, 2.0)
    assert len(last[25]) == 25
    np.testing.assert_array_equal(last[25][24], last[25][23])
    with pytest.raises(MediaError, match=r"a.mp4: 2.00 s of picture, shorter than the 2.1 s"):
        list(read_spans(path, TRANSFORMS, [0.0, 1.03], 1.0, 2.1))


def test_reading_ends_with_the_last_span(tmp_path, monkeypatch):
    path, seen = video(tmp_path / "a.mp4", 30, 4), []
    count = lambda frame, stream, ticks=read._ticks: seen.append(frame.pts) or ticks(frame, stream)
    monkeypatch.setattr(read, "_ticks", count)
    assert len(list(read_spans(path, TRANSFORMS, [0.0, 0.5], 1.0, 1.5))) == 2
    assert len(seen) < 60


def test_only_overlapping_spans_are_in_memory(tmp_path, monkeypatch):
    path, alive = video(tmp_path / "a.mp4", 30, 4), []

    class Counted(read._Span):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append(self)

        def samples(self, *args):
            alive.remove(self)
            return super().samples(*args)

    monkeypatch.setattr(read, "_Span", Counted)
    for _ in read_spans(path, TRANSFORMS, np.arange(0, 3.1, 0.25), 0.9, 4.0):
        assert len(alive) <= 5


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        list(read_spans(tmp_path / "none.mp4", TRANSFORMS, [0.0], 1.0, 1.0))
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    with pytest.raises(MediaError, match="bad.mp4: unreadable"):
        list(read_spans(tmp_path / "bad.mp4", TRANSFORMS, [0.0], 1.0, 1.0))
