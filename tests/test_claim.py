"""One process at a time works in a folder, and its contents follow from one set of settings."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from absl import logging

from vcm_jax.claim import ClaimError, claim, contents, describe_difference, hold

HOLDER = textwrap.dedent(
    """
    import sys, time
    from vcm_jax.claim import hold
    with hold(sys.argv[1], (int(sys.argv[2]), int(sys.argv[3]))):
        print("held", flush=True)
        time.sleep(60)
    """
)


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds a share of the folder, and ends it after the test."""
    started = []

    def start(index=0, count=1):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path, str(index), str(count)],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path, holder):
    process = holder()
    with pytest.raises(ClaimError) as error:
        with hold(tmp_path):
            pass
    (line,) = str(error.value).splitlines()
    assert str(tmp_path) in line and f"process {process.pid}" in line
    assert "since 2" in line and f"{sys.executable} -c" in line  # since when, and its command


def test_death_releases_the_folder(tmp_path, holder):
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with hold(tmp_path):
        assert contents(tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "theirs, ours, fits",
    [
        ((0, 2), (1, 2), True),
        ((0, 2), (0, 2), False),
        ((0, 2), (0, 1), False),
        ((0, 1), (1, 2), False),
        ((0, 2), (2, 4), False),  # every fourth item from the third on is an even one
        ((0, 2), (3, 4), True),
        ((0, 2), (1, 3), False),
    ],
)
def test_shares_exclude_each_other_where_they_overlap(tmp_path, theirs, ours, fits):
    with hold(tmp_path, theirs):
        if fits:
            with hold(tmp_path, ours):
                assert contents(tmp_path) == []
        else:
            with pytest.raises(ClaimError, match=f"process {os.getpid()} "):
                with hold(tmp_path, ours):
                    pass
    with hold(tmp_path, ours):  # released
        pass


def test_what_a_dead_process_left_behind_excludes_nobody(tmp_path):
    (tmp_path / ".lock").write_text("garbage")
    (tmp_path / ".lock-1-of-3").touch()
    with hold(tmp_path, (0, 2)):
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock-0-of-2"]


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    """A worker that outlives its parent must not keep the parent's lock."""
    read, write = os.pipe()
    script = textwrap.dedent(
        """
        import os, sys, time
        from vcm_jax.claim import hold
        with hold(sys.argv[1]):
            if os.fork() == 0:
                os.write(int(sys.argv[2]), b"x")
                time.sleep(60)
            os._exit(0)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path, str(write)], pass_fds=[write], process_group=0
    )
    try:
        assert os.read(read, 1) == b"x"
        process.wait()
        with hold(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        os.close(read), os.close(write)


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    with hold(tmp_path):
        assert not list(tmp_path.iterdir())
    (line,) = said
    assert str(tmp_path) in line and "no locks" in line


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch, number):
    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(OSError) as error:
        with hold(tmp_path):
            pass
    assert error.value.errno == number and error.value.filename == str(tmp_path)


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "file"
    path.touch()
    for use in (lambda: hold(path).__enter__(), lambda: claim(path, {})):
        with pytest.raises(ClaimError, match="file is a file, not a folder"):
            use()


def test_claim_notes_the_settings_and_names_what_differs(tmp_path):
    out = tmp_path / "out"
    settings = {"seed": 1, "sizes": (2, 3), "codec": {"name": "linear", "hash": "a" * 50}}
    with hold(out):
        assert not claim(out, settings)
        assert claim(out, settings)
    other = {"seed": 2, "sizes": [2, 3], "codec": {"name": "linear", "hash": "b" * 50}}
    with pytest.raises(ClaimError) as error:
        claim(out, other, flag="--records")
    line = str(error.value)
    assert f"--records={out}" in line and "(seed 1, not 2; codec.hash)" in line
    with pytest.raises(ClaimError, match="codec.name"):  # one that is not wanted any more
        claim(out, {"seed": 1, "sizes": [2, 3], "codec": {}})


def test_claim_refuses_a_folder_of_other_files(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ClaimError, match="holds other files and no made.json"):
        claim(tmp_path, {}, "made.json")
    assert not (tmp_path / "made.json").exists()


def test_what_a_killed_process_left_behind_is_no_other_file(tmp_path):
    (tmp_path / ".0123456789abcdef.tmp").touch()
    (tmp_path / ".lock-0-of-2").touch()
    assert not claim(tmp_path, {"seed": 1})


def test_claim_takes_over_where_nothing_was_begun(tmp_path):
    claim(tmp_path, {"seed": 1})
    assert not claim(tmp_path, {"seed": 2}, is_begun=lambda: False)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 2}
    with pytest.raises(ClaimError, match="seed 2, not 1"):
        claim(tmp_path, {"seed": 1}, is_begun=lambda: True)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"'])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match="settings.json is damaged"):
        claim(tmp_path, {"seed": 1})


def test_differences_of_lists_and_missing_entries():
    assert describe_difference({"a": [1], "b": None}, {"a": [1], "c": {}}) == (
        "c missing, not {}; b null, not missing"
    )
