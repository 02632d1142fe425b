"""What `mux_audio` writes shows the frames that came in, over many kinds of video files."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_files import RATE, Movie, make, noise, number

from vcm_jax.media.read import probe, read_audio
from vcm_jax.media.write import mux_audio

FRAGMENTED = (("movflags", "frag_keyframe+delay_moov"),)
LIVE = (("live", "1"),)  # no duration, no index
CONTAINERS = {  # (muxer, its options, seconds by which time stamps are rounded)
    "mp4": ("mp4", (), 0),
    "mp4, fragmented": ("mp4", FRAGMENTED, 0),
    "mov": ("mov", (), 0),
    "mkv": ("matroska", (), 1e-3),
    "mkv, live": ("matroska", LIVE, 1e-3),
    "webm": ("webm", (), 1e-3),
    "webm, live": ("webm", LIVE, 1e-3),
    "ts": ("mpegts", (), 0),
    "mpg": ("mpeg", (), 0),
    "avi": ("avi", (), 0),
    "flv": ("flv", (), 1e-3),
}
KINDS = [
    (codec, container)
    for codec, containers in {
        "libx264": ("mp4", "mp4, fragmented", "mov", "mkv", "mkv, live", "ts", "avi", "flv"),
        "libx265": ("mp4", "mov", "mkv", "ts"),
        "libsvtav1": ("mp4", "mkv", "webm", "webm, live"),
        "libvpx": ("webm", "webm, live", "mkv"),
        "libvpx-vp9": ("mp4", "webm", "webm, live", "mkv"),
        "mpeg4": ("mp4", "avi", "mkv"),
        "mpeg2video": ("ts", "mpg", "mkv"),
        "prores_ks": ("mov",),
        "mjpeg": ("mov", "avi"),
        "ffv1": ("mkv", "avi"),
        "png": ("mov",),
    }.items()
    for container in containers
]
REORDERING = {"libx264", "libx265", "mpeg4", "mpeg2video"}
ANY_SIZE = {"libvpx", "libvpx-vp9", "mjpeg", "ffv1", "png"}
ANY_TIME = {"mp4", "mp4, fragmented", "mov", "mkv", "mkv, live", "webm", "webm, live"}
COPIED = {"libx264", "libx265", "libsvtav1", "libvpx-vp9", "mpeg4"}


@st.composite
def movies(draw):
    """(name of the container, movie)."""
    codec, name = draw(st.sampled_from(KINDS))
    container, options, _ = CONTAINERS[name]
    rates = [24, 25, 30, Fraction(30_000, 1001), 60]
    rate = draw(st.sampled_from(rates if codec == "mpeg2video" else [8, 10, *rates]))
    gaps = st.sampled_from([1 / 50, 1 / 25, 0.2])
    turned = name in ("mp4", "mov")
    odd = codec in ANY_SIZE and draw(st.booleans())
    sizes = (
        [(64, 64), (128, 64), (64, 128)] if codec == "libx265" else [(64, 48), (48, 64), (96, 80)]
    )
    width, height = draw(st.sampled_from(sizes))
    movie = Movie(
        codec,
        container,
        size=(width + odd, height + odd * draw(st.booleans())),
        rate=Fraction(rate),
        b_frames=draw(st.sampled_from([0, 1, 2, 3])) if codec in REORDERING else 0,
        sar=draw(st.sampled_from([Fraction(1), Fraction(4, 3), Fraction(16, 11), Fraction(9, 16)])),
        rotation=draw(st.sampled_from([0, 90, 180, 270])) if turned else 0,
        mirrored=turned and draw(st.booleans()),
        layout=draw(st.sampled_from([None, "mono", "stereo", "5.1"])),
        sound=draw(st.sampled_from([0.1, 0.5, 2.0])),
        delay=draw(st.sampled_from([0.0, 0.2])),
        tags=draw(st.sampled_from([(1, 1, 1, 1), (1, 5, 6, 6), (1, 9, 9, 16)])),
        options=options,
    )
    if movie.layout == "5.1" and container in ("mpeg", "avi", "flv"):
        movie = dataclasses.replace(movie, layout="stereo")  # MP2 has two channels
    if name in ANY_TIME and codec not in ("png", "mpeg2video") and draw(st.booleans()):
        some = tuple(draw(st.lists(gaps, min_size=movie.count, max_size=movie.count)))
        movie = dataclasses.replace(movie, gaps=some)
    return name, movie


def look(path):
    """(seconds of the frames, the frames, how they are shown): plain PyAV, which raises."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        frames = list(container.decode(video))
        seconds = [float((f.pts - frames[0].pts) * video.time_base) for f in frames]
        first, sar = frames[0], video.sample_aspect_ratio or Fraction(1)
        matrix = first.side_data.get("DISPLAYMATRIX")
        shown = first.width, first.height, sar, matrix and bytes(matrix)
        tags = first.color_range, first.colorspace, first.color_primaries, first.color_trc
        return seconds, [f.to_ndarray(format="rgb24") for f in frames], shown, tags


def check(folder, name: str, movie: Movie):
    source, out = folder / "source", folder / "out.mp4"
    make(source, movie)
    tolerance = 1e-4 + CONTAINERS[name][2]
    if not movie.gaps:
        length = movie.count / movie.rate
        assert probe(source).duration == pytest.approx(float(length), abs=2e-3)
    seconds = mux_audio(source, noise(0.3)[0], RATE, out)
    times, frames, shown, tags = look(out)
    _, _, shown_before, tags_before = look(source)
    assert len(frames) == movie.count
    np.testing.assert_allclose(times, movie.times, atol=tolerance)
    assert seconds >= movie.times[-1]
    assert shown == shown_before
    assert tags[1:] == tags_before[1:] or movie.codec == "png"
    assert max(tags[0], 1) == max(tags_before[0], 1) or movie.codec == "png"
    for i, frame in enumerate(frames):
        upright = np.rot90(frame, movie.rotation // 90)
        assert number(upright[:, ::-1] if movie.mirrored else upright) == i
    assert len(read_audio(out, RATE)) == round(seconds * RATE)
    with av.open(str(out)) as written:
        codec = written.streams.video[0].codec_context
        assert codec.codec.canonical_name in ("h264", "hevc", "av1", "vp9", "mpeg4")
        assert codec.codec_tag != "hev1"
    assert not list(folder.glob(".*"))


def quietly(count: int):
    """Settings for `count` movies that are the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@quietly(80)
@given(movies())
def test_dozens_of_kinds(tmp_path_factory, case):
    check(tmp_path_factory.mktemp("kind"), *case)


@pytest.mark.slow
@quietly(400)
@given(movies())
def test_hundreds_of_kinds(tmp_path_factory, case):
    check(tmp_path_factory.mktemp("kind"), *case)
