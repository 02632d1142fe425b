"""The encoders that MMAudio conditions on, in torch: CLIP (pictures, captions) and Synchformer."""

import functools
import hashlib
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from vcm_jax.interop import frames as preparation
from vcm_jax.interop.state_dict import StateDictError, import_torch
from vcm_jax.records.sequence import SequenceConfig

SYNCHFORMER = "synchformer_state_dict.pth"
_PURPOSE = "encoding with CLIP and Synchformer"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def _import_packages():
    """The torch module; an error that says how to install what is not there."""
    torch = import_torch(_PURPOSE)
    for name in ("transformers", "ftfy", "regex", "tokenizers"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise StateDictError(
                f"{_PURPOSE} needs {name}: pip install {name} (or this package with its extra, "
                '".[torch]")'
            ) from error
    return torch


def _hash(weights: Mapping[str, np.ndarray]) -> str:
    """Hash of weights by their names: the same for every file layout that holds them."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = np.ascontiguousarray(weights[name])
        digest.update(f"{name} {value.dtype} {value.shape};".encode())
        digest.update(value.data)
    return digest.hexdigest()[:16]


class TorchEncoders:
    """CLIP ViT-H/14 and Synchformer with weights from a folder, as MMAudio uses them.

    Args:
      folder: holds synchformer_state_dict.pth, here or in `ext_weights`, where MMAudio and
        `vcm_jax.pretrained fetch --out` put it; and CLIP's files (see `clip.load_clip`), here or in
        a folder `clip`.
      dtype: "float32" or "bfloat16", of the networks.
      batch_size: pictures, segments or captions at a time: what memory depends on.
      device: of torch; None takes CUDA where it is.

    Raises:
      StateDictError: weights that are missing, damaged or others, or packages that are not there.
    """

    name, version = "mmaudio", 1
    on_device = True

    def __init__(self, folder, dtype: str = "float32", batch_size: int = 8, device=None):
        folder = Path(folder)
        if not folder.is_dir():
            raise StateDictError(f"{folder}: no such folder of encoder weights")
        torch = _import_packages()
        from vcm_jax.interop import clip, synchformer

        self._dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self._batch_size = batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        inside, published = folder / "clip", folder / "ext_weights" / SYNCHFORMER
        sync = published if published.is_file() else folder / SYNCHFORMER
        self._places = inside if inside.is_dir() else folder, sync
        self._sync, _ = synchformer.load_synchformer(self._places[1])
        self._clip, self._tokenizer, _ = clip.load_clip(self._places[0])
        self._clip_size, self._sync_size = clip.IMAGE, self._sync.size.image
        self._features = clip
        self.clip_dim, self.text_dim = clip.SIZE.projection, clip.SIZE.text_width
        self.sync_dim = self._sync.size.width
        self._clip.to(self._device, self._dtype)
        self._sync.to(self._device, self._dtype)

    @functools.cached_property
    def _spec(self) -> dict:
        """It is made when it is asked for: hashing the files of 5 GB takes as long as a clip."""
        from vcm_jax.interop import clip, synchformer

        _, _, weights = clip.load_clip(self._places[0])
        _, sync = synchformer.load_synchformer(self._places[1])
        count = lambda arrays: sum(value.size for value in arrays.values())
        return {
            "name": self.name,
            "version": self.version,
            "clip_dim": self.clip_dim,
            "sync_dim": self.sync_dim,
            "text_dim": self.text_dim,
            "hash": {
                "clip": _hash(weights),
                "vocabulary": self._tokenizer.hash,
                "synchformer": _hash(sync),
            },
            "parameters": {"clip": count(weights), "synchformer": count(sync)},
            "dtype": str(self._dtype).removeprefix("torch."),
        }

    def release(self) -> None:
        """Gives the memory of the networks back; they cannot be used any more."""
        del self._clip, self._sync
        torch = import_torch(_PURPOSE)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def spec(self) -> dict:
        """name, version, dims, hashes of the weights and the vocabulary, parameters, dtype."""
        return self._spec

    def check_spec(self, spec: Mapping) -> None:
        """Refuse to stand for the encoders that `spec` describes when they are not these.

        A spec without hashes (of features that MMAudio's own code made) fits by its dims.

        Raises:
          ValueError: other widths, weights or vocabulary.
        """
        wanted = {key: spec.get(key) for key in ("name", "version")}
        wanted |= {key: spec[key] for key in ("clip_dim", "sync_dim", "text_dim")}
        pairs = [(key, wanted[key], self._spec[key]) for key in wanted]
        pairs += [
            (f"hash of {key}", value, self._spec["hash"].get(key))
            for key, value in spec.get("hash", {}).items()
        ]
        for key, theirs, ours in pairs:
            if theirs != ours:
                raise ValueError(f"{key} is {ours}, the features were made with {theirs}")

    def frame_transforms(self, sequence: SequenceConfig) -> dict[float, Callable]:
        """{clip_fps: (384, 384, 3) uint8, whole; sync_fps: (224, 224, 3) uint8, the middle}."""
        return {
            sequence.clip_fps: functools.partial(preparation.squash, size=self._clip_size),
            sequence.sync_fps: functools.partial(preparation.short_side_crop, size=self._sync_size),
        }

    def _run(self, function, items: Iterator) -> np.ndarray:
        """function of batches of arrays, stacked again: float32."""
        torch = import_torch(_PURPOSE)
        outputs, items = [], iter(items)
        with torch.inference_mode():
            while batch := list(itertools.islice(items, self._batch_size)):
                try:
                    batch = torch.from_numpy(np.stack(batch)).to(self._device)
                    outputs.append(function(batch).float().cpu().numpy())
                except torch.OutOfMemoryError as error:
                    raise MemoryError(
                        f"{_PURPOSE}: out of memory on {self._device} with {self._batch_size} at a "
                        "time; give a smaller --encoder_batch, or leave it more of the memory that "
                        "JAX takes (XLA_PYTHON_CLIENT_PREALLOCATE=false)"
                    ) from error
        return np.concatenate(outputs)

    def _scaled(self, pictures, mean, std):
        """uint8 ... H W 3 -> ... 3 H W: (pictures / 255 - mean) / std."""
        mean, std = (np.broadcast_to(np.float32(value), 3).copy() for value in (mean, std))
        mean, std = (import_torch(_PURPOSE).from_numpy(v).to(self._device) for v in (mean, std))
        return ((pictures.float() / 255 - mean) / std).movedim(-1, -3).to(self._dtype)

    def encode_frames(
        self, frames: Mapping[float, np.ndarray], sequence: SequenceConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Clip rows: a picture's CLIP features. Sync rows: 8 per segment, segments overlap."""
        image = lambda x: self._features.image_features(self._clip, self._scaled(x, _MEAN, _STD))
        clip = self._run(image, frames[sequence.clip_fps])
        starts = range(0, sequence.num_sync_segments * sequence.sync_stride, sequence.sync_stride)
        video = frames[sequence.sync_fps]
        segments = (video[start : start + sequence.sync_segment] for start in starts)
        sync = self._run(lambda x: self._sync(self._scaled(x, 0.5, 0.5)), segments)
        return clip, sync.reshape(-1, self.sync_dim)

    def encode_text(self, caption: str, sequence: SequenceConfig) -> np.ndarray:
        """Hidden states of all 77 positions, of unit length each."""
        return next(self.encode_texts([caption], sequence))

    def encode_texts(
        self, captions: Iterable[str], sequence: SequenceConfig
    ) -> Iterator[np.ndarray]:
        """`encode_text` of each, several at a time."""
        captions = iter(captions)
        text = lambda ids: self._features.text_features(self._clip, ids)
        while batch := list(itertools.islice(captions, self._batch_size)):
            yield from self._run(text, self._tokenizer(batch, sequence.text_seq_len))
