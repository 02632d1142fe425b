"""The picture that `mux_audio` writes is the picture that came in."""

import dataclasses
import errno
import resource
from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import RATE, Movie, image, make, noise, number

from vcm_jax.media import remux, write
from vcm_jax.media.bitstream import Malformed, check_packet
from vcm_jax.media.encode import increasing
from vcm_jax.media.read import MediaError, probe, read_audio, read_frames, upright
from vcm_jax.media.remux import decoding_times
from vcm_jax.media.write import mux_audio

MUTE = Movie(layout=None)


def muxed(source, folder, **kwargs):
    """(decoded frames, video stream's codec, tag and SAR, seconds) of what `mux_audio` writes."""
    out = folder / "out.mp4"
    seconds = mux_audio(source, noise(1.0)[0], RATE, out, **kwargs)
    with av.open(str(out)) as container:
        video = container.streams.video[0]
        frames = list(container.decode(video))
        context = video.codec_context
        about = context.codec.canonical_name, context.codec_tag, video.sample_aspect_ratio
        return frames, about, seconds, [float(f.pts * video.time_base) for f in frames]


def numbers(frames) -> list[int]:
    return [number(frame.to_ndarray(format="rgb24")) for frame in frames]


def payload(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_matroska_keeps_its_frames_without_decoding_times(tmp_path, codec):
    """FFmpeg gives the first packets of a Matroska file with B-frames no decoding times."""
    movie = dataclasses.replace(MUTE, codec=codec, container="matroska", b_frames=3, size=(64, 64))
    path = make(tmp_path / "b.mkv", movie)
    with av.open(str(path)) as container:
        assert next(container.demux(video=0)).dts is None
    frames, about, seconds, times = muxed(path, tmp_path)
    assert numbers(frames) == list(range(12))
    assert seconds == pytest.approx(12 / 25)
    np.testing.assert_allclose(times, np.arange(12) / 25, atol=1e-3)
    assert about[1] == ("avc1" if codec == "libx264" else "hvc1")
    assert payload(path) == payload(tmp_path / "out.mp4")  # copied


@pytest.mark.parametrize("codec, rotation", [("libx264", 0), ("libvpx-vp9", 0), ("libx264", 90)])
@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_other_containers(tmp_path, codec, rotation, suffix):
    """What WebM cannot hold is encoded, and turned pictures are shown upright."""
    movie = dataclasses.replace(MUTE, codec=codec, container="mov", rotation=rotation)
    if codec == "libvpx-vp9":
        movie = dataclasses.replace(movie, container="webm")
    path, out, sound = make(tmp_path / "a", movie), tmp_path / f"out.{suffix}", noise(0.48)[0]
    assert mux_audio(path, sound, RATE, out) == pytest.approx(12 / 25, abs=2e-3)
    with av.open(str(out)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert "matroska" in container.format.name
        is_vp9 = suffix == "webm" or codec == "libvpx-vp9"
        assert video.codec_context.codec.canonical_name == ("vp9" if is_vp9 else "h264")
        assert audio.codec_context.codec.canonical_name == ("opus" if suffix == "webm" else "aac")
    frames = read_frames(out, {25: lambda frame: frame})[25]
    assert [number(frame) for frame in frames] == list(range(12))
    assert frames.shape[1:3] == ((64, 48) if rotation else (48, 64))
    heard = read_audio(out, RATE, len(sound))
    assert np.corrcoef(heard, sound)[0, 1] > 0.9
    assert (payload(path) == payload(out)) == (suffix == "mkv" or codec == "libvpx-vp9")


def test_hevc_of_iphones_stays_hvc1(tmp_path):
    path = make(
        tmp_path / "a.mov",
        dataclasses.replace(MUTE, codec="libx265", container="mov", size=(64, 64)),
    )
    assert muxed(path, tmp_path)[1][:2] == ("hevc", "hvc1")


def test_av1_is_copied_whatever_its_decoder_is_called(tmp_path):
    path = make(tmp_path / "a.webm", dataclasses.replace(MUTE, codec="libsvtav1", container="webm"))
    frames, about, *_ = muxed(path, tmp_path)
    assert numbers(frames) == list(range(12)) and about[:2] == ("av1", "av01")
    assert payload(path) == payload(tmp_path / "out.mp4")


def test_recordings_joined_end_to_end(tmp_path):
    """The time stamps of two MPEG-TS files in one start again in the middle."""
    movie = Movie(container="mpegts", b_frames=2, sound=12 / 25)
    data = make(tmp_path / "one.ts", movie).read_bytes()
    path = tmp_path / "joined.ts"
    path.write_bytes(data * 3)
    assert probe(path).duration == pytest.approx(36 / 25)
    frames = read_frames(path, {25: np.copy})[25]
    assert [number(frame) for frame in frames] == 3 * list(range(12))
    sound, one = read_audio(path, RATE), read_audio(tmp_path / "one.ts", RATE)
    assert abs(len(sound) - 1.44 * RATE) < 0.1 * RATE
    for start in (0.48, 0.96):  # in step with the picture after each join
        part = sound[round(start * RATE) :][3000:6000]
        assert np.corrcoef(part, one[3000:6000])[0, 1] > 0.9
    frames, _, seconds, times = muxed(path, tmp_path)
    assert numbers(frames) == 3 * list(range(12)) and seconds == pytest.approx(1.44)
    np.testing.assert_allclose(times, np.arange(36) / 25, atol=1e-3)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_does_not_know_when_frames_are_shown(tmp_path, codec):
    movie = dataclasses.replace(MUTE, codec=codec, container="avi", b_frames=3)
    path = make(tmp_path / "b.avi", movie)
    shown = read_frames(path, {25: np.copy})[25]
    assert [number(frame) for frame in shown] == list(range(12))
    frames, about, _, times = muxed(path, tmp_path)
    assert numbers(frames) == list(range(12)) and about[0] == "h264"
    np.testing.assert_allclose(times, np.arange(12) / 25, atol=1e-6)


def test_time_stamps_that_repeat(tmp_path):
    """Matroska may hold frames with the time stamp of the frame before; none of them is lost."""
    gaps = (0.04, 0.0, 0.08, 0.04, 0.0, 0.0, 0.12, 0.04, 0.04, 0.04, 0.04, 0.04)
    movie = dataclasses.replace(MUTE, codec="mpeg4", gaps=(0.04,) * 12)
    plain = make(tmp_path / "plain.mp4", movie)
    path = tmp_path / "repeats.mkv"
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        times = [0.0, *np.cumsum(gaps)]
        for packet, time in zip(old.demux(video=0), times[:12]):
            packet.pts = packet.dts = round(time / packet.time_base)
            packet.stream = stream
            new.mux(packet)
    frames, _, _, times = muxed(path, tmp_path)
    assert numbers(frames) == list(range(12))
    np.testing.assert_allclose(
        times, [0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.28, 0.32, 0.36, 0.4, 0.44], atol=2e-3
    )


def test_times_that_do_not_increase_are_spread():
    assert increasing([0, 1, 1, 3], 1) == [0, 1, 2, 3]
    assert increasing([0, 2, 1, 1, 5, 5], 2) == [0, 2, 3, 4, 5, 7]
    assert increasing([3], 1) == [3] and increasing([], 1) == []


@pytest.mark.parametrize(
    "shown", [[0, 3, 1, 2, 6, 4, 5], [0, 4, 2, 1, 3, 7, 5, 6], [5, 90, 7], [1]]
)
def test_decoding_times(shown):
    times = decoding_times(shown)
    assert (np.diff(times) > 0).all() and (times <= shown).all() and (times == shown).any()


def with_display_size(data: bytes, width: int, height: int) -> bytes:
    """Matroska bytes whose colour element is replaced by a display size."""
    at = data.index(b"\x55\xb0") + 2
    length = data[at] & 0x7F
    size = b"\x54\xb0\x82" + width.to_bytes(2, "big") + b"\x54\xba\x82" + height.to_bytes(2, "big")
    rest = length + 3 - len(size)
    return (
        data[: at - 2]
        + size
        + bytes([0xEC, 0x80 | rest - 2])
        + bytes(rest - 2)
        + data[at + 1 + length :]
    )


def test_vp8_keeps_the_aspect_ratio_of_its_container(tmp_path):
    path = make(tmp_path / "a.webm", dataclasses.replace(MUTE, codec="libvpx", container="webm"))
    path.write_bytes(with_display_size(path.read_bytes(), 1024, 432))
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 9)
    frames, about, *_ = muxed(path, tmp_path)
    assert about == ("h264", "avc1", Fraction(16, 9)) and numbers(frames) == list(range(12))


@pytest.mark.parametrize("codec", ["prores_ks", "libx264"])
@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_and_mirrored_pictures(tmp_path, codec, rotation, mirrored):
    movie = dataclasses.replace(
        MUTE, codec=codec, container="mov", count=3, rotation=rotation, mirrored=mirrored
    )
    path = make(tmp_path / "turned.mov", movie)
    frames = muxed(path, tmp_path)[0]
    assert [number(upright(f.to_ndarray(format="rgb24"), f)) for f in frames] == [0, 1, 2]
    for file in (path, tmp_path / "out.mp4"):
        shown = read_frames(file, {25: np.copy})[25]
        assert [number(frame) for frame in shown] == [0, 1, 2]
        assert shown.shape[1:3] == ((64, 48) if rotation % 180 else (48, 64))


@pytest.mark.parametrize(
    "codec, container",
    [("ffv1", "matroska"), ("mjpeg", "mov"), ("mpeg2video", "mpeg"), ("libvpx", "webm")],
)
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_what_few_players_show_is_encoded(tmp_path, codec, container, suffix):
    path = make(tmp_path / "a", dataclasses.replace(MUTE, codec=codec, container=container))
    mux_audio(path, noise(1.0)[0], RATE, tmp_path / f"out.{suffix}")
    with av.open(str(tmp_path / f"out.{suffix}")) as out:
        assert out.streams.video[0].codec_context.name == "h264"


@pytest.mark.parametrize("codec", ["ffv1", "mjpeg", "png", "prores_ks", "libvpx"])
@pytest.mark.parametrize("tags", [(1, 1, 1, 1), (1, 5, 6, 6), (2, 1, 1, 1)])
def test_colours_stay(tmp_path, codec, tags):
    """Bars of colour, in two colour spaces and both ranges, look the same after encoding."""
    bars = np.array([[220, 40, 40], [40, 200, 40], [40, 40, 220], [200, 200, 40], [30, 30, 30],
                     [230, 230, 230]], np.uint8)  # fmt: skip
    picture = np.repeat(np.repeat(bars[None], 16, axis=1), 64, axis=0)
    container = {"ffv1": "matroska", "libvpx": "webm"}.get(codec, "mov")
    movie = dataclasses.replace(
        MUTE, codec=codec, container=container, count=2, size=(96, 64), tags=tags
    )
    path = make(tmp_path / "a", movie, [picture] * 2)
    before = read_frames(path, {25: np.copy})[25]
    mux_audio(path, noise(1.0)[0], RATE, tmp_path / "out.mp4")
    after = read_frames(tmp_path / "out.mp4", {25: np.copy})[25]
    inside = np.arange(96) % 16 // 4 % 3 > 0  # away from the edges
    difference = np.abs(before[0].astype(int) - after[0])[:, inside]
    assert difference.mean() < 3 and difference.max() < 25


def test_odd_sizes_are_kept(tmp_path):
    movie = dataclasses.replace(MUTE, codec="ffv1", container="matroska", size=(67, 49))
    frames, about, *_ = muxed(make(tmp_path / "odd.mkv", movie), tmp_path)
    assert about[0] == "vp9" and (frames[0].width, frames[0].height) == (67, 49)


def test_a_size_that_changes_in_the_middle(tmp_path):
    """Joined recordings of two sizes: read, and written, in the size of the first."""
    movie = Movie(container="mpegts", b_frames=2, layout=None)
    small = make(tmp_path / "a.ts", movie).read_bytes()
    large = make(tmp_path / "b.ts", dataclasses.replace(movie, size=(96, 80))).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(small + large)
    shown = read_frames(path, {25: np.copy})[25]
    assert shown.shape[1:] == (48, 64, 3)
    assert [number(frame) for frame in shown] == 2 * list(range(12))
    frames, *_ = muxed(path, tmp_path)
    assert numbers(frames) == 2 * list(range(12))
    assert {(frame.width, frame.height) for frame in frames} == {(64, 48)}


def test_a_recording_that_begins_between_key_frames(tmp_path, monkeypatch):
    """MPEG-TS cut anywhere: the picture starts with the first key frame, and so does time."""
    monkeypatch.delattr(write, "encoded_picture")  # what is left can be copied
    movie = Movie(container="mpegts", count=24, group=8, sound=24 / 25)
    whole = make(tmp_path / "whole.ts", movie)
    path = tmp_path / "cut.ts"
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        pictures = 0
        for packet in old.demux():
            pictures += packet.stream.type == "video"
            if packet.dts is not None and pictures > 3:
                packet.stream = streams[packet.stream.index]
                new.mux(packet)
    with av.open(str(path)) as container:
        assert not next(container.demux(video=0)).is_keyframe
    shown = read_frames(path, {25: np.copy})[25]
    assert [number(frame) for frame in shown] == list(range(8, 24))
    sound, before = read_audio(path, RATE), read_audio(whole, RATE)[round(8 / 25 * RATE) :]
    assert np.corrcoef(sound[2000:8000], before[2000:8000])[0, 1] > 0.9
    frames, _, _, times = muxed(path, tmp_path)
    assert numbers(frames) == list(range(8, 24)) and times[0] == 0


@pytest.mark.parametrize("damage", [b"\xff" * 40, b"\0" * 40], ids=["ones", "zeros"])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "libvpx-vp9"])
def test_damage_is_not_copied(tmp_path, codec, damage):
    """What is written decodes without an error, and only the damaged frames are gone."""
    path = make(
        tmp_path / "a.mp4", dataclasses.replace(MUTE, codec=codec, count=24, size=(128, 64))
    )
    data, packets = bytearray(path.read_bytes()), payload(path)
    at = data.index(packets[9])
    data[at : at + len(damage)] = damage
    path.write_bytes(data)
    frames, *_ = muxed(path, tmp_path)  # `muxed` decodes strictly
    assert 12 <= len(frames) <= 24


def test_malformed_packets():
    avcc, sps, slice_ = b"\1\x64\0\x0a\xff\xe1\0\4\x67abc", b"\0\0\0\4\x67abc", b"\0\0\0\3\x65xy"
    check_packet("h264", avcc, sps + slice_)
    with pytest.raises(Malformed, match="parameters that change"):
        check_packet("h264", avcc, b"\0\0\0\4\x67abd" + slice_)
    for bad in (slice_ + b"\0", b"\0\0\0\7\x65xy", b"\0\0\0\0", b"\0\0\0\3\xe5xy"):
        with pytest.raises(Malformed, match="damaged"):
            check_packet("h264", avcc, bad)
    streamed = b"\0\0\0\1\x67abc\0\0\1\x68d"
    check_packet("h264", streamed, streamed + b"\0\0\1\x65xy")
    with pytest.raises(Malformed, match="damaged"):
        check_packet("h264", streamed, b"xyz")
    with pytest.raises(Malformed, match="no parameters"):
        check_packet("hevc", None, slice_)
    with pytest.raises(Malformed, match="one frame each"):
        check_packet("mpeg4", b"x", b"\0\0\1\xb6a\0\0\1\xb6b")


def test_a_copy_that_differs_is_not_kept(tmp_path, monkeypatch):
    """Whatever goes wrong in copying, the written file is compared with the original."""
    path = make(tmp_path / "a.mp4", dataclasses.replace(MUTE, b_frames=2))
    copied = remux.copied_picture

    def swap(packets):
        packets[1].pts, packets[2].pts = packets[2].pts, packets[1].pts

    def stretch(packets):
        packets[-1].pts += 100

    for spoil in (list.pop, lambda packets: packets.pop(3), swap, stretch):

        def spoiled(source, output, duration, spoil=spoil):
            packets, seconds = copied(source, output, duration)
            spoil(packets)
            return packets, seconds

        monkeypatch.setattr(write, "copied_picture", spoiled)
        frames, _, _, times = muxed(path, tmp_path)
        assert numbers(frames) == list(range(12))
        np.testing.assert_allclose(times, np.arange(12) / 25)
        monkeypatch.setattr(write, "copied_picture", copied)


def test_nothing_is_left_where_neither_way_works(tmp_path, monkeypatch):
    path = make(tmp_path / "a.mp4", MUTE)

    def fails(source, output, duration):
        raise av.error.InvalidDataError(1, "no such luck")

    monkeypatch.setattr(write, "encoded_picture", fails)
    monkeypatch.setattr(write, "copied_picture", fails)
    with pytest.raises(MediaError, match=r"a.mp4: cannot be written as mp4 \(no such luck\)"):
        mux_audio(path, noise(1.0)[0], RATE, tmp_path / "out.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_is_not_the_fault_of_the_video(tmp_path):
    path = make(tmp_path / "a.mp4", MUTE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="out.mp4") as error:
            mux_audio(path, noise(1.0)[0], RATE, tmp_path / "out.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_cut_reads_no_more_than_it_needs(tmp_path, monkeypatch):
    path = make(tmp_path / "long.mp4", dataclasses.replace(MUTE, count=32, rate=Fraction(4)))
    seen = []
    check = remux.check_packet
    monkeypatch.setattr(remux, "check_packet", lambda *a: (seen.append(1), check(*a)))
    frames, _, seconds, _ = muxed(path, tmp_path, duration=1.0)
    assert numbers(frames) == [0, 1, 2, 3] and seconds == pytest.approx(1.0) and len(seen) == 4


def test_the_blocks_tell_numbers():
    assert [number(image(i, 64, 48)) for i in range(32)] == list(range(32))
    assert number(image(5, 64, 48)[::-1]) != 5
