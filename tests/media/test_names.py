"""Output names of clips: inside of the folder, reversible, and such that files pair again."""

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vcm_jax.media.names import SOUND_SUFFIXES, IdError, check_id, id_of, output_name, pairing_key


@pytest.mark.parametrize(
    "clip_id", ["", "/", "/abs/x", "../x", "a/../../x", "..", ".", "./x", "a//b", "a/", "x\0y",
                ".mp4", "a/.wav", "//x"],
)  # fmt: skip
def test_ids_that_lead_out_of_the_folder_are_refused(clip_id):
    for function in (check_id, output_name):
        with pytest.raises(IdError, match="the id "):
            function(clip_id)


@pytest.mark.parametrize(
    "clip_id, name",
    [
        ("000001", "000001"),
        ("train/a b", "train/a b"),
        ("x.mp4", "x"),
        ("x.MP4.wav", "x"),
        ("v1.0", "v1.0"),
        ("a..b", "a..b"),
        ("...", "%2E.."),
        (".hidden/.x", "%2Ehidden/%2Ex"),
        ("take-1:2", "take-1:2"),
        ("-rf", "-rf"),
        ("two\nlines", "two%0Alines"),
        ("100%", "100%"),
        ("a%20b", "a%2520b"),
        ("u\u0308", "\u00fc"),
    ],
)
def test_names(clip_id, name):
    assert output_name(clip_id) == name


IDS = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30)


@given(IDS)
@example("%2Ex")
@example(".%2E")
@example("a/.b%0A\n")
def test_every_id_gives_a_name_inside_of_the_folder_or_none(clip_id):
    try:
        name = output_name(clip_id)
    except IdError:
        return
    path = os.path.normpath(os.path.join("/out", f"{name}.wav"))
    assert path == f"/out/{name}.wav"
    assert not any(part.startswith(".") for part in Path(name).parts)
    wanted = unicodedata.normalize("NFC", clip_id)
    while wanted.lower().endswith((".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg",
                                   ".mpeg", ".ts", ".3gp", *SOUND_SUFFIXES)):  # fmt: skip
        wanted = wanted[: wanted.rindex(".")]
    assert id_of(name) == wanted
    assert pairing_key(name) == name  # what we wrote pairs with itself
    assert pairing_key(f"{name}.mp4") == name


@given(IDS, IDS)
def test_different_ids_give_different_names(one, other):
    try:
        names = output_name(one), output_name(other)
    except IdError:
        return
    assert (names[0] == names[1]) == (id_of(names[0]) == id_of(names[1]))


@pytest.mark.parametrize("name", ["x", "100%", "a%20b", "v1.0", "u\u0308", "x.mp4", "a/b", "x.y.z"])
def test_the_output_for_a_file_pairs_with_the_file(name):
    """Where ids are names of files without suffix, as in a folder without a list."""
    assert pairing_key(output_name(name)) == pairing_key(name)
