"""A local server that speaks as a Hugging Face hub and as a GitHub release, well or badly."""

import contextlib
import dataclasses
import functools
import hashlib
import mmap
import re
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants

from vcm_jax.pretrained import convert, resume, table

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The models of which there are tiny files.
NAMES = {"16k": "mmaudio_small_16k", "44k": "mmaudio_large_44k_v2"}
LFS = (".pth", ".pt", ".bin")


@dataclasses.dataclass
class Fault:
    """How a file is served badly.

    Attributes:
      cuts: bytes after which each of the next responses ends with the connection.
      statuses: of the next responses, in place of the file.
      extra: added to the length that is announced.
      body: other contents, at the same address.
      ignores_range: always sends everything.
      shifts_range: sends another range than the one that was asked for.
      largest_range: bytes that one answer to a request for a range holds at most.
      pause: seconds between two blocks of 4 kB.
    """

    cuts: list[int] = dataclasses.field(default_factory=list)
    statuses: list[int] = dataclasses.field(default_factory=list)
    extra: int = 0
    body: bytes | None = None
    ignores_range: bool = False
    shifts_range: bool = False
    largest_range: int | None = None
    pause: float = 0.0


class WeightServer:
    """Serves FOLDER/release/NAME and FOLDER/hub/OWNER/REPO/PATH.

    Attributes:
      url: address of the hub; `release_url` is that of the release, `contents_url` of what
        both redirect to.
      faults: {file name: Fault}; changed while it serves.
      tokens: {repository: token} of gated repositories.
      log: [method, file name, headers, bytes of the body that were sent] of each request.
    """

    def __init__(self, folder: Path):
        self.folder, self.faults, self.tokens, self.log = Path(folder), {}, {}, []
        handler = type("Handler", (_Handler,), {"owner": self})
        # Contents come from another origin than the hub, as huggingface_hub expects it.
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.contents_url = (
            f"http://127.0.0.1:{running.server_port}" for running in self._servers
        )
        self.release_url = f"{self.url}/mmaudio/releases/v0.1"
        for running in self._servers:
            threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        for running in self._servers:
            running.shutdown()
            running.server_close()

    def downloads(self, name: str) -> list[tuple[str | None, int]]:
        """(range that was asked for, bytes sent) of each request for a file's contents."""
        return [
            (headers.get("range"), sent)
            for method, file, headers, sent in list(self.log)
            if method == "GET" and file == name and sent
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: WeightServer

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._serve()

    def do_GET(self):
        self._serve()

    def _serve(self):
        name = self.path.rpartition("/")[2]
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.entry = [self.command, name, headers, 0]
        self.owner.log.append(self.entry)
        with contextlib.suppress(ConnectionError):
            self._route(name)

    def _route(self, name: str):
        root = self.owner.folder
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            self._resolve(*found.groups())
        elif found := re.fullmatch(r"/cdn/(.+)", self.path):
            self._file(root / "hub" / found[1], {})
        elif self.path.startswith("/mmaudio/releases/v0.1/") and (root / "release" / name).exists():
            self._empty(302, {"Location": f"{self.owner.contents_url}/assets/{name}"})
        elif self.path.startswith("/assets/"):
            self._file(root / "release" / name, {})
        else:
            self._empty(404, {})

    def _resolve(self, repo: str, path: str):
        """huggingface.co's /OWNER/REPO/resolve/REVISION/PATH."""
        file = self.owner.folder / "hub" / repo / path
        token = self.owner.tokens.get(repo)
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            return self._empty(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if not file.parent.is_dir():
            return self._empty(404, {"X-Error-Code": "RepoNotFound"})
        headers = {"X-Repo-Commit": COMMIT}
        if not file.is_file():
            return self._empty(404, headers | {"X-Error-Code": "EntryNotFound"})
        if file.suffix not in LFS:
            data = file.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return self._file(file, headers | {"ETag": f'"{blob}"'})
        status = file.stat()
        headers["ETag"] = '"a-pointer"'
        headers["X-Linked-Etag"] = f'"{_sha256(file, status.st_mtime_ns)}"'
        headers["X-Linked-Size"] = str(status.st_size)
        headers["Location"] = f"{self.owner.contents_url}/cdn/{repo}/{path}"
        self._empty(302, headers)

    def _empty(self, status: int, headers: dict):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(key, value)
        self.end_headers()

    def _file(self, path: Path, headers: dict):
        fault = self.owner.faults.get(path.name, Fault())
        if fault.statuses and self.command == "GET":
            return self._empty(fault.statuses.pop(0), {})
        data = _mapped(path) if fault.body is None else memoryview(fault.body)
        start, total = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not fault.ignores_range:
            start = int(asked[1])
            if start >= total:
                return self._empty(416, {"Content-Range": f"bytes */{total}"})
            start += fault.shifts_range
            end = min(total, start + (fault.largest_range or total))
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
            data = data[:end]
            self.send_response(206)
        else:
            self.send_response(200)
        length = len(data) - start + (fault.extra if self.command == "GET" else 0)
        for key, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self._body(data[start:], fault)

    def _body(self, data: memoryview, fault: Fault):
        if fault.cuts:
            data = data[: fault.cuts.pop(0)]
            self.close_connection = True
        if fault.extra:
            self.close_connection = True
        size = 4096 if fault != Fault() else 2**20
        for first in range(0, len(data), size):
            block = data[first : first + size]
            self.entry[3] += len(block)
            self.wfile.write(block)
            if fault.pause:
                self.wfile.flush()
                time.sleep(fault.pause)


def _mapped(path: Path) -> memoryview:
    """The contents of a file, which may be larger than the memory."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@functools.lru_cache
def _sha256(path: Path, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def served_path(folder: Path, file: table.WeightFile) -> Path:
    """Where the server has a file of the table."""
    return folder / "hub" / file.repo / file.path if file.repo else folder / "release" / file.name


def use_tiny_table(monkeypatch, folder: Path, release_url: str) -> None:
    """Puts the checksums and sizes of the served files into the table, and the server's address.

    Files that the server does not have stay as they are in the table.
    """

    def tiny(file):
        path = served_path(folder, file)
        if not path.exists():
            return file
        with open(path, "rb") as opened:
            known = file.checksum and f"md5:{hashlib.file_digest(opened, 'md5').hexdigest()}"
        return dataclasses.replace(file, size=path.stat().st_size, checksum=known)

    monkeypatch.setattr(table, "RELEASE", release_url)
    for name in list(table.PUBLIC_MODELS):
        public = table.PUBLIC_MODELS[name]
        if name in NAMES.values():
            public = dataclasses.replace(public, network=tiny(public.network))
            monkeypatch.setitem(table.PUBLIC_MODELS, name, public)
    for mode, files in list(table.CODECS.items()):
        monkeypatch.setitem(table.CODECS, mode, tuple(map(tiny, files)))
    encoders = tuple(map(tiny, table.ENCODERS))
    for module in (table, convert):
        monkeypatch.setattr(module, "ENCODERS", encoders)


def use_server(monkeypatch, server: WeightServer, home: Path) -> None:
    """Everything is fetched from a server on this machine, to HF_HOME `home`."""
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
