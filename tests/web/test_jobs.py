"""Jobs of the page: they tell, can be stopped, fail alone, and share the device one at a time."""

import threading
import time

import pytest

from vcm_jax.web.files import Files
from vcm_jax.web.jobs import Desk, Job, Stopped
from vcm_jax.web.votes import Votes


def endless(job):
    for i in range(10_000):
        job.say(i)
        time.sleep(0.001)


def test_what_a_job_says_is_heard_in_order():
    job = Desk().open("a")
    assert list(job.follow(lambda job: [job.say(i) for i in range(5)])) == list(range(5))


def test_a_stopped_job_ends_the_next_time_it_says_something():
    desk, steps = Desk(), []

    def work(job):
        for i in range(10_000):
            job.say(i)
            steps.append(i)
            time.sleep(0.001)

    heard = desk.open("a").follow(work)
    assert next(heard) == 0
    desk.stop("another")
    assert next(heard) == 1
    desk.stop("a")
    count = len(steps)
    with pytest.raises(Stopped):
        list(heard)
    assert len(steps) <= count + 1


def test_a_job_that_nobody_listens_to_any_more_ends():
    lock = threading.Lock()
    heard = Job(lock).follow(endless)
    next(heard)
    heard.close()
    assert lock.acquire(timeout=5)  # its thread has let the device go


def test_a_job_that_fails_does_so_alone():
    desk = Desk()

    def fail(job):
        job.say("begun")
        raise ValueError("one line")

    heard = desk.open("a").follow(fail)
    assert next(heard) == "begun"
    with pytest.raises(ValueError, match="one line"):
        next(heard)
    assert list(desk.open("a").follow(lambda job: job.say("next"))) == ["next"]


def test_one_job_works_at_a_time():
    desk, at_work, most = Desk(), [], []

    def work(job):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.01)
        at_work.pop()
        job.say("done")

    def visit(name):
        assert list(desk.open(name).follow(work)) == ["done"]

    threads = [threading.Thread(target=visit, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1] * 6


def test_a_visitor_has_one_job_at_a_time():
    desk = Desk()
    first = desk.open("a").follow(endless)
    next(first)
    assert list(desk.open("a").follow(lambda job: job.say(1))) == [1]
    with pytest.raises(Stopped):
        list(first)


def test_votes_are_lines_of_a_table(tmp_path):
    votes = Votes(tmp_path / "votes.tsv")
    votes.add("clip\t1", "two\nlines", "1 step", "4 steps", True, "b")
    votes.add("clip 2", "", "1 step", "4 steps", False, "same")
    header, first, second = (tmp_path / "votes.tsv").read_text().splitlines()
    assert header.split("\t") == ["time", "clip", "prompt", "a", "b", "blind", "vote"]
    assert first.split("\t")[1:] == ["clip 1", "two lines", "1 step", "4 steps", "yes", "b"]
    assert second.split("\t")[1:] == ["clip 2", "", "1 step", "4 steps", "no", "same"]
    with pytest.raises(ValueError, match="a vote is one of a, b, same"):
        votes.add("clip", "", "", "", True, "c")


def test_files_go_with_their_visitor_with_time_and_with_the_server():
    files = Files(keep_seconds=0.2)
    assert files.root.stat().st_mode & 0o077 == 0  # for this user alone
    mine, theirs = files.folder("me"), files.folder("they")
    files.drop("me")
    assert not mine.exists() and theirs.exists()
    time.sleep(0.25)
    assert files.folder("me").exists() and not theirs.exists()
    files.close()
    assert not files.root.exists()
