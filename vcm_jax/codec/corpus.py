"""The sounds that a codec is trained on: decoded once into a file, and cropped at random."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vcm_jax.atomic import atomic_path, read_json, write_json
from vcm_jax.hashes import open_seal, seal
from vcm_jax.media.clips import list_files
from vcm_jax.media.names import SOUND_SUFFIXES, VIDEO_SUFFIXES
from vcm_jax.media.sound import is_silent, read_audio

_SAMPLES, _INDEX = "sounds.i16", "sounds.json"
_BATCH = 64  # files that are decoded before they are written
_FULL = 32767  # int16 of full scale


class CorpusError(ValueError):
    """The sounds cannot be trained on; one line."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Decoded sounds of a folder.

    Attributes:
      samples: all sounds one after another, int16, a memory map.
      lengths: samples of each.
      names: their files, relative to the folder.
      left_out: [(file, reason)] of the files that cannot be used.
    """

    samples: np.ndarray
    lengths: np.ndarray
    names: list[str]
    left_out: list[tuple[str, str]]

    def sound(self, number: int) -> np.ndarray:
        """A sound (samples,) float32."""
        start = int(self.lengths[:number].sum())
        return self.samples[start : start + int(self.lengths[number])].astype(np.float32) / _FULL

    def split(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers for training, `count` numbers for validation), drawn at random; the same always.

        Of few sounds at most a tenth are for validation, and always one.

        Raises:
          CorpusError: there is only one sound.
        """
        if len(self.names) < 2:
            raise CorpusError("one sound is too few: at least one more is needed for validation")
        order = np.random.default_rng(0).permutation(len(self.names))
        count = max(1, min(count, len(order) // 10))
        return np.sort(order[count:]), np.sort(order[:count])

    def crops(self, numbers: np.ndarray, size: int, rows: slice, batch: int, seed: int, step: int):
        """Rows of the global batch of a step: (rows, size) float32.

        They are a function of the arguments alone, so that a resumed run sees the same ones. Long
        sounds are drawn more often; short ones are padded with silence.

        Args:
          numbers: of the sounds to draw from.
          size: samples.
          rows: which rows of the batch.
          batch: number of rows.
          seed, step: of the run.
        """
        rng = np.random.default_rng([seed, step])
        weights = np.maximum(self.lengths[numbers], size).cumsum()
        drawn, places = rng.random(batch)[rows], rng.random(batch)[rows]
        chosen = numbers[np.searchsorted(weights, drawn * weights[-1], side="right")]
        starts = np.concatenate([[0], self.lengths.cumsum()])
        crops = np.zeros((len(chosen), size), np.float32)
        for crop, number, place in zip(crops, chosen, places):
            begin = int(place * max(0, self.lengths[number] - size + 1))
            found = self.samples[starts[number] + begin : starts[number + 1]][:size]
            crop[: len(found)] = found
        return crops / _FULL


def _read(path: Path, sample_rate: int):
    """(samples int16, None) or (None, reason)."""
    try:
        sound = read_audio(path, sample_rate)
        if is_silent(sound):
            return None, "digital silence"
        return np.round(np.clip(sound, -1, 1) * _FULL).astype(np.int16), None
    except (ValueError, OSError) as error:
        return None, str(error).replace("\n", " ")


def _read_all(folder: Path, files: list[str], sample_rate: int) -> Iterator:
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(files), desc="Reading sounds", unit="file") as bar,
    ):
        for start in range(0, len(files), _BATCH):
            names = files[start : start + _BATCH]
            found = pool.map(lambda name: _read(folder / name, sample_rate), names)
            for name, (samples, reason) in zip(names, found):
                yield name, samples, reason
                bar.update()


def open_corpus(folder, sample_rate: int, cache) -> Corpus:
    """Decodes the sounds and the sound tracks of videos in a folder, or opens what was decoded.

    Args:
      folder: of sound or video files; subfolders are searched, too.
      sample_rate: Hz.
      cache: folder for the decoded sounds; 2 bytes per sample are written.

    Raises:
      CorpusError: no file has a usable sound, or the cache holds other files' sounds.
      ListError: no such folder.
    """
    folder, cache = Path(folder), Path(cache)
    files = list_files(folder, (*SOUND_SUFFIXES, *VIDEO_SUFFIXES))
    listing = [[name, (folder / name).stat().st_size] for name in files]
    index = cache / _INDEX
    if not index.exists():
        _decode(folder, files, sample_rate, cache, listing)
    found = open_seal(read_json(index, ["sample_rate", "listing", "sounds", "left_out"]), index)
    if found["listing"] != listing or found["sample_rate"] != sample_rate:
        raise CorpusError(
            f"{folder}: its files changed since {cache} was made: delete {cache} to begin anew"
        )
    if not found["sounds"]:
        reason = found["left_out"][0][1] if found["left_out"] else "no sound or video files"
        raise CorpusError(f"{folder}: no file has a usable sound, the first: {reason}")
    names, lengths = zip(*found["sounds"])
    samples = np.memmap(cache / _SAMPLES, np.int16, "r")
    if len(samples) != sum(lengths):
        raise CorpusError(f"{cache / _SAMPLES}: damaged: delete {cache} to begin anew")
    left_out = [tuple(entry) for entry in found["left_out"]]
    return Corpus(samples, np.array(lengths), list(names), left_out)


def _decode(folder: Path, files: list[str], sample_rate: int, cache: Path, listing) -> None:
    sounds, left_out = [], []
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(cache / _SAMPLES) as temporary, open(temporary, "wb") as file:
        for name, samples, reason in _read_all(folder, files, sample_rate):
            if reason is None:
                file.write(samples.tobytes())
                sounds.append([name, len(samples)])
            else:
                left_out.append([name, reason])
        if not sounds:
            file.write(b"\0\0")  # an empty file cannot be mapped; the caller says what is wrong
    content = {"sample_rate": sample_rate, "listing": listing}
    write_json(cache / _INDEX, seal(content | {"sounds": sounds, "left_out": left_out}), None)
