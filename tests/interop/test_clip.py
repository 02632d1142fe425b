"""CLIP: open_clip's weights in transformers' network, and its tokenizer to the last id."""

import dataclasses
import html
import json

import numpy as np
import pytest
import regex

from vcm_jax.interop.state_dict import StateDictError

torch = pytest.importorskip("torch")
pytest.importorskip("ftfy")
tiny = pytest.importorskip("tiny_encoders")
clip, Tokenizer = tiny.clip, tiny.clip.Tokenizer
CLIP, IMAGE = tiny.CLIP, tiny.IMAGE
F = torch.nn.functional


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    tiny.use_tiny_sizes(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    tiny.write_open_clip(tmp_path / "clip")
    return tmp_path / "clip"


def tower(w, prefix, x, heads, mask=None):
    """open_clip's residual attention blocks, with plain functions on its own names."""
    batch, length, width = x.shape
    i = 0
    while f"{prefix}transformer.resblocks.{i}.ln_1.weight" in w:
        layer = {
            name.removeprefix(f"{prefix}transformer.resblocks.{i}."): value
            for name, value in w.items()
            if name.startswith(f"{prefix}transformer.resblocks.{i}.")
        }
        h = F.layer_norm(x, (width,), layer["ln_1.weight"], layer["ln_1.bias"])
        qkv = h @ layer["attn.in_proj_weight"].T + layer["attn.in_proj_bias"]
        split = lambda z: z.view(batch, length, heads, -1).transpose(1, 2)
        q, k, v = (split(z) for z in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5
        if mask is not None:
            scores = scores + mask
        h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + h @ layer["attn.out_proj.weight"].T + layer["attn.out_proj.bias"]
        h = F.layer_norm(x, (width,), layer["ln_2.weight"], layer["ln_2.bias"])
        h = h @ layer["mlp.c_fc.weight"].T + layer["mlp.c_fc.bias"]
        h = h * torch.sigmoid(1.702 * h)
        x = x + h @ layer["mlp.c_proj.weight"].T + layer["mlp.c_proj.bias"]
        i += 1
    return x


def open_clip_image(w, pictures):
    x = F.conv2d(pictures, w["visual.conv1.weight"], stride=CLIP.patch).flatten(2).transpose(1, 2)
    first = w["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + w["visual.positional_embedding"]
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
    x = tower(w, "visual.", norm(x, "visual.ln_pre"), CLIP.vision_heads)
    return F.normalize(norm(x[:, 0], "visual.ln_post") @ w["visual.proj"], dim=-1)


def open_clip_text(w, ids):
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    x = tower(w, "", x, CLIP.text_heads, mask)
    x = F.layer_norm(x, x.shape[-1:], w["ln_final.weight"], w["ln_final.bias"])
    return F.normalize(x, dim=-1)


def pictures():
    return torch.from_numpy(
        np.random.default_rng(1).standard_normal((3, 3, IMAGE, IMAGE), np.float32)
    )


def test_the_same_features_as_open_clips_own_forward_pass(folder):
    weights = {k: torch.from_numpy(v) for k, v in tiny.open_clip_weights().items()}
    model, tokenizer, _ = clip.load_clip(folder)
    ids = torch.from_numpy(tokenizer(["", "The dog's ball!!", "all the dogs " * 40]))
    with torch.inference_mode():
        image, text = clip.image_features(model, pictures()), clip.text_features(model, ids)
    torch.testing.assert_close(image, open_clip_image(weights, pictures()), atol=2e-6, rtol=0)
    torch.testing.assert_close(text, open_clip_text(weights, ids), atol=2e-6, rtol=0)
    assert image.shape == (3, CLIP.projection) and text.shape == (3, 77, CLIP.text_width)
    # Positions after the end count, differ from each other, and see the caption.
    assert (text[1, 20:] - text[1, 19]).abs().amax(-1).min() > 1e-3
    assert (text[1, 20:] - text[0, 20:]).abs().amax(-1).min() > 1e-3


def test_what_is_left_over_at_the_edge_is_not_looked_at(folder):
    model, _, _ = clip.load_clip(folder)
    cut = pictures()
    cut[..., 28:, :] = cut[..., :, 28:] = 9.0
    with torch.inference_mode():
        whole, other = (clip.image_features(model, x) for x in (pictures(), cut))
    torch.testing.assert_close(whole, other)


@pytest.mark.parametrize("kind", ["bin", "safetensors", "float16"])
def test_a_transformers_checkpoint_gives_the_same(folder, tmp_path, kind):
    model, _, weights = clip.load_clip(folder)
    other = tmp_path / "transformers"
    model.config.vision_config.image_size = 28  # what it was trained at; it is given 34
    if kind == "safetensors":
        model.save_pretrained(other)
    else:
        model.config.save_pretrained(other)
        state_dict = model.state_dict() | {"text_model.embeddings.position_ids": torch.arange(77)}
        if kind == "float16":
            state_dict = {k: v.half() for k, v in state_dict.items()}
        torch.save(state_dict, other / "pytorch_model.bin")
    tiny.write_vocabulary(other, "pair")
    again, tokenizer, same = clip.load_clip(other)
    tolerance = 5e-3 if kind == "float16" else 0
    with torch.inference_mode():
        torch.testing.assert_close(
            clip.image_features(again, pictures()),
            clip.image_features(model, pictures()),
            atol=tolerance,
            rtol=0,
        )
    assert same.keys() == weights.keys() and tokenizer.hash == Tokenizer(folder).hash


def error(folder) -> str:
    with pytest.raises(StateDictError) as caught:
        clip.load_clip(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    return str(caught.value)


def test_checkpoints_that_do_not_fit(folder, tmp_path):
    weights = tiny.open_clip_weights()
    path, config = folder / "open_clip_pytorch_model.bin", folder / "open_clip_config.json"
    tiny.save(path, {k: v for k, v in weights.items() if "visual.transformer.resblocks.1" not in k})
    assert "missing: vision_model.encoder.layers.1.layer_norm1.bias, " in error(folder)
    tiny.save(path, weights | {"visual.attnpool.x": np.zeros(2)})
    assert "not known: visual.attnpool.x" in error(folder)
    tiny.save(path, weights | {"visual.proj": np.zeros((20, 8), np.float32)})
    assert "other shapes: visual_projection.weight (8, 20) instead of (12, 20)" in error(folder)
    path.write_bytes(path.read_bytes()[:5000])
    assert "truncated" in error(folder)
    path.unlink()
    assert "no weights of CLIP (model.safetensors, " in error(folder)
    tiny.save(path, weights)
    for change in (("width", 24), ("layers", 3), ("image_size", 42)):
        content = json.loads(json.dumps(tiny.OPEN_CLIP_CONFIG))
        content["model_cfg"]["vision_cfg"].update([change])
        config.write_text(json.dumps(content))
        assert "not the CLIP that MMAudio uses" in error(folder)
    assert "grid 3 instead of 2" in error(folder)
    content = tiny.OPEN_CLIP_CONFIG["model_cfg"] | {"quick_gelu": False}
    config.write_text(json.dumps({"model_cfg": content}))
    assert error(folder).endswith("activation gelu instead of quick_gelu")
    config.write_text("{}")
    assert "not the config of a CLIP (KeyError" in error(folder)
    config.unlink()
    assert "open_clip_config.json: no such file; it belongs to the weights" in error(folder)


def test_vocabularies_that_do_not_fit(folder):
    packed = folder / "bpe_simple_vocab_16e6.txt.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:60])
    assert "damaged or other vocabulary" in error(folder)
    packed.unlink()
    assert error(folder).endswith("tokenizer.json, or bpe_simple_vocab_16e6.txt.gz")
    tiny.write_vocabulary(folder, "pair")
    content = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({k: v for k, v in content.items() if v > 2}))
    assert "damaged or other vocabulary (KeyError: '!')" in error(folder)
    (folder / "vocab.json").write_text(json.dumps(content | {"<|endoftext|>": 999}))
    assert "a vocabulary of 1000 that ends with ids 523 and 999, the weights have 525" in error(
        folder
    )


def simple_tokenizer(text: str) -> list[int]:
    """The textbook's byte-pair encoding: the earliest merge first, wherever it applies."""
    table = tiny.letters()
    words = table + [a + "</w>" for a in table] + ["".join(m) for m in tiny.MERGES]
    ids = {word: i for i, word in enumerate([*words, "<start_of_text>", "<end_of_text>"])}
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    letter = dict(zip(order, table))
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    found = []
    for word in regex.findall(pattern, " ".join(html.unescape(text).split()).lower()):
        symbols = [letter[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        while True:
            pairs = list(zip(symbols, symbols[1:]))
            best = min((tiny.MERGES.index(p) for p in pairs if p in tiny.MERGES), default=None)
            if best is None:
                break
            at = pairs.index(tiny.MERGES[best])
            symbols[at : at + 2] = ["".join(tiny.MERGES[best])]
        found += [ids[symbol] for symbol in symbols]
    ids = [len(words), *found, len(words) + 1]
    ids = ids[:76] + [len(words) + 1] if len(ids) > 77 else ids
    return ids + [0] * (77 - len(ids))


CAPTIONS = [
    "",
    "  ",
    "The dog's ball",
    "ALL the   balls\tand\ndogs!!",
    "don't re-fall 1234, they'll!!?",
    "a &amp; b &lt;tag&gt;",
    "caf\u00e9 \u732b \U0001f415",
    "the " * 100,
    "x" * 75,
    "x" * 76,
    "x" * 74,
]


@pytest.mark.parametrize("form", ["gzip", "pair", "json", "old"])
def test_ids_are_those_of_the_textbook(tmp_path, form):
    tiny.write_vocabulary(tmp_path, form)
    ids = Tokenizer(tmp_path)(CAPTIONS)
    assert ids.shape == (len(CAPTIONS), 77) and ids.dtype == np.int64
    for caption, row in zip(CAPTIONS, ids):
        assert row.tolist() == simple_tokenizer(caption), caption
    start, end = CLIP.vocabulary - 2, CLIP.vocabulary - 1
    assert ids[0].tolist() == [start, end] + [0] * 75
    assert ids[7, -1] == end and ids[9, -1] == end and ids[9, -2] != 0 and ids[10, -1] == 0


def test_captions_are_cleaned_as_by_open_clip(tmp_path):
    tiny.write_vocabulary(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    pairs = {
        "\u201cdog\u201d\u2019s": '"dog"\'s',  # curly quotes
        "caf\u00c3\u00a9": "caf\u00e9",  # UTF-8 that was read as Latin-1
        "cafe\u0301": "caf\u00e9",  # a combining accent
        "\uff24\uff2f\uff27 \ufb01": "dog fi",  # wide letters, a ligature
        "a &amp;amp; b": "a & b",
        "dog\u00a0\u2003ball": "dog ball",
    }
    given, wanted = tokenizer(list(pairs)), tokenizer(list(pairs.values()))
    np.testing.assert_array_equal(given, wanted)
    special = tokenizer(["dog <end_of_text> ball"])[0]
    assert special[2] == CLIP.vocabulary - 1 and special[3] == tokenizer(["ball"])[0, 1]


def test_the_published_sizes():
    """What DFN5B's own config files say, in both their forms, are the sizes that are wanted."""
    vision = {"image_size": 378, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
    config = {"embed_dim": 1024, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    assert clip._size_from_open_clip({"model_cfg": config}) == clip.ClipSize()
    vision = {"hidden_size": 1280, "image_size": 378, "intermediate_size": 5120, "patch_size": 14}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 32}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    text |= {"num_hidden_layers": 24}
    config = {"projection_dim": 1024, "text_config": text, "vision_config": vision}
    assert clip._size_from_transformers(config) == clip.ClipSize()
    assert dataclasses.replace(clip.ClipSize(), grid=24) != clip.ClipSize()
    assert 384 // 14 == 378 // 14 == clip.ClipSize().grid
