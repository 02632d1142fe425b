"""What a visitor asks for, checked: every mistake is one line that says what would be right."""

import dataclasses
import math
from pathlib import Path

import av

from vcm_jax.media.read import probe
from vcm_jax.media.streams import MediaError, ffmpeg_name, opened

# FFmpeg's names of the containers that are accepted. Playlists and the like are not among them:
# they name other files, which are none of the visitor's business.
_VIDEOS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,mpegvideo,h264,hevc,ivf"
_PICTURES = "image2,png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe,gif,mov,avif"
_LARGEST = 4096 * 2304  # pixels of a picture
_PLAYED = {"h264", "vp8", "vp9", "av1"}  # codecs that browsers show, with 8-bit colours:
_PLAYED_COLOURS = {"yuv420p", "yuvj420p"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the page accepts.

    Attributes:
      megabytes: size of a file.
      seconds: length of a sound.
      takes: sounds that are made at a time.
      steps: of the sampler.
      letters: length of a prompt.
    """

    megabytes: float = 100
    seconds: float = 30
    takes: int = 4
    steps: int = 100
    letters: int = 1000


@dataclasses.dataclass(frozen=True)
class Asked:
    """A sound that is wanted.

    Attributes:
      name: of the clip; the noise depends on it, as in `vcm_jax.generate`.
      video, image: the file that it is for; None without one.
      prompt, negative_prompt: "" if there is none.
      start: seconds of the video to leave out.
      seconds: length of the sound; None: that of the video, or the training length.
      needs_cut: whether the video must be written anew: to be cut, or to be shown by browsers.
    """

    name: str
    video: Path | None = None
    image: Path | None = None
    prompt: str = ""
    negative_prompt: str = ""
    start: float = 0.0
    seconds: float | None = None
    needs_cut: bool = False


def check(
    limits: Limits,
    video=None,
    image=None,
    prompt: str = "",
    negative_prompt: str = "",
    start: float = 0.0,
    seconds: float = 0.0,
) -> Asked:
    """What is asked for.

    Args:
      limits: of the page.
      video, image: paths of uploaded files, or None.
      prompt, negative_prompt: texts.
      start: seconds of the video to leave out.
      seconds: the most that is wanted; 0: all of a video, and the training length without one.

    Raises:
      ValueError: it cannot be made; one line that says why.
    """
    prompt, negative_prompt = (" ".join((t or "").split()) for t in (prompt, negative_prompt))
    start, seconds = float(start or 0), float(seconds or 0)
    for what, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
        if len(text) > limits.letters:
            raise ValueError(f"the {what} has {len(text)} letters: at most {limits.letters} here")
    if not (0 <= start < math.inf and 0 <= seconds < math.inf):
        raise ValueError("trim: start and length are seconds, 0 or more")
    if seconds > limits.seconds:
        raise ValueError(f"trim: a length of {seconds:g} s; at most {limits.seconds:g} s here")
    if video and image:
        raise ValueError("there are a video and a picture: remove one of them")
    if not video and not image and not prompt:
        raise ValueError("drop a video or a picture, or write a prompt")
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    if video:
        path = Path(video)
        _check_file(path, limits, _VIDEOS, "video")
        needs_cut, seconds = _span(path, limits, start, seconds)
        return Asked(path.stem, path, None, **texts, start=start, seconds=seconds,
                     needs_cut=needs_cut)  # fmt: skip
    if start:
        raise ValueError("trim: a start needs a video")
    if image:
        path = Path(image)
        _check_file(path, limits, _PICTURES, "picture")
        return Asked(path.stem, None, path, **texts, seconds=seconds or None)
    return Asked(prompt, **texts, seconds=seconds or None)


def _check_file(path: Path, limits: Limits, formats: str, what: str) -> None:
    """Raises ValueError unless the file is of an accepted kind and size."""
    size = path.stat().st_size / 1e6
    if size > limits.megabytes:
        raise ValueError(f"{path.name}: {size:.0f} MB; at most {limits.megabytes:g} MB here")
    try:
        with av.open(ffmpeg_name(path), options={"format_whitelist": formats}) as container:
            streams = container.streams.video
            pixels = max((s.width * s.height for s in streams if s.codec_context), default=0)
    except (av.error.FFmpegError, OSError):
        raise ValueError(f"{path.name}: this is no {what} that can be read") from None
    if not streams:
        raise ValueError(f"{path.name}: there is no picture in this file")
    if not pixels:
        raise ValueError(f"{path.name}: this is no {what} that can be read")
    if pixels > _LARGEST:
        raise ValueError(f"{path.name}: more than {_LARGEST / 1e6:.1f} million pixels")


def _span(path: Path, limits: Limits, start: float, seconds: float) -> tuple[bool, float]:
    """(whether the video must be written anew, seconds of it that are wanted)."""
    try:
        length = probe(path).duration
        with opened(path) as source:
            stream = source.need_picture()
            colours = stream.codec_context.pix_fmt
            plays = source.codec in _PLAYED and colours in _PLAYED_COLOURS
    except MediaError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from None
    if start >= length:
        raise ValueError(f"trim: it starts at {start:g} s, the video ends at {length:.2f} s")
    wanted = min(length - start, seconds or math.inf)
    if wanted > limits.seconds:
        raise ValueError(
            f"{path.name}: {wanted:.1f} s; at most {limits.seconds:g} s here: trim it by a start "
            "and a length"
        )
    return start > 0 or not plays, wanted
