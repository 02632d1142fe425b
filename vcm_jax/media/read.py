"""Reading of videos and sounds.

Time zero of a file is the start of its picture, for the picture and for the sound alike (a sound
file starts with its first sample). Everything goes through FFmpeg's libraries (PyAV).
"""

import collections
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

from vcm_jax.media.sound import check_start, is_silent, read_audio
from vcm_jax.media.streams import MediaError, Source, opened, shown, whole_frames

__all__ = [
    "MediaError",
    "MediaInfo",
    "is_silent",
    "num_frames",
    "probe",
    "read_audio",
    "read_image",
    "read_frames",
    "read_spans",
    "stream_offset",
]

# Formats whose headers say exactly how long a stream is. Others give the length of the longest
# stream, an estimate from the bit rate, or, for live recordings, nothing.
_EXACT = {"mov", "avi", "wav", "flac", "aiff", "ogg"}


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a file holds.

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


def _is_whole(source: Source, stream) -> bool:
    """Whether the file holds all that its index speaks of, which a download cut short does not."""
    count = len(stream.index_entries)
    if not count:
        return "mov" not in source.formats  # the index of a fragmented mp4 comes bit by bit
    last = stream.index_entries[count - 1]
    return last.pos + last.size <= os.path.getsize(source.file)


def _duration(source: Source, stream) -> float:
    """Seconds from the start of a stream to its own end, from its packets where headers fail."""
    fragmented = "mov" in source.formats and not stream.frames
    if stream.duration and _EXACT & source.formats and not fragmented and _is_whole(source, stream):
        return float(stream.duration * stream.time_base)
    start = source.zero if source.picture is not None else None
    for packet in source.packets(stream):
        if start is None:
            start = packet.pts if packet.pts is not None else packet.dts
    end = source.lines[stream.index].end
    if end is None:
        return 0.0
    return whole_frames(float((end - (start or 0)) * stream.time_base), stream)


def probe(path) -> MediaInfo:
    """Find out what a file holds, decoding nothing.

    Raises:
      MediaError: the file is missing, unreadable, or has neither picture nor sound.
    """
    with opened(path) as source:
        video = source.picture
        stream = video or next(iter(source.sounds), None)
        if stream is None:
            raise MediaError(f"{source.path}: neither a video nor an audio stream")
        if video is not None:
            source.need_picture()
        rate = (video.average_rate or video.guessed_rate or 0) if video else 0
        return MediaInfo(
            duration=_duration(source, stream),
            fps=float(rate),
            width=video.width if video else 0,
            height=video.height if video else 0,
            has_video=video is not None,
            has_audio=bool(source.sounds),
        )


def stream_offset(path) -> float:
    """Seconds from the start of the picture to the start of the sound by the container's time
    stamps; 0 for a file that lacks one of them. `read_audio` makes up for it.

    Raises:
      MediaError: the file is missing or unreadable.
    """
    with opened(path) as source:
        if source.picture is None or not source.sounds:
            return 0.0
        sound = source.sounds[0]
        start = float((sound.start_time or 0) * sound.time_base)
        return start - float(source.zero * source.picture.time_base)


def upright(array: np.ndarray, frame) -> np.ndarray:
    """An image (H, W, C) turned and mirrored as the frame's display matrix says.

    The matrix (ISO 14496-12, 8.3.2) maps stored x, y to shown a x + c y, b x + d y; a multiple of
    a quarter turn is assumed.
    """
    matrix = display_matrix(frame)
    if matrix is None:
        return array
    a, b, _, c, d = matrix[:5]
    if abs(b) > abs(a):
        array, a, d = array.swapaxes(0, 1), c, b
    if a < 0:
        array = array[:, ::-1]
    return array[::-1] if d < 0 else array


def display_matrix(frame) -> list[int] | None:
    """The nine numbers of a frame's display matrix, or None where it is shown as it is stored."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32).tolist()


class _FrameRate:
    """FFmpeg's fps filter at one rate, followed by a transform of each frame."""

    def __init__(self, fps, transform, frame, time_base):
        self.transform, self.outputs, self.first = transform, [], frame
        self.size = {"width": frame.width, "height": frame.height}
        self.graph = av.filter.Graph()
        self.graph.threads = 1  # there is nothing to share between threads
        nodes = [
            self.graph.add_buffer(**self.size, format=frame.format, time_base=time_base),
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
            # A video whose size changes keeps its first size.
            picture = out.to_ndarray(format="rgb24", threads=1, **self.size)
            self.outputs.append(self.transform(upright(picture, self.first)))


def read_image(path) -> np.ndarray:
    """The picture in an image file, or the first one of a video, upright: (H, W, 3) uint8.

    Raises:
      MediaError: missing, unreadable, or no picture.
    """
    with opened(path) as source:
        source.need_picture()
        frame = next(source.frames(), None)
        if frame is None:
            raise MediaError(f"{source.path}: no picture could be decoded")
        return upright(frame.to_ndarray(format="rgb24"), frame)


def num_frames(duration: float, fps: float) -> int:
    """floor(duration * fps), not fooled by 2.56 * 25 = 63.99999999999999."""
    return math.floor(round(duration * fps, 6))


def _is_short(end: float, duration: float, step: float) -> bool:
    """Whether a picture of `end` seconds lacks more than a frame (`step` seconds) of `duration`."""
    return end < duration - 1.01 * step


class _Span:
    """A span of a video, sampled at several frame rates.

    Attributes:
      end: seconds of picture after the start of the span, as far as frames were pushed.
      step: seconds of the last frame.
    """

    def __init__(self, stream, transforms: dict, start: float, duration: float | None):
        self.stream, self.transforms, self.duration = stream, transforms, duration
        # Ticks fine enough to shift the frames by any time.
        self.parts = 1000 if start and stream.time_base.denominator * 1000 < 2**31 else 1
        self.base = Fraction(stream.time_base) / self.parts
        self.begin = round(start / self.base)
        self.limits = {
            fps: math.inf if duration is None else num_frames(duration, fps) for fps in transforms
        }
        self.rates: dict[float, _FrameRate] = {}
        self.end = self.step = 0.0

    def push(self, frame, pts: int, lasting: float):
        """Take a frame; its time stamp and duration are in the stream's ticks."""
        if not self.rates:
            self.rates = {
                fps: _FrameRate(fps, f, frame, self.base) for fps, f in self.transforms.items()
            }
        self.step = float(lasting * self.stream.time_base)
        frame.pts = pts * self.parts - self.begin
        frame.duration = round(lasting * self.parts)
        self.end = max(self.end, float(frame.pts * self.base) + self.step)
        for fps, rate in self.rates.items():
            rate.push(frame, self.limits[fps])

    @property
    def is_sampled(self) -> bool:
        """Whether no further sample is wanted."""
        return all(len(rate.outputs) >= self.limits[fps] for fps, rate in self.rates.items())

    def finish(self):
        """Take what the filters still hold: there are no more frames."""
        for fps, rate in self.rates.items():
            rate.push(None, self.limits[fps])

    def samples(self, seconds: float, path) -> dict[float, np.ndarray]:
        """{fps: the samples of the first `seconds`}; the last one is repeated if some are missing.

        Raises:
          MediaError: there is no sample at one of the frame rates.
        """
        result = {}
        for fps, rate in self.rates.items():
            count = num_frames(seconds, fps)
            frames = rate.outputs[:count]
            if not frames:
                raise MediaError(
                    f"{shown(path)}: {seconds:.3f} s of picture, less than one frame at {fps} fps"
                )
            result[fps] = np.stack(frames + frames[-1:] * (count - len(frames)))
        return result


def _ticks(frame, stream) -> tuple[int, float]:
    """Time stamp and duration of a frame in the stream's ticks."""
    usual = 1 / ((stream.average_rate or stream.guessed_rate or 25) * stream.time_base)
    return frame.pts, frame.duration or usual


def read_frames(
    path, transforms: dict[float, Callable], duration: float | None = None, start: float = 0.0
) -> dict[float, np.ndarray]:
    """Decode a video once and sample it at several frame rates with FFmpeg's fps filter.

    Args:
      path: video file.
      transforms: {fps: f}, f takes a frame (H, W, 3) uint8, upright, and returns an array of a
        fixed shape; it runs on each frame as it arrives, so that no full-size video is held.
        All frames have the size of the first one.
      duration: seconds to read from `start` on; None reads all.
      start: seconds from the start of the picture.

    Returns:
      {fps: array of floor(duration * fps) transformed frames}. The last frame is repeated where
      the source ends up to one of its frames early.

    Raises:
      MediaError: unreadable, mostly damaged, no video stream, shorter than `start + duration` by
        more than a frame, or a `start` that is not inside the picture.
    """
    check_start(path, start)
    with opened(path) as source:
        stream = source.need_picture()
        span = _Span(stream, transforms, start, duration)
        for frame in source.frames(start):
            span.push(frame, *_ticks(frame, stream))
            # At a high frame rate the samples are complete some frames before the picture is.
            if duration is not None and span.is_sampled:
                if not _is_short(span.end, duration, span.step):
                    break
        else:
            span.finish()
        end = whole_frames(start + span.end, stream) - start if span.rates else span.end
        source.check_damage("picture")
    if not span.rates:
        raise MediaError(f"{shown(path)}: no frame could be decoded")
    if start and end <= 0:
        raise MediaError(f"{shown(path)}: start {start:g} s is past the end of the picture")
    if duration is not None and _is_short(end, duration, span.step):
        raise _too_short(path, start, end, duration)
    return span.samples(end if duration is None else duration, path)


def _too_short(path, start: float, end: float, duration: float) -> MediaError:
    after = f" after {start:g} s" if start else ""
    return MediaError(
        f"{shown(path)}: {end:.2f} s of picture{after}, shorter than the {duration:g} s needed"
    )


def read_spans(
    path, transforms: dict[float, Callable], starts: Sequence[float], duration: float, length: float
) -> Iterator[dict[float, np.ndarray]]:
    """Decode a video once and sample spans of it, which may overlap.

    Memory holds the frames of the spans that overlap, whatever the length of the video.

    Args:
      path, transforms: as `read_frames`'s.
      starts: increasing, seconds from the start of the picture.
      duration: seconds of each span.
      length: seconds of picture that there must be. A span may reach a little further: its last
        frame is then repeated.

    Yields:
      For each start, what `read_frames(path, transforms, duration, start)` returns.

    Raises:
      MediaError: as `read_frames`; the picture is shorter than `length` by more than a frame.
    """
    waiting, spans, last, end, step = collections.deque(starts), collections.deque(), None, 0.0, 0.0
    with opened(path) as source:
        stream = source.need_picture()

        def begin(start: float):
            spans.append(_Span(stream, transforms, start, duration))
            if last is not None:  # it may be on screen when the span begins
                spans[-1].push(*last)

        for frame in source.frames():
            pts, lasting = _ticks(frame, stream)
            time, step = float(pts * stream.time_base), float(lasting * stream.time_base)
            while waiting and time >= waiting[0]:
                begin(waiting.popleft())
            for span in spans:
                span.push(frame, pts, lasting)
            while spans and spans[0].is_sampled:
                yield spans.popleft().samples(duration, path)
            last, end = (frame, pts, lasting), max(end, time + step)
            if not (waiting or spans or _is_short(end, length, step)):
                break
        end = whole_frames(end, stream)
        source.check_damage("picture")
        if last is None:
            raise MediaError(f"{shown(path)}: no frame could be decoded")
        if _is_short(end, length, step):
            raise _too_short(path, 0, end, length)
        while waiting:
            begin(waiting.popleft())
        for span in spans:
            span.finish()
            yield span.samples(duration, path)
