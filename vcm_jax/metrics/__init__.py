"""Figures of merit on feature arrays and waveforms."""

from vcm_jax.metrics.frechet import frechet_distance as frechet_distance
from vcm_jax.metrics.frechet import log_mel_features as log_mel_features
from vcm_jax.metrics.frechet import spectral_sharpness as spectral_sharpness
from vcm_jax.metrics.materials import fit_material_classifier as fit_material_classifier
from vcm_jax.metrics.materials import material_accuracy as material_accuracy
from vcm_jax.metrics.onset import detect_onsets as detect_onsets
from vcm_jax.metrics.onset import merge_close as merge_close
from vcm_jax.metrics.onset import onset_scores as onset_scores
