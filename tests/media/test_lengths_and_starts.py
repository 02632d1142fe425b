"""How long a clip is, where it starts, and what is left of a damaged one."""

import dataclasses
import math
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from media_files import RATE, Movie, make, noise, number

from vcm_jax.media.read import MediaError, probe, read_audio, read_frames, stream_offset
from vcm_jax.media.write import mux_audio

LIVE = (("live", "1"),)


def numbers(path, fps=25, **kwargs) -> list[int]:
    return [number(frame) for frame in read_frames(path, {fps: np.copy}, **kwargs)[fps]]


@pytest.mark.parametrize("codec, container", [("libx264", "matroska"), ("libvpx-vp9", "webm")])
@pytest.mark.parametrize("options", [(), LIVE])
def test_the_picture_decides_how_long_a_clip_is(tmp_path, codec, container, options):
    """Matroska says how long the longest stream is, and live recordings say nothing."""
    movie = Movie(codec, container, count=30, rate=Fraction(30), sound=2.0, options=options)
    path = make(tmp_path / "clip", movie)
    assert probe(path).duration == pytest.approx(1.0)
    seconds = mux_audio(path, noise(2.0)[0], RATE, tmp_path / "out.mp4")
    assert seconds == pytest.approx(1.0) and probe(tmp_path / "out.mp4").duration == seconds
    frames = read_frames(path, {30: np.copy}, probe(path).duration)[30]
    assert [number(frame) for frame in frames] == list(range(30))


def test_a_live_recording_of_a_sound(tmp_path):
    path = tmp_path / "live.webm"
    make(path, Movie("libvpx", "webm", count=2, sound=1.0, options=LIVE))
    with (
        av.open(str(path)) as old,
        av.open(str(tmp_path / "s.mka"), "w", format="matroska", options=dict(LIVE)) as new,
    ):
        stream = new.add_stream_from_template(old.streams.audio[0])
        for packet in old.demux(audio=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    assert probe(tmp_path / "s.mka").duration == pytest.approx(1.0, abs=0.05)


def test_fragments_of_browsers(tmp_path):
    """mp4 in fragments, as MediaRecorder writes it, has no lengths in its header."""
    movie = Movie(
        count=30, group=10, layout=None, options=(("movflags", "frag_keyframe+empty_moov"),)
    )
    path = make(tmp_path / "a.mp4", movie)
    assert probe(path).duration == pytest.approx(30 / 25)
    assert numbers(path) == list(range(30))


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """32 frames at 2 Hz, a key frame every 8 frames, and 16 s of sound."""
    folder = tmp_path_factory.mktemp("long")
    movie = Movie(count=32, rate=Fraction(2), b_frames=2, group=8, sound=16.0)
    containers = {"mp4": "mp4", "mkv": "matroska", "ts": "mpegts", "avi": "avi"}
    return {
        suffix: make(folder / f"long.{suffix}", dataclasses.replace(movie, container=container))
        for suffix, container in containers.items()
    }


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("start", [0.5, 3.0, 7.5, 12.0])
def test_start_shifts_picture_and_sound(long, suffix, start):
    path = long[suffix]
    first = round(start * 2)
    assert numbers(path, 2, start=start) == list(range(first, 32))
    assert numbers(path, 4, start=start, duration=2) == [first + i // 2 for i in range(8)]
    whole = read_audio(path, RATE)
    sound = read_audio(path, RATE, 2 * RATE, 2.0, start=start)
    np.testing.assert_array_equal(sound, whole[round(start * RATE) :][: 2 * RATE])


def test_a_start_between_two_frames(long):
    assert numbers(long["mp4"], 8, start=3.3, duration=1) == [6, 6, 7, 7, 7, 7, 8, 8]


def test_only_the_clip_is_decoded(long):
    """A clip at the end of a long file does not cost the whole file, nor its length in memory."""
    seen = []
    read_frames(long["mp4"], {2: lambda frame: seen.append(1) or frame.mean()}, 1.0, start=14.0)
    assert len(seen) == 2
    assert len(read_audio(long["mp4"], RATE, start=15.5)) == pytest.approx(RATE / 2, abs=200)


@pytest.mark.parametrize("start", [-1.0, math.inf, math.nan, -math.inf])
def test_starts_that_are_none(long, start):
    for read in (
        lambda: read_frames(long["mp4"], {2: np.copy}, 1.0, start=start),
        lambda: read_audio(long["mp4"], RATE, RATE, start=start),
    ):
        with pytest.raises(MediaError, match="long.mp4: start must be a finite number of seconds"):
            read()


@pytest.mark.parametrize("start", [16.0, 17.0, 1e6, 1e12])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_starts_past_the_end(long, suffix, start):
    with pytest.raises(MediaError, match=r"start .* is past the end"):
        read_frames(long[suffix], {2: np.copy}, 1.0, start=start)
    with pytest.raises(MediaError, match=r"start .* is past the end"):
        read_audio(long[suffix], RATE, RATE, start=start + 0.1)


def test_clips_that_end_too_early(long):
    with pytest.raises(MediaError, match=r"1.00 s of picture after 15 s, shorter than the 2 s"):
        read_frames(long["mp4"], {2: np.copy}, 2.0, start=15.0)
    with pytest.raises(MediaError, match=r"s of sound after 15 s, shorter than the 2 s"):
        read_audio(long["mp4"], RATE, 2 * RATE, 2.0, start=15.0)


def test_start_in_a_sound_file(tmp_path):
    sound = noise(3.0)[0]
    soundfile.write(tmp_path / "a.wav", sound, RATE, "FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", RATE, start=1.25), sound[20_000:])
    with pytest.raises(MediaError, match="start 3 s is past the end of the sound"):
        read_audio(tmp_path / "a.wav", RATE, RATE, start=3.0)


def test_sound_that_begins_later(tmp_path):
    path = make(tmp_path / "a.mkv", Movie(container="matroska", sound=1.0, delay=0.2))
    assert stream_offset(path) == pytest.approx(0.2, abs=0.08)  # less what AAC starts with
    sound = read_audio(path, RATE)
    assert not sound[: round(0.13 * RATE)].any() and sound[round(0.21 * RATE) :].any()


@pytest.mark.parametrize(
    "codec, container",
    [
        ("libx264", "mp4"),
        ("libx265", "mp4"),
        ("libx264", "matroska"),
        ("libx264", "mpegts"),
        ("libvpx-vp9", "webm"),
        ("mpeg4", "avi"),
        ("mjpeg", "mov"),
    ],
)
def test_damage_in_the_middle(tmp_path, codec, container):
    """Frames that are damaged are skipped; where most is gone, the file is refused."""
    movie = Movie(codec, container, count=31, size=(192, 128), group=10, layout=None)
    data = bytearray(make(tmp_path / "a", movie).read_bytes())
    with av.open(str(tmp_path / "a")) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert len(packets) == 31
    at = 0
    for packet in packets[:16]:  # packets may be alike; MPEG-TS puts headers into long ones
        at = data.index(packet[:100], at + 1)
    length = min(60, len(packets[15]))
    data[at : at + length] = np.random.default_rng(0).bytes(length)
    path = tmp_path / "damaged"
    path.write_bytes(data)
    found = numbers(path)
    assert len(found) in (30, 31) and found[:14] == list(range(14))
    assert found[20:30] == list(range(20, 30))
    mux_audio(path, noise(1.0)[0], RATE, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert sum(1 for _ in out.decode(video=0)) >= 28


@pytest.mark.parametrize(
    "codec, container",
    [
        ("libx264", "mp4"),
        ("libx265", "mp4"),
        ("ffv1", "matroska"),
        ("libvpx-vp9", "mp4"),
        ("mjpeg", "mov"),
    ],
)
def test_what_is_mostly_gone_is_refused(tmp_path, codec, container):
    movie = Movie(codec, container, count=31, size=(192, 128), layout=None)
    path = make(tmp_path / "a", movie)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    start, end = data.index(packets[4]), data.rindex(packets[-1]) + len(packets[-1])
    data[start:end] = np.random.default_rng(0).bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(MediaError, match="a: damaged: "):
        read_frames(path, {25: np.copy})
    with pytest.raises(MediaError, match="a: damaged: "):
        mux_audio(path, noise(1.0)[0], RATE, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def cut_off(path, packet: int):
    """Cut a file off in the middle of a frame, as a download that was interrupted."""
    with av.open(str(path)) as container:
        at = [p.pos for p in container.demux(video=0) if p.size][packet]
    path.write_bytes(path.read_bytes()[: at + 10])


def test_a_download_cut_short(tmp_path):
    """An mp4 whose index comes first: what is there is used, if it is the larger part."""
    movie = Movie(count=30, layout=None, options=(("movflags", "faststart"),))
    path = make(tmp_path / "a.mp4", movie)
    cut_off(path, 20)
    assert probe(path).duration == pytest.approx(20 / 25, abs=1 / 25)
    assert numbers(path) == list(range(20))
    assert mux_audio(path, noise(1.0)[0], RATE, tmp_path / "out.mp4") == pytest.approx(20 / 25)
    assert numbers(tmp_path / "out.mp4") == list(range(20))
    with pytest.raises(MediaError, match="0.80 s of picture, shorter than the 1.2 s"):
        read_frames(path, {25: np.copy}, 1.2)
    cut_off(path, 6)
    with pytest.raises(MediaError, match="a.mp4: damaged: 2[34] of 30 packets"):
        read_frames(path, {25: np.copy})


def test_frame_rates_that_vary(tmp_path):
    gaps = (0.04, 0.2, 0.04, 0.12, 0.04, 0.04, 0.2, 0.04, 0.04, 0.04, 0.04, 0.04)
    path = make(tmp_path / "a.mp4", Movie(gaps=gaps, layout=None))
    expected = np.repeat(np.arange(11), np.round(np.array(gaps[:11]) * 25).astype(int))
    assert numbers(path)[: len(expected)] == expected.tolist()


@pytest.mark.parametrize("rate", [120, 240, 480])
def test_slow_motion_is_as_long_as_it_is(tmp_path, rate):
    """The samples at 25 fps are complete several frames before the picture is."""
    path = make(tmp_path / "a.mp4", Movie(count=rate // 2, rate=Fraction(rate), layout=None))
    for fps in (8, 25):
        frames = read_frames(path, {fps: np.copy}, 0.5)[fps]
        assert len(frames) == math.floor(0.5 * fps)
    with pytest.raises(MediaError, match="0.50 s of picture, shorter than the 0.55 s needed"):
        read_frames(path, {25: np.copy}, 0.55)
