"""The command: its flags, its examples, and what it says when something is missing."""

import sys

import numpy as np
import pytest
from commands import run_command

from vcm_jax.media.write import write_mp4
from vcm_jax.web import __main__ as command


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "error: give --workdir or --model"),
        (["--workdir=a", "--model=b"], "error: give --workdir or --model"),
        (["--model=b", "--checkpoint=3"], "error: --checkpoint is for --workdir"),
        (["--workdir=missing"], "error: missing is not the workdir of a run"),
        (["--workdir=a", "--auth=me"], "error: --auth is NAME:PASSWORD"),
        (["--workdir=a", "--captions=x.tsv"], "error: --captions needs --examples"),
        (["--workdir=a", "--examples=nowhere"], "error: nowhere: no such folder"),
        (["--workdir=a", "--max_seconds=0"], "error: flag --max_seconds=0"),
        (["--workdir=a", "--port=99999"], "error: flag --port=99999"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(flags, message):
    pytest.importorskip("gradio", reason="needs gradio, the extra `web`")
    done = run_command(command, *flags)
    assert done.code == 1 and done.err.startswith(message) and done.err.count("\n") == 1


def test_without_gradio_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = run_command(command, "--workdir=a")
    assert done.err == 'error: the page needs gradio: pip install "vcm_jax[web]"\n'


def test_a_name_and_a_password():
    assert command.read_auth(None) is None
    assert command.read_auth("me:a:b") == ("me", "a:b")


def test_examples_are_spread_over_the_folder_and_have_captions(tmp_path, monkeypatch):
    folder, names = tmp_path / "test", [f"{i:02}" for i in range(9)]
    folder.mkdir()
    for name in names:
        write_mp4(folder / f"{name}.mp4", np.zeros((2, 16, 16, 3), np.uint8), 10)
    found = command.find_examples(str(folder), None)
    assert [(path.stem, caption) for path, caption in found] == [
        (name, "") for name in names[::2]
    ]  # fmt: skip
    rows = "".join(f"{name}\tball {name}\n" for name in names)
    (tmp_path / "test.tsv").write_text(f"id\tcaption\n{rows}")
    assert command.find_examples(f"{folder}/", None)[1][1] == "ball 02"
    monkeypatch.chdir(tmp_path)
    assert all(path.is_absolute() for path, _ in command.find_examples("test", None))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.json").write_text("{}")
    with pytest.raises(ValueError, match="no files that end in"):
        command.find_examples(str(tmp_path / "empty"), None)


def test_two_models_have_two_names():
    assert command._longer("runs/a/x", "runs/b/x") == ["a/x", "b/x"]
    assert command._longer("runs/x", "runs/x") == ["runs/x (1)", "runs/x (2)"]
