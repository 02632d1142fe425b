"""Few-step video-to-audio models in JAX."""

__version__ = "0.1.0"
