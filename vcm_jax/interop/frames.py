"""Frames as MMAudio prepares them: resized to what CLIP and Synchformer look at, still uint8.

torchvision's `Resize(..., BICUBIC)` on uint8 pictures is torch's antialiased interpolation, which
rounds to uint8 (torchvision itself is not needed). Scaling and normalisation come later, where the
encoders run: until then a frame takes a quarter of the memory.
"""

import numpy as np


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (height, width, 3) uint8, antialiased bicubic."""
    import torch

    picture = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
    picture = torch.nn.functional.interpolate(
        picture, (height, width), mode="bicubic", antialias=True
    )
    return picture[0].permute(1, 2, 0).numpy()


def squash(frame: np.ndarray, size: int) -> np.ndarray:
    """A frame (H, W, 3) uint8 made square, (size, size, 3), without cropping: for CLIP."""
    return np.ascontiguousarray(_resize(frame, size, size))


def short_side_crop(frame: np.ndarray, size: int) -> np.ndarray:
    """The middle (size, size, 3) of a frame (H, W, 3) uint8 whose short side became `size`."""
    height, width = frame.shape[:2]
    short = min(height, width)
    scale = lambda side: size if side == short else int(size * side / short)
    frame = _resize(frame, scale(height), scale(width))
    # torchvision's CenterCrop rounds halves to even.
    top, left = (round((side - size) / 2) for side in frame.shape[:2])
    return np.ascontiguousarray(frame[top : top + size, left : left + size])
