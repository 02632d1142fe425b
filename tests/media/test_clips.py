"""Folders and lists as they are in the world: links, Unicode forms, dialects, bad rows."""

import csv
import io
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcm_jax.media.clips import ListError, list_clips, list_files, read_captions
from vcm_jax.media.tables import TableError, read_table, write_table

NFC, NFD = (unicodedata.normalize(form, "größe é") for form in ("NFC", "NFD"))


def make(folder: Path, *names: str) -> Path:
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()
    return folder


def captions(folder: Path, text: str | bytes) -> Path:
    path = folder / "list.tsv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_without_captions_all_files_are_taken(tmp_path):
    make(tmp_path, "a.mp4", "sub dir/d.MOV", ".hidden.mp4", "notes.txt", "folder.mp4/e.mp4")
    clips, failures = list_clips(tmp_path)
    assert not failures and {clip.caption for clip in clips} == {""}
    assert [clip.id for clip in clips] == ["a", "folder.mp4/e", "sub dir/d"]


def test_ids_that_fit_several_files(tmp_path):
    make(tmp_path, "x/clip.mp4", "y/clip.mp4", "y/clip.mov", "z.mp4", "z/z.mp4")
    table = captions(tmp_path, "id\tcaption\nclip\t\nx/clip\t\ny/clip\t\ny/clip.mov\t\nz\t\n\n")
    clips, failures = list_clips(tmp_path, table)
    found = {clip.id: clip.path.relative_to(tmp_path).as_posix() for clip in clips}
    assert found == {"x/clip": "x/clip.mp4", "y/clip.mov": "y/clip.mov", "z": "z.mp4"}
    assert [clip_id for clip_id, _ in failures] == ["clip", "y/clip"]
    assert failures[0][1] == "several files: x/clip.mp4, y/clip.mov, y/clip.mp4"


def test_lists_that_cannot_be_used(tmp_path):
    videos = make(tmp_path / "videos", "a.mp4")
    with pytest.raises(ListError, match="nothing: no such folder"):
        list_clips(tmp_path / "nothing")
    with pytest.raises(ListError, match="no files that end in .mp4"):
        list_clips(make(tmp_path / "empty", "a.txt"))
    for text, reason in (
        (
            "package\taudio\ttext\r\nx\ty\tz\r\n",
            "its columns are 'package', 'audio', 'text'; needed",
        ),
        ("id,caption\na,b\n", "its columns are 'id,caption'"),
        ("id\tcaption\n", "no rows"),
        ("", "its columns are"),
    ):
        with pytest.raises(ListError, match=reason):
            list_clips(videos, captions(tmp_path, text))
    with pytest.raises(ListError, match="none.tsv: unreadable .No such file"):
        list_clips(videos, tmp_path / "none.tsv")


@pytest.mark.parametrize("clip_id", ["../z", "/abs/z", "a/../../z", "", ".", "a//z"])
def test_ids_that_lead_out_of_a_folder_are_refused(tmp_path, clip_id):
    videos = make(tmp_path / "videos", "z.mp4")
    table = captions(tmp_path, f"id\tcaption\tfile\n{clip_id}\tbad\tz\nz\tgood\tz\n")
    clips, failures = list_clips(videos, table)
    assert [clip.caption for clip in clips] == ["good"]
    assert failures == [(clip_id, f"the id {clip_id!r} does not name a file inside of a folder")]


def test_bad_starts_are_refused_row_by_row(tmp_path):
    videos = make(tmp_path / "videos", *(f"{i}.mp4" for i in range(8)))
    starts = ["", "0", "1.5", "-1", "inf", "nan", "one", "1,5"]
    rows = [f"{i}\tc\t{start}" for i, start in enumerate(starts)]
    table = captions(tmp_path, "\n".join(["id\tcaption\tstart", *rows]))
    clips, failures = list_clips(videos, table)
    assert [(clip.id, clip.start) for clip in clips] == [("0", 0), ("1", 0), ("2", 1.5)]
    for (_, reason), start in zip(failures, starts[3:], strict=True):
        assert reason == f"start {start!r} is not a number of seconds from 0 on"


DIALECTS = {
    "plain": "{0}\t{1}\n",
    "windows": "{0}\t{1}\r\n",
    "quoted": '"{0}"\t"{1}"\n',
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("line", DIALECTS.values(), ids=DIALECTS)
def test_encodings_and_line_ends(tmp_path, line, encoding):
    rows = [("id", "caption"), ("a", "größe, 12' high"), ("b", "")]
    text = "".join(line.format(*row) for row in rows)
    found = read_captions(captions(tmp_path, text.encode(encoding)))
    assert [(row.id, row.caption) for row in found] == rows[1:]


FIELDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_what_pandas_and_spreadsheets_write_comes_back(tmp_path_factory, rows, end):
    stripped = [(a.strip(), b.strip()) for a, b in rows]
    returns = any("\r" in field for row in rows for field in row)
    folder = tmp_path_factory.getbasetemp()
    for quoting in (csv.QUOTE_ALL,) if returns else (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        file = io.StringIO()
        csv.writer(file, delimiter="\t", lineterminator=end, quoting=quoting).writerows(
            [("id", "caption"), *rows]
        )
        header, table = read_table(captions(folder, file.getvalue()))
        assert header == ["id", "caption"]
        assert [(row["id"], row["caption"]) for _, row in table] == stripped
    write_table(folder / "list.tsv", ("id", "caption"), rows)
    assert [tuple(row.values()) for _, row in read_table(folder / "list.tsv")[1]] == stripped


def test_quotes_in_a_plain_table_mean_nothing(tmp_path):
    text = 'id\tcaption\na\t"big" cave\nb\ta 12" record\nc\tsay "hi"\n'
    found = read_captions(captions(tmp_path, text))
    assert [row.caption for row in found] == ['"big" cave', 'a 12" record', 'say "hi"']


@pytest.mark.parametrize(
    "text, line",
    [
        ("id\tcaption\na\tone\nb\tfirst half\nsecond half\nc\tx\n", 4),  # a bare line break
        ("id\tcaption\na\tone\nb\ttwo\tthree\n", 3),  # a bare tab
        ('id\tcaption\n"a"\t"one"\n"b"\t"two" three\n', 3),  # quotes that are not doubled
        ('id\tcaption\na\tone\nb\t"never closed\nc\tx\n', 3),
        ('id\tcaption\na\t"two\nlines"\nb\t"x\ny" z\nc\tx\n', 4),
        ("id\tcaption\tstart\na\tone\n", 2),  # a field is missing
        ("id\tcaption\na\tcaf\xe9\n".encode("latin-1"), 2),
    ],
)
def test_a_caption_that_would_be_cut_is_an_error_with_its_line(tmp_path, text, line):
    table = captions(tmp_path, text)
    with pytest.raises(ListError, match=f"list.tsv, line {line}: ") as caught:
        read_captions(table)
    assert "\n" not in str(caught.value)


def test_empty_fields_that_spreadsheets_add_are_nothing(tmp_path):
    header, table = read_table(
        captions(tmp_path, "id\tcaption\t\t\na\tx\t\t\n\t\t\t\nb\ty\t\t\t\t\n")
    )
    assert [row["caption"] for _, row in table] == ["x", "", "y"]
    with pytest.raises(TableError, match="line 2: 4 fields, but the header has 3"):
        read_table(captions(tmp_path, "id\tcaption\t\na\tx\t\ty\n"))


@pytest.mark.parametrize("on_disk, listed", [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_names_in_either_unicode_form(tmp_path, on_disk, listed):
    videos = make(tmp_path / "videos", f"{on_disk}/{on_disk}.mp4")
    for name in (listed, f"{listed}/{listed}", f"{listed}/{listed}.mp4"):
        clips, failures = list_clips(videos, captions(tmp_path, f"id\tcaption\n{name}\tx\n"))
        assert not failures and clips[0].id == name and clips[0].path.exists()
    table = captions(tmp_path, f"id\tcaption\tfile\n{NFC}\tx\t{listed}\n{NFD}\tx\t{listed}\n")
    assert list_clips(videos, table)[1] == [(NFD, "duplicate id")]


def test_files_that_differ_in_their_unicode_form_alone(tmp_path):
    videos = make(tmp_path / "videos", f"{NFC}.mp4", f"{NFD}.mp4")
    clips, _ = list_clips(
        videos, captions(tmp_path, f"id\tcaption\tfile\na\t\t{NFC}\nb\t\t{NFD}\n")
    )
    assert [clip.path.stem for clip in clips] == [NFC, NFD]


def test_names_of_bytes_that_are_no_utf8(tmp_path):
    videos = make(tmp_path / "videos", os.fsdecode(b"caf\xe9/x.mp4"), "y.mp4")
    (clip, _), failures = list_clips(videos)
    assert clip.id == r"caf\xe9/x" and clip.path.exists() and not failures
    clip.id.encode()
    (again,), failures = list_clips(videos, captions(tmp_path, b"id\tcaption\ncaf\xe9/x\tc\n"))
    assert again.path == clip.path and again.id == clip.id and not failures


def test_links_to_folders_are_followed_once(tmp_path):
    make(tmp_path, "videos/a/x.mp4", "videos/b/y.mp4", "outside/z.mp4", "outside/deep/w.mp4")
    videos = tmp_path / "videos"
    (videos / "0 again").symlink_to("a")  # comes first, but the folder itself is in the list
    (videos / "out").symlink_to(tmp_path / "outside")
    (videos / "out again").symlink_to(tmp_path / "outside" / "deep")
    (videos / "a" / "up").symlink_to("..")
    (videos / "b" / "loop").symlink_to("loop")
    (videos / "file.mp4").symlink_to("a/x.mp4")
    (videos / "broken.mp4").symlink_to("nowhere")
    found = ["a/x.mp4", "b/y.mp4", "broken.mp4", "file.mp4", "out/deep/w.mp4", "out/z.mp4"]
    assert sorted(map(Path, list_files(videos, (".mp4",)))) == sorted(map(Path, found))
    linked = tmp_path / "linked"
    linked.symlink_to(videos)
    assert list_files(linked, (".mp4",)) == list_files(videos, (".mp4",))
