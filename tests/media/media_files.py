"""Small video and sound files of many kinds, made with PyAV, whose frames tell their numbers."""

import dataclasses
from fractions import Fraction

import av
import numpy as np

RATE = 16_000
BITS = 5  # a frame's number, in blocks of black and white


@dataclasses.dataclass(frozen=True)
class Movie:
    """What a file holds.

    Attributes:
      codec: name of FFmpeg's encoder.
      container: name of FFmpeg's muxer.
      size: width and height as stored.
      rate: frames per second.
      gaps: seconds between frames; () for 1 / rate.
      b_frames: how many in a row.
      group: frames from one key frame to the next.
      sar: sample aspect ratio.
      rotation, mirrored: as `set_display_rotation`; only mp4 and mov hold them.
      layout: of the channels; None for a file without sound.
      sound: seconds of sound.
      delay: seconds from the start of the picture to the sound.
      tags: colour range, space, primaries and transfer function.
      options: for the muxer.
    """

    codec: str = "libx264"
    container: str = "mp4"
    count: int = 12
    size: tuple[int, int] = (64, 48)
    rate: Fraction = Fraction(25)
    gaps: tuple[float, ...] = ()
    b_frames: int = 0
    group: int = 12
    sar: Fraction = Fraction(1)
    rotation: int = 0
    mirrored: bool = False
    layout: str | None = "mono"
    sound: float = 0.5
    delay: float = 0.0
    tags: tuple[int, int, int, int] = (1, 1, 1, 1)
    options: tuple[tuple[str, str], ...] = ()

    @property
    def times(self) -> list[float]:
        """Seconds at which the frames are shown."""
        gaps = self.gaps or (float(1 / self.rate),) * self.count
        return [0.0, *np.cumsum(gaps)][: self.count]


def image(number: int, width: int, height: int) -> np.ndarray:
    """Six blocks, two rows of three: a white one at the upper left, then the bits of a number."""
    bits = np.array([1, *(number >> i & 1 for i in range(BITS))]).reshape(2, 3)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 3 // width
    return np.repeat((40 + 180 * bits[rows][:, columns])[..., None], 3, axis=2).astype(np.uint8)


def number(shown: np.ndarray) -> int:
    """The number of an upright frame; -1 for one that lies on its side or is a mirror image."""
    height, width = shown.shape[:2]
    bits = [
        shown[(2 * r + 1) * height // 4, (2 * c + 1) * width // 6].mean() > 130
        for r in range(2)
        for c in range(3)
    ]
    return sum(int(bit) << i for i, bit in enumerate(bits[1:])) if bits[0] else -1


def stored(frame: np.ndarray, rotation: int, mirrored: bool) -> np.ndarray:
    """The pixels that become `frame` when a player turns them counterclockwise and mirrors them."""
    frame = frame[:, ::-1] if mirrored else frame
    return np.rot90(frame, -rotation // 90)


_OPTIONS = {
    "libx264": {"preset": "ultrafast", "qp": "12"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:crf=12:pools=1"},
    "libsvtav1": {"preset": "8", "crf": "5", "svtav1-params": "lp=1:enable-tf=0:pred-struct=1"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "crf": "4", "b": "2M"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "4", "b": "2M"},
}
_FORMATS = {"prores_ks": "yuv422p10le", "mjpeg": "yuvj420p", "ffv1": "yuv444p", "png": "rgb24"}
_SOUNDS = {"webm": "libopus", "mpegts": "aac", "mpeg": "mp2", "avi": "mp2", "flv": "aac"}


def _range(stream, movie: Movie) -> int:
    return 2 if stream.pix_fmt.startswith("yuvj") else movie.tags[0]


def _add_picture(output, movie: Movie):
    stream = output.add_stream(movie.codec, rate=movie.rate, options=_OPTIONS.get(movie.codec, {}))
    context = stream.codec_context
    stream.width, stream.height = movie.size
    if movie.codec == "libx265":
        # x265 corrupts memory at the edges of small pictures of other sizes.
        assert movie.size[0] % 64 == movie.size[1] % 64 == 0
    stream.pix_fmt = _FORMATS.get(movie.codec, "yuv420p")
    context.time_base = Fraction(1, 60_000) if movie.gaps else 1 / movie.rate
    context.thread_count = 1
    context.max_b_frames, context.gop_size = movie.b_frames, movie.group
    context.sample_aspect_ratio = movie.sar
    if stream.pix_fmt != "rgb24":
        context.colorspace, context.color_range = movie.tags[1], _range(stream, movie)
        context.color_primaries, context.color_trc = movie.tags[2:]
    if movie.rotation or movie.mirrored:
        stream.set_display_rotation(movie.rotation, hflip=movie.mirrored)
    return stream


def _picture_packets(stream, movie: Movie, images=None):
    turned = movie.rotation % 180 == 90
    width, height = movie.size[::-1] if turned else movie.size
    for i, time in enumerate(movie.times):
        pixels = stored(image(i, width, height), movie.rotation, movie.mirrored)
        pixels = pixels if images is None else images[i]
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
        spaces = {"dst_colorspace": movie.tags[1], "dst_color_range": _range(stream, movie)}
        frame = frame.reformat(format=stream.pix_fmt, **spaces)
        base = Fraction(stream.codec_context.time_base)
        frame.pts, frame.time_base = round(time / base) if movie.gaps else i, base
        frame.pict_type = 0
        yield from stream.encode(frame)
    yield from stream.encode(None)


def noise(seconds: float, rows: int = 1, seed: int = 0) -> np.ndarray:
    """(rows, samples) float32; the same in every row."""
    sound = 0.2 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return np.repeat(sound[None].astype(np.float32), rows, axis=0)


def sound_packets(stream, samples: np.ndarray, delay: float = 0.0):
    """Encode (channels, samples), which start `delay` seconds after time 0."""
    context = stream.codec_context
    resampler = av.AudioResampler(context.format, context.layout, context.rate)
    frame = av.AudioFrame.from_ndarray(samples, "fltp", context.layout.name)
    frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
    frame.pts = round(delay * RATE)
    for resampled in (*resampler.resample(frame), *resampler.resample(None)):
        yield from stream.encode(resampled)
    yield from stream.encode(None)


def make(path, movie: Movie, images=None):
    """Write a movie, whose frames show their numbers or, as they are stored, `images`."""
    with av.open(str(path), "w", format=movie.container, options=dict(movie.options)) as output:
        picture = _add_picture(output, movie)
        packets = []
        if movie.layout:
            codec = _SOUNDS.get(movie.container, "aac")
            rate = 48_000 if codec in ("libopus", "mp2") else RATE
            sound = output.add_stream(codec, rate=rate, layout=movie.layout)
            rows = sound.codec_context.layout.nb_channels
            packets += sound_packets(sound, noise(movie.sound, rows), movie.delay)
        packets += _picture_packets(picture, movie, images)
        output.mux(sorted(packets, key=lambda packet: packet.dts * packet.time_base))
    return path
