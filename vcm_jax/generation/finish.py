"""What is done to a generated sound before people hear it: loudness, then the limiter."""

import dataclasses
from pathlib import Path

import numpy as np

from vcm_jax.media import loudness
from vcm_jax.media.write import mux_audio, write_sound


@dataclasses.dataclass
class Finish:
    """Writes sounds at a level that never clips, and counts what it changed.

    Evaluation is to see what the network made: `vcm_jax.media.write.find_as_made` finds that for
    the sounds of a folder.

    Attributes:
      lufs: the integrated loudness of all sounds before the limiter; None: as they were made.
      keep: whether to keep what the network made beside each .wav or .flac that was changed.
      reductions: largest reduction by the limiter in dB, of each sound that was written.
    """

    lufs: float | None = None
    keep: bool = False
    reductions: list[float] = dataclasses.field(default_factory=list)

    def write_sound(self, path: Path, sound: np.ndarray, sample_rate: int) -> None:
        """Writes a .wav or .flac.

        Raises:
          ValueError: the sound is not finite or, with `lufs`, silent or too short.
        """
        heard, reduction = self._level(sound, sample_rate)
        kept = sound if self.keep and heard is not sound else None
        write_sound(path, heard, sample_rate, kept)
        self.reductions.append(reduction)

    def mux(self, video, sound: np.ndarray, sample_rate: int, path: Path, seconds: float) -> None:
        """Writes a sound with the first seconds of a video's picture; see `mux_audio`."""
        heard, reduction = self._level(sound, sample_rate)
        mux_audio(video, heard, sample_rate, path, seconds)
        self.reductions.append(reduction)

    def _level(self, sound: np.ndarray, sample_rate: int) -> tuple[np.ndarray, float]:
        if self.lufs is not None:
            sound = loudness.at_loudness(sound, sample_rate, self.lufs)
        return loudness.limit(sound, sample_rate)

    def summary(self) -> str:
        """One line that says what the limiter did; "" if it did nothing."""
        limited = [reduction for reduction in self.reductions if reduction]
        if not limited:
            return ""
        return (
            f"limited to a true peak of {loudness.PEAK:g} dB: {len(limited)} of "
            f"{len(self.reductions)} sounds, by up to {max(limited):.1f} dB"
        )
