"""Pages escape whatever they are given."""

import html.parser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes

from vcm_jax.media import page
from vcm_jax.media.write import write_mp4


class Reader(html.parser.HTMLParser):
    """What a browser makes of a page: elements with attributes, and the text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


NASTY = st.one_of(
    st.text(),
    st.sampled_from(["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;", "'",
                     "</td></table>", "<!--", "]]>", "<b", "&#60;i&#62;"]),
)  # fmt: skip


@given(NASTY, NASTY)
def test_text_stays_text(text, value):
    found = page.element("p", text, [text, page.element("b", text)], class_=value, id=None)
    reader = Reader(str(found))
    assert reader.elements == ["p", "b"]
    wanted = text.replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(reader.text).replace("\r\n", "\n").replace("\r", "\n") == 3 * wanted
    ((name, read),) = reader.attributes
    assert name == "class" and read == value


@given(NASTY)
def test_every_function_of_the_kit_escapes(text):
    found = page.table([text, "b"], [[text, 1.5], [page.element("i", text), None]], id=text)
    assert set(Reader(str(found)).elements) == {"table", "tr", "th", "td", "i"}
    found = page.element("p", page.lines(text, text, text))
    assert Reader(str(found)).elements == ["p", "br", "br"]


def test_joining_strings_does_not_make_html():
    """Whoever glues strings together gets text."""
    bold = page.element("b", "x")
    assert str(page.element("p", f"{bold}")) == "<p>&lt;b&gt;x&lt;/b&gt;</p>"
    with pytest.raises(TypeError):
        bold + "<script>"


def test_a_document(tmp_path):
    path = tmp_path / "page.html"
    sound = np.zeros(16_000, np.float32)
    page.write_document(
        path,
        "<Title>",
        page.element("p", "caf\u00e9 \ud800"),
        page.player(sound, 16_000),
        page.spectrogram(sound, 16_000),
    )
    reader = Reader(path.read_text(encoding="utf-8"))
    assert reader.elements == [
        "html",
        "meta",
        "meta",
        "title",
        "style",
        "body",
        "p",
        "audio",
        "img",
    ]
    assert "<Title>" in reader.text and "caf\u00e9 ?" in reader.text


def test_a_film_strip_shows_evenly_spaced_frames(tmp_path, monkeypatch):
    frames = np.repeat(np.arange(0, 240, 5, dtype=np.uint8), 240 * 320 * 3)
    path = tmp_path / "a.mp4"
    write_mp4(path, frames.reshape(48, 240, 320, 3), 24)
    shown = []
    monkeypatch.setattr(Axes, "imshow", lambda self, frame: shown.append(frame))
    page.film_strip(path, 2.0, count=4)
    assert len(shown) == 4 and max(len(frame) for frame in shown) < 200
    np.testing.assert_allclose(np.diff([frame.mean() for frame in shown]), 60, atol=6)
