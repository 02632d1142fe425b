"""From an empty cache to all files, and every way in which that can fail."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from weight_server import COMMIT, Fault, served_path

from vcm_jax import pretrained
from vcm_jax.pretrained import downloads, files, resume, table
from vcm_jax.pretrained.table import CODECS, PretrainedError

NAME = "mmaudio_small_16k"
NETWORK, CLIP = "mmaudio_small_16k.pth", "open_clip_pytorch_model.bin"


def public_files(name=NAME):
    return table.PUBLIC_MODELS[name].files


def assert_complete(server, root, name=NAME):
    for file in public_files(name):
        found = files.locate(file, root)
        assert found.read_bytes() == served_path(server.folder, file).read_bytes()


def refused(message, name=NAME, **arguments):
    """The one line with which fetching ends."""
    with pytest.raises(PretrainedError, match=message) as caught:
        pretrained.fetch(name, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_from_nothing(home, server, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(downloads, "say", lambda text: asked.append((text, len(server.log))))
    root = pretrained.fetch(NAME)
    assert_complete(server, root)
    text = "\n".join(line for line, _ in asked)
    assert all(requests == 0 for _, requests in asked)  # all is said before anything is fetched
    for file in public_files():
        assert file.name in text and downloads.origin(file) in text
    assert "CC-BY-NC 4.0" in text and "no commercial use" in text and "Apple AMLR" in text
    assert str(home) in text and "MMAudio's own weights/ and ext_weights/" in text
    # Hugging Face's files are in its cache, as its own library has it.
    cached = home / "hub/models--hkchengrex--MMAudio/snapshots" / COMMIT / "weights" / NETWORK
    assert files.locate(public_files()[0], root) == cached
    before = len(server.log)
    assert pretrained.fetch(NAME) == root and len(server.log) == before
    # The other mode has the encoders in common.
    asked.clear()
    pretrained.fetch("mmaudio_large_44k_v2")
    assert_complete(server, root, "mmaudio_large_44k_v2")
    text = "\n".join(line for line, _ in asked)
    assert "needs 3 files" in text and "clip" not in text and "MIT" in text


def test_into_a_folder(home, server, tmp_path):
    """Laid out as MMAudio's own; nothing is left in the caches, and files there are copied."""
    out = tmp_path / "out"
    assert pretrained.fetch("mmaudio_large_44k_v2", out) == out
    for file in public_files("mmaudio_large_44k_v2"):
        assert (out / file.place).is_file()
    assert_complete(server, out, "mmaudio_large_44k_v2")
    assert not (home / "hub").exists()
    shutil.rmtree(out)
    pretrained.fetch(NAME)
    before = len(server.log)
    pretrained.fetch(NAME, out)
    assert len(server.log) == before
    for file in public_files():
        assert (out / file.place).is_file() and not (out / file.place).is_symlink()


def test_downloads_continue(home, server):
    """Of a release file what has come stays, in a run and between runs."""
    server.faults["v1-16.pth"] = Fault(cuts=[20_000, 10_000] + [0] * 10)
    resume_chunk = 1000
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(resume, "CHUNK", resume_chunk)
        refused("v1-16.pth: the connection failed .*; run this again to continue")
    root = files.default_root()
    assert not (root / "ext_weights/v1-16.pth").exists()
    del server.faults["v1-16.pth"]
    server.log.clear()
    pretrained.fetch(NAME)
    assert_complete(server, root)
    ((asked, sent),) = server.downloads("v1-16.pth")
    assert asked == "bytes=30000-" and sent == CODECS["16k"][0].size - 30_000
    assert not list((root / "ext_weights").glob(".*"))


def test_hugging_faces_library_continues_too(home, server, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.faults[CLIP] = Fault(cuts=[20_000])
    pretrained.fetch(NAME)
    (_, first), (asked, second) = server.downloads(CLIP)
    assert asked == "bytes=20000-" and first == 20_000
    assert_complete(server, files.default_root())


@pytest.mark.parametrize("name", ["v1-16.pth", NETWORK, "vocab.json", CLIP])
@pytest.mark.parametrize("out", [False, True])
def test_altered_contents(home, server, tmp_path, name, out):
    """md5 of the table, sha256 of LFS files and git's hash of small ones."""
    (path,) = (p for p in server.folder.rglob(name))
    altered = bytearray(path.read_bytes())
    altered[len(altered) // 2] ^= 1
    server.faults[name] = Fault(body=bytes(altered))
    folder = tmp_path / "out" if out else None
    text = refused(name, out=folder)
    assert "not the published file" in text and text.endswith("it was deleted")
    file = next(file for file in public_files() if file.name == name)
    assert files.locate(file, folder or files.default_root()) is None
    del server.faults[name]
    pretrained.fetch(NAME, folder)
    assert_complete(server, folder or files.default_root())


@pytest.mark.parametrize("name", ["v1-16.pth", NETWORK])
@pytest.mark.parametrize("extra", [-1000, 1000])
def test_lengths_that_are_not_true(home, server, name, extra):
    server.faults[name] = Fault(extra=extra, ignores_range=True)
    refused(name)
    assert files.locate(public_files()[0 if name == NETWORK else 1], home) is None


def test_a_stale_beginning_is_dropped(home, server, capsys):
    """What an earlier run left is of another file: fetched again from its beginning, once."""
    root = files.default_root()
    work = root / "ext_weights/.v1-16.pth.download"
    work.mkdir(parents=True)
    (work / "v1-16.pth.part").write_bytes(b"x" * 1000)
    (work / "tmp123").write_bytes(b"of a process that was killed")
    pretrained.fetch(NAME)
    assert_complete(server, root)
    assert [asked for asked, _ in server.downloads("v1-16.pth")] == ["bytes=1000-", None]


def test_without_a_network(home, server, monkeypatch):
    server.close()
    text = refused("mmaudio_small_16k.pth: http://127.0.0.1:.* cannot be reached")
    assert "Connection refused" in text
    assert f"put the files into {files.default_root()} as weights/{NETWORK}, ext_" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = refused("HF_HUB_OFFLINE forbids fetching")
    assert f"as weights/{NETWORK}, ext_weights/v1-16.pth, ext_weights/best_netG.pt" in text
    # Files that are put there are taken.
    for file in public_files():
        place = files.default_root() / file.place
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(served_path(server.folder, file), place)
    pretrained.fetch(NAME)


def test_one_file_that_cannot_be_fetched(home, server, monkeypatch):
    pretrained.fetch(NAME)
    (files.default_root() / "ext_weights/best_netG.pt").unlink()
    monkeypatch.setattr(table, "RELEASE", "http://127.0.0.1:9/v0.1")
    text = refused("best_netG.pt: the connection failed .*Connection refused")
    assert "put http://127.0.0.1:9/v0.1/best_netG.pt into " in text
    assert text.endswith("as ext_weights/best_netG.pt")


def test_tokens(home, server):
    repo = table.ENCODERS[1].repo
    server.tokens[repo] = "hf_secret"
    refused("open_clip_pytorch_model.bin: its repository is gated.*HF_TOKEN")
    home.mkdir(exist_ok=True)
    (home / "token").write_text("hf_secret")
    server.log.clear()
    pretrained.fetch(NAME)
    # The hub alone gets it, not the storage that it leads to.
    asked = {bool(sent): headers for _, name, headers, sent in server.log if name == CLIP}
    assert "authorization" in asked[False] and "authorization" not in asked[True]
    assert_complete(server, files.default_root())


def test_what_the_server_does_not_have(home, server, monkeypatch):
    monkeypatch.setattr(table, "RELEASE", f"{server.url}/elsewhere")
    refused("v1-16.pth: 404 Client Error")
    for name, reason in (("open_clip_config.json", "404"), (NETWORK, "503")):
        server.faults[name] = Fault(statuses=[int(reason)] * 50)
    refused("open_clip_config.json|" + NETWORK)


@pytest.mark.parametrize("name", [NETWORK, CLIP, "vocab.json"])
def test_a_damaged_file_in_the_cache(home, server, name):
    """Also of those that another program has fetched: blobs are named by their checksums."""
    root = pretrained.fetch(NAME)
    (root / files.CHECKSUMS).unlink()
    file = next(file for file in public_files() if file.name == name)
    blob = files.locate(file, root).resolve()
    data = bytearray(blob.read_bytes())
    data[100] ^= 1
    blob.write_bytes(data)
    text = refused("not the published file .*Delete it to fetch it again")
    assert text.startswith(f"{blob}: ")
    blob.unlink()
    pretrained.fetch(NAME)
    assert_complete(server, root)


def test_another_file_of_the_users_is_left_alone(home, server, tmp_path):
    mine = tmp_path / "out/weights" / NETWORK
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"fine-tuned")
    assert refused("not the published file", out=tmp_path / "out").startswith(f"{mine}: ")
    assert mine.read_bytes() == b"fine-tuned"


def test_too_little_space(home, server, monkeypatch):
    usage = shutil.disk_usage(Path(__file__))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    refused("fetching mmaudio_small_16k takes about .* where 300 kB are free: set HF_HOME")
    assert not server.log


@pytest.mark.parametrize("name", ["v1-16.pth", NETWORK])
def test_a_full_disk(home, server, name, monkeypatch):
    """The disk fills up on the way: one line, and a later run continues."""

    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, key):
            return getattr(self._file, key)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, data):
            if self._file.tell() > 10_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

    def opened(path, mode="r", *rest, **options):
        file = open(path, mode, *rest, **options)
        return Full(file) if mode in ("ab", "wb") else file

    with pytest.MonkeyPatch.context() as full:
        if name == NETWORK:
            path_open = Path.open
            full.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4000)
            full.setattr(
                Path,
                "open",
                lambda p, mode="r", *a, **k: (
                    Full(path_open(p, mode, *a, **k))
                    if ".incomplete" in p.name
                    else path_open(p, mode, *a, **k)
                ),
            )
        else:
            full.setattr(resume, "CHUNK", 4000)
            full.setattr(resume, "open", opened, raising=False)
        with pytest.raises(OSError, match="No space left on device: '.*(mmaudio|hub)'"):
            pretrained.fetch(NAME)
    pretrained.fetch(NAME)
    assert_complete(server, files.default_root())
    assert not list(home.rglob("*.incomplete")) and not list(home.rglob("*.part"))


def test_the_list_of_checksums(home, server, tmp_path):
    """It stands for the names of blobs, which a folder has not."""
    root = pretrained.fetch(NAME, tmp_path / "out")
    noted = json.loads((root / files.CHECKSUMS).read_text())
    assert noted.keys() == {file.name for file in public_files()}
    merges = root / "clip/merges.txt"
    merges.write_text(merges.read_text() + "x y\n")
    refused("merges.txt: not the published file", out=root)
    (root / files.CHECKSUMS).write_text("{")
    with pytest.raises(ValueError, match="checksums.json is damaged: not JSON"):
        pretrained.fetch(NAME, root)


def test_unknown_names(home):
    refused("small: unknown; the public models are mmaudio_small_16k, ", name="small")
