"""Data: lengths, records, mixtures, and the embedded data set."""

from vcm_jax.data.sequence import SequenceConfig as SequenceConfig
