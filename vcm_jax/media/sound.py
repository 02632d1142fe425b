"""Reading of sounds: which track, which channels, and when each sample sounds."""

import itertools
import math
import sys

import av
import numpy as np
from absl import logging

from vcm_jax.media.streams import LONGEST_GAP, MediaError, opened, shown

_GAP = 0.1  # s; FFmpeg's own limit (min_hard_comp) between jittering time stamps and a real gap
_CODEC_FRAME = 2048  # samples in the longest frame of AAC
# Formats without time stamps: FFmpeg counts packets as if their sample rate never changed.
_UNTIMED = {"aac", "ac3", "eac3", "mp3"}
_LONGEST = 1e7  # s; time stamps have 64 bits
_CANCELLED = 0.01  # channels cancel if their mean has less than this share of a channel's power


def check_start(path, start: float) -> None:
    """Refuse a start that cannot be a number of seconds into a clip.

    Raises:
      MediaError: `start` is negative, infinite or not a number, or as large as no clip is long.
    """
    if not (math.isfinite(start) and start >= 0):
        raise MediaError(
            f"{shown(path)}: start must be a finite number of seconds, 0 or more, not {start:g}"
        )
    if start >= _LONGEST:
        raise MediaError(f"{shown(path)}: start {start:g} s is past the end of any clip")


def is_silent(audio: np.ndarray) -> bool:
    """Digital silence: all samples stay below half a step of 16 bits (NaN does not)."""
    return bool((np.abs(audio) < 0.5**16).all())


class _Resampler:
    """Resamples frames whose channels, sample rate and format may change from frame to frame.

    Mono and stereo keep their channels; more channels become stereo by FFmpeg's downmix, with
    weights that add up to 1, as FFmpeg does for 16-bit samples.
    """

    def __init__(self, rate: int):
        self.rate, self.resampler, self.setup = rate, None, None

    def push(self, frame):
        """Yield (time in seconds or None, (1 or 2, n) float32) for a frame; None flushes."""
        if frame is None:
            if self.resampler is not None:
                yield from self._output(self.resampler.resample(None))
            self.resampler = self.setup = None
            return
        setup = frame.format.name, frame.layout.name, frame.sample_rate
        if setup != self.setup:
            yield from self.push(None)
            self.setup, self.resampler = setup, av.AudioResampler("fltp", rate=self.rate)
            if frame.layout.nb_channels > 2:
                options = {"rematrix_maxval": 1}
                self.resampler = av.AudioResampler("fltp", "stereo", self.rate, options=options)
        try:
            pieces = self.resampler.resample(frame)
        except av.error.FFmpegError:
            # A layout that FFmpeg cannot mix, such as ambisonics.
            self.resampler = av.AudioResampler("fltp", rate=self.rate)
            pieces = self.resampler.resample(frame)
        yield from self._output(pieces)

    def _output(self, pieces):
        for piece in pieces:
            time = None if piece.pts is None else float(piece.pts * piece.time_base)
            samples = piece.to_ndarray()
            if len(samples) > 2:
                samples = samples.mean(axis=0, keepdims=True, dtype=np.float32)
            yield time, samples


def _decoded(source, stream, rate: int):
    """Decode and resample a sound.

    Yields:
      (time in seconds or None, samples (1 or 2, n), whether to place them exactly at that time).
      Time stamps jitter: samples that need no exact place follow the ones before them.
    """
    resampler, exact, offset, timed = _Resampler(rate), False, 0, True
    usual = stream.rate  # read now: the decoder changes it
    streams = [stream] if source.picture is None else [stream, source.picture]
    for packet in itertools.chain(source.packets(*streams), [None]):
        if packet is not None and packet.stream_index != stream.index:
            continue
        joined = source.lines[stream.index].offset
        if joined != offset:
            for time, samples in resampler.push(None):
                yield time, samples, exact
                exact = False
            offset, exact = joined, True
        frames = source.decode(packet, stream)
        if frames is None:
            exact = True  # the sound of the damaged packet is missing
        for frame in frames or ():
            if source.formats & _UNTIMED and frame.sample_rate != usual:
                timed = False
            frame.time_base, frame.pts = stream.time_base, frame.pts if timed else None
            for time, samples in resampler.push(frame):
                yield time, samples, exact
                exact = False
    for time, samples in resampler.push(None):
        yield time, samples, exact


class _Sound:
    """Collects samples from a time on, whatever the order of gaps, cuts and channels."""

    def __init__(self, rate: int, begin: float | None, start: float, limit: int):
        self.rate, self.begin, self.start, self.limit = rate, begin, start, limit
        self.chunks, self.cursor = [], None  # cursor: where the next sample goes; below 0, nowhere
        self.overlap = 0  # samples that come too late: their place is taken

    def add(self, time: float | None, samples, exact: bool) -> bool:
        """Append samples; a gap before them becomes zeros if it is longer than jitter, or `exact`.

        False refuses a gap of more than an hour, which is a damaged time stamp.
        """
        if time is not None and self.begin is None:
            self.begin = time + self.start
        place = None if time is None else round((time - self.begin) * self.rate)
        if self.cursor is None:
            exact = True
            self.cursor = -round(self.start * self.rate) if place is None else min(place, 0)
        gap = 0 if place is None else place - self.cursor
        if gap > LONGEST_GAP * self.rate:
            return False
        if gap > 0 and (exact or gap > _GAP * self.rate):
            self._append(np.zeros((1, min(gap, self.limit - self.cursor)), np.float32))
        elif exact:
            self.overlap = -gap
        skipped = min(self.overlap, samples.shape[1])
        self.overlap -= skipped
        self._append(samples[:, skipped:])
        return True

    def _append(self, samples):
        kept = samples[:, max(0, -self.cursor) :] if self.cursor < 0 else samples
        self.cursor += samples.shape[1]
        if kept.shape[1]:
            self.chunks.append(kept)

    def result(self) -> np.ndarray:
        """(1 or 2, n) float32."""
        rows = max((len(chunk) for chunk in self.chunks), default=1)
        chunks = [np.broadcast_to(chunk, (rows, chunk.shape[1])) for chunk in self.chunks]
        return np.concatenate(chunks, axis=1) if chunks else np.zeros((1, 0), np.float32)


def _read_track(path, number: int, rate: int, limit: int, start: float) -> tuple[np.ndarray, int]:
    """One audio track (its number counts default tracks first): (1 or 2, n), number of tracks."""
    with opened(path) as source:
        stream = source.need_sounds()[number]
        begin = None
        if source.picture is not None:
            begin = float(source.zero * source.picture.time_base) + start
        sound = _Sound(rate, begin, start, limit)
        for time, samples, exact in _decoded(source, stream, rate):
            if not sound.add(time, samples, exact):
                raise MediaError(f"{source.path}: the time stamps of its sound leap ahead by hours")
            if sound.cursor >= limit:
                break
        source.check_damage("sound")
        end = limit
        if stream.duration is not None and sound.begin is not None:
            # mp4 says where the sound ends; the decoder gives the last AAC frame whole.
            ticks = (stream.start_time or 0) + stream.duration
            declared = round((float(ticks * stream.time_base) - sound.begin) * rate)
            if 0 < (sound.cursor or 0) - declared <= rate * _CODEC_FRAME / max(1, stream.rate):
                end = max(0, declared)
        return sound.result()[:, : min(limit, end)], len(source.sounds)


def _mono(path, audio: np.ndarray) -> np.ndarray:
    """The mean of the channels, or one of them where they cancel each other."""
    if len(audio) == 1:
        return audio[0]
    mono = audio.mean(axis=0, dtype=np.float32)
    powers = [float(np.dot(channel, channel)) for channel in audio]
    if float(np.dot(mono, mono)) < _CANCELLED * max(powers):
        logging.warning("%s: its channels cancel each other; one of them is taken", shown(path))
        return audio[int(np.argmax(powers))]
    return mono


def read_audio(
    path,
    sample_rate: int,
    num_samples: int | None = None,
    shortest: float = 0.0,
    start: float = 0.0,
) -> np.ndarray:
    """Decode a file's sound, in step with its picture.

    The default audio track is read, or, if that is silent, the first one that is not. Stereo gives
    the mean of its channels, or one of them where they cancel; more channels are mixed by FFmpeg.

    Args:
      path: video or sound file.
      sample_rate: Hz, of the result.
      num_samples: cut or zero-pad to so many samples; None gives what there is.
      shortest: seconds of sound from `start` on that must be there, to a tolerance of 0.1 s.
      start: seconds from the start of the picture (of a sound file, from its first sample).

    Returns:
      (samples,) float32, mono, nominally in [-1, 1]: peaks can exceed it. Sample 0 sounds `start`
      seconds after the picture starts; where the time stamps leave a gap there are zeros.

    Raises:
      MediaError: unreadable, mostly damaged, no audio stream, shorter than `shortest`, samples
        that are no finite numbers, or a `start` that is not inside the sound.
    """
    check_start(path, start)
    limit = sys.maxsize if num_samples is None else num_samples
    audio, tracks = _read_track(path, 0, sample_rate, limit, start)
    for number in range(1, tracks if is_silent(audio) else 1):
        other, _ = _read_track(path, number, sample_rate, limit, start)
        if not is_silent(other):
            logging.warning("%s: its first audio track is silent; another one is read", shown(path))
            audio = other
            break
    if not np.isfinite(audio).all():
        bad = np.flatnonzero(~np.isfinite(audio).all(axis=0))
        raise MediaError(
            f"{shown(path)}: {len(bad)} samples of its sound are NaN or infinite, the first at "
            f"{start + bad[0] / sample_rate:.3f} s"
        )
    audio = _mono(path, audio)
    if not len(audio):
        why = f"start {start:g} s is past the end of the sound" if start else "its sound is empty"
        raise MediaError(f"{shown(path)}: {why}")
    if len(audio) < min(limit, (shortest - _GAP) * sample_rate):
        after = f" after {start:g} s" if start else ""
        raise MediaError(
            f"{shown(path)}: {len(audio) / sample_rate:.2f} s of sound{after}, shorter than the "
            f"{shortest:g} s needed"
        )
    return audio if num_samples is None else np.pad(audio, (0, num_samples - len(audio)))
