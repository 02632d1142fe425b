"""Conversion of PyTorch files to a codec folder: what is read, what is refused."""

import numpy as np
import pytest
from commands import run_command
from tiny_codecs import shrink, state_dicts

from vcm_jax.codec import load_codec
from vcm_jax.interop import import_codec, import_torch
from vcm_jax.interop.state_dict import StateDictError

torch = pytest.importorskip("torch", reason="reads PyTorch files")


def save(path, state_dict, wrapped=False):
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state_dict.items()}
    torch.save({"generator": tensors} if wrapped else tensors, path)
    return str(path)


def with_weight_norm(vocoder, g, v):
    """As training leaves it: a magnitude and a direction for every weight; and filters."""
    rng, found = np.random.default_rng(0), {}
    for name, value in vocoder.items():
        if not name.endswith(".weight"):
            found[name] = value
            continue
        stem = name.removesuffix(".weight")
        norm = np.sqrt((value**2).sum(axis=(1, 2), keepdims=True))
        found[stem + g] = norm
        found[stem + v] = value * rng.uniform(0.5, 2, norm.shape).astype(np.float32)
    found["activation_post.upsample.filter"] = np.zeros((1, 1, 12), np.float32)
    return found


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Paths of tiny files of both modes, as the released ones are laid out."""
    shrink(monkeypatch)
    paths = {}
    for mode in ("16k", "44k"):
        vae, vocoder = state_dicts(mode)
        vocoder = with_weight_norm(vocoder, ".weight_g", ".weight_v")
        paths[f"vae {mode}"] = save(tmp_path / f"v1-{mode}.pth", vae)
        paths[f"vocoder {mode}"] = save(tmp_path / f"vocoder-{mode}.pt", vocoder, wrapped=True)
    return paths


def convert(vae, vocoder, out):
    arguments = ("codec", f"--vae={vae}", f"--vocoder={vocoder}", f"--out={out}")
    return run_command(import_torch, *arguments, positional=import_torch.POSITIONAL)


def test_both_modes(files, tmp_path):
    for mode, rate in (("16k", 16_000), ("44k", 44_100)):
        done = convert(files[f"vae {mode}"], files[f"vocoder {mode}"], tmp_path / mode)
        assert done.code == 0 and f"codec of mode {mode}" in done.out
        codec = load_codec(tmp_path / mode)
        assert (codec.mode, codec.sample_rate) == (mode, rate)
        expected = import_codec.codec_from_torch(*state_dicts(mode), mode)
        assert codec.fingerprint == expected.fingerprint
        for name, value in expected.arrays.items():
            np.testing.assert_allclose(codec.arrays[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_is_torchs(old):
    """`torch.nn.utils.weight_norm` and the newer parametrization, of both convolutions."""
    make = torch.nn.utils.weight_norm if old else torch.nn.utils.parametrizations.weight_norm
    for layer in (torch.nn.Conv1d(3, 5, 7), torch.nn.ConvTranspose1d(3, 5, 8, 4)):
        model = torch.nn.Sequential(make(layer))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        with torch.no_grad():
            model(torch.zeros(1, 3, 20))  # the old kind computes the weight when it is called
        folded = import_codec.fold_weight_norm(
            {name: value.numpy() for name, value in model.state_dict().items()}
        )
        assert set(folded) == {"0.weight", "0.bias"}
        weight = model[0].weight.detach().numpy()
        np.testing.assert_allclose(folded["0.weight"], weight, rtol=1e-5, atol=1e-7)


def message(vae, vocoder, out):
    """The one line that the command ends with; nothing is written."""
    done = convert(vae, vocoder, out)
    assert done.code == 1 and not out.exists()
    (text,) = done.err.splitlines()
    assert text.startswith("error: ")
    return text


def test_files_that_do_not_fit(files, tmp_path):
    def refused(vae, vocoder):
        return message(files.get(vae, vae), files.get(vocoder, vocoder), tmp_path / "out")

    text = refused("vocoder 16k", "vocoder 16k")
    assert "vocoder-16k.pt: not a VAE of the modes 16k and 44k" in text
    assert text.endswith(
        "decoder.conv_in.weight is missing (it looks like the vocoder of mode 16k)"
    )
    assert refused("vae 16k", "vae 16k").endswith("(it looks like the VAE of mode 16k)")
    text = refused("vae 16k", "vocoder 44k")
    assert (
        "vocoder-44k.pt: as the vocoder of mode 16k it does not fit: missing: conv_post.bias"
        in text
    )
    assert "conv_pre.weight (32, 128, 7) instead of (32, 80, 7)" in text
    assert text.endswith("(it looks like the vocoder of mode 44k)")
    assert "nowhere.pth: no such file" in refused("nowhere.pth", "vocoder 16k")

    vae, vocoder = state_dicts("16k")
    vae["decoder.more"] = vae.pop("decoder.learnable_gain")
    text = refused(save(tmp_path / "renamed.pth", vae), "vocoder 16k")
    assert "missing: decoder.learnable_gain; not known: decoder.more" in text
    vae, _ = state_dicts("16k")
    vae["decoder.conv_in.weight"] = np.zeros((64, 20, 3), np.float32)
    text = refused(save(tmp_path / "wider.pth", vae), "vocoder 16k")
    assert "decoder.conv_in.weight is (64, 20, 3)" in text
    vocoder["conv_pre.bias"][3] = np.nan
    text = refused("vae 16k", save(tmp_path / "nan.pt", vocoder))
    assert "nan.pt: conv_pre.bias has numbers that are not finite" in text
    cut = tmp_path / "cut.pth"
    cut.write_bytes((tmp_path / "v1-16k.pth").read_bytes()[:5000])
    assert "cut.pth: truncated, or not a PyTorch file" in refused(str(cut), "vocoder 16k")


def test_a_folder_in_use_is_left_alone(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = convert(files["vae 16k"], files["vocoder 16k"], tmp_path / "out")
    assert done.code == 1 and "is there already: give another folder or remove it" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_missing_torch_is_said(files, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    text = message(files["vae 16k"], files["vocoder 16k"], tmp_path / "out")
    assert "needs PyTorch: pip install torch" in text


def test_a_halved_epsilon_would_be_seen():
    """Small weights, where the epsilon of the normalisation matters."""
    weight = 1e-3 * np.random.default_rng(0).standard_normal((4, 5, 3))
    found = import_codec.normalize_magnitude(weight.astype(np.float32))
    norms = np.sqrt((weight**2).sum(axis=(1, 2)))
    rms = norms / np.sqrt(15)
    np.testing.assert_allclose(np.sqrt((found**2).sum(axis=(1, 2))), rms / (1e-4 + rms), rtol=1e-5)


def test_shapes_are_refused_without_files():
    with pytest.raises(StateDictError, match="missing: data_mean, data_std, decoder.conv_in"):
        import_codec.codec_from_torch({"a": np.zeros(3)}, {}, "16k")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "'' cannot be imported: give codec, network FILE, or features FOLDER"),
        (["vocoder"], "'vocoder' cannot be imported"),
        (["network", "--out=x"], "network: give `network FILE` and flags"),
        (["codec", "file", "--out=x"], "codec file: give `codec` and flags"),
        (["codec", "--vae=a", "--out=x"], "codec needs --vocoder"),
        (["network", "a.pth", "--out=x", "--vae=b"], "network takes no --vae"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    done = run_command(import_torch, *arguments, positional=import_torch.POSITIONAL)
    assert done.code == 1 and message in done.err
