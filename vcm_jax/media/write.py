"""Writing of videos and sounds.

Everything goes through FFmpeg's libraries (PyAV); sounds are written by libsndfile (soundfile).
"""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile
from absl import logging

from vcm_jax.atomic import UNWRITABLE, atomic_path
from vcm_jax.hashes import short_hash
from vcm_jax.media.encode import X264, encoded_picture
from vcm_jax.media.read import read_image
from vcm_jax.media.remux import NotCopied, check_copy, copied_picture
from vcm_jax.media.streams import MediaError, ffmpeg_name, opened, reason, shown

_BIT_RATE = 128_000  # of the sound
# FFmpeg's names of the containers; movies of other suffixes are mp4.
_CONTAINERS = {".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
_STILL_RATE, _STILL_SIDE = 25, 1920  # frames a second and pixels of a picture's movie
_AS_MADE = ".as_made"  # a folder of originals, without suffixes: no search for sounds finds them


def _movie_output(path, container: str, sample_rate: int):
    """An output whose edit lists count in samples: in milliseconds, the default, sounds grow."""
    options = {"movie_timescale": str(sample_rate or 1000)} if container in ("mp4", "mov") else {}
    return av.open(ffmpeg_name(path), "w", format=container, options=options)


def _audio_packets(output, audio: np.ndarray, sample_rate: int) -> list:
    """Encode a mono sound in a new stream of `output`: as AAC, or as Opus in WebM."""
    # Opus has a few rates only; PyAV resamples.
    codec, rate = ("libopus", 48_000) if output.format.name == "webm" else ("aac", sample_rate)
    stream = output.add_stream(codec, rate=rate, layout="mono", bit_rate=_BIT_RATE)
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
    with atomic_path(path) as temporary, _movie_output(temporary, "mp4", sample_rate) as output:
        stream, packets = None, []
        for array in frames:
            if stream is None:
                height, width = array.shape[:2]
                if height % 2 or width % 2:
                    raise ValueError(f"{path}: H.264 needs an even frame size, not {array.shape}")
                rate = Fraction(fps).limit_denominator(100_000)
                stream = output.add_stream("libx264", rate=rate, options=X264)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            packets += stream.encode(frame)
        if stream is None:
            raise ValueError(f"{path}: no frames to write")
        packets += stream.encode(None)
        if audio is not None:
            packets += _audio_packets(output, audio, sample_rate)
        _mux(output, packets)


@contextlib.contextmanager
def still_movie(picture_path, seconds: float) -> Iterator[Path]:
    """A temporary mp4 that shows a picture, of at most 1,920 pixels a side, for some seconds.

    Raises:
      MediaError: the picture cannot be read.
    """
    picture = read_image(picture_path)
    shrink = min(1, _STILL_SIDE / max(picture.shape[:2]))
    height, width = (max(2, round(side * shrink) // 2 * 2) for side in picture.shape[:2])
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    picture = frame.reformat(width, height, interpolation="AREA").to_ndarray()
    count = max(1, round(_STILL_RATE * seconds))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "still.mp4"
        write_mp4(path, itertools.repeat(picture, count), count / seconds)
        yield path


def _write_movie(video_path, out_path, picture, audio, sample_rate: int, kind: str, duration):
    """Write the packets that `picture` gives for a video, and a sound as long as they are.

    Returns:
      seconds of the picture.
    """
    with opened(video_path) as source:
        source.need_picture()
        try:
            with _movie_output(out_path, kind, sample_rate) as output:
                packets, seconds = picture(source, output, duration)
                samples = round(seconds * sample_rate)
                sound = np.pad(audio[:samples], (0, max(0, samples - len(audio))))
                _mux(output, packets + _audio_packets(output, sound, sample_rate))
        except (av.error.FFmpegError, OSError) as error:
            if error.errno in UNWRITABLE:  # the fault of the disk, not of the video
                raise OSError(error.errno, os.strerror(error.errno), str(out_path)) from error
            raise MediaError(
                f"{source.path}: cannot be written as {kind} ({reason(error)})"
            ) from error
    return seconds


def mux_audio(video_path, audio: np.ndarray, sample_rate: int, out_path, duration=None) -> float:
    """Write a video's own picture with a new sound, atomically.

    The picture is copied as it is stored where the copy is proven to show the same frames at the
    same times and players show its codec in the container (in mp4: H.264, HEVC, AV1, VP9, MPEG-4).
    Otherwise it is encoded as H.264, in WebM as VP9, with its size, aspect ratio, orientation,
    frame times and colour tags.

    Args:
      video_path: where the picture comes from.
      audio: (samples,) float in [-1, 1], mono; cut or zero-padded to the picture's length.
      sample_rate: Hz.
      out_path: .mp4, .mov, .mkv or .webm file.
      duration: seconds of the picture to keep, to the next frame that can be cut at; None: all.

    Returns:
      Seconds of the picture (and sound) written.

    Raises:
      MediaError: the video is missing, unreadable, mostly damaged, has no picture, or cannot be
        written.
      OSError: the disk is full or read-only.
    """
    kind = _CONTAINERS.get(Path(out_path).suffix.lower(), "mp4")
    with atomic_path(out_path) as temporary:
        arguments = audio, sample_rate, kind, duration
        try:
            seconds = _write_movie(video_path, temporary, copied_picture, *arguments)
            check_copy(video_path, temporary, duration)
        except (NotCopied, MediaError) as error:
            logging.info("%s: encoded anew, not copied: %s", shown(video_path), error)
            seconds = _write_movie(video_path, temporary, encoded_picture, *arguments)
    return seconds


def cut_video(video_path, out_path, start: float = 0.0, duration: float | None = None) -> float:
    """Write a span of a video's picture, without sound, as an mp4 that browsers play, atomically.

    Args:
      video_path: where the picture comes from.
      out_path: .mp4 file.
      start: seconds from the start of the picture.
      duration: seconds to keep; None: all that follows.

    Returns:
      Seconds of the picture written.

    Raises:
      MediaError: the video is missing, unreadable or mostly damaged, or has no picture there.
      OSError: the disk is full or read-only.
    """
    with opened(video_path) as source, atomic_path(out_path) as temporary:
        source.need_picture()
        with _movie_output(temporary, "mp4", 0) as output:
            packets, seconds = encoded_picture(source, output, duration, start)
            _mux(output, packets)
    return seconds


def write_sound(path, audio: np.ndarray, sample_rate: int, as_made: np.ndarray | None = None):
    """Write a mono sound (samples,), clipped to [-1, 1], as 16-bit .wav or .flac, atomically.

    Args:
      path: of the file; its suffix says the format.
      audio: what the file is to hold.
      sample_rate: Hz.
      as_made: the sound before a limiter changed it. It is kept as 32-bit floats in the folder
        `.as_made` beside the file, for `find_as_made`.
    """
    kind = Path(path).suffix[1:].upper()
    with atomic_path(path) as temporary:
        soundfile.write(
            os.fsencode(temporary), np.clip(audio, -1, 1), sample_rate, "PCM_16", format=kind
        )
        if as_made is not None:
            kept = _as_made_path(Path(path).parent, temporary)
            kept.parent.mkdir(exist_ok=True)
            with atomic_path(kept) as other:
                soundfile.write(os.fsencode(other), as_made, sample_rate, "FLOAT", format="WAV")


def _as_made_path(folder: Path, file: Path) -> Path:
    """Where the original of a file is kept, as WAV: its name is a hash of what the file holds."""
    return folder / _AS_MADE / short_hash(file.read_bytes())


def find_as_made(path) -> Path:
    """The file that evaluation reads for a sound: as it was made, before a limiter changed it.

    That is `path` itself if nothing was changed, or if somebody has edited the file since.
    """
    path = Path(path)
    if not (path.parent / _AS_MADE).is_dir():
        return path
    kept = _as_made_path(path.parent, path)
    return kept if kept.exists() else path
