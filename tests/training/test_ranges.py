"""Every setting of every config has a range, and a value outside of it is one line."""

import copy
import dataclasses

import pytest
from small_runs import CONFIGS, load_config

from vcm_jax import settings
from vcm_jax.models import ModelConfig
from vcm_jax.objectives import OBJECTIVES
from vcm_jax.training import ranges
from vcm_jax.training.rows import StepConfig
from vcm_jax.training.state import OptimizerConfig

# Values of every type, inside and outside of the ranges.
VALUES = [
    None, True, -2, -1, 0, 1, 2**31, 0.5, 1e308, float("nan"), float("inf"), "", "x", b"x", (),
    (0,), (-1,), (0.5, 0.5), (1.5,), ("a", 1), ["x"], {"x": 1}, object(),
]  # fmt: skip


def configs():
    for path in sorted(CONFIGS.glob("*.py")):
        if path.stem == "ablations":
            yield load_config(path.stem, "w=2").to_dict()
            continue
        for objective in OBJECTIVES:
            yield load_config(path.stem, objective).to_dict()


def test_the_tables_hold_every_setting_of_every_config():
    for config in configs():
        assert dict(ranges._flatten(config)).keys() == ranges.RANGES.keys()
        name = config["objective"].pop("name")
        declared = settings.ranges(OBJECTIVES[name]) | settings.ranges(StepConfig)
        assert config["objective"].keys() <= declared.keys()
        assert config["optimizer"].keys() == settings.ranges(OptimizerConfig).keys()
        assert config["model_overrides"].keys() <= settings.ranges(ModelConfig).keys()


def test_every_config_is_inside_of_the_ranges():
    for config in configs():
        ranges.check(config)


@pytest.fixture(scope="module")
def config():
    return load_config("s16k").to_dict()


def changed(config, key, value):
    config = copy.deepcopy(config)
    *sections, name = key.split(".")
    inner = config
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return config


@pytest.mark.parametrize("key", ranges.RANGES)
def test_values_outside_of_a_range_are_one_line(config, key):
    accepts, refused = ranges.RANGES[key], 0
    for value in VALUES:
        if isinstance(value, dict) or accepts.holds(value):
            continue
        refused += 1
        with pytest.raises(ValueError, match=f"config.{key} must be ") as error:
            ranges.check(changed(config, key, value))
        assert "\n" not in str(error.value)
    assert refused >= 15, "a range that accepts values of other types"


@pytest.mark.parametrize(
    "key, value",
    [
        ("eval_sample_steps", (0,)), ("eval_sample_steps", (1, -4)), ("eval_sample_steps", 4),
        ("ema_sigma_rels", (0.0,)), ("ema_sigma_rels", (5.0,)), ("ema_sigma_rels", ()),
        ("ema_sigma_rels", (0.05, 0.05000001)), ("ema_sigma_rels", ("0.05",)), ("seed", -1),
        ("seed", 2**31), ("seed", 0.5), ("data.num_workers", -1), ("data.num_workers", 10**6),
        ("data.sources", 5), ("data.sources", "records=1"), ("data.sources", (5,)),
        ("steps", 2**31), ("steps", 1e3), ("batch_size", True), ("mesh.data", 0),
        ("mesh.fsdp", -2), ("dtype", "float16"), ("model", "tiny"), ("checkpoint_every", 0),
        ("log_every", -5), ("allow_config_change", 1),
    ],
)  # fmt: skip
def test_settings_that_failed_late(config, key, value):
    with pytest.raises(ValueError, match=f"config.{key} must be .*, not "):
        ranges.check(changed(config, key, value))


def test_sections_check_their_settings():
    for cls in (*OBJECTIVES.values(), StepConfig, OptimizerConfig):
        given = {"steps": 1} if cls is StepConfig else {}
        for name in settings.ranges(cls):
            for value in (None, "x", (), float("nan"), object()):
                if not settings.ranges(cls)[name].holds(value):
                    with pytest.raises(ValueError, match=f"{name} must be .*, not "):
                        cls(**given | {name: value})
    assert {field.name for field in dataclasses.fields(OptimizerConfig)} == set(
        settings.ranges(OptimizerConfig)
    )
    with pytest.raises(ValueError, match="optimizer.decay_steps must be"):
        OptimizerConfig(decay_steps=(-5, 10))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda config: config.pop("seed"), "the config has no setting seed"),
        (lambda config: config["mesh"].pop("fsdp"), "the config has no setting mesh.fsdp"),
        (lambda config: config.update(sed=1), "the config has an unknown setting sed"),
        (lambda config: config.update(mesh=4), "the config has no setting mesh.data, mesh.fsdp"),
        (lambda config: config.update(data={}), "the config has no setting data.dir, data.num_w"),
        (lambda config: config.pop("optimizer"), "config.optimizer must be a section"),
        (lambda config: config.update(objective="vcm"), "config.objective must be a section"),
    ],
)
def test_settings_that_are_missing_or_unknown(config, edit, message):
    config = copy.deepcopy(config)
    edit(config)
    with pytest.raises(ValueError, match=message):
        ranges.check(config)


def test_the_documentation_names_every_setting():
    text = (CONFIGS.parent / "docs/training.md").read_text()
    for key in (*ranges.RANGES, *(f"{section}." for section in ranges.SECTIONS)):
        assert f"`{key}" in text, key
