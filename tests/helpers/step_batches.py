"""Batches of a training step, as small as they can be, and the statistics of their latents."""

import numpy as np

STATS = {
    "latent_mean": np.float32([0.1, -0.2, 0.3, 0.0]),
    "latent_std": np.float32([1.0, 2.0, 0.5, 1.5]),
    "empty_text": np.full((3, 6), 0.25, np.float32),
}


def make_batch(size=16, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal((size, *shape)).astype(np.float32)

    return {
        "latent_mean": normal(12, 4),
        "latent_std": np.full((size, 12, 4), 0.1, np.float32),
        "clip": normal(4, 6).astype(np.float16),
        "sync": normal(8, 5).astype(np.float16),
        "text": normal(3, 6).astype(np.float16),
        "has_video": rng.random(size) < 0.8,
        "has_text": rng.random(size) < 0.8,
    }
