"""File names that FFmpeg, or a strict encoder, would stumble over."""

import os

import numpy as np
import pytest
from media_files import RATE, Movie, make, noise

from vcm_jax.atomic import atomic_path
from vcm_jax.media.read import MediaError, probe, read_audio, read_frames
from vcm_jax.media.write import mux_audio, write_mp4, write_sound

NAMES = [
    "take-1:2.mp4",
    "http:clip.mp4",
    "-i.mp4",
    "%03d.mp4",
    "a|b 'c' \"d\" [e] *?.mp4",
    "línea\nnueva.mp4",
    os.fsdecode(b"caf\xe9 \xff\xfe.mp4"),
    "x" * 251 + ".mp4",
    "é" * 125 + ".mp4",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Relative names: only these can be taken for URLs or options."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_read_and_written(here, name):
    plain = make(here / "plain.mp4", Movie())
    folder = here / name[:-4]
    folder.mkdir()
    os.rename(plain, name)
    assert probe(name).duration == pytest.approx(12 / 25)
    assert read_frames(name, {25: np.mean})[25].shape == (12,)
    assert len(read_audio(name, RATE))
    for out in (f"{name[:-4]}/{name}", os.path.join(".", name)):
        assert mux_audio(name, noise(1.0)[0], RATE, out) == pytest.approx(12 / 25)
        assert probe(out).duration == pytest.approx(12 / 25)
    write_sound(f"{name[:-4]}.wav", noise(0.1)[0], RATE)
    assert len(read_audio(f"{name[:-4]}.wav", RATE)) == 0.1 * RATE
    write_mp4(name, np.zeros((3, 16, 16, 3), np.uint8), 25, noise(0.1)[0], RATE)
    assert probe(name).duration == pytest.approx(0.12)
    assert not [file for file in os.listdir() if file.startswith(".")]


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_one_line_that_can_be_printed(here, name):
    (here / name).write_bytes(b"nothing of the kind")
    for read in (
        probe,
        lambda path: read_audio(path, RATE),
        lambda path: read_audio(path, RATE, start=-1),
    ):
        with pytest.raises(MediaError) as caught:
            read(name)
        message = str(caught.value)
        message.encode()
        assert "\n" not in message and message.startswith(name[:2])


def test_bytes_become_escapes(here):
    with pytest.raises(MediaError, match=r"caf\\xe9.mp4: no such file"):
        probe(os.fsdecode(b"caf\xe9.mp4"))


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, os.fsdecode(b"\xe9" * 255)])
def test_temporary_names_are_no_longer_than_names_may_be(here, name):
    with atomic_path(here / name) as temporary:
        temporary.write_text("whole")
        assert len(os.fsencode(temporary.name)) <= 255
    assert (here / name).read_text() == "whole" and len(list(here.iterdir())) == 1
