"""One network with guidance as an input against networks with fixed guidance, on a known flow."""

import functools
import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vcm_jax.objectives.guidance import Guidance
from vcm_jax.sampling import sample

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
toy = importlib.import_module("toy_flows")

SCALES = (1.0, 2.0, 4.0)
SETTINGS = dict(
    mix_ratio=0.25, instant_ratio=0.5, time_mean=0.0, time_std=1.5, finest=16, guidance_max=4.0
)


@pytest.mark.slow
def test_one_network_with_guidance_as_an_input_makes_every_guided_distribution(monkeypatch):
    """Two Gaussian classes, one step: whatever w a network was trained for, its samples match the
    distributions of the other two w worse than those of the one network that is told w."""
    init = toy.init_params
    monkeypatch.setattr(toy, "init_params", functools.partial(init, width=64, depth=3))
    problem = toy.Mixture(np.array([[-1.0, 0.0], [1.0, 0.0]]), 0.5, np.array([0, 1]))
    keys = jax.random.split(jax.random.key(5))
    _, label = problem.draw(keys[0], 1500)
    one_hot = jax.nn.one_hot(label, 2)
    x1, other = jax.random.normal(keys[1], (2, 1500, 2))
    truth = {w: np.asarray(problem.flow(other, 1.0, 0.0, label, w)) for w in SCALES}

    def distances(cond_of, **settings):
        u, _ = toy.train("shortcut", problem, 0, 2000, 256, **SETTINGS | settings)
        found = {w: np.asarray(sample(u, x1, (1.0, 0.0), cond_of(w))) for w in SCALES}
        return {w: toy.energy_distance(found[w], truth[w]) for w in SCALES}

    one = distances(lambda w: toy.condition(one_hot, Guidance(w)), guidance="conditioned")
    for trained in SCALES:
        fixed = distances(lambda w: one_hot, guidance_scale=trained)
        for w in SCALES:
            if w != trained:
                assert one[w] < fixed[w], (trained, w, one, fixed)
    assert max(one.values()) < 0.1
