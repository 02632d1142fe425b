"""Encoders: frames and captions to the clip, sync and text features that condition the network.

`Encoders` is all that extraction and generation know of them. `WeightsFreeEncoders` stand where
CLIP and Synchformer stand in the full model and need no pretrained weights: pooled pictures and
motion profiles under fixed random projections, and hashed caption words.
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

_CLIP_GRID = 8  # cells per side; what moves is a few cells large
_CLIP_CONTRAST = 4.0  # weight of the difference from the clip's median picture
_CLIP_SCALE = 0.27  # typical rms of a clip descriptor: features get a std of about 1
_SYNC_GRID = 16
_SYNC_NOISE = 0.003  # smaller changes of a cell (of 1) are compression noise
_SYNC_OFFSETS = (-2, -1, 0, 1, 2)  # frames around a row's time
_SYNC_SCALE = 0.2  # typical rms of a sync descriptor


class Encoders(Protocol):
    """What extraction and generation need. Lengths (Tc, Ts, Tt) are the SequenceConfig's.

    `on_device`: whether encoding wants an accelerator or all cores, so that one process does it.
    """

    clip_dim: int
    sync_dim: int
    text_dim: int
    on_device: bool

    def frame_transforms(self, sequence: SequenceConfig) -> dict[float, Callable]:
        """{fps: f}: f makes of one frame (H, W, 3) uint8 an array of a fixed shape."""

    def encode_frames(
        self, frames: Mapping[float, np.ndarray], sequence: SequenceConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """{fps: transformed frames} -> clip (Tc, clip_dim), sync (Ts, sync_dim), float32."""

    def encode_text(self, caption: str, sequence: SequenceConfig) -> np.ndarray:
        """Caption -> (Tt, text_dim) float32; "" gives the empty text's features."""

    def encode_texts(
        self, captions: Iterable[str], sequence: SequenceConfig
    ) -> Iterator[np.ndarray]:
        """`encode_text` of each."""

    def spec(self) -> dict:
        """JSON-able description from which `encoders_from_spec` makes equal encoders."""


def area_pool(frame: np.ndarray, cells: int) -> np.ndarray:
    """Mean colours of a frame (H, W, 3) uint8 over cells x cells parts: float32 in [0, 1]."""
    # Sums over whole pixels: matrix products would start BLAS threads for every small frame.
    for axis in (0, 1):
        edges = np.arange(cells + 1) * frame.shape[axis] // cells
        counts = np.maximum(np.diff(edges), 1).astype(np.float32)
        sums = np.add.reduceat(frame, edges[:-1], axis=axis, dtype=np.float32)
        frame = sums / np.expand_dims(counts, tuple(range(1, 3 - axis)))
    return frame / 255


@functools.lru_cache(maxsize=16)
def _projection(name: str, inputs: int, outputs: int) -> np.ndarray:
    """Fixed random matrix (inputs, outputs) float32 that keeps a vector's rms on average."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), inputs, outputs])
    return (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32)


def _motion_profiles(grids: np.ndarray) -> np.ndarray:
    """Motion from frame to frame: pooled frames (T, G, G, 3) -> (T - 1, 4 G) float32.

    Over bands of rows and of columns, the size of the change and its sign; square roots bring the
    weak motion of small things into the range of the strong.
    """
    change = np.diff(grids, axis=0)
    change = np.sign(change) * np.maximum(np.abs(change) - _SYNC_NOISE, 0)
    maps = np.abs(change).max(axis=-1), change.mean(axis=-1)
    bands = [m.sum(axis=axis) for m in maps for axis in (2, 1)]
    profiles = np.concatenate(bands, axis=1)
    return np.sign(profiles) * np.sqrt(np.abs(profiles))


def _sync_rows(grids: np.ndarray, sequence: SequenceConfig) -> np.ndarray:
    """Descriptors (Ts, 5 * 4 G) of the motion around (j + 1/2) / Ts of the clip.

    Synchformer's own rows come from overlapping segments and are not even in time; these are, so
    that nearest upsampling to the latent rate puts each where it belongs.
    """
    profiles = _motion_profiles(grids)
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
    """A word's fixed random vector (dim,) float32 of unit variance."""
    rng = np.random.default_rng([zlib.crc32(word.encode()), dim])
    return rng.standard_normal(dim).astype(np.float32)


class WeightsFreeEncoders:
    """Encoders without weights: deterministic, fast, good enough to learn synchrony from."""

    name, version = "weights_free", 1
    on_device = False

    def __init__(self, clip_dim: int = 1024, sync_dim: int = 768, text_dim: int = 1024):
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
        """Clip rows: the pooled picture and what differs from the clip's median picture, projected.

        Sync rows: motion profiles within two frames of the row's time (see `_sync_rows`),
        projected. Both have a std of about 1; without motion the sync rows are 0.
        """
        pictures = frames[sequence.clip_fps].reshape(sequence.clip_seq_len, -1)
        moving = _CLIP_CONTRAST * (pictures - np.median(pictures, axis=0))
        clip = np.concatenate([pictures - np.float32(0.5), moving], axis=1) / _CLIP_SCALE
        sync = _sync_rows(frames[sequence.sync_fps], sequence) / _SYNC_SCALE
        return (
            (clip @ _projection("clip", clip.shape[1], self.clip_dim)).astype(np.float32),
            (sync @ _projection("sync", sync.shape[1], self.sync_dim)).astype(np.float32),
        )

    def encode_text(self, caption: str, sequence: SequenceConfig) -> np.ndarray:
        """One row per word; the rest hold the whole caption, as CLIP's positions after its end do.

        Without that a mean over the rows would hardly see a short caption. "" gives zeros.
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
        """`encode_text` of each."""
        return (self.encode_text(caption, sequence) for caption in captions)

    def spec(self) -> dict:
        """name, version, dims, and a hash of them: the features follow from these alone."""
        spec = {key: getattr(self, key) for key in ("name", "version", "clip_dim", "sync_dim")}
        spec["text_dim"] = self.text_dim
        spec["hash"] = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]
        return spec


def load_encoders(folder, dtype: str = "float32", batch_size: int = 8) -> Encoders:
    """CLIP and Synchformer with the weights in a folder (`interop.encoders.TorchEncoders`).

    Raises:
      ValueError: weights or packages that are missing, or not what is wanted.
    """
    from vcm_jax.interop.encoders import TorchEncoders  # torch only where it is wanted

    return TorchEncoders(folder, dtype, batch_size)


def encoders_from_spec(spec: Mapping, folder=None) -> Encoders:
    """Make the encoders that `Encoders.spec` described.

    Args:
      spec: e.g. of a manifest.
      folder: weights of the encoders, for those that have some.

    Raises:
      ValueError: unknown encoders, another version or other weights of them, or no folder.
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
    encoders = WeightsFreeEncoders(*(spec[f"{kind}_dim"] for kind in ("clip", "sync", "text")))
    if spec != encoders.spec():
        raise ValueError(
            f"features were made by encoders {dict(spec)}, this program has {encoders.spec()}"
        )
    return encoders
