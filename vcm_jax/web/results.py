"""How the page shows takes: a player, and below it motion, waveform and spectrogram over time."""

import secrets
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from vcm_jax.media import page
from vcm_jax.media.drawing import draw_mel, draw_motion, draw_waveform
from vcm_jax.web.jobs import Stage
from vcm_jax.web.making import Take

_WIDTH, _DPI = 7.0, 150  # inches and dots an inch of a drawing


def url(path) -> str:
    """Where the server gives out one of its temporary files."""
    return f"gradio_api/file={quote(str(path))}"


def _row(draw, height: float, seconds: float, alt: str, caption: str) -> page.Html:
    figure = Figure(figsize=(_WIDTH, height))
    axis = figure.add_axes((0, 0, 1, 1))
    draw(axis)
    axis.set_axis_off()
    axis.set_xlim(0, seconds)
    picture = page.plot(figure, alt, dpi=_DPI, tight=False)
    return page.element("figure", picture, page.element("figcaption", caption), class_="track")


def tracks(take: Take) -> page.Html:
    """The drawings of a take, on one time axis."""
    sound, rate = take.sound, take.sample_rate
    seconds = len(sound) / rate
    rows = []
    if take.change is not None and len(take.change):
        draw = lambda axis: draw_motion(axis, take.change)
        rows.append(_row(draw, 0.6, seconds, "motion in the picture over time", "motion seen"))
    draw = lambda axis: draw_waveform(axis, sound, rate)
    rows.append(_row(draw, 0.8, seconds, "waveform of the sound", "waveform"))
    draw = lambda axis: draw_mel(axis, sound, rate)
    rows.append(_row(draw, 1.3, seconds, "mel spectrogram of the sound", "mel spectrogram"))
    return page.element(
        "div",
        page.element("div", rows, page.element("div", class_="playhead"), class_="rows"),
        _ticks(seconds),
        class_="tracks",
    )


def _ticks(seconds: float) -> page.Html:
    """Labels of the time axis, at round numbers of seconds."""
    steps = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300]
    step = next((s for s in steps if seconds / s <= 6), 600)
    times = np.arange(0, seconds - step / 3, step)
    marks = [
        page.element("span", f"{time:g}" + (" s" if not time else ""),
                     style=f"left:{100 * time / seconds:.2f}%")
        for time in times
    ]  # fmt: skip
    return page.element("div", marks, class_="ticks")


def card(take: Take, label: str = "", blind: bool = False) -> str:
    """The HTML of one take.

    Args:
      take: what was made.
      label: what to call it; its own label by default.
      blind: whether to say nothing about how it was made, downloads included.
    """
    link = lambda path, text: page.element("a", text, href=url(path), download=path.name)
    if take.movie is not None:
        player = page.element("video", controls="", playsinline="", preload="auto",
                              src=url(take.movie))  # fmt: skip
    else:
        player = page.element("audio", controls="", preload="auto", src=url(take.wav))
    links = [] if take.movie is None else [link(take.movie, "Video (mp4)")]
    links.append(link(take.wav, "Sound (wav)"))
    parts = [
        page.element("h3", label or take.variant.label),
        None if blind else page.element("p", take.variant.facts, class_="facts"),
        player,
        tracks(take),
        None if blind else page.element("p", "Download: ", links, class_="links"),
    ]
    return str(page.element("article", parts, class_="take", id=f"take-{secrets.token_hex(4)}"))


def status(stage: Stage) -> str:
    """The HTML of a stage, with a bar."""
    bar = page.element("span", style=f"width:{100 * stage.done:.0f}%")
    return _status(page.element("p", stage.text, " …"), page.element("div", bar, class_="bar"))


def note(text: str, kind: str = "note") -> str:
    """The HTML of a line that stands where stages stand: a note, or an error."""
    return _status(page.element("p", text), kind=kind)


def _status(*children, kind: str = "note") -> str:
    attributes = {"role": "alert"} if kind == "error" else {"aria-live": "polite"}
    return str(page.element("div", children, class_=f"status {kind}", **attributes))
