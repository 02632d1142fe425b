"""A server on this machine, tiny files, and caches of their own for every test."""

import socket
import time
import types

import pytest
from huggingface_hub import constants
from weight_server import WeightServer, use_tiny_table

from vcm_jax.pretrained import resume


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
    use_tiny_table(monkeypatch, server.folder, server.release_url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    values = {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(resume, "WAIT", 0.01)
    # huggingface_hub waits for seconds before it tries again.
    patient = types.SimpleNamespace(sleep=lambda _: time.sleep(0.01), time=time.time)
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", patient)
    return home
