"""MMAudio's codec: mel spectrogram, VAE and vocoder, for its modes 16k and 44k."""

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.atomic import atomic_path
from vcm_jax.codec import bigvgan, conv, vae
from vcm_jax.codec.folders import check_description, read_description, write_description
from vcm_jax.codec.mel import MEL_16K, MEL_44K, MelConfig, log_mel
from vcm_jax.hashes import array_hash

_VERSION = 1
_WINDOW = 512  # spectrogram frames that are vocoded at once
_WHOLE = 1024  # latents: longer clips are decoded to spectrograms in windows
_LATENTS, _OVERLAP = 512, 64  # latents in such a window, and shared with the next one, at least
_STEP = 64  # the number of frames in a window is a multiple of it: few programs are compiled


@dataclasses.dataclass(frozen=True)
class Mode:
    """Sizes of one of MMAudio's two modes.

    Attributes:
      mel: the spectrogram.
      latent_dim: channels of the latents.
      width: of the finest level of the VAE.
      vocoder_width: of the first layer of the vocoder.
      rates: upsampling rates of the vocoder; their product is the hop.
      tanh: whether tanh bounds the vocoder's sound; its last layer then has a bias.
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

    The weights of a network are read and moved to the device when they are first needed. A process
    that only encodes never holds the vocoder.

    Attributes:
      name: "vae".
      sample_rate: Hz.
      hop: samples per spectrogram frame.
      latent_downsample: spectrogram frames per latent token.
      latent_dim: C.
      mode: a key of MODES.
      arrays: the weights, as the constructor got them.
      dtype: of the products in convolutions.
      fingerprint: hash of the VAE. Codecs with other fingerprints have other latents. It does not
        depend on the vocoder: the same latents allow several vocoders.
      on_device: whether encoding uses an accelerator or all cores, so that only one process may
        encode.
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
            in the layout of `vcm_jax.interop.import_codec`. They are read when they are needed.
          fingerprint: of the arrays, if it is known.
          dtype: of the products in convolutions: float32 (exact on all platforms) or bfloat16
            (faster on accelerators).
        """
        self.mode, self.arrays, self.dtype = mode, arrays, jnp.dtype(dtype)
        self._mel, self._tanh = MODES[mode].mel, MODES[mode].tanh
        self.sample_rate, self.hop = self._mel.sample_rate, self._mel.hop
        self.latent_dim = int(MODES[mode].latent_dim)
        self.fingerprint = fingerprint or _fingerprint(arrays)
        self._hashes = {}  # of the arrays as they were saved; earlier versions saved none
        self._path = ""  # of the arrays, for messages

    def _network(self, *prefixes: str, strip: str = "") -> dict[str, jax.Array]:
        """The arrays of one network, on the device, without the prefix `strip`."""

        def read(name):
            array = self.arrays[name]
            if self._hashes and array_hash(array) != self._hashes[name]:
                raise ValueError(f"{name} is not the array that was saved")
            return jnp.asarray(array, self.dtype if array.ndim == 3 else jnp.float32)

        try:
            return {
                name.removeprefix(strip): read(name)
                for name in self.arrays
                if name.startswith(prefixes)
            }
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise ValueError(f"{self._path}the codec's weights are damaged ({error})") from error

    @functools.cached_property
    def _encoder(self):
        return self._network("encoder.", "data_")

    @functools.cached_property
    def _decoder(self):
        return self._prepared(self._network("decoder.", "data_"))

    @functools.cached_property
    def _vocoder(self):
        return self._prepared(self._network("vocoder.", strip="vocoder."))

    def _prepared(self, params: dict) -> dict:
        """The arrays as the device's convolutions want them."""
        exact_on_cpu = jax.default_backend() == "cpu" and self.dtype == jnp.float32
        return conv.for_cpus(params) if exact_on_cpu else params

    def encode(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sound (samples,) in [-1, 1] -> latent mean and std (N, C) float32.

        There are N = ceil(samples / (2 hop)) tokens; the last one is padded with silence.

        Raises:
          ValueError: another shape, or no samples.
        """
        audio = np.asarray(audio, np.float32)
        if audio.ndim != 1 or len(audio) == 0:
            raise ValueError(f"the sound must be (samples,), not {audio.shape}")
        token = self.latent_downsample * self.hop
        tokens = -(-len(audio) // token)
        # log_mel cannot reflect the ends of less than two tokens.
        padded = np.pad(audio, (0, max(2, tokens) * token - len(audio)))
        mean, std = _encode(self._encoder, padded[None], self._mel)
        return np.asarray(mean[0, :tokens]), np.asarray(std[0, :tokens])

    def decode_mel(self, latents: np.ndarray) -> np.ndarray:
        """Latents (N, C) -> log-mel spectrogram (2 N, bands) float32.

        The middle of the network attends to all that it decodes. Clips of more than 1,024 latents
        (33 s at 16 kHz) are decoded in windows of 512, far longer than the 8 s on which the network
        was trained. They overlap by 64 latents, in which the spectrograms are cross-faded.

        Raises:
          ValueError: another shape.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim or len(latents) == 0:
            raise ValueError(f"latents must be (N, {self.latent_dim}), not {latents.shape}")
        if len(latents) <= _WHOLE:
            return np.asarray(_decode(self._decoder, latents[None])[0])
        count = -(-(len(latents) - _OVERLAP) // (_LATENTS - _OVERLAP))
        starts = np.linspace(0, len(latents) - _LATENTS, count).round().astype(int)
        step = self.latent_downsample
        mel = np.zeros((len(latents) * step, self._mel.bands), np.float32)
        end = 0  # of the frames that are written
        for start in starts:
            found = np.asarray(_decode(self._decoder, latents[None, start : start + _LATENTS])[0])
            first, shared = start * step, max(0, end - start * step)
            rise = ((np.arange(shared) + 0.5) / max(1, shared))[:, None].astype(np.float32)
            mel[first:end] += rise * (found[:shared] - mel[first:end])
            mel[end : first + len(found)] = found[shared:]
            end = first + len(found)
        return mel

    def vocode(self, mel: np.ndarray) -> np.ndarray:
        """Log-mel spectrogram (L, bands) -> sound (L * hop,) float32 in [-1, 1].

        Long clips are vocoded in windows, which overlap by the receptive field of a sample. The
        result equals that of the whole clip, in bounded memory.
        """
        context = bigvgan.context(self._vocoder)
        size, starts = windows(len(mel), context)
        sound = np.empty(len(mel) * self.hop, np.float32)
        for start in starts:
            window = mel[None, start : start + size]
            vocoded = np.asarray(_vocode(self._vocoder, window, self._tanh)[0])
            skip = context if start else 0  # frames whose context is cut off by the window
            good = vocoded[skip * self.hop :]
            sound[(start + skip) * self.hop : (start + size) * self.hop] = good
        return sound

    def decode(self, latents: np.ndarray, seed: int = 0) -> np.ndarray:
        """Latents (N, C) -> sound (N * 2 hop,) float32 in [-1, 1].

        The seed has no effect: nothing here is random.

        Raises:
          ValueError: another shape.
        """
        return self.vocode(self.decode_mel(latents))

    def save(self, folder):
        """Write codec.npz and, last, codec.json into a folder."""
        folder = Path(folder)
        with atomic_path(folder / "codec.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **dict(self.arrays) | {"fingerprint": np.array(self.fingerprint)})
        fields = ("name", "mode", "sample_rate", "hop", "latent_downsample", "latent_dim")
        meta = {key: getattr(self, key) for key in (*fields, "fingerprint")}
        names = [name for name in self.arrays if name != "fingerprint"]
        hashes = {name: array_hash(self.arrays[name]) for name in names}
        meta |= {"version": _VERSION, "hashes": hashes}
        write_description(folder, meta)

    @classmethod
    def load(cls, folder, dtype=jnp.float32) -> "NeuralCodec":
        """Open the folder that `save` wrote; the constructor describes `dtype`.

        Raises:
          ValueError: another version or mode, or arrays that do not match codec.json.
        """
        folder = Path(folder)
        meta = read_description(folder)
        if meta.get("version") != _VERSION or meta.get("mode") not in list(MODES):
            raise ValueError(
                f"{folder}: a neural codec of version {meta.get('version')}, mode "
                f"{meta.get('mode')!r}; this program reads version {_VERSION}, modes "
                + ", ".join(MODES)
            )
        path = folder / "codec.npz"
        try:
            arrays = np.load(path)
            found = str(arrays["fingerprint"])
        except Exception as error:  # np.load raises errors of many types on damaged files
            raise ValueError(f"{path}: missing or damaged ({error})") from error
        codec = cls(meta["mode"], arrays, found, dtype)
        check_description(codec, meta, folder)
        codec._path, codec._hashes = f"{path}: ", meta.get("hashes", {})
        if codec._hashes and codec._hashes.keys() != set(arrays) - {"fingerprint"}:
            raise ValueError(f"{path}: its contents do not fit codec.json (names of arrays)")
        return codec


def windows(frames: int, context: int) -> tuple[int, list[int]]:
    """Size and starts of the windows in which a clip is vocoded.

    The last `context` frames of a window are wrong unless the clip ends there, and the first
    `context` frames unless it starts there. All windows have the same size; each starts `context`
    frames before the first frame that the previous one got wrong; the last one ends with the clip.

    Args:
      frames: of the clip.
      context: frames on either side of a frame that affect it.
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
