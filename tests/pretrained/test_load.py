"""From files to converted folders: what is converted, kept, checked and refused."""

import dataclasses
import errno
import json
import os
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weight_server import NAMES, served_path

from vcm_jax import pretrained
from vcm_jax.codec import load_codec
from vcm_jax.features.encoders import load_encoders
from vcm_jax.interop import import_codec, import_network
from vcm_jax.models import MODELS
from vcm_jax.pretrained import PretrainedError, convert, files, table
from vcm_jax.records.sequence import SequenceConfig

tiny_weights = pytest.importorskip("tiny_weights", reason="makes PyTorch files")
NAME = "mmaudio_small_16k"


@pytest.fixture
def weights(home, served, tmp_path):
    """A function that makes a folder of files of both modes as MMAudio has them."""

    def make(name="mine", flat=False, modes=("16k",)):
        folder = tmp_path / name
        for mode in modes:
            for file in table.PUBLIC_MODELS[NAMES[mode]].files:
                target = folder / (file.name if flat else file.place)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(served_path(served, file), target)
        return folder

    return make


@pytest.fixture
def conversions(monkeypatch):
    """Names of the components that are converted, in order."""
    made, original = [], convert.convert

    def counted(folder, component, *rest):
        made.append(component.name)
        return original(folder, component, *rest)

    monkeypatch.setattr(convert, "convert", counted)
    return made


def assert_loads(found, mode="16k"):
    variables = pretrained.read_network(found.network)
    config = MODELS[found.model]
    expected = import_network.network_from_torch(tiny_weights.network(mode), config)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    codec = load_codec(found.codec)
    expected = import_codec.codec_from_torch(*tiny_weights.tiny_codecs.state_dicts(mode), mode)
    assert (codec.mode, codec.fingerprint) == (mode, expected.fingerprint)
    assert codec.sample_rate == found.sequence.sample_rate
    encoders = load_encoders(found.encoders)
    assert encoders.encode_text("the dog", SequenceConfig()).shape == (77, 16)


def test_a_network_is_read_in_another_dtype_and_with_its_checksums(weights):
    found = pretrained.load(weights())
    whole = pretrained.read_network(found.network)
    half = pretrained.read_network(found.network, jnp.bfloat16)
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), whole["params"])
    jax.tree.map(np.testing.assert_array_equal, half, whole | {"params": cast})
    assert {a.dtype for a in jax.tree.leaves(half["params"])} == {np.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(half["stats"])} == {np.dtype(np.float32)}
    flip(found.network / convert.NETWORK)
    with pytest.raises(PretrainedError, match="network.npz: missing or damaged .Bad CRC-32"):
        pretrained.read_network(found.network)


@pytest.mark.parametrize("mode", ["16k", "44k"])
def test_a_name(home, server, conversions, mode):
    name = NAMES[mode]
    found = pretrained.load(name)
    assert_loads(found, mode)
    assert (found.name, found.model) == (name, name.removeprefix("mmaudio_"))
    assert MODELS[found.model].version == (2 if mode == "44k" else 1)
    assert (found.steps, found.guidance_scale, found.licence) == (25, 4.5, "CC-BY-NC 4.0")
    wanted = SequenceConfig() if mode == "16k" else SequenceConfig.mode_44k()
    assert found.sequence == wanted
    assert conversions == [name, f"codec_{mode}", "encoders"]
    # The second start asks nobody and makes nothing.
    server.log.clear()
    assert pretrained.load(name) == found
    assert not server.log and len(conversions) == 3
    record = json.loads((found.network / convert.RECORD).read_text())
    assert record["origins"][f"{name}.pth"]["checksum"].startswith("md5:")
    assert all(entry["checksum"].startswith("sha256:") for entry in record["files"].values())


def test_what_is_converted_needs_no_origin(home, server, conversions):
    """The encoders are read from the published files, so that these stay."""
    pretrained.load(NAME)
    shutil.rmtree(home / "hub/models--hkchengrex--MMAudio")
    for name in ("v1-16.pth", "best_netG.pt"):
        (files.default_root() / "ext_weights" / name).unlink()
    server.log.clear()
    pretrained.load(NAME)
    assert not server.log and len(conversions) == 3
    (files.default_root() / "ext_weights/synchformer_state_dict.pth").unlink()
    found = pretrained.load(NAME)
    assert conversions[3:] == ["encoders"] and load_encoders(found.encoders)
    assert {name for _, name, *_ in server.log} == {"synchformer_state_dict.pth"}


def flip(path, restore_time=False):
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if restore_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    "kind, damage",
    [
        ("network", "flip"),
        ("codec", "truncate"),
        ("network", "delete"),
        ("codec", "record"),
        ("codec", "version"),
    ],
)
def test_damaged_conversions_are_made_again(home, server, conversions, capsys, kind, damage):
    found = pretrained.load(NAME)
    folder = getattr(found, kind)
    victim, record = largest(folder), folder / convert.RECORD
    if damage == "flip":
        flip(victim)
    elif damage == "truncate":
        os.truncate(victim, victim.stat().st_size // 2)
    elif damage == "delete":
        victim.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:-30])
    else:
        record.write_text(record.read_text().replace('"version": 1', '"version": 0'))
    capsys.readouterr()
    pretrained.load(NAME)
    assert conversions[3:] == [folder.name]
    told = [line for line in capsys.readouterr().err.splitlines() if "made again" in line]
    assert len(told) == 1 and str(folder) in told[0]


def test_copied_conversions_are_recognised_by_their_contents(home, server, conversions):
    found = pretrained.load(NAME)
    for path in found.network.rglob("*"):
        os.utime(path)
    pretrained.load(NAME)
    assert len(conversions) == 3


def test_verify_finds_what_size_and_time_do_not_show(home, server):
    found = pretrained.load(NAME)
    assert all(good for _, _, good in pretrained.verify(NAME))
    origin = files.locate(table.CODECS["16k"][0], files.default_root())
    for path, name in ((largest(found.network), found.network), (origin, origin)):
        flip(path, restore_time=True)
        assert pretrained.load(NAME) == found
        bad = [what for what, _, good in pretrained.verify(NAME) if not good]
        assert bad == [str(name)]
        flip(path, restore_time=True)


def test_verify_before_anything_is_there(home):
    findings = pretrained.verify(NAME)
    assert {finding for _, finding, _ in findings} == {"not here", "does not exist"}


@pytest.mark.parametrize("flat", [True, False])
def test_a_folder(weights, server, conversions, flat):
    folder = weights(flat=flat)
    found = pretrained.load(folder)
    assert_loads(found)
    assert found.name == NAME and found.network == folder / "converted" / NAME
    assert pretrained.load(str(folder)) == found and len(conversions) == 3
    assert not server.log


def test_mmaudios_own_folder(weights, home, server, monkeypatch, tmp_path):
    """Its repository has no vocoder for 44.1 kHz and no CLIP: Hugging Face's cache has them."""
    folder = weights(modes=("44k",))
    pretrained.fetch("mmaudio_large_44k_v2")
    server.log.clear()
    shutil.rmtree(folder / "clip")
    (folder / "ext_weights/bigvgan_generator.pt").unlink()
    assert_loads(pretrained.load(folder), "44k")
    assert not server.log


def test_open_clips_vocabulary(weights, tmp_path, monkeypatch):
    folder = weights()
    for name in ("vocab.json", "merges.txt"):
        (folder / "clip" / name).unlink()
    package = tmp_path / "packages/open_clip"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    tiny_weights.tiny_encoders.write_vocabulary(package)
    with pytest.raises(PretrainedError, match="lacks clip/vocab.json, clip/merges.txt: put the "):
        pretrained.load(folder)
    monkeypatch.syspath_prepend(package.parent)
    assert load_encoders(pretrained.load(folder).encoders)
    assert "open_clip" not in sys.modules


def test_a_folder_that_was_moved(weights, conversions, tmp_path):
    """Links to files of the encoders lead elsewhere then; the rest is as it was."""
    folder = weights().rename(tmp_path / "before")
    pretrained.load(folder)
    found = pretrained.load(folder.rename(tmp_path / "after"))
    assert conversions[3:] == ["encoders"]
    assert load_encoders(found.encoders)


def test_several_networks(weights, monkeypatch):
    folder = weights(modes=("16k", "44k"))
    with pytest.raises(PretrainedError, match="several networks: give the file of one") as caught:
        pretrained.load(folder)
    for name in NAMES.values():
        path = folder / "weights" / f"{name}.pth"
        assert str(path) in str(caught.value)
        found = pretrained.load(path)
        assert (found.name, found.network) == (name, folder / "converted" / name)
    monkeypatch.chdir(folder / "weights")
    assert pretrained.load(f"{NAME}.pth").network == folder / "converted" / NAME
    flat = weights("flat", flat=True)
    assert pretrained.load(flat / f"{NAME}.pth").network == flat / "converted" / NAME


def test_files_that_a_folder_lacks(weights, server, home):
    folder = weights()
    (folder / "ext_weights/v1-16.pth").unlink()
    with pytest.raises(PretrainedError) as caught:
        pretrained.load(folder)
    assert str(caught.value) == (
        f"{folder} lacks ext_weights/v1-16.pth: put {server.release_url}/v1-16.pth into {folder} "
        f"as ext_weights/v1-16.pth, or run python -m vcm_jax.pretrained fetch {NAME} --out={folder}"
    )
    assert not server.log
    pretrained.fetch(NAME, folder)
    assert [name for _, name, _, sent in server.log if sent] == ["v1-16.pth"]
    assert_loads(pretrained.load(folder))


def test_names_and_folders_that_are_neither(home, tmp_path):
    with pytest.raises(PretrainedError, match="neither a folder nor a public model; .*_large_44k_"):
        pretrained.load("large")
    with pytest.raises(PretrainedError, match="holds no network .weights/mmaudio_small_16k.pth or"):
        pretrained.load(tmp_path)


def test_a_folder_that_cannot_be_written(weights, home, monkeypatch):
    """The converted weights go to the default folder."""
    folder = weights()
    monkeypatch.setattr(os, "access", lambda path, mode: folder not in [path, *path.parents])
    found = pretrained.load(folder)
    assert not (folder / "converted").exists() and home in found.network.parents
    assert_loads(found)


def test_another_network_in_a_folder_is_used(weights, capsys, conversions):
    """Fine-tuned weights have the published name and another checksum."""
    folder = weights()
    pretrained.load(folder)
    path = folder / "weights" / f"{NAME}.pth"
    tiny_weights.tiny_encoders.save(path, tiny_weights.network("16k", seed=1))
    found = pretrained.load(folder)
    assert conversions[3:] == [NAME]
    assert "not the published file (md5:" in capsys.readouterr().err
    variables = pretrained.read_network(found.network)
    expected = import_network.network_from_torch(
        tiny_weights.network("16k", seed=1), MODELS["small_16k"]
    )
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize("name", [f"weights/{NAME}.pth", "ext_weights/bigvgan_generator.pt"])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_files_in_a_folder(weights, home, name, damage):
    """Without a published checksum, too: the format has its own."""
    folder = weights(modes=("44k",) if "bigvgan" in name else ("16k",))
    path = folder / name
    if damage == "flip":
        flip(path)
    else:
        os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(PretrainedError, match="truncated or damaged|damaged .* fails its checksum"):
        pretrained.load(folder)
    converted = folder / "converted"
    assert not [p for p in converted.glob("*") if p.name.startswith(("mmaudio_small_16k", "codec"))]


def test_a_file_without_statistics(weights):
    folder = weights()
    state = tiny_weights.network("16k")
    del state["latent_mean"]
    tiny_weights.tiny_encoders.save(folder / "weights" / f"{NAME}.pth", state)
    with pytest.raises(PretrainedError, match="holds no latent_mean, without which"):
        pretrained.load(folder)


def test_a_full_disk(weights, monkeypatch, conversions):
    folder = weights()
    full = OSError(errno.ENOSPC, "No space left on device")

    def save(self, out):
        (out / "codec.npz").write_bytes(b"half")
        raise full

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_codec.NeuralCodec, "save", save)
        with pytest.raises(OSError, match="No space left"):
            pretrained.load(folder)
    assert [p.name for p in (folder / "converted").glob("*codec*")] == []
    pretrained.load(folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PretrainedError, match="converting .* takes about .* are free"):
        pretrained.load(weights("other"))


def test_what_a_killed_process_left(weights):
    folder = weights()
    left = folder / "converted" / f".{NAME}.0123abcd.tmp"
    left.mkdir(parents=True)
    (left / "checkpoints").touch()
    pretrained.load(folder)
    assert sorted(p.name for p in (folder / "converted").iterdir()) == [
        "codec_16k",
        "encoders",
        NAME,
    ]


def test_a_table_with_another_checksum(home, server, monkeypatch):
    """Published weights were replaced: what was made from the old ones is not used."""
    pretrained.load(NAME)
    public = table.PUBLIC_MODELS[NAME]
    changed = dataclasses.replace(public.network, checksum="md5:" + 32 * "0")
    replaced = dataclasses.replace(public, network=changed)
    monkeypatch.setitem(table.PUBLIC_MODELS, NAME, replaced)
    with pytest.raises(PretrainedError, match="not the published file"):
        pretrained.load(NAME)


def test_without_symbolic_links(weights, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    assert load_encoders(pretrained.load(weights()).encoders)


def test_what_could_not_be_converted_is_not_fetched(home, server, monkeypatch):
    from vcm_jax.interop import state_dict

    def absent(name):
        raise ImportError(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(MODELS, "small_16k")
        with pytest.raises(PretrainedError, match="this version of vcm_jax has no network small"):
            pretrained.load(NAME)
    monkeypatch.setattr(state_dict, "importlib", types.SimpleNamespace(import_module=absent))
    with pytest.raises(ValueError, match="needs PyTorch: pip install torch"):
        pretrained.load(NAME)
    assert not server.log


def test_two_at_once(weights, conversions, capsys):
    """One converts, the other waits and finds it done."""
    folder = weights()
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(pretrained.load, folder) for _ in range(2))
    assert first.result() == second.result() and len(conversions) == 3
    assert capsys.readouterr().err.count("waiting: ") == 1


def test_the_network_alone(home, server, conversions):
    """What fine-tuning starts from needs neither the codec nor the encoders."""
    assert pretrained.is_public(NAME) and not pretrained.is_public("nowhere")
    folder = pretrained.load_network(NAME)
    assert conversions == [NAME] and folder.name == NAME
    assert {name for _, name, _, sent in server.log if sent} == {f"{NAME}.pth"}
    assert pretrained.load(NAME).network == folder
    assert conversions == [NAME, "codec_16k", "encoders"]
