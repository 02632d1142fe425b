"""Devices that are only described, and what is said where they cannot be."""

import importlib.util

import pytest

from vcm_jax.devices import topology


@pytest.mark.parametrize(
    "name", ["v9:2x2", "0xv5e:4x4", "b300x8", "h100", "h100x0", "v5e-16", "v5e:4", "tpu"]
)
def test_names_that_are_not_known_are_answered_with_those_that_are(name):
    with pytest.raises(topology.TopologyError) as error:
        topology.describe(name)
    line = str(error.value)
    assert "\n" not in line and line.startswith(repr(name))
    for known in (*topology.TPU_MEMORY, *topology.GPUS, "v5e:4x4", "h100x8"):
        assert known in line


@pytest.mark.parametrize("name, extra", [("v5e:4x4", "tpu"), ("h100x8", "cuda13")])
def test_a_compiler_that_is_missing_is_one_line(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        topology.TopologyError, match=rf'{name} needs .*pip install "jax\[{extra}\]"'
    ):
        topology.describe(name)


def test_gpus_fill_machines(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topology, "_devices", lambda *args, **kwargs: asked.append(kwargs) or [])
    found = topology.describe("h200x16")
    assert (
        asked[0]["topology"] == "1x2x8" and "device_memory_size: 1501" in asked[0]["target_config"]
    )
    assert 120 * topology.GIB < found.memory < 140 * topology.GIB and found.platform == "gpu"
    with pytest.raises(topology.TopologyError, match="multiple of 8"):
        topology.describe("h100x12")


def test_slices_of_tpus(monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topology, "_devices", lambda *args, **kwargs: asked.append(kwargs) or [])
    assert topology.describe("2xv5e:4x4").memory == 15.75 * topology.GIB
    topology.describe("v5p:2x2x4")
    topology.describe("v6e:1x1")
    assert asked == [
        {"topology_name": "v5e:4x4", "num_slices": 2},
        {"topology_name": "v5p:2x2x4"},
        {"topology_name": "v6e:1x1", "chips_per_host_bounds": [1, 1, 1]},
    ]
