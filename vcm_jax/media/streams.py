"""Opened media files: which streams count, where the picture starts, what damage is tolerated.

Everything that reads a file does so through `Source`. FFmpeg's libraries (PyAV) do the work.
"""

import collections
import contextlib
import heapq
import itertools
import os

import av
from absl import logging
from av.container.core import Flags as ContainerFlags
from av.format import Flags as FormatFlags
from av.stream import Disposition

from vcm_jax.media.timeline import Line, continuous

DAMAGE = 0.5  # the share of a stream's packets that may be damaged; players show the rest too
LONGEST_GAP = 3600  # s; more is a damaged time stamp
_OUTPUT_CORRUPT = 8  # AV_CODEC_FLAG_OUTPUT_CORRUPT
_PATIENCE = 1000  # packets to try before giving up: on a key frame, on reading, on decoding
_HEADERS = 2**12  # bytes of a file that may belong to no packet, whatever its size
_FAR = 5.0  # s; up to later starts the file is skipped by seeking, not decoded
_MARGIN = 1.0  # s; how far before the start to seek


class MediaError(ValueError):
    """A media file that cannot be used; the one-line message names the file and says why."""


def shown(path) -> str:
    """A path for messages: line breaks, and bytes that are not UTF-8, become escapes (\\xff)."""
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def ffmpeg_name(path) -> str:
    """A path for FFmpeg, which would take a relative name with a colon for a URL."""
    return "file:" + os.fsdecode(path)


def whole_frames(seconds: float, stream) -> float:
    """Seconds of a picture, as a whole number of frames if only coarse ticks keep it from that."""
    rate = float(stream.average_rate or 0) if stream.type == "video" else 0
    rounded = round(seconds * rate) / rate if rate else seconds
    tolerance = min(2 * float(stream.time_base), 2e-3)
    return rounded if 0 < abs(rounded - seconds) <= tolerance else seconds


def reason(error: Exception) -> str:
    """FFmpeg's own words for an error, without file names and log lines."""
    return str(getattr(error, "strerror", None) or error)


@contextlib.contextmanager
def opened(path):
    """Open a file as a `Source`.

    Raises:
      MediaError: the file is missing, or FFmpeg cannot read it; also for any error of FFmpeg's
        inside the block.
    """
    if not os.path.isfile(path):
        raise MediaError(f"{shown(path)}: no such file")
    source = None
    try:
        source = Source(path)
        yield source
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(f"{shown(path)}: unreadable ({reason(error)})") from error
    finally:
        if source:
            source.container.close()


def _default(stream) -> bool:
    """Sorts default streams first."""
    return not stream.disposition & Disposition.default


class Source:
    """An opened media file.

    Attributes:
      file, path: its path, as given and for messages.
      formats: FFmpeg's names of the container format.
      container: PyAV's container.
      picture: the default video stream, else the first; cover art is none. None without.
      sounds: the audio streams that FFmpeg can decode, default ones first.
      zero: time stamp of the start of the picture, in the picture's ticks.
      in_order: whether the picture's time stamps count frames in decoding order, as in AVI: only a
        decoder then knows when a frame is shown.
      lines: time lines of the streams that `packets` gives, by stream index.
      failed, passed: how many packets could not be read or decoded, and how many could.
    """

    def __init__(self, path):
        self.file, self.path = path, shown(path)
        self._open()

    def _open(self):
        self.container = container = av.open(ffmpeg_name(self.file), metadata_errors="ignore")
        videos = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        self.picture = min(videos, key=_default, default=None)
        sounds = [stream for stream in container.streams.audio if stream.codec_context]
        self.sounds = sorted(sounds, key=_default)
        self.formats = set(container.format.name.split(","))
        self._leaps = bool(FormatFlags.ts_discont.value & container.format.flags)
        if self.formats & {"avi", "matroska"}:
            # FFmpeg's guesses of missing time stamps are wrong where there are B-frames.
            container.flags &= ~ContainerFlags.gen_pts.value
        self.zero, self.in_order = 0, False
        self.lines = {}
        self.failed = self.passed = self._read_bytes = 0
        self._reason, self._ended, self._sought = "", False, False
        self._count, self._last = 0, None  # frames decoded, and the last one's time
        self._ahead, self._reader = collections.deque(), self._read()
        if self.picture is not None:
            self._find_start()

    @property
    def codec(self) -> str:
        """The picture's codec, whatever its decoder is called."""
        return self.picture.codec_context.codec.canonical_name

    def need_picture(self):
        """The picture's stream.

        Raises:
          MediaError: there is none, or no decoder for it.
        """
        if self.picture is None:
            raise MediaError(f"{self.path}: no video stream")
        if self.picture.codec_context is None:
            raise MediaError(f"{self.path}: no decoder for its video stream")
        return self.picture

    def need_sounds(self) -> list:
        """The audio streams, default ones first.

        Raises:
          MediaError: there is none, or no decoder for any.
        """
        if not self.sounds:
            what = (
                "decoder for its audio stream" if self.container.streams.audio else "audio stream"
            )
            raise MediaError(f"{self.path}: no {what}")
        return self.sounds

    def _read(self):
        """All packets of all streams; what FFmpeg cannot read is skipped."""
        errors, demuxer = 0, self.container.demux()
        while errors < _PATIENCE:
            try:
                packet = next(demuxer, None)
            except av.error.FFmpegError as error:
                errors += 1
                self._fail(error)
                demuxer = self.container.demux()
                continue
            if packet is None:
                break
            if packet.size:  # PyAV ends with one empty packet for each stream
                errors = 0
                self._read_bytes += packet.size
                yield packet
        self._ended = True

    def _find_start(self):
        """Set `zero` and `in_order`, and drop what comes before the first key frame.

        A recording may begin between two key frames; that beginning cannot be decoded.
        """
        pictures = []
        for packet in self._reader:
            self._ahead.append(packet)
            if packet.stream_index == self.picture.index:
                pictures.append(packet)
                if packet.is_keyframe:
                    break
            if len(self._ahead) >= _PATIENCE:
                break
        if not pictures:
            return
        start = pictures[-1] if pictures[-1].is_keyframe else pictures[0]
        self.in_order = start.pts is None and start.dts is not None
        self.zero = (start.dts if self.in_order else start.pts) or 0
        if start is pictures[0] and not self.in_order and self.picture.start_time is not None:
            self.zero = self.picture.start_time  # an edit list may hide the first frames
        elif start is not pictures[0]:
            for packet in pictures[:-1]:
                self._ahead.remove(packet)

    def _fail(self, error):
        self.failed += 1
        self._reason = reason(error)
        if self.failed >= _PATIENCE and not self.passed:
            raise MediaError(f"{self.path}: nothing can be decoded ({self._reason})")

    def packets(self, *streams):
        """Packets of some streams, with time stamps on one continuous line (`continuous`)."""
        self.lines = {stream.index: Line(stream, self._leaps) for stream in streams}
        leader = self.lines.get(self.picture.index) if self.picture is not None else None

        def stored():
            while self._ahead:
                yield self._ahead.popleft()
            yield from self._reader

        return continuous(stored(), self.lines, leader)

    def decode(self, packet, stream) -> list | None:
        """Frames of a packet (None: the decoder's last frames), or None for a damaged packet."""
        try:
            frames = stream.decode(packet)
        except av.error.EOFError:
            return []
        except av.error.FFmpegError as error:
            if packet is not None:
                self._fail(error)
            return None
        self.passed += packet is not None
        return frames

    def frames(self, start: float = 0.0):
        """Decode the picture; frames come in the order in which they are shown.

        Args:
          start: seconds after the start of the picture. The frames that come first may be earlier.

        Yields:
          PyAV's frames; `pts` counts the picture's ticks from the start of the picture.
        """
        base = self.picture.time_base
        self._sought = start > _FAR and not self._leaps and not self.in_order
        if self._sought:
            ticks = self.zero + int((start - _MARGIN) / base)
            self.container.seek(ticks, stream=self.picture)
            self._ahead.clear()
            self._reader = self._read()
        for frame in self._frames():
            if not self._count and self._sought and frame.pts * base > start:
                self.container.close()  # FFmpeg went too far: read from the beginning
                self._open()
                yield from self.frames()
                return
            self._last, self._count = frame.pts, self._count + 1
            yield frame

    def _frames(self):
        stream = self.picture
        stream.thread_type = "AUTO"
        if self.codec == "hevc":
            # Without it one lost frame silences the decoder until the next key frame.
            stream.codec_context.flags |= _OUTPUT_CORRUPT
        longest = LONGEST_GAP / stream.time_base
        times, last = [], None  # times: a heap, of frames that are not shown yet
        for packet in itertools.chain(self.packets(stream), [None]):
            if packet is not None and self.in_order and packet.dts is not None:
                heapq.heappush(times, packet.dts)
            frames = self.decode(packet, stream)
            if frames is None and packet is not None and packet.dts in times:
                times.remove(packet.dts)
                heapq.heapify(times)
            for frame in frames or ():
                if self.in_order and times:
                    time = heapq.heappop(times)
                    frame.duration = frame.duration if last is None else time - last
                elif frame.pts is not None:
                    time = frame.pts
                else:
                    time = self.zero if last is None else last + (frame.duration or 1)
                if last is not None and time - last > longest:
                    raise MediaError(
                        f"{self.path}: the time stamps of its picture leap ahead by hours"
                    )
                last = time
                frame.pts = time - self.zero
                yield frame

    def _seen(self) -> float:
        """Which fraction of the file's time has frames, at the picture's mean frame rate."""
        if self._last is None:  # only sound was read
            return 0.0 if self.failed else 1.0
        seconds = float(self._last * self.picture.time_base)
        seconds = max(seconds, (self.container.duration or 0) / av.time_base)
        return self._count / max(1.0, float(self.picture.average_rate or 0) * seconds)

    def check_damage(self, what: str):
        """Log how many damaged packets of the picture or sound (`what`) were skipped.

        Raises:
          MediaError: most of what was read is damaged.
        """
        total = self.passed + self.failed
        if self._ended and "mov" in self.formats and what == "picture" and not self._sought:
            # A file that was cut off has fewer packets than its index says.
            total = max(total, len(self.picture.index_entries))
        lost = total - self.passed
        why = f" ({self._reason})" if self._reason else ""
        if lost > DAMAGE * total:
            raise MediaError(
                f"{self.path}: damaged: {lost} of {total} packets of the {what} cannot be decoded"
                f"{why}"
            )
        if self._ended and not self._sought and self._seen() < 1 - DAMAGE:
            size = os.path.getsize(self.file)
            if size - self._read_bytes > max(DAMAGE * size, _HEADERS):
                raise MediaError(
                    f"{self.path}: damaged: only {self._read_bytes} of its {size} bytes can be "
                    f"read{why}"
                )
        if lost:
            logging.warning(
                "%s: skipped %d of %d packets of the %s, which are damaged",
                self.path,
                lost,
                total,
                what,
            )
