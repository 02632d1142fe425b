"""Where sounds go, and that one bad clip costs no other."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run_command

from vcm_jax import generate as command
from vcm_jax.generation import clips, finish, outputs
from vcm_jax.generation.outputs import plan
from vcm_jax.generation.run import load_run
from vcm_jax.media.read import probe
from vcm_jax.sampling import uniform_times


@pytest.fixture(scope="module")
def run(world):
    return load_run(world / "run")


@pytest.fixture
def videos(world, tmp_path):
    """A folder with three good videos."""
    folder = tmp_path / "videos"
    shutil.copytree(world / "data/test", folder)
    return folder


def test_requests_and_paths_of_a_list(world, tmp_path):
    data = world / "data"
    wanted, failures = plan(
        str(tmp_path), video=str(data / "test"), captions=str(data / "test.tsv"), format="mp4"
    )
    assert [path.name for _, path in wanted] == ["000000.mp4", "000001.mp4", "000002.mp4"]
    assert wanted[0][0].prompt.endswith("bouncing") and not failures


def test_a_row_that_starts_within_its_file_is_left_out(videos, tmp_path):
    rows = tmp_path / "rows.tsv"
    rows.write_text("id\tcaption\tstart\n000000\tx\t0\n000001\ty\t0.25\n")
    wanted, failures = plan(str(tmp_path / "out"), video=str(videos), captions=str(rows))
    assert [request.id for request, _ in wanted] == ["000000"]
    assert failures == [
        ("000001", "it starts at 0.25 s; a video gets sound as a whole: cut it first")
    ]


def test_the_path_of_one_clip(videos, tmp_path):
    video = str(videos / "000000.mp4")
    path = lambda out, **flags: plan(out, **flags)[0][0][1]
    assert path("x.wav", video=video) == Path("x.wav")
    assert path(f"{tmp_path}", video=video) == tmp_path / "000000.mp4"
    assert path(f"{tmp_path}/v1.0/", video=video) == tmp_path / "v1.0/000000.mp4"
    assert path(f"{tmp_path}/new/", prompt="rain") == tmp_path / "new/rain.wav"
    assert path(f"{tmp_path}/new/", prompt="../rain") == tmp_path / "new/%2E. rain.wav"
    assert path(f"{tmp_path}/", video=video, format="flac") == tmp_path / "000000.flac"


@pytest.mark.parametrize("out", ["out_v1.0", "out.d/", "out", "a.b.c"])
def test_a_dot_in_a_folder_s_name(videos, tmp_path, out):
    wanted, _ = plan(f"{tmp_path}/{out}", video=str(videos))
    assert [path for _, path in wanted] == [tmp_path / out / f"00000{i}.mp4" for i in range(3)]


def test_a_folder_that_exists_may_be_called_like_a_video(videos, tmp_path):
    (tmp_path / "odd.mp4").mkdir()
    wanted, _ = plan(f"{tmp_path}/odd.mp4", video=str(videos))
    assert wanted[0][1] == tmp_path / "odd.mp4/000000.mp4"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "give --video, --prompt, or both"),
        ({"prompt": "rain"}, "ends in .wav"),
        ({"video": "VIDEO", "out": "x.txt"}, "ends in .wav or .flac or .mp4 or .mov"),
        ({"video": "a.mp4"}, "a.mp4: no such file"),
        ({"video": "VIDEO", "format": "wav"}, "does not end in .wav"),
        ({"captions": "a.tsv"}, "--captions needs --video"),
        ({"video": ".", "out": "x.mp4"}, "several clips go into a folder"),
        ({"video": "nowhere", "captions": "a.tsv", "out": "x"}, "nowhere: no such folder"),
        ({"prompt": "rain", "out": ""}, "--out is empty"),
    ],
)
def test_flags_that_contradict_each_other(videos, changes, message):
    given = {"out": "x.mp4"} | changes
    if given.get("video") == "VIDEO":
        given["video"] = str(videos / "000000.mp4")
    with pytest.raises(ValueError, match=message):
        plan(given.pop("out"), **given)


def test_outputs_that_cannot_or_must_not_be_written(videos, tmp_path):
    video = videos / "000000.mp4"
    content = video.read_bytes()
    ask = lambda out: plan(str(out), video=str(video))
    ask(tmp_path / "new" / "b.mp4")
    for out, message in (
        (video, "one of the videos themselves"),
        (video / "b.mp4", "cannot write into"),
        (videos, "one of the videos themselves"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(out)
    link = tmp_path / "link.mp4"
    link.symlink_to(video)
    with pytest.raises(ValueError, match="themselves"):
        ask(link)
    assert video.read_bytes() == content
    with pytest.raises(ValueError, match="themselves"):
        plan(str(videos), video=str(videos))


@pytest.mark.parametrize("clip_id", ["../x", "/abs/x", "a/../../x", "a//b", "..", "x/"])
def test_ids_do_not_lead_out_of_the_folder(videos, tmp_path, clip_id):
    table = tmp_path / "list.tsv"
    rows = ["id\tcaption\tfile", f"{clip_id}\tx\t000000", "good\tx\t000001"]
    table.write_text("\n".join(rows) + "\n")
    wanted, failures = plan(str(tmp_path / "out"), video=str(videos), captions=str(table))
    assert [path for _, path in wanted] == [tmp_path / "out/good.mp4"]
    ((name, reason),) = failures
    assert name == clip_id and repr(clip_id) in reason


def test_ids_with_suffixes_and_two_of_one_name(videos, tmp_path):
    table = tmp_path / "list.tsv"
    rows = ["id\tcaption\tfile", "x.mp4\ta\t000000", "x\tb\t000001", "folder\tc\t000002"]
    table.write_text("\n".join(rows) + "\n")
    (tmp_path / "out/folder.mp4").mkdir(parents=True)
    wanted, failures = plan(str(tmp_path / "out"), video=str(videos), captions=str(table))
    assert [path.name for _, path in wanted] == ["x.mp4"]
    assert [name for name, _ in failures] == ["x", "folder"]
    assert "that of x.mp4" in failures[0][1] and "is a folder" in failures[1][1]


def ask(world, videos, out, *flags):
    arguments = [f"--workdir={world / 'run'}", f"--video={videos}", f"--out={out}"]
    return run_command(command, *arguments, "--batch_size=2", *flags)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_a_folder_in_which_a_clip_is_bad(world, videos, tmp_path):
    (videos / "000001.mp4").write_bytes(b"no video")
    done = ask(world, videos, tmp_path / "out.1")
    assert done.code == 3 and "2 written, 1 left out" in done.out
    assert names(tmp_path / "out.1") == ["000000.mp4", "000002.mp4"]
    (line,) = [line for line in done.err.splitlines() if line.startswith("left out")]
    assert line.startswith("left out: 000001: ") and "000001.mp4" in line
    for path in videos.iterdir():
        path.write_bytes(b"no video")
    done = ask(world, videos, tmp_path / "none")
    assert done.code == 1 and "0 written, 3 left out" in done.out


def failing(function, name, error):
    """The function, failing for the clip of this name."""

    def fail(*args, **kwargs):
        if name in str(args):
            raise error
        return function(*args, **kwargs)

    return fail


@pytest.mark.parametrize(
    "error",
    [
        ValueError("v"),
        OSError("o"),
        MemoryError(),
        TypeError("t"),
        IndexError("i"),
        RuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        PermissionError(13, "no", "x"),
    ],
)
@pytest.mark.parametrize("where", ["encode_request", "generate_latents", "write", "mux_audio"])
def test_any_exception_of_a_clip_leaves_that_clip_out(
    run, videos, tmp_path, monkeypatch, where, error
):
    module = {"generate_latents": clips, "mux_audio": finish}.get(where, outputs)
    monkeypatch.setattr(module, where, failing(getattr(module, where), "000001", error))
    wanted, _ = plan(str(tmp_path / "out"), video=str(videos))
    done = dict(outputs.generate_files(run, wanted, uniform_times(1), batch_size=2))
    assert done.pop("000001") and done == {"000000": None, "000002": None}
    assert names(tmp_path / "out") == ["000000.mp4", "000002.mp4"]


def test_a_full_disk_ends_the_run(world, videos, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "x.mp4")
    monkeypatch.setattr(outputs, "write", failing(outputs.write, "000000", full))
    done = ask(world, videos, tmp_path / "out")
    assert done.code == 74 and "error: x.mp4: No space left on device" in done.err


def test_weights_that_are_not_finite(world, videos, tmp_path, monkeypatch):
    nan = lambda run, items, *args: [np.full((1, 20), np.nan) for _ in items]
    monkeypatch.setattr(clips, "generate_latents", nan)
    done = ask(world, videos, tmp_path / "out")
    assert done.code == 1 and done.err.count("not finite") == 3 and not names(tmp_path / "out")


def test_one_clip_of_any_length_and_name(world, videos, tmp_path):
    video = videos / "-take 1:2.mp4"
    (videos / "000000.mp4").rename(video)
    done = ask(world, video, f"{tmp_path}/v1.0/", "--seed=-1", "--duration=0.8")
    assert done.code == 0, done.err
    (path,) = (tmp_path / "v1.0").iterdir()
    assert path.name == video.name
    assert probe(path).duration == pytest.approx(0.8, abs=0.05)


def test_flags_for_records_alone(world, videos, tmp_path):
    done = ask(world, videos, tmp_path / "out", "--shard=0/2")
    assert done.code == 1 and done.err == "error: --shard=0/2 is for --records\n"
