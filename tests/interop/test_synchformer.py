"""Synchformer's visual encoder: parity with the original code, and the forms of its file."""

import json

import golden
import numpy as np
import pytest

from vcm_jax.interop.state_dict import StateDictError

torch = pytest.importorskip("torch")
synchformer = pytest.importorskip("vcm_jax.interop.synchformer")

TINY = synchformer.SynchformerSize(width=16, heads=2, depth=2, image=32)
STAGES = {
    "stage.patch_embed_3d": "patch_embed_3d.proj",
    "stage.blocks.0.timeattn": "blocks.0.timeattn",
    "stage.blocks.0.attn": "blocks.0.attn",
    "stage.blocks.0.mlp": "blocks.0.mlp",
    "stage.blocks.0": "blocks.0",
    "stage.blocks.1": "blocks.1",
    "stage.blocks.5": "blocks.5",
    "stage.blocks.11": "blocks.11",
    "stage.norm": "norm",
    "stage.spatial_attn_agg": "spatial_attn_agg",
}


def save(path, state_dict):
    torch.save(
        {name: torch.from_numpy(np.array(value)) for name, value in state_dict.items()}, path
    )
    return path


def loaded(tmp_path, table, boosted):
    path = save(tmp_path / "synchformer_state_dict.pth", golden.fill(table, boosted=boosted))
    return synchformer.load_synchformer(path)[0]


def test_parity_with_the_original_stage_by_stage(tmp_path):
    """One whole segment; the numbers are of the original code, thinned out by a stride."""
    folder = golden.DATA / "synchformer"
    info, arrays = golden.load(folder, "posboost_first_segment")
    model = loaded(tmp_path, info["table"], info["posboost_names"])
    seen = {}
    for stage, name in STAGES.items():
        keep = lambda module, inputs, output, stage=stage: seen.update({stage: output})
        model.get_submodule(name).register_forward_hook(keep)
    model.blocks[0].register_forward_pre_hook(lambda _, x: seen.update({"stage.tokens_in": x[0]}))
    segment = golden.randn(info["seed"], info["input_shape"])[0, :1]
    with torch.inference_mode():
        seen["features"] = model(torch.from_numpy(segment))
    convolved = seen["stage.patch_embed_3d"]  # B D T H W -> tokens, time slowest
    seen["stage.patch_embed_3d"] = convolved.flatten(2).transpose(1, 2)
    assert seen.keys() == arrays.keys()
    for name, reference in arrays.items():
        value = seen[name].numpy().reshape(-1)[:: info["strides"][name]]
        assert golden.relative_error(value, reference.reshape(-1)) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["synchformer", "synchformer_posboost"])
def test_parity_of_all_segments(shared, tmp_path, name):
    table = json.loads(shared("synchformer/synchformer_state_dict.json").read_text())
    info, arrays = golden.load(golden.SHARED / "synchformer", name)
    model = loaded(tmp_path, table, info["posboost_names"])
    segments = golden.randn(info["seed"], info["input_shape"])
    with torch.inference_mode():
        features = model(torch.from_numpy(segments[0])).numpy()
    assert golden.relative_error(features[None], arrays["features"]) < 1e-4


@pytest.fixture
def tiny(monkeypatch):
    """(state dict of a small encoder with the names of the original, its output, its input)."""
    monkeypatch.setattr(synchformer, "SIZE", TINY)
    torch.manual_seed(0)
    model = synchformer.Synchformer(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    segments = torch.randn(2, 16, 3, 32, 32)
    with torch.inference_mode():
        output = model(segments)
    return {k: v.numpy() for k, v in model.state_dict().items()}, output, segments


def test_each_segment_is_its_own(tiny, tmp_path):
    state_dict, output, segments = tiny
    model, _ = synchformer.load_synchformer(save(tmp_path / "a.pth", state_dict))
    assert output.shape == (2, 8, 16)
    with torch.inference_mode():
        torch.testing.assert_close(model(segments[1:]), output[1:], atol=1e-5, rtol=1e-5)


def test_the_file_with_prefix_with_more_and_wrapped(tiny, tmp_path):
    state_dict, output, segments = tiny
    prefixed = {f"vfeat_extractor.{name}": value for name, value in state_dict.items()}
    unused = {"patch_embed.proj.weight": np.zeros((16, 3, 16, 16)), "patch_embed.proj.bias": [0.0]}
    whole = {"afeat_extractor.x": np.zeros(3), "transformer.y": np.zeros(2)} | prefixed
    for number, content in enumerate((state_dict | unused, prefixed, whole)):
        path = save(tmp_path / f"{number}.pth", content)
        model, _ = synchformer.load_synchformer(path)
        with torch.inference_mode():
            torch.testing.assert_close(model(segments), output)
    tensors = {"model": torch.load(path)}
    torch.save(tensors, path)
    assert synchformer.load_synchformer(path)[1].keys() == state_dict.keys()


def test_files_that_do_not_fit(tiny, tmp_path):
    state_dict, _, _ = tiny
    path = tmp_path / "a.pth"

    def error(content):
        save(path, content)
        with pytest.raises(StateDictError) as caught:
            synchformer.load_synchformer(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
        return str(caught.value)

    missing = {k: v for k, v in state_dict.items() if not k.startswith("blocks.1.")}
    assert "missing: blocks.1.attn.proj.bias, " in error(missing) and "and 14 more" in error(
        missing
    )
    assert "not known: blocks.2.x" in error(state_dict | {"blocks.2.x": np.zeros(1)})
    other = state_dict | {"norm.weight": np.zeros(8, np.float32)}
    assert "other shapes: norm.weight (8,) instead of (16,)" in error(other)
    assert "Synchformer" in error({"x": np.zeros(1)})
    save(path, state_dict)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(StateDictError, match="truncated"):
        synchformer.load_synchformer(path)
