"""MMAudio's codec: mel spectrogram, VAE, and vocoder, for its modes 16k and 44k."""

import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.atomic import atomic_path
from vcm_jax.codec import bigvgan, vae
from vcm_jax.codec.mel import MEL_16K, MEL_44K, MelConfig, log_mel

_VERSION = 1
_WINDOW = 512  # spectrogram frames that are vocoded at a time
_STEP = 64  # windows have a multiple of so many frames, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Mode:
    """Sizes of one of MMAudio's two modes.

    Attributes:
      mel: the spectrogram.
      latent_dim: channels of the latents.
      width: of the VAE's finest level.
      vocoder_width: of the vocoder's first layer.
      rates: the vocoder's upsampling rates; their product is the hop.
      tanh: how the vocoder's sound is bounded, and that its last layer has a bias.
    """

    mel: MelConfig
    latent_dim: int
    width: int
    vocoder_width: int
    rates: tuple[int, ...]
    tanh: bool


MODES = {
    "16k": Mode(MEL_16K, 20, 384, 1536, (4, 4, 2, 2, 2, 2), tanh=True),
    "44k": Mode(MEL_44K, 40, 512, 1536, (8, 4, 2, 2, 2, 2), tanh=False),
}


@functools.partial(jax.jit, static_argnames="config")
def _encode(params, audio, config):
    return vae.encode(params, log_mel(audio, config))


_decode = jax.jit(vae.decode)
_vocode = jax.jit(bigvgan.vocode, static_argnames="tanh")


class NeuralCodec:
    """Sound to latents and back by MMAudio's pretrained VAE and a BigVGAN vocoder.

    Weights are read and moved to the device when they are first needed: who only encodes never
    holds the vocoder.

    Attributes:
      name, sample_rate (Hz), hop (samples per spectrogram frame), latent_downsample (frames per
      token), latent_dim (C): what the latents are.
      mode: a key of MODES.
      arrays: the weights, as the constructor got them.
      dtype: of the products in convolutions.
      fingerprint: hash of the VAE; latents of codecs that differ in it do not mix. The vocoder has
        no part in it: another one may be used with the same latents.
      on_device: whether encoding wants an accelerator or all cores, so that one process does it.
    """

    name = "vae"
    on_device = True
    latent_downsample = 2

    def __init__(
        self,
        mode: str,
        arrays: Mapping[str, np.ndarray],
        fingerprint: str | None = None,
        dtype=jnp.float32,
    ):
        """
        Args:
          mode: a key of MODES.
          arrays: `data_mean`, `data_std`, `encoder.*`, `decoder.*` and `vocoder.*`, normalised and
            in our layout (`vcm_jax.interop.import_codec`); read when needed.
          fingerprint: of the arrays, where it is known.
          dtype: of the products in convolutions, float32 (exact on every platform) or bfloat16
            (faster on accelerators).
        """
        self.mode, self.arrays, self.dtype = mode, arrays, jnp.dtype(dtype)
        self._mel, self._tanh = MODES[mode].mel, MODES[mode].tanh
        self.sample_rate, self.hop = self._mel.sample_rate, self._mel.hop
        self.latent_dim = int(MODES[mode].latent_dim)
        self.fingerprint = fingerprint or _fingerprint(arrays)

    def _part(self, *prefixes: str, strip: str = "") -> dict[str, jax.Array]:
        """The arrays of one network, on the device."""

        def cast(array):
            return jnp.asarray(array, self.dtype if array.ndim == 3 else jnp.float32)

        try:
            return {
                name.removeprefix(strip): cast(self.arrays[name])
                for name in self.arrays
                if name.startswith(prefixes)
            }
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise ValueError(f"the codec's weights are damaged ({error})") from error

    @functools.cached_property
    def _encoder(self):
        return self._part("encoder.", "data_")

    @functools.cached_property
    def _decoder(self):
        return self._part("decoder.", "data_")

    @functools.cached_property
    def _vocoder(self):
        return self._part("vocoder.", strip="vocoder.")

    def encode(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sound (samples,) in [-1, 1] -> latent mean and std (N, C) float32.

        The last of the N = ceil(samples / (2 hop)) tokens is filled up with silence.

        Raises:
          ValueError: another shape, or no samples.
        """
        audio = np.asarray(audio, np.float32)
        if audio.ndim != 1 or len(audio) == 0:
            raise ValueError(f"the sound must be (samples,), not {audio.shape}")
        token = self.latent_downsample * self.hop
        tokens = -(-len(audio) // token)
        # Less than two tokens are too short to be reflected at their ends.
        padded = np.pad(audio, (0, max(2, tokens) * token - len(audio)))
        mean, std = _encode(self._encoder, padded[None], self._mel)
        return np.asarray(mean[0, :tokens]), np.asarray(std[0, :tokens])

    def decode_mel(self, latents: np.ndarray) -> np.ndarray:
        """Latents (N, C) -> log-mel spectrogram (2 N, bands) float32.

        The whole clip at once, because of the attention in the middle: its N^2 scores take 56 MB
        for two minutes at 16 kHz.

        Raises:
          ValueError: another shape.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim or len(latents) == 0:
            raise ValueError(f"latents must be (N, {self.latent_dim}), not {latents.shape}")
        return np.asarray(_decode(self._decoder, latents[None])[0])

    def vocode(self, mel: np.ndarray) -> np.ndarray:
        """Log-mel spectrogram (L, bands) -> sound (L * hop,) float32 in [-1, 1].

        Longer clips are vocoded in windows with as much overlap as a sample depends on: the result
        is that of the whole clip, in bounded memory.
        """
        context = bigvgan.context(self._vocoder)
        size, starts = windows(len(mel), context)
        sound = np.empty(len(mel) * self.hop, np.float32)
        for start in starts:
            window = mel[None, start : start + size]
            piece = np.asarray(_vocode(self._vocoder, window, self._tanh)[0])
            skip = context if start else 0  # what has another beginning than the clip
            sound[(start + skip) * self.hop : (start + size) * self.hop] = piece[skip * self.hop :]
        return sound

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (N, C) -> sound (N * 2 hop,) float32 in [-1, 1].

        Raises:
          ValueError: another shape.
        """
        return self.vocode(self.decode_mel(latents))

    def save(self, folder):
        """Write codec.npz and codec.json into a folder; the json comes last."""
        folder = Path(folder)
        with atomic_path(folder / "codec.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **dict(self.arrays) | {"fingerprint": np.array(self.fingerprint)})
        fields = ("name", "mode", "sample_rate", "hop", "latent_downsample", "latent_dim")
        meta = {key: getattr(self, key) for key in (*fields, "fingerprint")}
        with atomic_path(folder / "codec.json") as temporary:
            temporary.write_text(json.dumps(meta | {"version": _VERSION}, indent=2) + "\n")

    @classmethod
    def load(cls, folder, dtype=jnp.float32) -> "NeuralCodec":
        """Open what `save` wrote; `dtype` as the constructor's.

        Raises:
          ValueError: another version or mode, or arrays that do not fit codec.json.
        """
        folder = Path(folder)
        meta = json.loads((folder / "codec.json").read_text())
        if meta.get("version") != _VERSION or meta.get("mode") not in MODES:
            raise ValueError(
                f"{folder}: a neural codec of version {meta.get('version')}, mode "
                f"{meta.get('mode')!r}; this program reads version {_VERSION}, modes "
                + ", ".join(MODES)
            )
        path = folder / "codec.npz"
        try:
            arrays = np.load(path)
            found = str(arrays["fingerprint"])
        except Exception as error:  # np.load raises half a dozen kinds on damaged files
            raise ValueError(f"{path}: missing or damaged ({error})") from error
        if found != meta.get("fingerprint"):
            raise ValueError(f"{path}: its contents do not fit codec.json")
        return cls(meta["mode"], arrays, found, dtype)


def windows(frames: int, context: int) -> tuple[int, list[int]]:
    """Size and starts of the windows in which a clip is vocoded.

    All are of one size, and each reaches `context` frames back behind what the one before it got
    right, which is all but its last `context` frames; the last one ends with the clip.
    """
    if frames <= _WINDOW:
        return frames, [0]
    inner = frames - 2 * context
    count = -(-inner // (_WINDOW - 2 * context))
    size = -(-(-(-inner // count) + 2 * context) // _STEP) * _STEP
    return size, [min(i * (size - 2 * context), frames - size) for i in range(count)]


def _fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"vae {_VERSION} ".encode())
    for name in sorted(arrays):
        if not name.startswith("vocoder."):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()[:16]
