"""One network with guidance as an input against networks with fixed guidance, on a known flow."""

import functools
import importlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
toy = importlib.import_module("toy_flows")
guidance = importlib.import_module("toy_guidance")


@pytest.mark.slow
def test_one_network_with_guidance_as_an_input_makes_every_guided_distribution(monkeypatch):
    """Two Gaussian classes, one step: whatever w a network was trained for, its samples match the
    distributions of the other two w worse than those of the one network that is told w."""
    small = functools.partial(toy.init_params, width=64, depth=3)
    monkeypatch.setattr(toy, "init_params", small)
    samples = guidance.Samples(1500)
    one = samples.distances(samples.of(None, 2000, 256))
    assert max(one.values()) < 0.1
    for trained in guidance.SCALES:
        fixed = samples.distances(samples.of(trained, 2000, 256))
        for w in guidance.SCALES:
            if w != trained:
                assert one[w] < fixed[w], (trained, w, one, fixed)
