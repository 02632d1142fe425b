"""Copying of a video's coded picture into another file, where the copy shows the same frames."""

import itertools
import math
from fractions import Fraction

import numpy as np

from vcm_jax.media.bitstream import COPIED, DECODED, Malformed, check_packet
from vcm_jax.media.read import display_matrix
from vcm_jax.media.streams import Source, opened, whole_frames

_REORDERED = 20  # frames; more than any codec holds back before it shows one
_TOLERANCE = 1e-3  # s
_FINEST = 1_000_000  # Hz; a 32-bit duration of a frame in finer ticks ends after seconds


class NotCopied(Exception):
    """Why the picture of a file cannot be copied as it is."""


def decoding_times(shown) -> np.ndarray:
    """Strictly increasing decoding times for frames in decoding order with given display times.

    The i-th frame is decoded at the i-th display time, less the delay that lets every frame be
    decoded before it is shown.

    Args:
      shown: (n,) integers, all different.
    """
    shown = np.asarray(shown, np.int64)
    ordered = np.sort(shown)
    return ordered - (ordered - shown).max(initial=0)


def _gather(source: Source, duration: float | None) -> list:
    """Packets of the picture, as many as `duration` needs."""
    video = source.picture
    step = 1 / (video.average_rate or 25)
    last = None if duration is None else duration + float(max(1, _REORDERED * step))
    packets = []
    for packet in source.packets(video):
        if packet.pts is None and not video.codec_context.has_b_frames:
            packet.pts = packet.dts
        if packet.pts is None:
            raise NotCopied("frames without display times")
        packets.append(packet)
        if last is not None and packet.dts is not None:
            if (packet.dts - source.zero) * video.time_base > last:
                break
    return packets


def _cut(packets, zero: int, base, duration: float) -> list:
    """Packets up to the last frame shown before `duration` and on to where a cut can be made.

    Frames are stored in decoding order: all that is kept must be shown before all that is not.
    """
    pts = np.array([packet.pts for packet in packets])
    inside = np.flatnonzero((pts - zero) * float(base) < duration - 1e-6)
    latest = np.maximum.accumulate(pts)
    next_up = np.append(np.minimum.accumulate(pts[::-1])[::-1][1:], pts.max() + 1)
    last = inside.max(initial=0)
    return packets[: last + int(np.argmax((latest < next_up)[last:])) + 1]


def _check(source: Source, packets, codec: str):
    """Raise NotCopied unless these packets, alone, give the frames that the file shows."""
    if source.failed or any(packet.is_corrupt for packet in packets):
        raise NotCopied("damaged packets")
    if not packets or not packets[0].is_keyframe:
        raise NotCopied("no key frame at the start")
    if len({packet.pts for packet in packets}) < len(packets):
        raise NotCopied("frames with the same display time")
    shown = [packet.pts for packet in packets if not packet.is_discard]
    hidden = [packet.pts for packet in packets if packet.is_discard]
    if hidden and max(hidden) >= min(shown, default=0):
        raise NotCopied("an edit list that hides frames in the middle")
    extradata = source.picture.codec_context.extradata
    try:
        for i, packet in enumerate(packets):
            if i and packet.has_sidedata("new_extradata"):
                raise NotCopied("parameters that change in the middle")
            check_packet(codec, extradata, bytes(packet))
    except Malformed as error:
        raise NotCopied(str(error)) from None


def copied_picture(source: Source, output, duration: float | None) -> tuple[list, float]:
    """Packets of the picture as they are stored, moved to time 0, for a new stream of `output`.

    Returns:
      packets, and the seconds of picture that they hold.

    Raises:
      NotCopied: the copy would not be what the file shows, or few players would show it.
    """
    video = source.picture
    codec = source.codec
    if codec not in COPIED or video.codec_context.name not in output.supported_codecs:
        raise NotCopied(f"few players show {codec} in {output.format.name}")
    packets = _gather(source, duration)
    base, zero = Fraction(video.time_base), source.zero
    if duration is not None and packets:
        packets = _cut(packets, zero, base, duration)
    # Players never show what an edit list cuts off: before time 0 it is needed for decoding.
    while len(packets) > 1 and packets[-1].is_discard:
        packets.pop()
    _check(source, packets, codec)
    stream = output.add_stream_from_template(video, opaque=True)
    if codec == "hevc" and output.format.name in ("mp4", "mov"):
        stream.codec_context.codec_tag = "hvc1"  # QuickTime and Safari refuse FFmpeg's hev1
    if video.sample_aspect_ratio:
        stream.codec_context.sample_aspect_ratio = video.sample_aspect_ratio
    if base.denominator > _FINEST:
        stream.time_base = Fraction(1, 90_000)
    step = max(1, round(1 / ((video.average_rate or 25) * base)))
    end = max(packet.pts + (packet.duration or step) for packet in packets)
    dts = [packet.dts for packet in packets]
    late = any(d is None or d > packet.pts for d, packet in zip(dts, packets))
    if late or any(b <= a for a, b in itertools.pairwise(dts)):
        dts = decoding_times([packet.pts for packet in packets]).tolist()
    for packet, decoded in zip(packets, dts):
        packet.pts, packet.dts = packet.pts - zero, decoded - zero
        packet.duration = packet.duration or step
        packet.stream = stream
    return packets, whole_frames(float((end - zero) * base), video)


def _look(source: Source) -> tuple:
    """How the first frame of a file is shown, and its pixels."""
    video = source.picture
    frame = next(source.frames(), None)
    if frame is None:
        raise NotCopied("a first frame that cannot be decoded")
    tags = frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc
    return (
        (frame.width, frame.height, video.sample_aspect_ratio or 1, display_matrix(frame), tags),
        frame.to_ndarray(format="rgb24", threads=1),
    )


def _shown_times(source: Source, until: float) -> list[float]:
    """Seconds at which a file shows its frames up to a time, in decoding order."""
    times, base = [], source.picture.time_base
    for packet in source.packets(source.picture):
        at = packet.dts if packet.pts is None else packet.pts
        if not packet.is_discard:
            times.append(float((at - source.zero) * base))
        if packet.dts is not None and (packet.dts - source.zero) * base > until:
            break  # no frame is shown before it is decoded
    return [time for time in times if time <= until]


def check_copy(original, copy, duration: float | None = None):
    """Compare a written copy with its original: number and times of its frames, and the first one.

    Args:
      original, copy: paths.
      duration: seconds of the original that the copy must hold; None: all.

    Raises:
      NotCopied: they differ.
    """
    with opened(copy) as source:
        packets = list(source.packets(source.picture))
        codec = source.codec
    if any(b.dts <= a.dts for a, b in itertools.pairwise(packets)) or not packets[0].is_keyframe:
        raise NotCopied("times that step back in the copy")
    with opened(copy) as source:
        found = _shown_times(source, math.inf)
    until = math.inf if duration is None else max(duration, max(found) + _TOLERANCE)
    with opened(original) as source:
        wanted = _shown_times(source, until - _TOLERANCE / 2)
    if len(found) != len(wanted):
        raise NotCopied(f"{len(found)} of {len(wanted)} frames in the copy")
    if any(abs(a - b) > _TOLERANCE for a, b in zip(found, wanted)):
        raise NotCopied("other times in the copy")
    if codec in DECODED:
        with opened(copy) as source:
            sizes = [(frame.width, frame.height) for frame in source.frames()]
        if source.failed or len(sizes) != len(found):
            raise NotCopied("damaged packets")
        if len(set(sizes)) > 1:
            raise NotCopied("a size that changes in the middle")
    with opened(original) as first, opened(copy) as second:
        looks = [_look(source) for source in (first, second)]
    if looks[0][0] != looks[1][0] or (looks[0][1] != looks[1][1]).any():
        raise NotCopied("another first frame in the copy")
