"""From requests (a video, a prompt, or both) to sounds: encoding, sampling, decoding, writing."""

import dataclasses
import functools
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from vcm_jax import sampling
from vcm_jax.features.extract import encode_video
from vcm_jax.generation.run import Run
from vcm_jax.media.read import probe
from vcm_jax.media.write import mux_audio, write_sound
from vcm_jax.models import MMDiT
from vcm_jax.models.conditioned import sample_latents
from vcm_jax.records.sequence import SequenceConfig

# One evaluation looks at all of a clip at once: attention grows with the square of its length.
MAX_DURATION = 120.0


@dataclasses.dataclass(frozen=True)
class Request:
    """A sound that is wanted: `id` (noise depends on it), a video or None, a prompt or ""."""

    id: str
    video: Path | None
    prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Features:
    """Encoded request: clip and sync features are None without a video."""

    request: Request
    sequence: SequenceConfig
    seconds: float
    clip: np.ndarray | None
    sync: np.ndarray | None
    text: np.ndarray


def encode_request(request: Request, run: Run, duration: float | None = None) -> Features:
    """Decodes and encodes one request; the length is the video's, or `duration` if that is less.

    Raises:
      ValueError: an unreadable video (MediaError), or one that is too short or too long.
    """
    clip = sync = None
    seconds = duration or run.sequence.duration
    if request.video is not None:
        length = probe(request.video).duration
        seconds = min(length, duration or length)
    if seconds > MAX_DURATION:
        raise ValueError(
            f"{request.video or request.id}: {seconds:.0f} s is more than {MAX_DURATION:.0f} s; "
            "give --duration or cut it"
        )
    try:
        sequence = dataclasses.replace(run.sequence, duration=seconds)
    except ValueError as error:
        raise ValueError(f"{request.video or request.id}: {error}") from None
    if request.video is not None:
        clip, sync = encode_video(request.video, sequence, run.encoders)
    text = run.encoders.encode_text(request.prompt, sequence)
    return Features(request, sequence, seconds, clip, sync, text)


@functools.partial(jax.jit, static_argnames=("model", "objective", "sampler", "times"))
def _sample(variables, model, objective, sampler, times, features, noise, keys):
    net = MMDiT(model)
    return sample_latents(net, variables, features, noise, times, objective, sampler, keys)


def _noise(seed: int, request_id: str, shape) -> np.ndarray:
    """Noise as a function of (seed, id): the same in any batch."""
    return np.random.default_rng([seed, zlib.crc32(request_id.encode())]).standard_normal(
        shape, np.float32
    )


def _keys(seed: int, ids: list[str]) -> jax.Array:
    """Keys of a restart sampler's later noise, as functions of (seed, id) too."""
    hashes = np.array([zlib.crc32(request_id.encode()) for request_id in ids], np.uint32)
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(hashes)


def start_latents(run: Run, items: list[Features], times, seed: int, batch_size: int, put=None):
    """Latents of one batch of items of one length, `batch_size N C`, as the device's promise.

    The batch is filled up with copies, so that one program serves all. `put` places its arrays.
    """
    model = run.model.with_lengths(items[0].sequence)
    shape = (model.latent_seq_len, model.latent_dim)
    filled = items + items[-1:] * (batch_size - len(items))
    features = {
        "clip": _stack([f.clip for f in filled], (model.clip_seq_len, model.clip_dim)),
        "sync": _stack([f.sync for f in filled], (model.sync_seq_len, model.sync_dim)),
        "text": np.stack([f.text for f in filled]).astype(np.float32),
        "has_video": np.array([f.clip is not None for f in filled]),
        "has_text": np.ones(batch_size, bool),  # an empty prompt has features too
    }
    noise = np.stack([_noise(seed, f.request.id, shape) for f in filled])
    keys = _keys(seed, [f.request.id for f in filled])
    if put is not None:
        features, noise, keys = put((features, noise, keys))
    static = (model, run.objective, run.sampler, sampling.check_times(times))
    return _sample(run.variables, *static, features, noise, keys)


def generate_latents(run: Run, items: list[Features], times, seed: int, batch_size: int):
    """Latents of items of one length, `N C` each, in order; `times` as `sampling.sample`'s."""
    latents = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        found = start_latents(run, batch, times, seed, batch_size)
        latents += list(np.asarray(found)[: len(batch)])
    return latents


def _stack(features, shape):
    """Stacks features; those that are None become zeros, which `_sample` does not look at."""
    zeros = np.zeros(shape, np.float32)
    return np.stack([zeros if f is None else f for f in features]).astype(np.float32)


def generate(
    run: Run, items: Iterable[Features], times, seed: int = 0, batch_size: int = 1
) -> Iterator[tuple[Features, np.ndarray]]:
    """(item, sound) of every item, float32 mono, as long as the item says.

    Args:
      run: from `runs.load_run`.
      items: from `encode_request`; held back until a batch of equal length is full.
      times: as `sampling.sample`'s, e.g. `sampling.uniform_times(1)`.
      seed: of the noise, which also depends on the request's id.
      batch_size: clips at a time.
    """
    waiting: dict[SequenceConfig, list[Features]] = {}

    def finish(group):
        for item, latent in zip(group, generate_latents(run, group, times, seed, batch_size)):
            yield item, run.codec.decode(latent)[: round(item.seconds * run.codec.sample_rate)]

    for item in items:
        lengths = (
            item.sequence.latent_seq_len,
            item.sequence.clip_seq_len,
            item.sequence.sync_seq_len,
        )
        group = waiting.setdefault(lengths, [])
        group.append(item)
        if len(group) == batch_size:
            yield from finish(waiting.pop(lengths))
    for group in waiting.values():
        yield from finish(group)


def write(item: Features, sound: np.ndarray, sample_rate: int, path: Path) -> None:
    """Writes the sound as .wav or .flac, or the request's own picture with it as .mp4 or .mov."""
    if path.suffix.lower() in (".wav", ".flac"):
        write_sound(path, sound, sample_rate)
    else:
        mux_audio(item.request.video, sound, sample_rate, path, item.seconds)
