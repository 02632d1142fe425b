"""SequenceConfig: all lengths of a clip, derived from its duration."""

import dataclasses
import math

import numpy as np

# How Synchformer sees a video: overlapping segments of frames, each of which gives several rows.
SYNC_FPS = 25
SYNC_SEGMENT = 16  # frames
SYNC_STRIDE = 8  # frames from one segment to the next
SYNC_ROWS = 8  # feature rows per segment


def sync_row_times(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the sync rows lie: their centres in seconds, and their distance from the centre of
    their segment in rows; float64 `num_rows` each.

    Rows of neighbouring segments share their times, since the segments overlap.
    """
    segment, row = np.divmod(np.arange(num_rows), SYNC_ROWS)
    frames = SYNC_SEGMENT / SYNC_ROWS  # per row
    centres = (SYNC_STRIDE * segment + frames * (row + 0.5)) / SYNC_FPS
    return centres, np.abs(row - (SYNC_ROWS - 1) / 2)


def _floor(x: float) -> int:
    """floor(x), robust to rounding errors such as 2.56 * 25 = 63.99999999999999."""
    return math.floor(round(x, 6))


def _ceil(x: float) -> int:
    return math.ceil(round(x, 6))


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Lengths of a clip's sound, latent and conditions, all derived from its duration.

    The defaults are MMAudio's 16 kHz mode; `SequenceConfig.mode_44k()` is its 44.1 kHz mode
    (MMAudio, model/sequence_config.py).

    Attributes:
      duration: seconds.
      sample_rate: of the sound, in Hz.
      hop: samples per spectrogram frame.
      latent_downsample: spectrogram frames per latent token.
      clip_fps, sync_fps: frame rates (Hz) at which the two visual encoders see the video.
      sync_segment, sync_stride: frames per Synchformer segment, and between starts of segments.
      sync_rows_per_segment: feature rows that one segment gives.
      text_seq_len: text tokens (CLIP's context length).

    Raises:
      ValueError: the duration is too short for one segment of sync frames.
    """

    duration: float = 8.0
    sample_rate: int = 16_000
    hop: int = 256
    latent_downsample: int = 2
    clip_fps: int = 8
    sync_fps: int = SYNC_FPS
    sync_segment: int = SYNC_SEGMENT
    sync_stride: int = SYNC_STRIDE
    sync_rows_per_segment: int = SYNC_ROWS
    text_seq_len: int = 77

    def __post_init__(self):
        shortest = self.sync_segment / self.sync_fps
        if not shortest <= self.duration < math.inf:
            raise ValueError(
                f"duration {self.duration} s is too short or no number: the sync features need at "
                f"least {self.sync_segment} frames at {self.sync_fps} fps, {shortest} s"
            )

    @classmethod
    def mode_44k(cls, duration: float = 8.0) -> "SequenceConfig":
        """MMAudio's 44.1 kHz mode: 345 latents for 8 s."""
        return cls(duration=duration, sample_rate=44_100, hop=512)

    @property
    def latent_seq_len(self) -> int:
        """N, the number of latent tokens."""
        return _ceil(self.duration * self.sample_rate / self.hop / self.latent_downsample)

    @property
    def num_spec_frames(self) -> int:
        """Spectrogram frames that the latents represent."""
        return self.latent_seq_len * self.latent_downsample

    @property
    def num_samples(self) -> int:
        """Samples that the latents represent: `duration` rounded up to whole latents."""
        return self.num_spec_frames * self.hop

    @property
    def num_clip_frames(self) -> int:
        """Number of frames at `clip_fps`."""
        return max(1, _floor(self.duration * self.clip_fps))

    @property
    def clip_seq_len(self) -> int:
        """Tc, the number of clip tokens: one per frame."""
        return self.num_clip_frames

    @property
    def num_sync_frames(self) -> int:
        """Number of frames at `sync_fps`."""
        return _floor(self.duration * self.sync_fps)

    @property
    def num_sync_segments(self) -> int:
        """Overlapping segments that fit completely into the frames."""
        return (self.num_sync_frames - self.sync_segment) // self.sync_stride + 1

    @property
    def sync_seq_len(self) -> int:
        """Ts, the number of sync tokens."""
        return self.num_sync_segments * self.sync_rows_per_segment
