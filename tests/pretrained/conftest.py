"""A server on this machine, tiny files, and caches of their own for every test."""

import socket

import pytest
from weight_server import WeightServer, use_server


@pytest.fixture(autouse=True)
def local_network_only(monkeypatch):
    """No test reaches out."""
    connect = socket.socket.connect

    def checked(self, address):
        assert not isinstance(address, tuple) or address[0] == "127.0.0.1", address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Folder of the tiny files that the server has."""
    pytest.importorskip("torch", reason="converts PyTorch files")
    import tiny_weights

    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_weights.use_tiny_sizes(monkeypatch)
        tiny_weights.write_served(folder)
    return folder


@pytest.fixture
def server(served):
    running = WeightServer(served)
    yield running
    running.close()


@pytest.fixture
def home(tmp_path, server, monkeypatch):
    """HF_HOME: an empty folder; and the table of tiny files."""
    import tiny_weights

    home = tmp_path / "home"
    tiny_weights.use_tiny_sizes(monkeypatch)
    use_server(monkeypatch, server, home)
    return home
