"""The learned codec: a decoder with a Fourier head, on linear or learned latents.

`python -m vcm_jax.codec.train` trains it on one's own sounds.
"""

import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vcm_jax.atomic import atomic_path
from vcm_jax.codec import fourier
from vcm_jax.codec.encoders import ENCODERS, LearnedEncoder
from vcm_jax.codec.folders import check_description, read_description, write_description
from vcm_jax.codec.linear import LinearCodec
from vcm_jax.codec.mel import MELS, STACK, MelConfig, stacked_mel
from vcm_jax.hashes import array_hash, short_hash

_VERSION = 1
_WINDOW = 256  # latents that are decoded at once
_STEP = 32  # a short clip is padded to a multiple of it: few programs are compiled
N_FFT = {"16k": 512, "44k": 1024}  # of the head: a quarter of it is a quarter of a latent


@functools.partial(jax.jit, static_argnames=("size", "n_fft"))
def _decode(params, latents, mask, key, first, size, n_fft):
    """Sound (B, N n_fft) of latents that are already normalised; `first` is the first's number."""
    with jax.default_matmul_precision("highest"):
        head = fourier.FourierDecoder(fourier.DECODERS[size], n_fft).apply(
            {"params": params}, latents, mask
        )
    noise = fourier.draw_noise(key, first, latents.shape[1], n_fft)[None]
    frames = fourier.spectrum(head, noise)
    return fourier.inverse_stft(frames, n_fft, fourier.fine_mask(mask))


@functools.partial(jax.jit, static_argnames=("size", "latent_dim", "mel"))
def _encode(params, sound, mask, statistics, size, latent_dim, mel: MelConfig):
    mean, std = (statistics[name][None, None] for name in ("mean", "std"))
    rows = (stacked_mel(sound, mel) - mean) / std
    with jax.default_matmul_precision("highest"):
        mean, log_variance = LearnedEncoder(ENCODERS[size], latent_dim).apply(
            {"params": params}, rows, mask
        )
    return mean, jnp.exp(0.5 * log_variance)


class LearnedCodec:
    """Sound to latents and back by a decoder that was trained on sounds.

    Attributes:
      name: "learned".
      mode: "16k" or "44k".
      size: of the networks, a key of `fourier.DECODERS`.
      encoder: "linear", the principal components of `LinearCodec`, or "learned", a network.
      sample_rate: Hz.
      hop: samples per spectrogram frame.
      latent_downsample: spectrogram frames per latent.
      latent_dim: C.
      arrays: all weights by name.
      fingerprint: hash of the encoder. Codecs with other fingerprints have other latents. It does
        not depend on the decoder: the same latents allow several, and latents of a linear codec are
        those of a learned codec with that linear encoder.
      on_device: whether encoding uses an accelerator or all cores, so that only one process may
        encode.
    """

    name = "learned"
    latent_downsample = STACK

    def __init__(self, mode: str, size: str, arrays: Mapping[str, np.ndarray]):
        """
        Args:
          mode, size: see the class.
          arrays: `decoder/mean` and `decoder/std` (C,), the statistics of the latents;
            `decoder/params/...`; and either `encoder/mean` and `encoder/components` of the linear
            encoder or `encoder/mean`, `encoder/std` (2bands,) and `encoder/params/...`.
        """
        self.mode, self.size, self.arrays = mode, size, dict(arrays)
        mel = MELS[mode]
        self.sample_rate, self.hop = mel.sample_rate, mel.hop
        self.latent_dim = len(self.arrays["decoder/mean"])
        self.encoder = "linear" if "encoder/components" in self.arrays else "learned"
        self.on_device = self.encoder == "learned"
        if self.encoder == "linear":
            mean, components = self.arrays["encoder/mean"], self.arrays["encoder/components"]
            self._linear = LinearCodec(mean, components, np.nan, mode)
            self.fingerprint = self._linear.fingerprint
        else:
            names = sorted(name for name in self.arrays if name.startswith("encoder/"))
            chunks = [(name.encode(), np.ascontiguousarray(self.arrays[name])) for name in names]
            kind = f"learned {mode} {size} {_VERSION} ".encode()
            self.fingerprint = short_hash(kind, *(part for chunk in chunks for part in chunk))

    def _network(self, prefix: str) -> dict:
        flat = {
            name.removeprefix(prefix): jnp.asarray(array)
            for name, array in self.arrays.items()
            if name.startswith(prefix)
        }
        return traverse_util.unflatten_dict(flat, sep="/")

    # The weights move to the device when they are first needed: a process that only encodes with
    # the linear encoder never uses one.
    @functools.cached_property
    def _decoder(self) -> dict:
        return self._network("decoder/params/")

    @functools.cached_property
    def _encoder(self) -> dict:
        return self._network("encoder/params/")

    def encode(self, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sound (samples,) in [-1, 1] -> latent mean and std (N, C) float32.

        There are N = ceil(samples / (2 hop)) latents; the last one is padded with silence. The std
        of linear latents is 0.

        Raises:
          ValueError: another shape, or no samples.
        """
        if self.encoder == "linear":
            return self._linear.encode(audio)
        audio = np.asarray(audio, np.float32)
        if audio.ndim != 1 or len(audio) == 0:
            raise ValueError(f"the sound must be (samples,), not {audio.shape}")
        token = STACK * self.hop
        count = -(-len(audio) // token)
        rows = -(-max(2, count) // _STEP) * _STEP
        padded = np.pad(audio, (0, rows * token - len(audio)))
        mask = (np.arange(rows) < count)[None, :, None].astype(np.float32)
        statistics = {name: self.arrays[f"encoder/{name}"] for name in ("mean", "std")}
        mel = MELS[self.mode]
        found = _encode(
            self._encoder, padded[None], mask, statistics, self.size, self.latent_dim, mel
        )
        mean, std = (np.asarray(array[0, :count]) for array in found)
        return mean, std

    def decode(self, latents: np.ndarray, seed: int = 0) -> np.ndarray:
        """Latents (N, C) -> sound (N * 2 hop,) float32; peaks may exceed 1.

        Long clips are decoded in windows which overlap by all that affects a sample. The result is
        that of the whole clip, and the memory for activations is bounded.

        Args:
          latents: not normalised, as `encode` gives them.
          seed: of the noise, 0 <= seed < 2^63; equal seeds give equal sounds.

        Raises:
          ValueError: another shape.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim or len(latents) == 0:
            raise ValueError(f"latents must be (N, {self.latent_dim}), not {latents.shape}")
        latents = (latents - self.arrays["decoder/mean"]) / self.arrays["decoder/std"]
        count, n_fft = len(latents), N_FFT[self.mode]
        size = min(_WINDOW, -(-count // _STEP) * _STEP)
        context = fourier.DECODERS[self.size].context if count > size else 0
        starts = range(0, count, size)
        pad = ((context, starts[-1] + size + context - count), (0, 0))
        padded = np.pad(latents, pad)[None]
        mask = np.pad(np.ones((count, 1), np.float32), pad)[None]
        key, sounds = jax.random.key(seed), []
        for start in starts:
            window = slice(start, start + size + 2 * context)
            first = np.uint32((start - context) % 2**32)
            sound = _decode(
                self._decoder, padded[:, window], mask[:, window], key, first, self.size, n_fft
            )
            sounds.append(np.asarray(sound[0])[context * n_fft : (context + size) * n_fft])
        return np.concatenate(sounds)[: count * n_fft]

    def save(self, folder) -> None:
        """Write codec.npz and, last, codec.json into a folder."""
        folder = Path(folder)
        with atomic_path(folder / "codec.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **self.arrays)
        fields = ("name", "mode", "size", "encoder", "sample_rate", "hop", "latent_downsample")
        meta = {key: getattr(self, key) for key in (*fields, "latent_dim", "fingerprint")}
        hashes = {name: array_hash(array) for name, array in self.arrays.items()}
        write_description(folder, meta | {"version": _VERSION, "hashes": hashes})

    @classmethod
    def load(cls, folder) -> "LearnedCodec":
        """Read what `save` wrote.

        Raises:
          ValueError: another version, mode or size, or arrays that do not match codec.json.
        """
        folder = Path(folder)
        meta, path = read_description(folder), folder / "codec.npz"
        known = meta.get("mode") in list(MELS) and meta.get("size") in list(fourier.DECODERS)
        if meta.get("version") != _VERSION or not known:
            raise ValueError(
                f"{folder}: a learned codec of version {meta.get('version')}, mode "
                f"{meta.get('mode')!r}, size {meta.get('size')!r}; this program reads version "
                f"{_VERSION}, modes {', '.join(MELS)}, sizes {', '.join(fourier.DECODERS)}"
            )
        try:
            with np.load(path) as file:
                arrays = dict(file)
            if {name: array_hash(array) for name, array in arrays.items()} != meta["hashes"]:
                raise ValueError("its arrays are not those that were saved")
            codec = cls(meta["mode"], meta["size"], arrays)
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: missing or damaged ({error})") from error
        check_description(codec, meta, folder)
        return codec
