"""Settings of the step and the optimizer: their ranges, and the learning-rate schedule."""

import numpy as np
import pytest

from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.training.rows import StepConfig
from vcm_jax.training.state import OptimizerConfig, learning_rate_schedule


def test_learning_rate():
    rate = learning_rate_schedule(OptimizerConfig())
    np.testing.assert_allclose(
        [rate(k) for k in (0, 499, 999, 200_000, 240_000, 299_999)],
        [1e-7, 5e-5, 1e-4, 1e-4, 1e-5, 1e-6],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "cls, change, message",
    [
        (StepConfig, {"steps": 0}, "steps"),
        (StepConfig, {"steps": 1, "null_prob": 2}, "objective.null_prob"),
        (VCMConfig, {"lambda_end": 0}, "objective.lambda_end"),
        (OptimizerConfig, {"learning_rate": 0}, "optimizer.learning_rate"),
        (OptimizerConfig, {"decay_steps": (5, 3)}, "optimizer.decay_steps"),
    ],
)
def test_settings_out_of_range(cls, change, message):
    with pytest.raises(ValueError, match=message):
        cls(**change)
