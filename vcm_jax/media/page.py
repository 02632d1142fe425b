"""Pieces of self-contained HTML pages: players, spectrograms, tables."""

import base64
import html
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from vcm_jax.media.read import read_frames
from vcm_jax.media.write import write_sound
from vcm_jax.metrics import log_mel_features

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; color: #222;
       padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .3em .8em; text-align: right }
th { border-bottom: 2px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f4f4f4 } figure { margin: 0 } img { max-width: 100% }
.clip { display: grid; grid-template-columns: 13em 1fr; gap: .4em 1em; align-items: center;
        border-top: 1px solid #ccc; padding: 1em 0 } .clip h3 { grid-column: 1 / 3; margin: 0 }
.clip audio { width: 100%; height: 2em } .clip img { width: 100% } .note { color: #555 }
.win { font-weight: 600 } small { color: #555 }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of HTML parts."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    return "\n".join([head, f"<style>{STYLE}</style>", *parts])


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image(figure) -> str:
    """A matplotlib figure, which is closed, as an <img>."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="" src="{_data_uri("image/png", buffer.getvalue())}">'


def player(sound: np.ndarray, sample_rate: int) -> str:
    """A mono sound (samples,) as an <audio> with controls."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.wav"
        write_sound(path, sound, sample_rate)
        return f'<audio controls src="{_data_uri("audio/wav", path.read_bytes())}"></audio>'


def film_strip(path, duration: float, count: int = 8) -> str:
    """Evenly spaced frames of a video as an <img>."""
    frames = read_frames(path, {25: lambda frame: frame}, duration)[25]
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    figure, axes = plt.subplots(1, count, figsize=(11, 1.5))
    for axis, frame in zip(axes, chosen):
        axis.imshow(frame)
        axis.axis("off")
    figure.subplots_adjust(wspace=0.03)
    return image(figure)


def spectrogram(
    sound: np.ndarray, sample_rate: int, marks: Sequence[float] = (), label: bool = False
) -> str:
    """A log-mel spectrogram (10^-5 to 10^1.5 in power) as an <img>, with dotted lines at `marks`.

    Args: marks: seconds; label: whether the axis says that it counts seconds.
    """
    figure, axis = plt.subplots(figsize=(11, 1.3))
    rows = log_mel_features(sound, sample_rate)
    axis.imshow(
        rows.T,
        origin="lower",
        aspect="auto",
        vmin=-5,
        vmax=1.5,
        cmap="magma",
        extent=(0, len(sound) / sample_rate, 0, rows.shape[1]),
    )
    for mark in marks:
        axis.axvline(mark, color="white", lw=0.6, ls=":")
    axis.set_yticks([])
    axis.set_xlabel("seconds" if label else "")
    return image(figure)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the cells of its rows are HTML, the head is text."""
    line = lambda cells, tag: "".join(f"<{tag}>{cell}</{tag}>" for cell in cells)
    lines = [line(map(html.escape, head), "th"), *(line(row, "td") for row in rows)]
    return "<table>" + "".join(f"<tr>{cells}</tr>" for cells in lines) + "</table>"
