"""Writing of videos and sounds.

Everything goes through FFmpeg's libraries (PyAV); sounds are written by libsndfile (soundfile).
"""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile

from vcm_jax.atomic import atomic_path
from vcm_jax.media.read import _opened, _video_stream

_X264 = {"preset": "veryfast", "crf": "18"}
_AAC_BIT_RATE = 128_000


def _mp4_output(path, container: str, sample_rate: int):
    """An output whose edit lists count in samples: in milliseconds, the default, sounds grow."""
    options = {"movie_timescale": str(sample_rate or 1000)}
    return av.open(str(path), "w", format=container, options=options)


def _audio_packets(output, audio: np.ndarray, sample_rate: int) -> list:
    """Encode a mono sound as AAC in a new stream of `output`."""
    stream = output.add_stream("aac", rate=sample_rate, layout="mono", bit_rate=_AAC_BIT_RATE)
    samples = np.clip(np.asarray(audio, np.float32), -1, 1)[None]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", "mono")
    frame.sample_rate, frame.pts, frame.time_base = sample_rate, 0, Fraction(1, sample_rate)
    return stream.encode(frame) + stream.encode(None)


def _mux(output, packets):
    """Write packets of several streams in the order of their decoding times."""
    output.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))


def write_mp4(path, frames: Iterable[np.ndarray], fps: float, audio=None, sample_rate: int = 0):
    """Write frames and a mono sound as H.264 and AAC, atomically.

    Args:
      path: of the mp4 file.
      frames: (H, W, 3) uint8 each, H and W even; any iterable.
      fps: frame rate in Hz.
      audio: (samples,) float in [-1, 1] (clipped), or None for a file without an audio stream.
      sample_rate: Hz.

    Raises:
      ValueError: no frames, an odd size, or an audio that is not one-dimensional.
    """
    if audio is not None and np.ndim(audio) != 1:
        raise ValueError(f"{path}: the sound must be (samples,), not {np.shape(audio)}")
    with atomic_path(path) as temporary, _mp4_output(temporary, "mp4", sample_rate) as output:
        stream, packets = None, []
        for array in frames:
            if stream is None:
                height, width = array.shape[:2]
                if height % 2 or width % 2:
                    raise ValueError(f"{path}: H.264 needs an even frame size, not {array.shape}")
                rate = Fraction(fps).limit_denominator(100_000)
                stream = output.add_stream("libx264", rate=rate, options=_X264)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            packets += stream.encode(frame)
        if stream is None:
            raise ValueError(f"{path}: no frames to write")
        packets += stream.encode(None)
        if audio is not None:
            packets += _audio_packets(output, audio, sample_rate)
        _mux(output, packets)


def _copied_picture(source, video, output, duration):
    """Packets of the picture as they are, moved to time 0; (packets, seconds)."""
    stream = output.add_stream_from_template(video)
    packets = []
    for packet in source.demux(video):
        if packet.dts is not None:  # the flushing packet at the end has none
            packet.pts = packet.dts if packet.pts is None else packet.pts  # AVI has only these
            packets.append(packet)
    start, base = video.start_time or 0, video.time_base
    if duration is not None:
        # Frames are stored in decoding order: cut after the last one shown before `duration`, at
        # the next place where all that is kept is shown before all that is not.
        pts = np.array([packet.pts for packet in packets])
        inside = np.flatnonzero((pts - start) * float(base) < duration - 1e-6)
        latest = np.maximum.accumulate(pts)
        next_up = np.append(np.minimum.accumulate(pts[::-1])[::-1][1:], pts.max() + 1)
        last = inside.max(initial=0)
        packets = packets[: last + int(np.argmax((latest < next_up)[last:])) + 1]
    # Players never show what an edit list cuts off: before time 0 it is needed for decoding.
    while packets[-1].is_discard and len(packets) > 1:
        packets.pop()
    end = max(packet.pts + (packet.duration or 0) for packet in packets)
    for packet in packets:
        packet.pts -= start
        packet.dts -= start
        packet.stream = stream
    return packets, float((end - start) * base)


def _encoded_picture(source, video, output, duration):
    """The picture decoded and encoded again as H.264; (packets, seconds)."""
    rate = Fraction(video.average_rate or video.guessed_rate or 25)
    stream = output.add_stream("libx264", rate=rate, options=_X264)
    stream.width, stream.height = video.width // 2 * 2, video.height // 2 * 2
    stream.pix_fmt, stream.codec_context.time_base = "yuv420p", video.time_base
    start, packets, end = video.start_time or 0, [], Fraction(0)
    for frame in source.decode(video):
        time = (frame.pts - start) * video.time_base
        if duration is not None and time > duration - 1e-6:
            break
        frame = frame.reformat(stream.width, stream.height, "yuv420p")
        frame.pts, frame.time_base = frame.pts - start, video.time_base
        frame.pict_type = av.video.frame.PictureType.NONE  # the encoder places its own key frames
        packets += stream.encode(frame)
        end = time + 1 / rate
    return packets + stream.encode(None), float(end)


def mux_audio(video_path, audio: np.ndarray, sample_rate: int, out_path, duration=None) -> float:
    """Write a video's own picture with a new sound, atomically.

    The picture is copied as it is stored where mp4 can hold its codec, otherwise encoded as H.264.

    Args:
      video_path: where the picture comes from.
      audio: (samples,) float in [-1, 1], mono; cut or zero-padded to the picture's length.
      sample_rate: Hz.
      out_path: mp4 or mov file.
      duration: seconds of the picture to keep, to the next frame that can be cut at; None: all.

    Returns:
      Seconds of the picture (and sound) written.

    Raises:
      MediaError: the video is missing, unreadable or has no picture.
    """
    container = "mov" if Path(out_path).suffix.lower() == ".mov" else "mp4"
    with atomic_path(out_path) as temporary, _opened(video_path) as source:
        video = _video_stream(source, video_path)
        with _mp4_output(temporary, container, sample_rate) as output:
            fits = video.codec_context.name in output.supported_codecs
            picture = _copied_picture if fits else _encoded_picture
            packets, seconds = picture(source, video, output, duration)
            samples = round(seconds * sample_rate)
            sound = np.pad(audio[:samples], (0, max(0, samples - len(audio))))
            _mux(output, packets + _audio_packets(output, sound, sample_rate))
    return seconds


def write_sound(path, audio: np.ndarray, sample_rate: int):
    """Write a mono sound (samples,), clipped to [-1, 1], as 16-bit .wav or .flac, atomically."""
    kind = Path(path).suffix[1:].upper()
    with atomic_path(path) as temporary:
        soundfile.write(temporary, np.clip(audio, -1, 1), sample_rate, "PCM_16", format=kind)
