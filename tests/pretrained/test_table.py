"""The table of public models."""

import dataclasses

from vcm_jax.models import MODELS
from vcm_jax.pretrained import table


def test_the_table():
    """Names, sizes and checksums are the published ones; the monkeypatched table is another."""
    assert list(table.PUBLIC_MODELS) == [
        "mmaudio_small_16k",
        "mmaudio_small_44k",
        "mmaudio_medium_44k",
        "mmaudio_large_44k",
        "mmaudio_large_44k_v2",
    ]
    for name, public in table.PUBLIC_MODELS.items():
        assert len(public.files) == 8 and public.network.name == f"{name}.pth"
        assert public.network.checksum.startswith("md5:")
        assert all(file.licence in table.LICENCES for file in public.files)
        config = MODELS.get(public.model)
        if config:
            assert config.latent_seq_len == public.sequence.latent_seq_len
            assert dataclasses.replace(config).with_lengths(public.sequence) == config
