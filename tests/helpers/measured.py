"""SoundMetrics of clips that a test makes."""

from vcm_jax.metrics import SoundMetrics


def measured(clips, sample_rate):
    """SoundMetrics of (id, generated sound, true sound), each sound (samples,)."""
    metrics = SoundMetrics(sample_rate)
    for clip, pred, truth in clips:
        metrics.add(clip, pred, truth)
    return metrics
