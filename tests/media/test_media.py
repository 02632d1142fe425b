import struct
from fractions import Fraction

import av
import librosa
import numpy as np
import pytest
import soundfile

from vcm_jax.media.read import MediaError, MediaInfo, is_silent, probe, read_audio, read_frames
from vcm_jax.media.write import mux_audio, write_mp4, write_sound

RATE = 16_000
EVENTS = (0.4, 1.0, 1.72, 2.2)  # seconds; whole frames at 25 fps


def mean(frame):
    return frame.mean()


def lag(sound, reference) -> int:
    """Samples by which `sound` comes later than `reference`."""
    n = min(len(sound), len(reference))
    spectrum = np.fft.rfft(sound[:n], 2 * n) * np.conj(np.fft.rfft(reference[:n], 2 * n))
    best = int(np.argmax(np.fft.irfft(spectrum)))
    return best if best < n else best - 2 * n


def clicks(seconds: float, rate: int = RATE) -> np.ndarray:
    rng = np.random.default_rng(0)
    sound = 0.01 * rng.standard_normal(round(seconds * rate))
    for time in EVENTS:
        start = round(time * rate)
        sound[start : start + 200] += 0.5 * rng.uniform(-1, 1, len(sound[start : start + 200]))
    return sound.astype(np.float32)


def flashes(count: int, fps: float) -> np.ndarray:
    frames = np.full((count, 64, 48, 3), 20, np.uint8)
    for time in EVENTS:
        frames[round(time * fps) : round(time * fps) + 3] = 220
    return frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def clip(folder):
    """64 frames at 25 fps that flash when the sound clicks."""
    path = folder / "clip.mp4"
    write_mp4(path, flashes(64, 25), 25, clicks(2.56), RATE)
    return path


def test_probe(clip):
    info = probe(clip)
    assert info == MediaInfo(2.56, 25.0, 48, 64, True, True)


def test_picture_and_sound_come_back_when_they_happened(clip):
    frames = read_frames(clip, {8: mean, 25: mean}, 2.56)
    assert frames[25].shape == (64,) and frames[8].shape == (20,)
    starts = np.flatnonzero(np.diff(frames[25]) > 100) + 1
    np.testing.assert_array_equal(starts / 25, EVENTS)
    sound = read_audio(clip, RATE)
    assert sound.dtype == np.float32 and len(sound) == round(2.56 * RATE)
    assert lag(sound, clicks(2.56)) == 0
    assert np.corrcoef(sound, clicks(2.56))[0, 1] > 0.9


@pytest.mark.parametrize("rate", [22_050, 44_100])
def test_resampled_sound_stays_in_time(clip, rate):
    sound = read_audio(clip, rate)
    reference = librosa.resample(clicks(2.56), orig_sr=RATE, target_sr=rate)
    assert len(sound) == len(reference) and lag(sound, reference) == 0


def test_read_audio_cuts_pads_and_insists(clip):
    whole = read_audio(clip, RATE)
    np.testing.assert_array_equal(read_audio(clip, RATE, 1000), whole[:1000])
    padded = read_audio(clip, RATE, 50_000)
    np.testing.assert_array_equal(padded[: len(whole)], whole)
    assert len(padded) == 50_000 and not padded[len(whole) :].any()
    assert len(read_audio(clip, RATE, shortest=2.6)) == len(whole)
    with pytest.raises(MediaError, match=r"clip.mp4: 2.56 s of sound, shorter than the 3 s"):
        read_audio(clip, RATE, shortest=3)


def test_the_frame_that_the_filter_lacks_is_repeated(folder):
    path = folder / "slow.mp4"
    ramp = np.arange(20, dtype=np.uint8)[:, None, None, None] * 10
    write_mp4(path, np.broadcast_to(ramp, (20, 16, 16, 3)), 10)
    frames = read_frames(path, {25: mean, 7: mean}, 2.09)
    assert len(frames[25]) == 52 and len(frames[7]) == 14
    # FFmpeg's fps filter: source frame i shows from output frame round(2.5 i) on.
    np.testing.assert_allclose(frames[25][:8], [0, 0, 0, 10, 10, 20, 20, 20], atol=2)
    np.testing.assert_array_equal(frames[25][50:], frames[25][49])
    assert len(read_frames(path, {25: mean})[25]) == 50
    with pytest.raises(MediaError, match=r"slow.mp4: 2.00 s of picture, shorter than the 2.2 s"):
        read_frames(path, {25: mean}, 2.2)


def remux(source, target, video_shift: float, audio_shift: float):
    """Copies the streams of `source`, shifted in time (seconds), into another container."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        for packet in old.demux():
            if packet.dts is None:
                continue
            shift = video_shift if packet.stream.type == "video" else audio_shift
            ticks = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
            packet.stream = streams[packet.stream.index]
            new.mux(packet)


@pytest.mark.parametrize("delay", [0.0, 0.25, -0.25])
def test_time_stamps_that_start_elsewhere(clip, folder, delay):
    path = folder / f"shifted{delay}.mkv"
    remux(clip, path, 1.0, 1.0 + delay)
    frames = read_frames(path, {25: mean}, 2.4)[25]
    np.testing.assert_allclose(frames, read_frames(clip, {25: mean}, 2.4)[25])
    sound, original = read_audio(path, RATE), read_audio(clip, RATE)
    # Matroska counts in milliseconds; the decoder's first 1024 samples may be there or not.
    assert abs(lag(sound, original) - delay * RATE) <= RATE / 1000
    assert not sound[: int(max(delay - 0.07, 0) * RATE)].any()


def test_turned_video(clip, folder):
    """The display matrix of a phone's video: turned by 90 degrees clockwise."""
    frames = np.zeros((10, 32, 48, 3), np.uint8)
    frames[:, :16] = 200  # the upper half is bright
    path = folder / "turned.mp4"
    write_mp4(path, frames, 25, clicks(0.4), RATE)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16
    one = 1 << 16
    assert struct.unpack_from(">9i", data, matrix) == (one, 0, 0, 0, one, 0, 0, 0, one << 14)
    struct.pack_into(">9i", data, matrix, 0, one, 0, -one, 0, 0, 0, 0, one << 14)
    path.write_bytes(data)
    frame = read_frames(path, {25: np.copy}, 0.4)[25][0]
    assert frame.shape == (48, 32, 3)
    assert frame[:, 20:].mean() > 180 and frame[:, :12].mean() < 20
    copy = folder / "turned_copy.mp4"
    mux_audio(path, clicks(0.4), RATE, copy)
    np.testing.assert_array_equal(read_frames(copy, {25: np.copy}, 0.4)[25][0], frame)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_new_sound_under_the_old_picture(clip, folder, rate):
    path, sound = folder / f"new{rate}.mp4", clicks(4.0, rate)[::-1].copy()
    assert mux_audio(clip, sound, rate, path) == pytest.approx(2.56)
    back = read_audio(path, rate)
    assert len(back) == round(2.56 * rate) and lag(back, sound) == 0
    assert probe(path) == probe(clip)
    with av.open(str(clip)) as old, av.open(str(path)) as new:
        packets = [[bytes(p) for p in c.demux(video=0) if p.size] for c in (old, new)]
    assert packets[0] == packets[1]  # copied, not encoded again


def test_mux_cuts_the_picture_and_pads_the_sound(clip, folder):
    path = folder / "cut.mov"
    seconds = mux_audio(clip, clicks(0.5), RATE, path, duration=1.2)
    assert 1.2 <= seconds <= 1.2 + 4 / 25
    assert probe(path).duration == pytest.approx(seconds)
    back = read_audio(path, RATE)
    assert len(back) == round(seconds * RATE) and np.abs(back[9000:]).max() < 1e-3
    frames = read_frames(path, {25: mean}, seconds)[25]
    assert len(frames) == round(seconds * 25)
    np.testing.assert_allclose(frames, read_frames(clip, {25: mean}, seconds)[25])


def test_mux_encodes_what_mp4_cannot_hold(folder):
    webm, path = folder / "clip.webm", folder / "from_webm.mp4"
    with av.open(str(webm), "w") as output:
        stream = output.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 64, "yuv420p"
        for array in flashes(64, 25):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        output.mux(stream.encode(None))
    assert mux_audio(webm, clicks(2.56), RATE, path) == pytest.approx(2.56)
    frames = read_frames(path, {25: mean}, 2.56)[25]
    np.testing.assert_array_equal((np.flatnonzero(np.diff(frames) > 100) + 1) / 25, EVENTS)
    assert lag(read_audio(path, RATE), clicks(2.56)) == 0


def test_sound_files_give_the_mean_of_their_channels(folder):
    time = np.arange(44_100) / 44_100
    sounds = [0.5 * np.sin(2 * np.pi * f * time) for f in (300, 700)]
    for suffix in ("wav", "flac", "ogg", "mp3"):
        path = folder / f"två [1] sounds.{suffix}"
        soundfile.write(path, np.stack(sounds, 1), 44_100)
        sound = read_audio(path, RATE)
        assert abs(len(sound) - RATE) < 0.06 * RATE  # lossy formats add a few milliseconds
        if suffix in ("wav", "flac"):
            assert len(sound) == RATE
            expected = librosa.resample(np.mean(sounds, 0), orig_sr=44_100, target_sr=RATE)
            np.testing.assert_allclose(sound[100:-100], expected[100:-100], atol=1e-3)
    assert probe(path).has_video is False


def test_a_gap_in_the_sound_stays_a_gap(clip, folder):
    path = folder / "gap.mkv"
    with av.open(str(clip)) as old, av.open(str(path), "w") as new:
        stream = old.streams.audio[0]
        target = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None and not 0.5 < packet.pts * packet.time_base < 1.0:
                packet.stream = target
                new.mux(packet)
    sound, whole = read_audio(path, RATE), clicks(2.56)
    assert not sound[10_000:15_000].any()
    # Matroska counts in milliseconds (and keeps the 1024 samples that AAC starts with).
    before = lag(sound[:8000], whole[:8000])
    assert abs(lag(sound[18_000:], whole[18_000:]) - before) <= RATE / 1000


def test_bad_files_get_one_line(clip, folder):
    cases = {"missing.mp4": "no such file", "garbage.mp4": "unreadable", "empty.mp4": "unreadable"}
    (folder / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "half.mp4").write_bytes(clip.read_bytes()[:9000])
    for name, reason in (cases | {"half.mp4": "unreadable"}).items():
        for read in (
            probe,
            lambda path: read_frames(path, {25: mean}, 1),
            lambda path: read_audio(path, RATE),
            lambda path: mux_audio(path, clicks(1), RATE, folder / "never.mp4"),
        ):
            with pytest.raises(MediaError, match=f"{name}: {reason}") as caught:
                read(folder / name)
            assert "\n" not in str(caught.value)
    assert not (folder / "never.mp4").exists() and not list(folder.glob(".*"))


def test_missing_streams(folder):
    write_mp4(folder / "mute.mp4", flashes(10, 25), 25)
    write_sound(folder / "sound.wav", clicks(1.0), RATE)
    with pytest.raises(MediaError, match="mute.mp4: no audio stream"):
        read_audio(folder / "mute.mp4", RATE)
    with pytest.raises(MediaError, match="sound.wav: no video stream"):
        read_frames(folder / "sound.wav", {25: mean}, 1)
    assert lag(read_audio(folder / "sound.wav", RATE), clicks(1.0)) == 0


def test_nothing_half_written(folder):
    def frames():
        yield np.zeros((16, 16, 3), np.uint8)
        raise RuntimeError("the renderer broke")

    before = set(folder.iterdir())
    with pytest.raises(RuntimeError):
        write_mp4(folder / "broken.mp4", frames(), 25)
    with pytest.raises(ValueError, match="even"):
        write_mp4(folder / "broken.mp4", np.zeros((2, 15, 16, 3), np.uint8), 25)
    with pytest.raises(ValueError, match="no frames"):
        write_mp4(folder / "broken.mp4", [], 25)
    assert set(folder.iterdir()) == before


def test_fractional_frame_rate(folder):
    path = folder / "ntsc.mp4"
    write_mp4(path, flashes(60, 30_000 / 1001), 30_000 / 1001)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == Fraction(30_000, 1001)
    assert len(read_frames(path, {8: mean}, 2.0)[8]) == 16
    # The sound is as long as the picture although that is no whole number of milliseconds.
    path = folder / "ntsc_cut.mp4"
    seconds = mux_audio(folder / "ntsc.mp4", clicks(2.56), RATE, path, duration=1.5)
    assert len(read_audio(path, RATE)) == round(seconds * RATE)


def test_silence():
    assert is_silent(np.zeros(100, np.float32))
    assert is_silent(np.full(100, 1e-6, np.float32))
    assert not is_silent(np.r_[np.zeros(100), 1e-3])


def test_edit_list_with_discarded_frames(shared, folder):
    """A public clip cut out of a longer one: 55 frames before time 0 are needed for decoding."""
    path = shared("../media/video/F8Zt3mYlOqU_000094.mp4")
    copy = folder / "copy.mp4"
    noise = 0.1 * np.random.default_rng(0).standard_normal(12 * RATE).astype(np.float32)
    seconds = mux_audio(path, noise, RATE, copy)
    sound = read_audio(copy, RATE)
    assert len(sound) == round(seconds * RATE) and lag(sound, noise) == 0
    frames, original = (read_frames(p, {25: mean}, 1.0)[25] for p in (copy, path))
    np.testing.assert_array_equal(frames, original)
