"""Sounds as they are found: tracks, channels, formats that change, and damage."""

import logging as python_logging

import av
import numpy as np
import pytest
import soundfile
from media_files import RATE, Movie, make, noise, sound_packets

from vcm_jax.media.read import MediaError, is_silent, probe, read_audio

SECONDS = 1.5
TONE = 0.3 * np.sin(2 * np.pi * 440 * np.arange(round(SECONDS * RATE)) / RATE)


def rms(sound) -> float:
    return float(np.sqrt(np.mean(np.square(sound))))


def correlation(a, b) -> float:
    n = min(len(a), len(b))
    return float(np.corrcoef(a[:n], b[:n])[0, 1])


def tracks(path, *rows, default: int | None = None, **kwargs):
    """Write a Matroska file of several FLAC tracks, (channels, samples) each, no picture."""
    with av.open(str(path), "w", format="matroska", **kwargs) as output:
        packets = []
        for i, samples in enumerate(rows):
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
            stream = output.add_stream("flac", rate=RATE, layout=layout)
            stream.disposition = int(i == default)
            packets += sound_packets(stream, np.asarray(samples, np.float32))
        output.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))
    return path


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the package warns of."""
    monkeypatch.setattr(python_logging.getLogger("absl"), "propagate", True)
    caplog.set_level("WARNING")
    return lambda: [record.getMessage() for record in caplog.records]


def test_the_default_track_is_read(tmp_path):
    silence = np.zeros((1, len(TONE)))
    path = tracks(tmp_path / "a.mkv", silence, TONE[None], default=1)
    assert correlation(read_audio(path, RATE), TONE) > 0.99
    other = noise(SECONDS)
    path = tracks(tmp_path / "b.mkv", other, TONE[None], default=1)
    assert correlation(read_audio(path, RATE), TONE) > 0.99


def test_a_silent_track_gives_way_to_one_that_is_not(tmp_path, warnings):
    silence = np.zeros((1, len(TONE)))
    path = tracks(tmp_path / "a.mkv", silence, silence, TONE[None], default=0)
    assert correlation(read_audio(path, RATE), TONE) > 0.99
    assert any("a.mkv" in line and "silent" in line for line in warnings())
    path = tracks(tmp_path / "b.mkv", silence, silence)
    assert is_silent(read_audio(path, RATE))


def test_channels_that_cancel(tmp_path, warnings):
    path = tmp_path / "inverted.wav"
    soundfile.write(path, np.stack([TONE, -TONE], 1), RATE)
    assert correlation(read_audio(path, RATE), TONE) > 0.99
    assert any("inverted.wav" in line and "cancel" in line for line in warnings())
    # A codec leaves some noise of the sum; stereo that is merely wide keeps its mean.
    soundfile.write(path, np.stack([TONE, -0.99 * TONE], 1), RATE)
    assert rms(read_audio(path, RATE)) == pytest.approx(rms(TONE), rel=0.02)
    left, right = noise(1.0)[0], noise(1.0, seed=1)[0]
    soundfile.write(path, np.stack([left, right], 1), RATE, "FLOAT")
    np.testing.assert_allclose(read_audio(path, RATE), (left + right) / 2, atol=1e-6)


def test_numbers_that_are_none(tmp_path):
    for value, where in ((np.nan, 100), (np.inf, 8000)):
        sound = TONE.astype(np.float32).copy()
        sound[where] = value
        soundfile.write(tmp_path / "broken.wav", sound, RATE, "FLOAT")
        with pytest.raises(
            MediaError, match="broken.wav: 1 samples .* are NaN or infinite"
        ) as caught:
            read_audio(tmp_path / "broken.wav", RATE)
        assert f"{where / RATE:.3f} s" in str(caught.value)
    assert not is_silent(np.array([0.0, np.nan]))


def test_surround_sound_is_mixed_as_ffmpeg_does(tmp_path):
    """5.1 is FL FR FC LFE BL BR; ITU-R BS.775 weights, scaled to a sum of 1; no LFE."""
    weights = np.array([0.5**0.5, 0.5**0.5, 1, 0, 0.5, 0.5])
    weights /= weights.sum()
    sounds = np.stack([noise(SECONDS, seed=i)[0] for i in range(6)])
    path = tracks(tmp_path / "a.mkv", sounds)
    np.testing.assert_allclose(read_audio(path, RATE), weights @ sounds, atol=1e-3)
    speech = np.zeros((6, len(TONE)))
    speech[2] = TONE
    path = tracks(tmp_path / "b.mkv", speech)
    assert rms(read_audio(path, RATE)) == pytest.approx(weights[2] * rms(TONE), rel=0.01)


def adts(path, samples, rate: int = RATE):
    """A stream of AAC packets that can be joined with others."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(str(path), "w", format="adts") as output:
        stream = output.add_stream("aac", rate=rate, layout=layout, bit_rate=128_000)
        output.mux(list(sound_packets(stream, np.asarray(samples, np.float32))))
    return path.read_bytes()


def test_formats_that_change_in_the_middle(tmp_path):
    """Mono, stereo, 5.1 and another sample rate in one stream: each in its place, at its level."""
    tone = TONE[None].astype(np.float32)
    surround = np.zeros((6, len(TONE)), np.float32)
    surround[:2] = tone
    kinds = [(tone, RATE), (np.repeat(tone, 2, 0), RATE), (surround, RATE), (tone, 44_100)]
    path = tmp_path / "joined.aac"
    path.write_bytes(b"".join(adts(tmp_path / "part.aac", *kind) for kind in kinds))
    sound = read_audio(path, RATE)
    assert abs(len(sound) - 4 * len(TONE)) < 0.4 * RATE  # AAC pads each part
    quarters = np.array_split(sound, 4)
    levels = [rms(quarter[4000:-4000]) for quarter in quarters]
    front = 2 * 0.5**0.5 / (1 + 2 * 0.5**0.5 + 1)
    np.testing.assert_allclose(levels, rms(TONE) * np.array([1, 1, front, 1]), rtol=0.05)
    for quarter in quarters:
        spectrum = np.abs(np.fft.rfft(quarter[4000:-4000]))
        hertz = np.fft.rfftfreq(len(quarter) - 8000, 1 / RATE)[spectrum.argmax()]
        assert hertz == pytest.approx(440, abs=2)


def test_a_few_damaged_packets_are_left_out_in_place(tmp_path, warnings):
    """What comes after the damage still sounds when it should."""
    original = noise(4.0)
    path = tmp_path / "a.mp4"
    make(path, Movie(sound=4.0))
    whole = read_audio(path, RATE)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    at = data.index(packets[20])
    data[at : at + 40] = np.random.default_rng(0).bytes(40)
    path.write_bytes(data)
    sound = read_audio(path, RATE)
    assert len(sound) == len(whole)
    assert correlation(sound[40_000:], original[0][40_000:]) > 0.9
    assert any("a.mp4: skipped" in line and "of the sound" in line for line in warnings())


@pytest.mark.parametrize("suffix", ["mp3", "aac", "ogg", "flac"])
def test_damage_in_the_middle_of_a_sound(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "aac":
        adts(path, noise(4.0))
    else:
        soundfile.write(path, noise(4.0)[0], RATE)
    whole = read_audio(path, RATE)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 700] = np.random.default_rng(1).bytes(700)
    path.write_bytes(data)
    sound = read_audio(path, RATE)
    assert len(whole) - RATE <= len(sound) <= len(whole) + 0.1 * RATE
    assert correlation(sound[:RATE], whole) > 0.9
    data[len(data) // 10 :] = np.random.default_rng(2).bytes(len(data) - len(data) // 10)
    path.write_bytes(data)
    try:
        assert len(read_audio(path, RATE)) < len(whole) / 2  # honest about what is left
    except MediaError as error:
        assert "damaged" in str(error) or "unreadable" in str(error) or "empty" in str(error)


def test_mostly_damaged_sound_is_refused(tmp_path):
    path = make(tmp_path / "a.mp4", Movie(sound=4.0))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(audio=0) if packet.size]
    for packet in packets[5:50]:
        at = data.index(packet)
        data[at : at + len(packet)] = b"\xff" * len(packet)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"a.mp4: damaged: \d+ of \d+ packets of the sound"):
        read_audio(path, RATE)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "ogg", "flac"])
def test_how_long_a_sound_is(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, TONE, RATE)
    info = probe(path)
    assert info.duration == pytest.approx(SECONDS, abs=0.15) and not info.has_video
    assert info.duration == pytest.approx(len(read_audio(path, RATE)) / RATE, abs=0.1)


def test_a_time_stamp_hours_ahead(tmp_path):
    path = tmp_path / "leap.mkv"
    plain = tracks(tmp_path / "plain.mkv", TONE[None])
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.audio[0])
        for i, packet in enumerate(old.demux(audio=0)):
            if packet.size:
                packet.pts = packet.dts = packet.pts + (10**8 if i > 3 else 0)
                packet.stream = stream
                new.mux(packet)
    with pytest.raises(MediaError, match="leap.mkv: the time stamps of its sound leap ahead"):
        read_audio(path, RATE)
