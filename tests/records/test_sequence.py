import pytest

from vcm_jax.records.sequence import SequenceConfig


@pytest.mark.parametrize(
    "config, expected",
    [
        (SequenceConfig(), (250, 64, 192, 128_000, 24)),
        (SequenceConfig.mode_44k(), (345, 64, 192, 353_280, 24)),
        (SequenceConfig(duration=2.56), (80, 20, 56, 40_960, 7)),
        (SequenceConfig(duration=5.5), (172, 44, 128, 88_064, 16)),
    ],
)
def test_lengths(config, expected):
    assert (
        config.latent_seq_len,
        config.clip_seq_len,
        config.sync_seq_len,
        config.num_samples,
        config.num_sync_segments,
    ) == expected


def test_too_short_for_one_segment():
    with pytest.raises(ValueError, match="too short"):
        SequenceConfig(duration=0.5)
    assert SequenceConfig(duration=0.64).num_sync_segments == 1
