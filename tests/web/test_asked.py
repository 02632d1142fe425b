"""What the page accepts: every mistake is one line that says what would be right."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from vcm_jax.media.read import probe, read_frames
from vcm_jax.media.write import cut_video, write_mp4, write_sound
from vcm_jax.web.asked import Limits, check

LIMITS = Limits(megabytes=1, seconds=3, letters=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """moving.mp4 of 4 s at 10 fps, picture.png, sound.wav, text.mp4."""
    folder = tmp_path_factory.mktemp("uploads")
    frames = np.arange(40, dtype=np.uint8)[:, None, None, None] * 6 + np.zeros((1, 32, 48, 3))
    write_mp4(folder / "moving.mp4", frames.astype(np.uint8), 10, np.zeros(64_000), 16_000)
    Image.fromarray(np.full((31, 33, 3), 99, np.uint8)).save(folder / "picture.png")
    write_sound(folder / "sound.wav", np.zeros(800), 16_000)
    (folder / "text.mp4").write_text("no video")
    (folder / "text.png").write_text("no picture")
    return folder


def test_a_video_is_accepted_and_trimmed(folder):
    asked = check(LIMITS, folder / "moving.mp4", prompt=" a  ball\n", seconds=2)
    assert (asked.name, asked.prompt, asked.seconds, asked.needs_cut) == (
        "moving", "a ball", 2, False,
    )  # fmt: skip
    asked = check(LIMITS, folder / "moving.mp4", start=1.5)
    assert asked.needs_cut and math.isclose(asked.seconds, 2.5)


def test_pictures_and_prompts_alone(folder):
    asked = check(LIMITS, image=folder / "picture.png")
    assert (asked.name, asked.video, asked.seconds) == ("picture", None, None)
    assert check(LIMITS, prompt="rain", seconds=2).seconds == 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "drop a video or a picture, or write a prompt"),
        ({"prompt": "x" * 21}, "the prompt has 21 letters: at most 20"),
        ({"negative_prompt": "x" * 21, "prompt": "x"}, "the negative prompt has 21 letters"),
        ({"prompt": "x", "seconds": 3.5}, "a length of 3.5 s; at most 3 s here"),
        ({"prompt": "x", "seconds": -1}, "start and length are seconds, 0 or more"),
        ({"prompt": "x", "start": math.nan}, "start and length are seconds, 0 or more"),
        ({"prompt": "x", "start": 1}, "a start needs a video"),
        ({"video": "moving.mp4"}, "moving.mp4: 4.0 s; at most 3 s here: trim it"),
        ({"video": "moving.mp4", "start": 4}, "it starts at 4 s, the video ends at 4.00 s"),
        ({"video": "moving.mp4", "image": "picture.png"}, "a video and a picture: remove one"),
        ({"video": "text.mp4"}, "text.mp4: this is no video that can be read"),
        ({"video": "sound.wav"}, "sound.wav: this is no video that can be read"),
        ({"image": "text.png"}, "text.png: this is no picture that can be read"),
    ],
)
def test_mistakes_are_one_line(folder, given, message):
    for name in ("video", "image"):
        if name in given:
            given = given | {name: folder / given[name]}
    with pytest.raises(ValueError, match=message) as caught:
        check(LIMITS, **given)
    assert "\n" not in str(caught.value) and str(folder) not in str(caught.value)


def test_large_files_are_refused(folder):
    path = folder / "large.mp4"
    path.write_bytes((folder / "moving.mp4").read_bytes() + bytes(1_100_000))
    with pytest.raises(ValueError, match="large.mp4: 1 MB; at most 1 MB here"):
        check(LIMITS, path)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{file}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile moving.mp4\n",
        "v=0\nc=IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
)
def test_files_that_name_other_files_are_refused(folder, text):
    """Playlists would make FFmpeg read videos of the server."""
    path = folder / "list.mp4"
    path.write_text(text.format(file=(folder / "moving.mp4").as_uri()))
    with pytest.raises(ValueError, match="list.mp4: this is no video that can be read"):
        check(dataclasses.replace(LIMITS, seconds=9), path)


@pytest.mark.parametrize("start", [0.0, 1.5])
def test_a_cut_shows_the_frames_of_its_span(folder, tmp_path, start):
    seconds = cut_video(folder / "moving.mp4", tmp_path / "cut.mp4", start, 1.0)
    info = probe(tmp_path / "cut.mp4")
    assert math.isclose(seconds, 1, abs_tol=1e-6) and not info.has_audio
    assert math.isclose(info.duration, 1, abs_tol=0.01)
    grey = lambda frame: frame.mean(dtype=np.float32)
    cut = read_frames(tmp_path / "cut.mp4", {10: grey})[10]
    whole = read_frames(folder / "moving.mp4", {10: grey}, 1.0, start)[10]
    np.testing.assert_allclose(cut, whole, atol=2)  # a frame differs by 6 from the next
