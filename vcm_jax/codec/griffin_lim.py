"""Griffin-Lim: sound from the magnitudes of an STFT, in bounded memory.

Fast Griffin-Lim (Perraudin et al. 2013), as librosa has it. Long sounds are made chunk by chunk.
While a chunk is made, the sound before it is kept fixed, so that the phases continue: chunks that
are made alone have unrelated phases and would cancel partly where they are joined.
"""

from collections.abc import Callable, Iterator

import librosa
import numpy as np

_MOMENTUM = 0.99
_CHUNK = 512  # frames that are made at once
_CONTEXT = 32  # frames before and after a chunk that take part


def _stft(sound: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    return librosa.stft(sound, n_fft=n_fft, hop_length=hop, pad_mode="constant")


def _istft(frames: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    return librosa.istft(frames, n_fft=n_fft, hop_length=hop)


def _continued(
    magnitudes: np.ndarray, known: np.ndarray, n_fft: int, hop: int, iterations: int, seed: int
) -> np.ndarray:
    """The sound ((frames - 1) * hop,) of magnitudes (bins, frames) that begins like `known`."""
    turns = np.random.RandomState(seed).random(size=magnitudes.shape)
    angles, before = librosa.util.phasor(2 * np.pi * turns.astype(np.float32)), np.complex64(0)
    for _ in range(iterations):
        sound = _istft(magnitudes * angles, n_fft, hop)
        sound[: len(known)] = known
        rebuilt = _stft(sound, n_fft, hop)
        angles = rebuilt - np.float32(_MOMENTUM / (1 + _MOMENTUM)) * before
        angles /= np.abs(angles) + np.finfo(np.float32).tiny
        before = rebuilt
    return _istft(magnitudes * angles, n_fft, hop)


def griffin_lim(
    magnitudes: Callable[[int, int], np.ndarray],
    frames: int,
    n_fft: int,
    hop: int,
    iterations: int,
    chunk: int = _CHUNK,
) -> Iterator[np.ndarray]:
    """Sound with fixed initial phases: consecutive chunks, together (frames - 1) * hop samples.

    Args:
      magnitudes: (first, end) -> |STFT| with Hann windows of these frames, (bins, end - first)
        float32. Frame i is centred at sample i * hop.
      frames: in all.
      n_fft, hop: samples per frame, and from frame to frame.
      iterations: of the algorithm.
      chunk: frames that are made at once. A sound of up to this many, and the context, is one.
    """
    known = np.zeros(0, np.float32)  # what was made of the frames before the chunk
    for number, start in enumerate(range(0, frames, chunk)):
        first, end = max(0, start - _CONTEXT), start + chunk + _CONTEXT
        if frames - end < _CONTEXT:
            end = frames  # no last chunk that is shorter than its context
        part = magnitudes(first, end)
        sound = _continued(part, known, n_fft, hop, iterations, number)
        begin = 0
        if len(known):  # the chunk fades in over the last window of what is known
            begin, rise = len(known) - n_fft, np.linspace(0, 1, n_fft, dtype=np.float32)
            sound[:begin] = known[:begin]
            joint = slice(begin, len(known))
            sound[joint] = (1 - rise) * known[begin:] + rise * sound[joint]
        if end == frames:
            yield sound[begin:]
            return
        stop = (start + chunk - first) * hop
        yield sound[begin : stop - n_fft]
        known = sound[stop - _CONTEXT * hop : stop]
