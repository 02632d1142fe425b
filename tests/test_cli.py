"""How commands start and fail: one line for what is expected, a traceback for a bug."""

import concurrent.futures.process
import csv
import errno
import importlib
import json
import lzma
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import types
import zipfile
import zlib
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from absl import flags
from commands import run_command

from vcm_jax import cli
from vcm_jax.atomic import atomic_path, read_json, write_json

ROOT = Path(__file__).parents[1]


def command(main):
    """A command with a flag --size that calls `main`."""
    define = lambda: flags.DEFINE_integer("size", 1, "A size.", lower_bound=1)
    return types.SimpleNamespace(define_flags=define, main=main, __name__="command")


def raising(error):
    def main(args):
        raise error

    return command(main)


def test_a_command_reads_its_flags_and_returns_its_code():
    done = run_command(command(lambda args: print(args.size)), "--size=3")
    assert (done.code, done.out, done.err) == (0, "3\n", "")
    assert run_command(command(lambda args: cli.LEFT_OUT)).code == 3


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--size=x"], "--size=x"),
        (["--size=0"], "--size=0"),
        (["--sizes=1", "--what"], "'sizes'"),
        (["stray"], "stray"),
    ],
)
def test_bad_arguments_are_one_line(arguments, named):
    done = run_command(command(lambda args: None), *arguments)
    assert done.code == 1 and done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ") and named in line


def test_positional_arguments_reach_a_command_that_takes_them():
    both = lambda args, rest: print(args.size, rest)
    done = run_command(command(both), "a", "--size=2", "b", positional="the runs")
    assert done.out == "2 ['a', 'b']\n"


def library_errors(folder):
    """Errors that libraries raise for files that are damaged."""
    damaged = folder / "damaged"
    damaged.write_bytes(b"PK\x03\x04 not what it seems" * 10)
    with damaged.open("rb") as file:
        yield from (
            lambda: zipfile.ZipFile(damaged).namelist(),
            lambda: pickle.loads(b"\x80\x04."),
            lambda: pickle.loads(b""),
            lambda: lzma.decompress(b"xxx"),
            lambda: zlib.decompress(b"xxx"),
            lambda: struct.unpack("<I", b"x"),
            lambda: soundfile.read(damaged),
            lambda: av.open(str(damaged)),
            lambda: json.load(file),
            lambda: list(csv.reader(["x" * 200_000])),
        )


def test_errors_of_libraries_are_one_line(tmp_path):
    for cause in library_errors(tmp_path):
        done = run_command(command(lambda args, cause=cause: cause() and None))
        assert done.code == 1
        assert done.err.startswith("error: ") and done.err.count("\n") == 1
    dead = concurrent.futures.process.BrokenProcessPool("a worker\ndied")
    assert run_command(raising(dead)).err.startswith("error: a worker died")


@pytest.mark.parametrize("name", sorted(cli._LIBRARY_ERRORS))
def test_every_library_error_that_is_listed_exists(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert f"{found.__module__}.{found.__qualname__}" == name


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, AssertionError, RuntimeError])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(error):
        run_command(raising(error("a bug")))


def test_an_expected_error_keeps_its_traceback_on_request():
    with pytest.raises(ValueError):
        run_command(raising(ValueError("bad")), "--verbosity=1")
    flags.FLAGS["verbosity"].present = 0


def test_an_error_from_outside_of_the_package_says_how_to_see_more():
    broadcast = run_command(command(lambda args: np.zeros(2) + np.zeros(3) is None))
    assert "--verbosity=1 shows where" in broadcast.err
    ours = run_command(command(lambda args: read_json(__file__)))
    assert f"{__file__} is damaged: not JSON" in ours.err and "--verbosity" not in ours.err


@pytest.mark.parametrize(
    "number, code", [(errno.ENOENT, 1), (errno.EACCES, 1), (errno.ENOSPC, 74), (errno.EROFS, 74)]
)
def test_errors_of_the_system_name_the_file(number, code):
    done = run_command(raising(OSError(number, os.strerror(number), "some/file")))
    assert done.code == code
    assert done.err == f"error: some/file: {os.strerror(number)}\n"
    both = run_command(raising(OSError(number, os.strerror(number), "a", None, "b")))
    assert both.err == f"error: a -> b: {os.strerror(number)}\n"


def test_too_little_memory_is_one_line():
    too_much = lambda args: jax.block_until_ready(jnp.zeros(2**45))
    done = run_command(command(too_much), memory_hint="lower --size")
    assert done.err == "error: the device does not have enough memory: lower --size\n"
    assert "the machine does not" in run_command(raising(MemoryError())).err


def test_interruption_is_one_line():
    assert run_command(raising(KeyboardInterrupt())).code == 130


SCRIPT = textwrap.dedent(
    """
    from absl import flags
    from vcm_jax.cli import run

    def define_flags():
        flags.DEFINE_string("name", None, "A name.", required=True)

    def main(args):
        print("x" * 100_000)
        raise ValueError("two\\nlines")

    if __name__ == "__main__":
        run(main, define_flags)
    """
)


def test_a_process_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(*arguments, **options):
        line = [sys.executable, tmp_path / "script.py", *arguments]
        paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = os.environ | {"PYTHONPATH": paths}
        return subprocess.run(line, text=True, stderr=subprocess.PIPE, env=env, **options)

    done = start("--name=a", stdout=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr == "error: two lines (ValueError; --verbosity=1 shows where)\n"
    done = start(stdout=subprocess.DEVNULL)
    assert done.returncode == 1 and "--name" in done.stderr and done.stderr.count("\n") == 1
    with open("/dev/full", "w") as full:
        done = start("--name=a", stdout=full)
    assert "Traceback" not in done.stderr and done.returncode == 74


def test_a_full_disk_blames_the_output(tmp_path):
    out = tmp_path / "out.wav"
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EACCES, "Permission denied", str(tmp_path / "input")),
    ):
        with pytest.raises(OSError) as found:
            with atomic_path(out) as temporary:
                temporary.write_text("half")
                raise error
        assert found.value.filename == (error.filename or str(out))
        assert not list(tmp_path.iterdir())
    with pytest.raises(OSError) as found:
        with atomic_path(out) as temporary:
            open(temporary / "no folder", "w")
    with pytest.raises(FileNotFoundError) as found:
        with atomic_path(out) as temporary:
            open(temporary)
    assert found.value.filename == str(out)


LIMITED = textwrap.dedent(
    """
    import resource, sys
    import numpy as np
    from vcm_jax.cli import run
    from vcm_jax.media.write import write_sound

    def main(args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        write_sound("out.wav", np.zeros(100_000), 16_000)

    if __name__ == "__main__":
        run(main)
    """
)


def test_a_library_that_hides_a_full_disk(tmp_path):
    """libsndfile fails without saying why; the limit stands for a full disk."""
    (tmp_path / "script.py").write_text(LIMITED)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "script.py"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (74, "error: out.wav: File too large\n")
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_pipe_or_a_folder_is_never_replaced(tmp_path):
    """As root, moving a file onto /dev/null would replace the device."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, tmp_path):
        with pytest.raises(ValueError, match="is not a regular file"):
            write_json(path, {})
    assert pipe.is_fifo() and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_atomic_path_takes_the_longest_names(tmp_path):
    write_json(tmp_path / ("x" * 255), {"a": 1})
    assert read_json(tmp_path / ("x" * 255), ["a"]) == {"a": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not list"),
        ("null", "not NoneType"),
        ("{}", "lacks model, codec"),
        ('{"codec": 1}', "lacks model"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_damaged_json_names_the_file(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"run.json is damaged: .*{message}"):
        read_json(path, ["model", "codec"])


@pytest.mark.parametrize(
    "argument, line",
    [
        ("--length=nan", "error: --length=nan is not a finite number"),
        ("--length=inf", "error: --length=inf is not a finite number"),
        ("--folder=", "error: --folder is empty: give a value or leave it out"),
    ],
)
def test_no_command_gets_a_number_that_is_none_or_an_empty_path(argument, line):
    def define_flags():
        cli.flags.DEFINE_float("length", 1.0, "")
        cli.flags.DEFINE_string("folder", None, "")
        cli.flags.DEFINE_string("prompt", "", "")

    seen = []
    module = types.SimpleNamespace(
        __name__="module", define_flags=define_flags, main=lambda args: seen.append(args.prompt)
    )
    done = run_command(module, argument)
    assert (done.code, done.err, seen) == (1, line + "\n", [])
    assert run_command(module, "--prompt=", "--length=2").code == 0 and seen == [""]
