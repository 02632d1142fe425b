"""Encoding of a video's picture anew, as H.264, with the look and the times that it has."""

from fractions import Fraction

import av
import numpy as np

from vcm_jax.media.read import display_matrix, upright
from vcm_jax.media.remux import decoding_times
from vcm_jax.media.streams import MediaError, Source, whole_frames

X264 = {"preset": "veryfast", "crf": "18"}
_VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "lag-in-frames": "0"}
_TICKS = 90_000  # Hz; as fine as any time that matters
_HOLD_MATRIX = ("mp4", "mov")  # containers that say how a picture is to be turned
_BT709, _LIMITED, _UNSPECIFIED = 1, 1, 2  # numbers of ITU-T H.273, and FFmpeg's range


def increasing(times: list, step) -> list:
    """Times, with those that repeat or step back spread evenly up to the next one that does not.

    Args:
      times: seconds, of frames in the order in which they are shown.
      step: seconds between frames, for those at the end.
    """
    result = list(times[:1])
    i = 1
    while i < len(times):
        j = i
        while j < len(times) and times[j] <= result[-1]:
            j += 1
        low = result[-1]
        high = times[j] if j < len(times) else low + step * (j - i + 1)
        result += [low + (high - low) * k / (j - i + 1) for k in range(1, j - i + 1)]
        result += times[j : j + 1]
        i = j + 1
    return result


def _is_rgb(frame) -> bool:
    return frame.format.is_rgb or frame.format.name.startswith("pal")


def _encoder(output, video, frame):
    """A new stream of `output` that looks like `video`, whose first frame is `frame`."""
    rate = Fraction(video.average_rate or video.guessed_rate or 25)
    rate = min(max(rate, Fraction(1, 100)), Fraction(1000)).limit_denominator(100_000)
    odd = frame.width % 2 or frame.height % 2
    if (odd or output.format.name == "webm") and "libvpx-vp9" in output.supported_codecs:
        # H.264 with halved colours has even sizes only; VP9 has any, and browsers play both.
        stream = output.add_stream("libvpx-vp9", rate=rate, options=_VP9)
        stream.width, stream.height = frame.width, frame.height
    else:
        stream = output.add_stream("libx264", rate=rate, options=X264)
        stream.width, stream.height = max(2, frame.width // 2 * 2), max(2, frame.height // 2 * 2)
    context = stream.codec_context
    context.pix_fmt, context.time_base = "yuv420p", 1 / rate
    context.sample_aspect_ratio = video.sample_aspect_ratio or 1
    if (frame.width < frame.height) != (video.width < video.height):  # turned on its side
        context.sample_aspect_ratio = 1 / context.sample_aspect_ratio
    stream.set_display_matrix(display_matrix(frame))
    if _is_rgb(frame):
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED
    else:
        context.colorspace, context.color_range = frame.colorspace, frame.color_range
        context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
    return stream


def _turned(frame, first):
    """A frame of the pixels that are shown, whatever display matrix the file has."""
    pixels = upright(frame.to_ndarray(format="rgb24"), first)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")


def encoded_picture(
    source: Source, output, duration: float | None, start: float = 0.0
) -> tuple[list, float]:
    """Decode the picture and encode it as H.264 (VP9 where a side is odd, or in WebM).

    Args:
      source: the video.
      output: PyAV's container, which gets a stream.
      duration: seconds of the picture to keep; None: all.
      start: seconds of the picture to leave out before that.

    Returns:
      packets, and the seconds of picture that they hold.

    Raises:
      MediaError: most of the picture is damaged, or no frame can be decoded.
    """
    video, base = source.picture, Fraction(source.picture.time_base)
    step = 1 / Fraction(video.average_rate or video.guessed_rate or 25)
    stream, packets, times, length = None, [], [], step
    turns, first = output.format.name not in _HOLD_MATRIX, None
    begin = Fraction(start).limit_denominator(100_000)
    for frame in source.frames(start):
        time = frame.pts * base - begin
        if time < 0:
            continue  # hidden by an edit list, or before the start
        if duration is not None and time > duration - 1e-6:
            break
        length = (frame.duration or 0) * base or step
        first = first or frame
        if turns and display_matrix(first) is not None:
            frame = _turned(frame, first)
        if stream is None:
            stream = _encoder(output, video, frame)
            context = stream.codec_context
        # Colours are converted only where they are RGB; the range stays as it is.
        frame = frame.reformat(
            context.width,
            context.height,
            "yuv420p",
            dst_colorspace=_BT709 if _is_rgb(frame) else None,
            src_color_range=frame.color_range,
            dst_color_range=context.color_range,
        )
        frame.pts, frame.time_base = len(times), context.time_base
        frame.pict_type = av.video.frame.PictureType.NONE  # the encoder places its own key frames
        times.append(time)
        packets += stream.encode(frame)
    source.check_damage("picture")
    if stream is None:
        raise MediaError(f"{source.path}: no frame could be decoded")
    packets += stream.encode(None)
    times = increasing(times, step)
    ticks = max(_TICKS, base.denominator) if base.denominator <= 1_000_000 else _TICKS
    ticks = ticks - ticks % base.denominator or ticks
    shown = [round(time * ticks) for time in times]
    for i in range(1, len(shown)):
        shown[i] = max(shown[i], shown[i - 1] + 1)
    end = round((max(times[-1], 0) + length) * ticks)
    lengths = np.diff([*shown, max(end, shown[-1] + 1)]).tolist()
    decoded = decoding_times([shown[packet.pts] for packet in packets]).tolist()
    stream.time_base = Fraction(1, ticks)
    for packet, dts in zip(packets, decoded):
        packet.duration, packet.pts, packet.dts = lengths[packet.pts], shown[packet.pts], dts
        packet.time_base = Fraction(1, ticks)
    return packets, whole_frames(float(times[-1] + length), video)
