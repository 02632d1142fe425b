"""Self-contained HTML pages: elements, tables, players, spectrograms.

Whatever is put into an element is escaped, unless it is itself an `Html`, which only the functions
of this module make. So no caller has to remember to escape a caption, and none can forget it.
"""

import base64
import html
import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from vcm_jax.atomic import atomic_path
from vcm_jax.media.drawing import draw_mel, reduced
from vcm_jax.media.loudness import limit
from vcm_jax.media.read import read_frames
from vcm_jax.media.write import write_sound

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; color: #222;
       padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: right }
th { border-bottom: 2px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f4f4f4 } figure { margin: 0 } img { max-width: 100% }
table.text td, table.text th { text-align: left; vertical-align: top }
.clip { display: grid; grid-template-columns: 13em 1fr; gap: .4em 1em; align-items: center;
        border-top: 1px solid #ccc; padding: 1em 0 } .clip h3 { grid-column: 1 / 3; margin: 0 }
.clip audio { width: 100%; height: 2em } .clip img { width: 100% } .note { color: #555 }
.videos { display: grid; grid-template-columns: repeat(4, 1fr); gap: .8em; margin: .5em 0 }
@media (max-width: 600px) { .videos { grid-template-columns: repeat(2, 1fr) } }
video { width: 100%; image-rendering: auto } figcaption { text-align: center; color: #555 }
.wide { overflow-x: auto }
figure.wide img { width: 100%; min-width: 480px; max-width: none }
.wide td:last-child, .wide th:last-child { text-align: left }
.sentence { display: inline-block; min-width: 16em } code { overflow-wrap: anywhere }
.win { font-weight: 600 } small { color: #555; overflow-wrap: anywhere }
.error { color: #b00 } .warning { color: #a60 } .fit { color: #070 }
"""
_VOID = ("br", "img", "meta")  # elements without an end tag


class Html:
    """A piece of HTML: safe to put into a page as it is."""

    def __init__(self, text: str):
        """Only this module calls it: everybody else would have to escape."""
        self._text = text

    def __str__(self) -> str:
        return self._text


def element(tag: str, *children, **attributes) -> Html:
    """<tag attributes>children</tag>.

    Args:
      tag: name of the element, such as "p".
      children: Html, iterables of children, or anything else, which is shown as text; None is left
        out.
      attributes: their values are text; a trailing underscore of a name is dropped (`class_`). None
        leaves an attribute out.
    """
    given = "".join(
        f' {key.rstrip("_")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{tag}{given}>"
    return Html(start if tag in _VOID else f"{start}{_text(children)}</{tag}>")


def _text(child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return str(child)
    if isinstance(child, Iterable) and not isinstance(child, str | bytes):
        return "".join(map(_text, child))
    return html.escape(str(child))


def lines(*children) -> list:
    """The children below each other."""
    return [part for child in children for part in (child, element("br"))][:-1]


def table(head: Sequence, rows: Iterable[Sequence], **attributes) -> Html:
    """A table; cells are text or Html."""
    return element("table", _row(head, "th"), [_row(row, "td") for row in rows], **attributes)


def _row(cells: Sequence, kind: str) -> Html:
    return element("tr", [element(kind, cell) for cell in cells])


def write_document(path, title: str, *children) -> None:
    """Writes a whole page, which is there completely or not at all.

    Raises:
      OSError: it cannot be written.
    """
    parts = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(_STYLE)),
        element("body", children),
    ]
    text = f"<!doctype html>{element('html', parts, lang='en')}\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def plot(figure, alt: str = "", dpi: int = 100, tight: bool = True) -> Html:
    """A matplotlib figure, which is closed, as a picture.

    Args:
      figure: of matplotlib's.
      alt: what it shows.
      dpi: pixels an inch.
      tight: whether to cut off its empty margins.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight" if tight else None)
    plt.close(figure)
    return element("img", alt=alt, src=_data_uri("image/png", buffer.getvalue()))


def player(sound: np.ndarray, sample_rate: int) -> Html:
    """A mono sound (samples,) with controls to play it; its true peak is limited to -1 dBTP."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.wav"
        write_sound(path, limit(sound, sample_rate)[0], sample_rate)
        return Html(f'<audio controls src="{_data_uri("audio/wav", path.read_bytes())}"></audio>')


def video(path) -> Html:
    """An mp4 file with controls to play it; the page contains it."""
    source = _data_uri("video/mp4", Path(path).read_bytes())
    return Html(f'<video controls loop playsinline preload="auto" src="{source}"></video>')


def film_strip(path, duration: float, count: int = 8, start: float = 0.0) -> Html:
    """Evenly spaced frames of `duration` seconds of a video, from `start` on, as a picture.

    Raises:
      MediaError: the video cannot be read.
    """
    fps = count / duration
    frames = read_frames(path, {fps: reduced}, start=start)[fps]
    figure, axes = plt.subplots(1, count, figsize=(11, 1.5))
    for axis in axes:
        axis.axis("off")
    for axis, frame in zip(axes, frames):
        axis.imshow(frame)
    figure.subplots_adjust(wspace=0.03)
    return plot(figure)


def spectrogram(
    sound: np.ndarray, sample_rate: int, marks: Sequence[float] = (), label: bool = False
) -> Html:
    """A log-mel spectrogram (10^-5 to 10^1.5 in power) as a picture.

    Args:
      sound: (samples,); sample_rate: Hz.
      marks: times in seconds at which dotted lines are drawn.
      label: whether the axis says that it counts seconds.
    """
    figure, axis = plt.subplots(figsize=(11, 1.3))
    draw_mel(axis, sound, sample_rate)
    for mark in marks:
        axis.axvline(mark, color="white", lw=0.6, ls=":")
    axis.set_xlabel("seconds" if label else "")
    return plot(figure)
