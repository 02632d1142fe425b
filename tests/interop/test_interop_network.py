"""MMAudio's weights in, ours out: against MMAudio's numbers and against PyTorch."""

import dataclasses
import functools
import json
import re
import types
from pathlib import Path

import golden
import jax
import numpy as np
import pytest
from commands import run_command

from vcm_jax import sampling
from vcm_jax.interop import export_torch, import_network, import_torch, state_dict
from vcm_jax.interop.weights import variables_from_torch, variables_to_torch
from vcm_jax.models import Conditions, MMDiT, ModelConfig
from vcm_jax.objectives.guidance import Guidance
from vcm_jax.runs import averages, checkpoint

NETWORK = golden.DATA / "network"
INFO, ARRAYS = golden.load(NETWORK, "small")
CONFIG = ModelConfig(**INFO["config"])


@functools.cache
def two_times():
    """State dict with the second embedder, deterministic weights."""
    return golden.fill(json.loads((NETWORK / "small_state_dict.json").read_text()))


def one_time():
    """As MMAudio's file: without it."""
    return {name: v for name, v in two_times().items() if not name.startswith("h_embed.")}


def inputs(info=INFO, c=CONFIG, batch=INFO["batch"]):
    seeds = info["seeds"]
    x = golden.randn(seeds["latent"], (batch, c.latent_seq_len, c.latent_dim))
    cond = Conditions(
        golden.randn(seeds["clip_f"], (batch, c.clip_seq_len, c.clip_dim)),
        golden.randn(seeds["sync_f"], (batch, c.sync_seq_len, c.sync_dim)),
        golden.randn(seeds["text_f"], (batch, c.text_seq_len, c.text_dim)),
    )
    return x, golden.uniform(seeds["t"], batch), golden.uniform(seeds["s"], batch), cond


APPLY = jax.jit(MMDiT(CONFIG).apply)


def test_imported_weights_are_minus_mmaudios_velocity_at_the_reversed_time():
    x, tau, other, cond = inputs()
    variables = import_network.network_from_torch(one_time(), CONFIG)
    t = np.float32(1 - tau.astype(np.float64))
    reference = -ARRAYS["output_original_one_time"]
    for s in (t, t * other, np.zeros_like(t)):
        assert golden.relative_error(APPLY(variables, x, t, s, cond), reference) < 1e-5
    assert np.abs(variables["params"]["h_embed"]["mlp_0"]["kernel"]).max() > 0


def test_what_is_imported_can_be_exported_again():
    variables = import_network.network_from_torch(one_time(), CONFIG)
    again = export_torch.to_mmaudio(variables_to_torch(variables, CONFIG))
    assert again.keys() == one_time().keys()
    for name, value in one_time().items():
        np.testing.assert_allclose(again[name], value, atol=1e-6, err_msg=name)


def test_mmaudios_convention_keeps_what_the_second_embedder_says_of_zero():
    x, t, _, cond = inputs()
    before = APPLY(variables_from_torch(two_times(), CONFIG), x, t, t, cond)
    theirs = export_torch.to_mmaudio(two_times())
    ours = import_network.network_from_torch(theirs, CONFIG)
    assert golden.relative_error(APPLY(ours, x, t, t, cond), before) < 1e-5


def test_imported_weights_are_sampled_with_guidance_as_mmaudio_does():
    x, _, _, cond = inputs()
    null = MMDiT(CONFIG).apply(
        variables_from_torch(two_times(), CONFIG), len(x), method="null_conditions"
    )
    # MMAudio's own velocity, without any conversion: the second embedder is all zero.
    second = {n: 0 * v for n, v in two_times().items() if n.startswith("h_embed.")}
    theirs = variables_from_torch(one_time() | second, CONFIG)
    expected = x
    for i in range(3):  # Euler's method from 0 (noise) to 1
        tau = np.full(len(x), i / 3, np.float32)
        guided, free = (APPLY(theirs, expected, tau, tau, c) for c in (cond, null))
        expected = expected + (4.5 * guided - 3.5 * free) / 3
    ours = import_network.network_from_torch(one_time(), CONFIG)
    u = lambda x, t, s, c: APPLY(ours, x, t, s, c)
    guided = sampling.guided_velocity(u, null, 4.5)
    found = sampling.sample(guided, x, sampling.uniform_times(3), cond)
    assert golden.relative_error(found, expected) < 1e-4


def test_statistics_that_a_file_lacks_are_left_to_the_data():
    stats = {"latent_mean", "latent_std", "empty_string_feat"}
    bare = {name: value for name, value in one_time().items() if name not in stats}
    whole = import_network.network_from_torch(one_time(), CONFIG)
    found = import_network.network_from_torch(bare, CONFIG)
    assert found["stats"] == {} and whole["stats"].keys() == {
        "latent_mean",
        "latent_std",
        "empty_text",
    }
    jax.tree.map(np.testing.assert_array_equal, found["params"], whole["params"])
    bare |= {
        "latent_mean": np.full((1, 1, 8), np.nan),
        "empty_string_feat": one_time()["empty_string_feat"],
    }
    assert import_network.network_from_torch(bare, CONFIG)["stats"].keys() == {"empty_text"}


@pytest.fixture
def known(monkeypatch):
    """The small network as one that is known by name."""
    monkeypatch.setattr(import_network, "MODELS", {"tiny": CONFIG})


def save(path, tensors):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    return str(path)


def imported(file, out):
    """What the import command did."""
    arguments = ("network", str(file), f"--out={out}")
    return run_command(import_torch, *arguments, positional=import_torch.POSITIONAL)


def exported(workdir, out, *options):
    """What the export command did."""
    return run_command(export_torch, f"--workdir={workdir}", f"--out={out}", *options)


def assert_refused(done, message):
    """The command ended with one line that matches."""
    assert done.code == 1 and len(done.err.splitlines()) == 1
    assert re.search(message, done.err), done.err


@pytest.fixture
def run_folder(tmp_path, known):
    """The workdir of a run with these weights, made through the import command."""

    def make(objective="vcm", tensors=None):
        out = tmp_path / "run"
        file = save(tmp_path / "mmaudio.pth", tensors or one_time())
        done = imported(file, out)
        assert (done.code, "weights of tiny for --config.init_from" in done.out) == (0, True)
        describe(out, objective)
        return out

    return make


def describe(folder, objective, **settings):
    config = {"objective": {"name": objective} | settings}
    run = {"config": config, "model": dataclasses.asdict(CONFIG)}
    run |= dict.fromkeys(("sequence", "encoders", "codec"), {})
    (folder / "run.json").write_text(json.dumps(run))


def test_import_command_writes_what_init_from_reads(run_folder):
    out = run_folder(tensors=one_time() | {"t_embed.freqs": np.zeros(128, np.float32)})
    restored = averages.restore_weights(out)
    expected = import_network.network_from_torch(one_time(), CONFIG)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_imported_weights_that_were_damaged_are_refused(run_folder):
    out = run_folder()
    largest = max(filter(Path.is_file, out.rglob("*")), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="checkpoints/0"):
        averages.restore_weights(out)


def test_torch_and_jax_sample_alike(run_folder, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from vcm_jax.interop.torch_model import AverageVelocity

    # A network with two times: what a run of ours has.
    variables = variables_from_torch(two_times(), CONFIG)
    monkeypatch.setattr(import_network, "network_from_torch", lambda *_: variables)
    file = tmp_path / "ours.pth"
    assert exported(run_folder(), file).code == 0
    model = AverageVelocity.from_state_dict(torch.load(file, weights_only=True))
    x, t, s, cond = inputs()
    features = [torch.from_numpy(getattr(cond, name)) for name in ("clip", "sync", "text")]
    with torch.no_grad():
        output = model(*map(torch.from_numpy, (x, t, s)), *features)
    assert golden.relative_error(output.numpy(), ARRAYS["output"]) < 1e-4
    u = functools.partial(MMDiT(CONFIG).apply, variables)
    sample = jax.jit(sampling.sample, static_argnums=(0, 2))
    for times in ((1.0, 0.0), (1.0, 0.75, 0.5, 0.25, 0.0), (1.0, 0.6, 0.1)):
        ours = sample(u, x, times, cond)
        n = len(times) - 1
        theirs = model.sample(torch.from_numpy(x), times if n == 2 else n, *features)
        assert golden.relative_error(theirs.numpy(), ours) < 1e-4
    np.testing.assert_array_equal(model.latent_std[0, 0].detach(), variables["stats"]["latent_std"])
    for times in (0, [0.0, 1.0], [1.5, 0.0], [1.0]):
        with pytest.raises(ValueError, match="times must decrease"):
            model.sample(torch.from_numpy(x), times, *features)
    # What export_torch wrote is taken back as it is.
    monkeypatch.undo()
    monkeypatch.setattr(import_network, "MODELS", {"tiny": CONFIG})
    assert imported(file, tmp_path / "back").code == 0
    back = averages.restore_weights(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("blocks", [1, 2])
def test_torch_knows_blocks_that_see_the_end_of_a_jump(run_folder, tmp_path, monkeypatch, blocks):
    torch = pytest.importorskip("torch")
    from vcm_jax.interop.torch_model import AverageVelocity

    variables = variables_from_torch(two_times(), CONFIG)
    monkeypatch.setattr(import_network, "network_from_torch", lambda *_: variables)
    folder = run_folder()
    run = json.loads((folder / "run.json").read_text())
    run["model"]["blocks_at_s"] = blocks
    (folder / "run.json").write_text(json.dumps(run))
    assert exported(folder, tmp_path / "ours.pth").code == 0
    model = AverageVelocity.from_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))
    x, t, s, cond = inputs()
    features = [torch.from_numpy(getattr(cond, name)) for name in ("clip", "sync", "text")]
    with torch.no_grad():
        theirs = model(*map(torch.from_numpy, (x, t, s)), *features).numpy()
    ours = MMDiT(dataclasses.replace(CONFIG, blocks_at_s=blocks)).apply(variables, x, t, s, cond)
    assert golden.relative_error(theirs, ours) < 1e-4
    assert golden.relative_error(theirs, ARRAYS["output"]) > 1e-3


def test_torch_takes_guidance_as_an_input(known, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from vcm_jax.interop.torch_model import AverageVelocity

    config = dataclasses.replace(CONFIG, guidance_input=True)
    rng = np.random.default_rng(0)
    embedder = {
        f"g_embed.mlp.{layer}": 0.1 * rng.standard_normal(shape).astype(np.float32)
        for layer, shape in (
            ("0.weight", (64, 768)),
            ("0.bias", 64),
            ("2.weight", (64, 64)),
            ("2.bias", 64),
        )
    }
    file = save(tmp_path / "guided.pth", two_times() | embedder)
    assert imported(file, tmp_path / "start").code == 0
    variables = averages.restore_weights(tmp_path / "start")
    describe(tmp_path / "start", "vcm", guidance="conditioned")
    run = json.loads((tmp_path / "start/run.json").read_text())
    run["model"]["guidance_input"] = True
    (tmp_path / "start/run.json").write_text(json.dumps(run))
    done = exported(tmp_path / "start", tmp_path / "back.pth")
    assert done.code == 0 and "guidance_scale, from 1 to 8" in done.out
    tensors = torch.load(tmp_path / "back.pth", weights_only=True)
    model = AverageVelocity.from_state_dict(tensors)
    x, _, _, cond = inputs()
    features = [torch.from_numpy(getattr(cond, name)) for name in ("clip", "sync", "text")]
    apply = jax.jit(MMDiT(config).apply)
    found = {}
    for scale, interval in ((1.0, (0.0, 1.0)), (3.0, (0.1, 0.8))):
        guidance = Guidance(scale, *interval)
        one, zero = np.ones(len(x), np.float32), np.zeros(len(x), np.float32)
        ours = x - apply(variables, x, one, zero, cond, guidance)
        theirs = model.sample(
            torch.from_numpy(x), 1, *features, guidance_scale=scale, guidance_interval=interval
        ).numpy()
        assert golden.relative_error(theirs, ours) < 1e-4
        found[scale] = theirs
    assert golden.relative_error(found[1.0], found[3.0]) > 1e-3
    plain = AverageVelocity.from_state_dict(
        {name: torch.from_numpy(value) for name, value in two_times().items()}
    )
    with pytest.raises(ValueError, match="has its guidance in the weights"):
        plain.sample(torch.from_numpy(x), 1, *features, guidance_scale=3.0)


def test_torch_in_bfloat16_stays_close():
    torch = pytest.importorskip("torch")
    from vcm_jax.interop.torch_model import AverageVelocity

    tensors = {name: torch.from_numpy(value) for name, value in two_times().items()}
    model = AverageVelocity.from_state_dict(tensors).to(torch.bfloat16)
    x, t, s, cond = inputs()
    with torch.no_grad():
        output = model(*map(torch.from_numpy, (x, t, s, cond.clip, cond.sync, cond.text)))
    assert output.dtype == torch.float32
    difference = output.numpy() - ARRAYS["output"]
    assert 1e-4 < difference.std() / ARRAYS["output"].std() < 0.03
    null = model.null_conditions(len(x), CONFIG.clip_seq_len, CONFIG.sync_seq_len)
    assert [part.shape for part in null] == [
        part.shape for part in (cond.clip, cond.sync, cond.text)
    ]


@pytest.mark.slow
def test_torch_matches_the_reference_in_full_size(shared):
    torch = pytest.importorskip("torch")
    from vcm_jax.interop.torch_model import AverageVelocity

    folder = shared("network/small_16k.npz").parent
    info, arrays = golden.load(folder, "small_16k")
    table = json.loads((folder / "small_16k_state_dict.json").read_text())
    tensors = {name: torch.from_numpy(value) for name, value in golden.fill(table).items()}
    model = AverageVelocity.from_state_dict(tensors)
    args = inputs(info, ModelConfig(**info["config"]), len(arrays["in_t"]))
    x, t, s, clip, sync, text = map(torch.from_numpy, jax.tree.leaves(args))
    null = model.null_conditions(len(x), clip.shape[1], sync.shape[1])
    with torch.no_grad():
        for name, cond in {"output": (clip, sync, text), "output_null": null}.items():
            output = model(x, t, s, *cond).numpy()
            assert golden.relative_error(output, arrays[name]) < 1e-4, name


def test_what_cannot_be_exported(run_folder, tmp_path):
    torch = pytest.importorskip("torch")
    run, file = run_folder("flow_matching"), tmp_path / "fm.pth"
    assert exported(run, file, "--convention=mmaudio").code == 0
    found = torch.load(file, weights_only=True)
    np.testing.assert_allclose(found["final_layer.conv.bias"], one_time()["final_layer.conv.bias"])
    other = tmp_path / "other.pth"

    def refused(message, *options, out=other):
        assert_refused(exported(run, out, *options), message)
        assert not other.exists()

    describe(run, "vcm")
    refused("one time only.*'vcm'", "--convention=mmaudio")
    refused("is a folder: name a file", out=tmp_path)
    refused(r"no checkpoint of step 7; there are \[0\]", "--step=7")
    refused("no EMA of sigma_rel 0.3, only 0", "--sigma_rel=0.3")
    describe(run, "soflow", parameterisation="trigonometric")
    refused("settings of soflow the network is not the average velocity")


def without(name):
    return {k: v for k, v in one_time().items() if k != name}


@pytest.mark.parametrize(
    "tensors, message",
    [
        (without("clip_cond_proj.bias"), "missing: clip_cond_proj.bias"),
        (one_time() | {"what": np.zeros(1)}, "not known: what"),
        (one_time() | {"sync_pos_emb": np.zeros((1, 1, 8, 3))}, r"emb \(1, 1, 8, 3\) inst"),
        (one_time() | {"h_embed.mlp.0.bias": np.zeros(64)}, "missing: h_embed.mlp.0.weight, h_emb"),
        (one_time() | {"clip_cond_proj.bias": np.full(64, np.nan)}, "not finite: clip_cond_proj"),
        (one_time() | {"clip_input_proj.2.w1.weight": np.zeros(1)}, "version 2, for a net"),
        ({"encoder.conv_in.weight": np.zeros(3)}, "not MMAudio's network"),
        (one_time() | {"fused_blocks.7.x": np.zeros(1)}, "7.x .it looks most like tiny"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_written(
    tensors, message, known, tmp_path
):
    file = save(tmp_path / "weights.pth", tensors)
    assert_refused(imported(file, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


def test_damaged_files_and_full_folders_are_refused(known, tmp_path):
    file = tmp_path / "weights.pth"
    save(file, one_time())
    file.write_bytes(file.read_bytes()[:5000])
    assert_refused(
        imported(file, tmp_path / "out"), "weights.pth: truncated, or not a PyTorch file"
    )
    assert_refused(imported("nowhere.pth", tmp_path / "out"), "no such file")
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    assert_refused(imported(file, tmp_path / "out"), "out is there already")
    assert_refused(exported(tmp_path, tmp_path / "x.pth"), "not the workdir of a run")


def test_without_torch_the_commands_say_how_to_get_it(monkeypatch, tmp_path):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(state_dict, "importlib", types.SimpleNamespace(import_module=absent))
    file = tmp_path / "weights.pth"
    file.write_bytes(b"")
    assert_refused(imported(file, tmp_path / "out"), "needs PyTorch: pip install torch")
    assert_refused(exported(tmp_path, tmp_path / "x.pth"), "needs PyTorch: pip install torch")
