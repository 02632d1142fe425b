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
from vcm_jax.codec.mel import MEL_FLOOR, MELS, STACK, MelConfig, mel_filters, stacked_mel
from vcm_jax.hashes import short_hash

_VERSION = 1
_ITERATIONS = 32  # of Griffin-Lim
LATENT_DIMS = {"16k": 20, "44k": 40}  # channels, as many as MMAudio's codec has in this mode

_stacked_mel = jax.jit(stacked_mel, static_argnums=1)


def stacked_frames(audio: np.ndarray, mel: MelConfig) -> np.ndarray:
    """Stacked log-mel frames of a sound: (samples,) -> (N, 2bands) float64; `encode` defines N.

    Raises:
      ValueError: another shape, or no samples.
    """
    audio = np.asarray(audio, np.float32)
    token = STACK * mel.hop
    if audio.ndim != 1 or len(audio) == 0:
        raise ValueError(f"the sound must be (samples,), not {audio.shape}")
    tokens = max(2, -(-len(audio) // token))
    padded = np.pad(audio, (0, tokens * token - len(audio)))
    rows = np.asarray(_stacked_mel(padded[None], mel)[0], np.float64)
    return rows[: -(-len(audio) // token)]


@functools.cache
def _inverse_filters(mel: MelConfig) -> np.ndarray:
    """Pseudo-inverse of the mel filters: (bins, bands) float32."""
    return np.linalg.pinv(mel_filters(mel))


class LinearCodec:
    """Sound to latents and back, by PCA of pairs of log-mel frames.

    There are 31.25 latents a second at 16 kHz, and 43.07 at 44.1 kHz.

    Attributes:
      name: "linear".
      mode: "16k" or "44k".
      mel: the spectrogram.
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
    latent_downsample = STACK

    def __init__(
        self,
        mean: np.ndarray,
        components: np.ndarray,
        explained_variance: float,
        mode: str = "16k",
    ):
        """mean (2bands,) and components (C, 2bands) of the stacked log-mel frames."""
        self.mode, self.mel = mode, MELS[mode]
        self.sample_rate, self.hop = self.mel.sample_rate, self.mel.hop
        self.mean = np.asarray(mean, np.float32)
        self.components = np.asarray(components, np.float32)
        self.explained_variance = float(explained_variance)
        self.latent_dim = len(self.components)
        content = self.mean.tobytes() + self.components.tobytes()
        kind = "linear" if mode == "16k" else f"linear {mode}"
        self.fingerprint = short_hash(f"{kind} {_VERSION} ".encode(), content)

    def encode(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sound (samples,) in [-1, 1] -> latent mean and std (N, C) float32; the std is 0.

        There are N = ceil(samples / (2 hop)) tokens; the last one is padded with silence.

        Raises:
          ValueError: another shape, or no samples.
        """
        latents = ((stacked_frames(audio, self.mel) - self.mean) @ self.components.T).astype(
            np.float32
        )
        return latents, np.zeros_like(latents)

    def decode(self, latents: np.ndarray, seed: int = 0) -> np.ndarray:
        """Latents (N, C) -> sound (N * 2 hop,) float32; peaks may exceed 1.

        The seed has no effect: nothing here is random.

        Raises:
          ValueError: another shape.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"latents must be (N, {self.latent_dim}), not {latents.shape}")
        hop, count = self.mel.hop, len(latents) * STACK

        # Griffin-Lim centres frame i at sample i * hop, log_mel at (i + 1/2) * hop. With the first
        # and the last frame repeated, the wanted sound starts half a hop later.
        def magnitudes(first: int, end: int) -> np.ndarray:
            return self._magnitudes(latents, np.clip(np.arange(first, end) - 1, 0, count - 1))

        sound, at = np.empty(count * hop, np.float32), -(hop // 2)
        for chunk in griffin_lim(magnitudes, count + 2, self.mel.n_fft, hop, _ITERATIONS):
            chunk, at = chunk[max(0, -at) :], max(0, at)
            chunk = chunk[: len(sound) - at]
            sound[at : at + len(chunk)] = chunk
            at += len(chunk)
        return sound

    def _magnitudes(self, latents: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """|STFT| (bins, len(frames)) of consecutive frames."""
        first = frames[0] // STACK
        rows = latents[first : frames[-1] // STACK + 1]
        log_mel = (rows @ self.components + self.mean).reshape(-1, self.mel.bands)
        base = np.float32(10 if self.mel.log10 else np.e)
        power = np.maximum(base ** log_mel[frames - first * STACK], MEL_FLOOR)
        return np.maximum(_inverse_filters(self.mel) @ power.T, 0)

    def save(self, folder):
        """Write codec.json and codec.npz into a folder; the json comes last and atomically."""
        folder = Path(folder)
        with atomic_path(folder / "codec.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, mean=self.mean, components=self.components)
        fields = ("name", "sample_rate", "hop", "latent_downsample", "latent_dim", "fingerprint")
        meta = {key: getattr(self, key) for key in fields}
        meta |= {
            "version": _VERSION,
            "mode": self.mode,
            "explained_variance": self.explained_variance,
        }
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
                codec = cls(
                    arrays["mean"],
                    arrays["components"],
                    meta["explained_variance"],
                    meta.get("mode", "16k"),  # earlier versions had no other
                )
        except Exception as error:  # np.load raises errors of many types on damaged files
            raise ValueError(f"{folder / 'codec.npz'}: missing or damaged ({error})") from error
        check_description(codec, meta, folder)
        return codec


def fit_linear_codec(
    sounds: Iterable[np.ndarray], latent_dim: int | None = None, mode: str = "16k"
) -> LinearCodec:
    """PCA of the stacked log-mel frames of training sounds, in one pass and bounded memory.

    Args:
      sounds: (samples,) each, at the sample rate of the mode.
      latent_dim: C, the number of principal components; None is 20 in mode 16k and 40 in 44k.
      mode: "16k" or "44k".

    Raises:
      ValueError: fewer frames than components.
    """
    mel, latent_dim = MELS[mode], latent_dim or LATENT_DIMS[mode]
    width = STACK * mel.bands
    count, total, square = 0, np.zeros(width), np.zeros((width, width))
    for sound in sounds:
        rows = stacked_frames(sound, mel)
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
    return LinearCodec(mean, components, values[::-1][:latent_dim].sum() / values.sum(), mode)
