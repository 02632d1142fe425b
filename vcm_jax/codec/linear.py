"""The linear codec: log-mel spectrogram and PCA, inverted with Griffin-Lim.

It replaces the VAE and the vocoder of the full model where no pretrained weights are at hand.
Fitting it on the training sounds takes a few seconds.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from vcm_jax.atomic import atomic_path
from vcm_jax.codec.folders import check_description, read_description, write_description
from vcm_jax.codec.griffin_lim import griffin_lim
from vcm_jax.codec.mel import MEL_16K, log_mel, mel_filters
from vcm_jax.hashes import short_hash

_VERSION = 1
_STACK = 2  # spectrogram frames per latent token: SequenceConfig.latent_downsample
_ITERATIONS = 32  # of Griffin-Lim
_FLOOR = -5.0  # log10 of the smallest mel value

_log_mel = jax.jit(log_mel, static_argnums=1)


def _rows(audio: np.ndarray) -> np.ndarray:
    """Stacked log-mel frames of a sound: (samples,) -> (N, 160) float64; `encode` defines N."""
    audio = np.asarray(audio, np.float32)
    token = _STACK * MEL_16K.hop
    if audio.ndim != 1 or len(audio) == 0:
        raise ValueError(f"the sound must be (samples,), not {audio.shape}")
    tokens = max(2, -(-len(audio) // token))
    padded = np.pad(audio, (0, tokens * token - len(audio)))
    mel = np.asarray(_log_mel(padded[None], MEL_16K)[0], np.float64)
    return mel.reshape(-1, _STACK * MEL_16K.bands)[: -(-len(audio) // token)]


@functools.cache
def _inverse_filters() -> np.ndarray:
    """Pseudo-inverse of the mel filters: (bins, bands) float32."""
    return np.linalg.pinv(mel_filters(MEL_16K))


class LinearCodec:
    """16 kHz sound to 31.25 latents a second and back, by PCA of pairs of log-mel frames.

    Attributes:
      name: "linear".
      sample_rate: Hz.
      hop: samples per spectrogram frame.
      latent_downsample: spectrogram frames per latent token.
      latent_dim: C.
      explained_variance: share of the log-mel variance of the training sounds that C components
        explain.
      fingerprint: hash of the contents. Codecs with other fingerprints have other latents.
      on_device: whether encoding uses an accelerator or all cores, so that only one process may
        encode.
    """

    name = "linear"
    on_device = False
    sample_rate = MEL_16K.sample_rate
    hop = MEL_16K.hop
    latent_downsample = _STACK

    def __init__(self, mean: np.ndarray, components: np.ndarray, explained_variance: float):
        """mean (160,) and components (C, 160) of the stacked log-mel frames."""
        self.mean = np.asarray(mean, np.float32)
        self.components = np.asarray(components, np.float32)
        self.explained_variance = float(explained_variance)
        self.latent_dim = len(self.components)
        content = self.mean.tobytes() + self.components.tobytes()
        self.fingerprint = short_hash(f"linear {_VERSION} ".encode(), content)

    def encode(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sound (samples,) in [-1, 1] -> latent mean and std (N, C) float32; the std is 0.

        There are N = ceil(samples / 512) tokens; the last one is padded with silence.

        Raises:
          ValueError: another shape, or no samples.
        """
        latents = ((_rows(audio) - self.mean) @ self.components.T).astype(np.float32)
        return latents, np.zeros_like(latents)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (N, C) -> sound (N * 512,) float32, deterministic; peaks may exceed 1.

        Raises:
          ValueError: another shape.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"latents must be (N, {self.latent_dim}), not {latents.shape}")
        hop, count = MEL_16K.hop, len(latents) * _STACK

        # Griffin-Lim centres frame i at sample i * hop, log_mel at (i + 1/2) * hop. With the first
        # and the last frame repeated, the wanted sound starts half a hop later.
        def magnitudes(first: int, end: int) -> np.ndarray:
            return self._magnitudes(latents, np.clip(np.arange(first, end) - 1, 0, count - 1))

        sound, at = np.empty(count * hop, np.float32), -(hop // 2)
        for chunk in griffin_lim(magnitudes, count + 2, MEL_16K.n_fft, hop, _ITERATIONS):
            chunk, at = chunk[max(0, -at) :], max(0, at)
            chunk = chunk[: len(sound) - at]
            sound[at : at + len(chunk)] = chunk
            at += len(chunk)
        return sound

    def _magnitudes(self, latents: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """|STFT| (bins, len(frames)) of consecutive frames."""
        first = frames[0] // _STACK
        rows = latents[first : frames[-1] // _STACK + 1]
        mel = (rows @ self.components + self.mean).reshape(-1, MEL_16K.bands)
        mel = np.maximum(mel[frames - first * _STACK], _FLOOR)
        return np.maximum(_inverse_filters() @ 10.0**mel.T, 0)

    def save(self, folder):
        """Write codec.json and codec.npz into a folder; the json comes last and atomically."""
        folder = Path(folder)
        with atomic_path(folder / "codec.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, mean=self.mean, components=self.components)
        fields = ("name", "sample_rate", "hop", "latent_downsample", "latent_dim", "fingerprint")
        meta = {key: getattr(self, key) for key in fields}
        meta |= {"version": _VERSION, "explained_variance": self.explained_variance}
        write_description(folder, meta)

    @classmethod
    def load(cls, folder) -> "LinearCodec":
        """Read what `save` wrote.

        Raises:
          ValueError: another version, or arrays that do not fit codec.json.
        """
        folder = Path(folder)
        meta = read_description(folder)
        if meta.get("version") != _VERSION:
            raise ValueError(
                f"{folder}: a linear codec of version {meta.get('version')}, "
                f"this program reads version {_VERSION}"
            )
        try:
            with np.load(folder / "codec.npz") as arrays:
                codec = cls(arrays["mean"], arrays["components"], meta["explained_variance"])
        except Exception as error:  # np.load raises errors of many types on damaged files
            raise ValueError(f"{folder / 'codec.npz'}: missing or damaged ({error})") from error
        check_description(codec, meta, folder)
        return codec


def fit_linear_codec(sounds: Iterable[np.ndarray], latent_dim: int = 20) -> LinearCodec:
    """PCA of the stacked log-mel frames of training sounds, in one pass and bounded memory.

    Args:
      sounds: (samples,) each, 16 kHz.
      latent_dim: C, the number of principal components.

    Raises:
      ValueError: fewer frames than components.
    """
    width = _STACK * MEL_16K.bands
    count, total, square = 0, np.zeros(width), np.zeros((width, width))
    for sound in sounds:
        rows = _rows(sound)
        count += len(rows)
        total += rows.sum(0)
        square += rows.T @ rows
    if count <= latent_dim:
        raise ValueError(f"{count} latent frames are too few to fit {latent_dim} components")
    mean = total / count
    values, vectors = np.linalg.eigh(square / count - np.outer(mean, mean))
    components = vectors[:, ::-1][:, :latent_dim].T
    # The sign of an eigenvector is arbitrary: fix it, so that all machines give the same codec.
    strongest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(latent_dim), strongest])[:, None]
    return LinearCodec(mean, components, values[::-1][:latent_dim].sum() / values.sum())
