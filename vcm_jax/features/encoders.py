"""Encoders: frames and captions to the clip, sync and text features that condition the network.

Extraction and generation use encoders through the protocol `Encoders` alone.
`WeightsFreeEncoders` replace CLIP and Synchformer where no pretrained weights are at hand: they
project pooled images and motion profiles by fixed random matrices, and hash the words of captions.
"""

import functools
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from vcm_jax.records.sequence import SequenceConfig

_CLIP_GRID = 8  # cells per side: moving objects are a few cells large
_CLIP_CONTRAST = 4.0  # weight of the difference from the clip's median image
_CLIP_SCALE = 0.27  # typical rms of a clip descriptor; dividing by it gives a std of about 1
_SYNC_GRID = 16
_SYNC_NOISE = 0.003  # smaller changes of a cell, whose range is [0, 1], are compression noise
_SYNC_OFFSETS = (-2, -1, 0, 1, 2)  # frames around a row's time
_SYNC_SCALE = 0.2  # typical rms of a sync descriptor


class Encoders(Protocol):
    """Encoders as extraction and generation use them; the SequenceConfig has Tc, Ts and Tt.

    Attributes:
      clip_dim, sync_dim, text_dim: widths of the features.
      on_device: whether encoding uses an accelerator or all cores, so that only one process may
        encode.
    """

    clip_dim: int
    sync_dim: int
    text_dim: int
    on_device: bool

    def frame_transforms(self, sequence: SequenceConfig) -> dict[float, Callable]:
        """{fps: f}: f turns one frame (H, W, 3) uint8 into an array of a fixed shape."""

    def encode_frames(
        self, frames: Mapping[float, np.ndarray], sequence: SequenceConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """{fps: transformed frames} -> clip (Tc, clip_dim), sync (Ts, sync_dim), float32."""

    def encode_text(self, caption: str, sequence: SequenceConfig) -> np.ndarray:
        """Caption -> (Tt, text_dim) float32; "" gives the features of the empty text."""

    def encode_texts(
        self, captions: Iterable[str], sequence: SequenceConfig
    ) -> Iterator[np.ndarray]:
        """Apply `encode_text` to each caption, in batches where that is faster."""

    def spec(self) -> dict:
        """JSON-able description from which `encoders_from_spec` makes equal encoders."""


def area_pool(frame: np.ndarray, cells: int) -> np.ndarray:
    """Mean colours (cells, cells, 3) float32 in [0, 1] of a frame (H, W, 3) uint8."""
    # Sums over whole pixels, because matrix products would start BLAS threads for each frame.
    for axis in (0, 1):
        edges = np.arange(cells + 1) * frame.shape[axis] // cells
        counts = np.maximum(np.diff(edges), 1).astype(np.float32)
        sums = np.add.reduceat(frame, edges[:-1], axis=axis, dtype=np.float32)
        frame = sums / np.expand_dims(counts, tuple(range(1, 3 - axis)))
    return frame / 255


@functools.lru_cache(maxsize=16)
def _projection(name: str, inputs: int, outputs: int) -> np.ndarray:
    """Fixed random matrix (inputs, outputs) float32 that preserves the rms in expectation."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), inputs, outputs])
    return (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)


def _motion_profiles(grids: np.ndarray, version: int) -> np.ndarray:
    """Motion from frame to frame: pooled frames (T, G, G, 3) -> (T - 1, 8 G) float32.

    Each profile has the size of the change in every row and every column of cells, and its signed
    value for each colour, which tells what moves. Version 1 had the mean over the colours instead,
    4 G in all. Square roots bring the weak motion of small objects into the range of strong motion.
    """
    change = np.diff(grids, axis=0)
    change = np.sign(change) * np.maximum(np.abs(change) - _SYNC_NOISE, 0)
    signed = [change.mean(axis=-1)] if version == 1 else list(np.moveaxis(change, -1, 0))
    maps = [np.abs(change).max(axis=-1), *signed]
    bands = [m.sum(axis=axis) for m in maps for axis in (2, 1)]
    profiles = np.concatenate(bands, axis=1)
    return np.sign(profiles) * np.sqrt(np.abs(profiles))


def _sync_rows(grids: np.ndarray, sequence: SequenceConfig, version: int) -> np.ndarray:
    """Descriptors (Ts, 5 * 8 G) of the motion around (j + 1/2) / Ts of the clip.

    Synchformer's rows come from overlapping segments and are unevenly spaced in time. These are
    evenly spaced, so that nearest upsampling to the latent rate places each row correctly.
    """
    profiles = _motion_profiles(grids, version)
    rows = (np.arange(sequence.sync_seq_len) + 0.5) / sequence.sync_seq_len
    # Profile k lies between frames k and k + 1.
    centre = rows * sequence.duration * sequence.sync_fps - 0.5
    columns = []
    for offset in _SYNC_OFFSETS:
        place = np.clip(centre + offset, 0, len(profiles) - 1)
        before = np.floor(place).astype(int)
        after = np.minimum(before + 1, len(profiles) - 1)
        weight = (place - before)[:, None].astype(np.float32)
        columns.append((1 - weight) * profiles[before] + weight * profiles[after])
    return np.concatenate(columns, axis=1)


@functools.lru_cache(maxsize=4096)
def _word_vector(word: str, dim: int) -> np.ndarray:
    """The fixed random vector (dim,) float32 of a word; its variance is 1."""
    rng = np.random.default_rng([zlib.crc32(word.encode()), dim])
    return rng.standard_normal(dim).astype(np.float32)


class WeightsFreeEncoders:
    """Encoders without weights: deterministic, fast, and good enough to learn synchrony.

    Attributes:
      version: of the features, 2; the runs and records of earlier programs have 1, whose sync
        features do not know the colours of what moves.
    """

    name, versions = "weights_free", (1, 2)
    on_device = False

    def __init__(
        self, clip_dim: int = 1024, sync_dim: int = 768, text_dim: int = 1024, version: int = 2
    ):
        self.version = version
        self.clip_dim, self.sync_dim, self.text_dim = clip_dim, sync_dim, text_dim

    def frame_transforms(self, sequence: SequenceConfig) -> dict[float, Callable]:
        """{clip_fps: (8, 8, 3), sync_fps: (16, 16, 3)}: mean colours in [0, 1], float32."""
        return {
            sequence.clip_fps: functools.partial(area_pool, cells=_CLIP_GRID),
            sequence.sync_fps: functools.partial(area_pool, cells=_SYNC_GRID),
        }

    def encode_frames(
        self, frames: Mapping[float, np.ndarray], sequence: SequenceConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode sampled frames.

        Clip rows are projections of the pooled image and of its difference from the clip's median
        image. Sync rows are projections of the motion within two frames of the row's time (see
        `_sync_rows`). Both have a std of about 1; without motion the sync rows are 0.

        Args:
          frames: {clip_fps: (Tc, 8, 8, 3), sync_fps: (T, 16, 16, 3)}, see `frame_transforms`.
          sequence: lengths.

        Returns:
          clip (Tc, clip_dim) and sync (Ts, sync_dim) features, float32.
        """
        pictures = frames[sequence.clip_fps].reshape(sequence.clip_seq_len, -1)
        moving = _CLIP_CONTRAST * (pictures - np.median(pictures, axis=0))
        clip = np.concatenate([pictures - np.float32(0.5), moving], axis=1) / _CLIP_SCALE
        sync = _sync_rows(frames[sequence.sync_fps], sequence, self.version) / _SYNC_SCALE
        return (
            (clip @ _projection("clip", clip.shape[1], self.clip_dim)).astype(np.float32),
            (sync @ _projection("sync", sync.shape[1], self.sync_dim)).astype(np.float32),
        )

    def encode_text(self, caption: str, sequence: SequenceConfig) -> np.ndarray:
        """Encode a caption: one row per word, then rows that hold the whole caption.

        CLIP's positions after the end of the text hold the whole caption as well. Without them a
        short caption would hardly change the mean over the rows. "" gives zeros.
        """
        features = np.zeros((sequence.text_seq_len, self.text_dim), np.float32)
        words = re.findall(r"\w+", caption.lower())[: sequence.text_seq_len]
        if words:
            vectors = np.stack([_word_vector(word, self.text_dim) for word in words])
            features[: len(words)] = vectors
            features[len(words) :] = vectors.sum(axis=0) / np.sqrt(len(words))
        return features

    def encode_texts(
        self, captions: Iterable[str], sequence: SequenceConfig
    ) -> Iterator[np.ndarray]:
        """Apply `encode_text` to each caption."""
        return (self.encode_text(caption, sequence) for caption in captions)

    def spec(self) -> dict:
        """name, version, widths and a hash of them; the features depend on nothing else."""
        spec = {key: getattr(self, key) for key in ("name", "version", "clip_dim", "sync_dim")}
        spec["text_dim"] = self.text_dim
        spec["hash"] = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]
        return spec


def load_encoders(folder, dtype: str = "float32", batch_size: int = 8) -> Encoders:
    """CLIP and Synchformer with the weights in a folder (`interop.encoders.TorchEncoders`).

    Args:
      folder: of the weights.
      dtype: "float32" or "bfloat16".
      batch_size: images, segments or captions in a batch.

    Raises:
      ValueError: weights or packages are missing or of another kind.
    """
    from vcm_jax.interop.encoders import TorchEncoders  # imports torch, which is optional

    return TorchEncoders(folder, dtype, batch_size)


def encoders_from_spec(spec: Mapping, folder=None) -> Encoders:
    """Make the encoders that `Encoders.spec` described.

    Args:
      spec: for example of a manifest.
      folder: with the weights of the encoders, if they have weights.

    Raises:
      ValueError: unknown encoders, another version or other weights, or no folder of weights.
    """
    if spec.get("name") == "mmaudio":
        if folder is None:
            raise ValueError(
                "the features were made by CLIP and Synchformer: give the folder of their "
                "weights, --encoders=DIR"
            )
        encoders = load_encoders(folder, spec.get("dtype", "float32"))
        try:
            encoders.check_spec(spec)
        except ValueError as error:
            raise ValueError(f"--encoders={folder}: {error}") from None
        return encoders
    if spec.get("name") != WeightsFreeEncoders.name:
        raise ValueError(
            f"unknown encoders {spec.get('name')!r}, known: {WeightsFreeEncoders.name!r}, 'mmaudio'"
        )
    if folder is not None:
        raise ValueError(
            f"--encoders={folder}: the features were made by encoders without weights, leave it out"
        )
    widths = (spec[f"{kind}_dim"] for kind in ("clip", "sync", "text"))
    version = spec["version"] if spec["version"] in WeightsFreeEncoders.versions else 2
    encoders = WeightsFreeEncoders(*widths, version=version)
    if spec != encoders.spec():
        raise ValueError(
            f"features were made by encoders {dict(spec)}, this program has {encoders.spec()}"
        )
    return encoders
