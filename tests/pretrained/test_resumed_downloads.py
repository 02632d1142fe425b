"""Downloads that continue: every fault of a server that one can think of."""

import pytest
import requests
from weight_server import Fault, WeightServer

from vcm_jax.pretrained import resume
from vcm_jax.pretrained.resume import ResumingDownloader

DATA = bytes(range(256)) * 200  # 51,200 bytes
NAME = "v1-16.pth"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "WAIT", 0.01)
    monkeypatch.setattr(resume, "CHUNK", 100)
    (tmp_path / "served" / "release").mkdir(parents=True)
    (tmp_path / "served" / "release" / NAME).write_bytes(DATA)
    running = WeightServer(tmp_path / "served")
    yield running
    running.close()


@pytest.fixture
def download(tmp_path, server):
    def run(*, have: bytes | None = None, **fault):
        server.faults[NAME] = Fault(**fault)
        partial, target = tmp_path / f"{NAME}.part", tmp_path / NAME
        if have is not None:
            partial.write_bytes(have)
        ResumingDownloader(partial)(f"{server.release_url}/{NAME}", str(target), None)
        assert not partial.exists()
        return target.read_bytes()

    return run


def test_a_file(download, server):
    assert download() == DATA
    assert server.downloads(NAME) == [(None, len(DATA))]


def test_dropped_connections_ask_for_the_rest_alone(download, server):
    assert download(cuts=[5000, 130, 20_000]) == DATA
    assert server.downloads(NAME) == [
        (None, 5000),
        ("bytes=5000-", 130),  # 30 bytes of a chunk are lost
        ("bytes=5100-", 20_000),
        ("bytes=25100-", 26_100),
    ]


def test_what_an_earlier_run_left_is_not_fetched_again(download, server):
    assert download(have=DATA[:40_000]) == DATA
    assert server.downloads(NAME) == [("bytes=40000-", 11_200)]


def test_a_complete_file_of_an_earlier_run(download, server):
    assert download(have=DATA) == DATA
    assert server.downloads(NAME) == []


@pytest.mark.parametrize("fault", ["ignores_range", "shifts_range"])
def test_servers_that_send_another_range(download, server, fault):
    """The file is right, from its beginning."""
    assert download(have=b"x" * 1000, **{fault: True}) == DATA


def test_servers_that_send_ranges_in_parts(download, server):
    assert download(have=DATA[:1000], largest_range=20_000) == DATA
    assert [asked for asked, _ in server.downloads(NAME)] == [
        "bytes=1000-",
        "bytes=21000-",
        "bytes=41000-",
    ]


def test_a_file_that_became_shorter(download):
    assert download(have=DATA + b"more") == DATA


def test_passing_failures_of_the_server(download):
    assert download(statuses=[503, 429, 500]) == DATA


def test_a_file_that_is_not_there(tmp_path, server):
    with pytest.raises(requests.HTTPError, match="404"):
        ResumingDownloader(tmp_path / "p")(f"{server.release_url}/no.pth", "out", None)
    assert len(server.log) == 1  # asking again would not help


def test_endless_failures_end(download, server, tmp_path):
    with pytest.raises(requests.ConnectionError, match="503"):
        download(statuses=[503] * 100)
    assert len(server.downloads(NAME)) == 0
    with pytest.raises(requests.RequestException):
        download(cuts=[100] * 100)
    assert len(server.downloads(NAME)) == resume.RETRIES + 1
    assert (tmp_path / f"{NAME}.part").read_bytes() == DATA[:600]  # a later run continues


def test_a_length_that_is_too_large(download, server, tmp_path):
    """The rest of a range shows what the length is; without ranges the file is never complete."""
    assert download(extra=500) == DATA
    (tmp_path / NAME).unlink()
    with pytest.raises(requests.RequestException):
        download(extra=500, ignores_range=True)
    assert not (tmp_path / NAME).exists()


def test_a_length_that_is_too_small(download):
    """What is announced is all that comes; the checksum has to tell (see test_fetch)."""
    assert download(extra=-500) == DATA[:-500]
