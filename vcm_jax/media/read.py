"""Reading of videos and sounds.

Time zero of a file is the start of its picture, for the picture and for the sound alike (a sound
file starts with its first sample). Everything goes through FFmpeg's libraries (PyAV).
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

_GAP = 0.1  # s; FFmpeg's own limit (min_hard_comp) between jittering time stamps and a real gap
_CODEC_FRAME = 2048  # samples in the longest frame of AAC


class MediaError(ValueError):
    """A media file that cannot be used; the one-line message names the file and says why."""


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a file's headers say.

    Attributes:
      duration: seconds of the picture, or of the sound when there is no picture.
      fps: mean frame rate in Hz (0 without picture).
      width, height: pixels as stored, before any rotation (0 without picture).
      has_video, has_audio: whether there are such streams (cover art is not a video).
    """

    duration: float
    fps: float
    width: int
    height: int
    has_video: bool
    has_audio: bool


@contextlib.contextmanager
def _opened(path):
    """An open input container; whatever FFmpeg has to complain about becomes a MediaError."""
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such file")
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            yield container
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: unreadable ({reason})") from error


def _picture(container):
    """The first video stream that is not cover art, or None."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def _video_stream(container, path):
    stream = _picture(container)
    if stream is None:
        raise MediaError(f"{path}: no video stream")
    return stream


def _start(stream) -> float:
    return float((stream.start_time or 0) * stream.time_base)


def probe(path) -> MediaInfo:
    """Read a file's headers, decoding nothing.

    Raises:
      MediaError: the file is missing, unreadable, or has neither picture nor sound.
    """
    with _opened(path) as container:
        video = _picture(container)
        audio = container.streams.audio[0] if container.streams.audio else None
        stream = video or audio
        if stream is None:
            raise MediaError(f"{path}: neither a video nor an audio stream")
        if stream.duration is not None:
            duration = float(stream.duration * stream.time_base)
        else:
            duration = (container.duration or 0) / av.time_base
        rate = (video.average_rate or video.guessed_rate or 0) if video else 0
        return MediaInfo(
            duration=duration,
            fps=float(rate),
            width=video.width if video else 0,
            height=video.height if video else 0,
            has_video=video is not None,
            has_audio=audio is not None,
        )


def stream_offset(path) -> float:
    """Seconds from the start of the picture to the start of the sound by the container's time
    stamps; 0 for a file that lacks one of them. `read_audio` makes up for it.

    Raises:
      MediaError: the file is missing or unreadable.
    """
    with _opened(path) as container:
        video = _picture(container)
        if video is None or not container.streams.audio:
            return 0.0
        return _start(container.streams.audio[0]) - _start(video)


class _FrameRate:
    """FFmpeg's fps filter at one rate, followed by a transform of each frame."""

    def __init__(self, fps, transform, frame, time_base):
        self.transform, self.outputs = transform, []
        self.turns = round(frame.rotation / 90) % 4
        self.graph = av.filter.Graph()
        self.graph.threads = 1  # nothing to share out here
        nodes = [
            self.graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=time_base
            ),
            self.graph.add("fps", f"fps={Fraction(fps).limit_denominator(100_000)}:start_time=0"),
            self.graph.add("buffersink"),
        ]
        self.graph.link_nodes(*nodes).configure()

    def push(self, frame, limit):
        """Take a source frame (None: the end) and transform what the filter gives for it."""
        self.graph.vpush(frame)
        while len(self.outputs) < limit:
            try:
                out = self.graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            picture = out.to_ndarray(format="rgb24", threads=1)
            self.outputs.append(self.transform(np.rot90(picture, self.turns)))


def num_frames(duration: float, fps: float) -> int:
    """floor(duration * fps), not fooled by 2.56 * 25 = 63.99999999999999."""
    return math.floor(round(duration * fps, 6))


def read_frames(
    path, transforms: dict[float, Callable], duration: float | None = None
) -> dict[float, np.ndarray]:
    """Decode a video once and sample it at several frame rates with FFmpeg's fps filter.

    Args:
      path: video file.
      transforms: {fps: f}, f takes a frame (H, W, 3) uint8, upright, and returns an array of a
        fixed shape; it runs on each frame as it arrives, so that no full-size video is held.
      duration: seconds to read from the start of the picture; None reads all.

    Returns:
      {fps: array of floor(duration * fps) transformed frames}. The last frame is repeated where
      the source ends up to one of its frames early.

    Raises:
      MediaError: unreadable, no video stream, or shorter than `duration` by more than a frame.
    """
    with _opened(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        start = stream.start_time or 0
        limits = {
            fps: math.inf if duration is None else num_frames(duration, fps) for fps in transforms
        }
        rates, end, step = {}, 0.0, 0.0
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            frame.pts -= start
            if not rates:
                rates = {
                    fps: _FrameRate(fps, f, frame, stream.time_base)
                    for fps, f in transforms.items()
                }
            step = float((frame.duration or 0) * stream.time_base)
            step = step or 1 / float(stream.average_rate or stream.guessed_rate or 25)
            end = max(end, float(frame.pts * stream.time_base) + step)
            for fps, rate in rates.items():
                rate.push(frame, limits[fps])
            if all(len(rate.outputs) >= limits[fps] for fps, rate in rates.items()):
                break
        else:
            for fps, rate in rates.items():
                rate.push(None, limits[fps])
    if not rates:
        raise MediaError(f"{path}: no frame could be decoded")
    if duration is not None and end < duration - 1.01 * step:
        raise MediaError(f"{path}: {end:.2f} s of picture, shorter than the {duration:g} s needed")
    result = {}
    for fps, rate in rates.items():
        count = num_frames(end if duration is None else duration, fps)
        frames = rate.outputs[:count]
        if not frames:
            raise MediaError(f"{path}: {end:.3f} s of picture, less than one frame at {fps} fps")
        frames += frames[-1:] * (count - len(frames))
        result[fps] = np.stack(frames)
    return result


def _pieces(container, stream, sample_rate: int):
    """(time stamp in seconds or None, mono samples) of a decoded and resampled sound."""
    resampler = av.AudioResampler(format="fltp", rate=sample_rate)
    for frame in itertools.chain(container.decode(stream), [None]):
        for piece in resampler.resample(frame):
            time = None if piece.pts is None else float(piece.pts * piece.time_base)
            yield time, piece.to_ndarray().mean(axis=0, dtype=np.float32)


def read_audio(
    path, sample_rate: int, num_samples: int | None = None, shortest: float = 0.0
) -> np.ndarray:
    """Decode a file's sound, in step with its picture.

    Args:
      path: video or sound file.
      sample_rate: Hz, of the result.
      num_samples: cut or zero-pad to so many samples; None gives what there is.
      shortest: seconds of sound that must be there, to a tolerance of 0.1 s.

    Returns:
      float32, mono (the mean of the channels), nominally in [-1, 1]: peaks can exceed it. Sample 0
      sounds when the picture starts; where the time stamps leave a gap there are zeros.

    Raises:
      MediaError: unreadable, no audio stream, or shorter than `shortest`.
    """
    limit = sys.maxsize if num_samples is None else num_samples
    chunks, cursor, end = [], 0, limit
    with _opened(path) as container:
        if not container.streams.audio:
            raise MediaError(f"{path}: no audio stream")
        stream, video = container.streams.audio[0], _picture(container)
        start = _start(video) if video else None
        for time, sound in _pieces(container, stream, sample_rate):
            if time is not None:
                start = time if start is None else start
                gap = round((time - start) * sample_rate) - cursor
                if not chunks and gap < 0:
                    cursor = gap  # begins before the picture: cut off below
                elif gap > 0 and (not chunks or gap > _GAP * sample_rate):
                    chunks.append(np.zeros(min(gap, limit - cursor), np.float32))
                    cursor += len(chunks[-1])
            chunks.append(sound)
            cursor += len(sound)
            if cursor >= limit:
                break
        if stream.duration is not None and start is not None:
            # mp4 says where the sound ends; the decoder gives the last AAC frame whole.
            seconds = _start(stream) + float(stream.duration * stream.time_base) - start
            declared = round(seconds * sample_rate)
            if 0 < cursor - declared <= sample_rate * _CODEC_FRAME / stream.rate:
                end = declared
    audio = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    audio = audio[max(0, len(audio) - cursor) :][: min(limit, end)]
    if not len(audio):
        raise MediaError(f"{path}: the audio stream is empty")
    if len(audio) < min(limit, (shortest - _GAP) * sample_rate):
        raise MediaError(
            f"{path}: {len(audio) / sample_rate:.2f} s of sound, shorter than the {shortest:g} s "
            "needed"
        )
    return audio if num_samples is None else np.pad(audio, (0, num_samples - len(audio)))


def is_silent(audio: np.ndarray) -> bool:
    """Digital silence: the peak stays below half a step of 16 bits."""
    return not np.abs(audio).max(initial=0.0) >= 0.5**16
