"""MMAudio's log-mel spectrograms (mmaudio/ext/mel_converter.py), for both of its modes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np


@dataclasses.dataclass(frozen=True)
class MelConfig:
    """Settings of a log-mel spectrogram.

    Attributes:
      sample_rate: Hz.
      n_fft: samples per frame, also the length of the window.
      hop: samples between the starts of frames; n_fft is a multiple of it.
      bands: number of mel bands.
      fmin, fmax: Hz, the range of the bands.
      log10: whether the logarithm is decadic; otherwise it is natural.
    """

    sample_rate: int
    n_fft: int
    hop: int
    bands: int
    fmin: float
    fmax: float
    log10: bool


MEL_16K = MelConfig(16_000, 1024, 256, 80, 0.0, 8_000.0, log10=True)
MEL_44K = MelConfig(44_100, 2048, 512, 128, 0.0, 22_050.0, log10=False)
MELS = {"16k": MEL_16K, "44k": MEL_44K}
STACK = 2  # spectrogram frames per latent
MEL_FLOOR = 1e-5  # the smallest mel value, before the logarithm


@functools.cache
def mel_filters(config: MelConfig) -> np.ndarray:
    """Mel filter matrix (bands, n_fft // 2 + 1) float32: Slaney's scale and area normalisation."""
    return librosa.filters.mel(
        sr=config.sample_rate,
        n_fft=config.n_fft,
        n_mels=config.bands,
        fmin=config.fmin,
        fmax=config.fmax,
        htk=False,
        norm="slaney",
        dtype=np.float32,
    )


def hann_window(n_fft: int) -> np.ndarray:
    """The periodic Hann window (n_fft,) float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def log_mel(audio: jax.Array, config: MelConfig) -> jax.Array:
    """Log-mel spectrogram. Pure; jit it with `config` static.

    Args:
      audio: (B, samples) in [-1, 1] (clamped), more than n_fft / 2 samples.
      config: settings.

    Returns:
      (B, frames, bands) float32 with frames = samples // hop: time before channels, as the
      latents have it (MMAudio's own layout is B, bands, frames).
    """
    pad = (config.n_fft - config.hop) // 2
    audio = jnp.pad(jnp.clip(audio, -1.0, 1.0), ((0, 0), (pad, pad)), mode="reflect")
    # A frame consists of whole hops, so that shifted slices can replace a gather.
    overlap = config.n_fft // config.hop
    hops = audio[:, : audio.shape[1] // config.hop * config.hop]
    hops = hops.reshape(audio.shape[0], -1, config.hop)
    frames = hops.shape[1] - overlap + 1
    framed = jnp.concatenate([hops[:, i : i + frames] for i in range(overlap)], axis=-1)
    spectrum = jnp.fft.rfft(framed * hann_window(config.n_fft)[None, None])
    magnitude = jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)
    # Matrix products are exact in float32 on all platforms only on request.
    mel = jnp.matmul(magnitude, mel_filters(config).T, precision="highest")
    return (jnp.log10 if config.log10 else jnp.log)(jnp.maximum(mel, MEL_FLOOR))


def stacked_mel(audio: jax.Array, config: MelConfig) -> jax.Array:
    """Pairs of log-mel frames, one for each latent: (B, 2 N hop) -> `B N 2bands` float32."""
    frames = log_mel(audio, config)
    return frames.reshape(frames.shape[0], -1, STACK * config.bands)
