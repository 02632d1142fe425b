"""The benchmarks that compare objectives: exact flows of mixtures, records' layout, the report."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import GaussianFlow

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
toy = importlib.import_module("toy_flows")
sync_layout = importlib.import_module("sync_layout")
compare = importlib.import_module("compare_objectives")


def test_a_mixture_of_one_has_the_gaussian_s_flow():
    flow = GaussianFlow(0.7, 0.4)
    mixture = toy.Mixture(np.full((1, 2), 0.7), 0.4, np.zeros(1, int))
    x = np.random.default_rng(0).standard_normal((6, 2))
    label = jnp.zeros(6, int)
    with jax.enable_x64(True):
        for t in (0.2, 0.9):
            found = mixture.velocity(x, t, label)
            np.testing.assert_allclose(found, flow.velocity(x, t), rtol=1e-9)
        found = mixture.flow(x, 0.9, 0.1, label)
        exact = x - 0.8 * flow.average_velocity(x, np.float64(0.9), np.float64(0.1))
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    label, x = jnp.zeros(3, int), np.zeros((3, 2))
    ends = [problem.flow(x, 1.0, 0.0, label) for problem in toy.PROBLEMS.values()]
    assert np.isfinite(ends).all(), "one program for each problem"


def test_classes_and_guidance_of_a_mixture():
    """Far apart modes: given its class a point sees its own mode alone, otherwise the nearest."""
    mixture = toy.Mixture(np.array([[-2.0, 0.0], [2.0, 0.0]]), 0.1, np.array([0, 1]))
    x, label = np.array([[1.9, 0.0]] * 2, np.float32), jnp.array([1, 0])
    own, other = mixture.velocity(x, 0.1, label)
    assert np.abs(own).max() < 20 < np.abs(other).max()
    free = mixture.velocity(x, 0.1, -jnp.ones(2, int))
    np.testing.assert_allclose(free[0], own, atol=1e-4)
    guided = mixture.guided(x, 0.1, label)
    np.testing.assert_allclose(guided[0], own, atol=1e-3)
    np.testing.assert_allclose(guided[1], 2 * other - free[1], rtol=1e-5)
    x0, classes = mixture.draw(jax.random.key(0), 500)
    assert ((x0[:, 0] > 0) == (classes == 1)).all() and 200 < classes.sum() < 300


def test_overlapping_rows_see_synchformer_s_times():
    seconds = (np.arange(56) + 0.5) / 56 * 2.56
    found = sync_layout.overlapping(np.float32(seconds)[:, None], 2.56)[:, 0]
    wanted = [(8 * (j // 8) + 2 * (j % 8) + 1) / 25 for j in range(56)]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_settings_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "overrides", lambda entry: {})
    text = "configs/impacts.py:vcm optimizer.learning_rate=7e-4 batch_size=64 dtype=bfloat16"
    config = compare.entry_config(compare.Entry(text, 0, tmp_path))
    assert (config.optimizer.learning_rate, config.batch_size) == (7e-4, 64)
    assert config.dtype == "bfloat16"


def test_names_and_the_report_of_what_is_scored(tmp_path):
    configs = ["configs/impacts.py:vcm", "configs/impacts.py:flow_matching"]
    configs.append("configs/ablations.py:base=impacts,lambda_end=1/250")
    entries = [compare.Entry(config, seed, tmp_path) for seed in (0, 1) for config in configs]
    assert [entry.name for entry in entries[:3]] == ["vcm", "flow_matching", "lambda_end=1/250"]
    assert entries[2].workdir == tmp_path / "lambda_end=1_250-0"
    shards = [compare.shard(entries, f"{i}/4") for i in range(4)]
    assert sorted(map(entries.index, sum(shards, []))) == list(range(6))
    with pytest.raises(ValueError, match="--shard=4/4: must be i/n"):
        compare.shard(entries, "4/4")
    tuned = compare.Entry("configs/impacts.py:reflow optimizer.learning_rate=7e-4", 1, tmp_path)
    assert tuned.file == "configs/impacts.py:reflow" and tuned.learns_from_teacher
    assert tuned.settings == {"optimizer.learning_rate": "7e-4"}
    larger = compare.Entry("configs/impacts.py:vcm batch_size=64", 0, tmp_path)
    assert compare.num_steps(larger, {}, 0, 6400) == 100
    assert tuned.workdir.name == "reflow_optimizer.learning_rate=7e-4-1"
    with pytest.raises(ValueError, match="no run is scored yet"):
        compare.write_report(entries, tmp_path, "note")

    metrics = dict.fromkeys(compare.METRICS | compare.ERROR, 0.5)

    def scored(value):
        return {compare.OWN: {str(n): metrics | {"f1": value} for n in compare.STEPS}}

    for entry, value in zip((entries[0], entries[3], entries[1]), (0.6, 0.8, 0.4)):
        found = scored(value)
        if entry.name == "flow_matching":
            found[compare.UNGUIDED] = scored(0.25)[compare.OWN]
        compare.write_json(entry.workdir / "scores.json", {"steps": 7, "metrics": found})
    compare.write_json(tmp_path / "truth.json", {"true sound": metrics})
    steps = {"vcm": {"seconds": 0.3, "temporary_bytes": 4e6, "flops": 6e9}}
    steps["flow_matching"] = {"seconds": 0.1, "temporary_bytes": 2e6, "flops": 4e9}
    compare.write_json(tmp_path / "steps.json", steps)
    with pytest.raises(ValueError, match="steps.json has no lambda_end=1/250: --stage=measure"):
        compare.num_steps(entries[2], steps, 1.0, 0)
    assert compare.num_steps(entries[0], steps, 1.0, 0) == 200
    page = compare.write_report(entries, tmp_path, "a <note>").read_text()
    text = (tmp_path / "comparison.md").read_text()
    assert "| vcm | 0.700 ± 0.141 | 0.700 ± 0.141 |" in text
    assert "| flow_matching, unguided | 0.250 |" in text and "lambda_end" not in text
    assert "| vcm | 300 | 3.00 | 6.0 | 1.50 | 4 | 2.00 | 7 | 2 |" in text
    steps["flow_matching"]["flops"] = None  # as of a run with a teacher
    compare.write_json(tmp_path / "steps.json", steps)
    compare.write_report(entries, tmp_path, "note")
    assert "| vcm | 300 | 3.00 |  |  | 4 |" in (tmp_path / "comparison.md").read_text()
    assert "a &lt;note&gt;" in page and "<td>0.700 ± 0.141</td>" in page
    assert json.loads((tmp_path / "steps.json").read_text()) == steps
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_configs_that_import_others_load_in_a_script(tmp_path):
    """A script has its own folder on the path, not that of the configs."""
    code = f"import sys; sys.path.insert(0, {str(Path(compare.__file__).parent)!r})\n"
    code += f"sys.path.insert(1, {str(compare.ROOT / 'tests')!r})\n"
    code += "import compare_objectives\n"
    code += "print(compare_objectives.load_config('configs/impacts.py:vcm').model)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "demo", done.stderr
