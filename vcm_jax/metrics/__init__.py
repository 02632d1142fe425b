"""Figures of merit on feature arrays and waveforms."""

from vcm_jax.metrics.captions import caption_accuracy as caption_accuracy
from vcm_jax.metrics.frechet import RunningGaussian as RunningGaussian
from vcm_jax.metrics.frechet import frechet_distance as frechet_distance
from vcm_jax.metrics.frechet import log_mel_features as log_mel_features
from vcm_jax.metrics.frechet import spectral_sharpness as spectral_sharpness
from vcm_jax.metrics.loudness import loudness as loudness
from vcm_jax.metrics.loudness import spectral_convergence as spectral_convergence
from vcm_jax.metrics.onset import count_onsets as count_onsets
from vcm_jax.metrics.onset import detect_onsets as detect_onsets
from vcm_jax.metrics.onset import merge_close as merge_close
from vcm_jax.metrics.onset import onset_scores as onset_scores
from vcm_jax.metrics.onset import scores_of_counts as scores_of_counts
from vcm_jax.metrics.scores import cosine_score as cosine_score
from vcm_jax.metrics.scores import desync as desync
from vcm_jax.metrics.scores import inception_score as inception_score
from vcm_jax.metrics.scores import kl_divergence as kl_divergence
from vcm_jax.metrics.sounds import SoundFigures as SoundFigures
from vcm_jax.metrics.sounds import bootstrap as bootstrap
from vcm_jax.metrics.sounds import sound_figures as sound_figures
