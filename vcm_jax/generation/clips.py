"""Sounds for requests (a video or a picture, and a prompt): encoding, sampling, decoding."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging

from vcm_jax import sampling
from vcm_jax.features.extract import encode_image, encode_spans, encode_video
from vcm_jax.generation.finish import Finish
from vcm_jax.generation.run import Run
from vcm_jax.generation.windows import Windows, sample_in_windows
from vcm_jax.media.read import probe
from vcm_jax.media.write import still_movie
from vcm_jax.models import MMDiT, ModelConfig
from vcm_jax.models.conditioned import sample_latents, velocity_of_features
from vcm_jax.records.sequence import SequenceConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """A sound to generate.

    Attributes:
      id: of the clip; its noise depends on it.
      video: path of the video whose sound is wanted; None without one.
      prompt: "" if there is none.
      image: a picture in place of a video; None without one.
      ignore_picture: the motion in the video counts, not what is to be seen.
      negative_prompt: what guidance leads away from; "" for the empty condition.
    """

    id: str
    video: Path | str | None
    prompt: str = ""
    image: Path | None = None
    ignore_picture: bool = False
    negative_prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Features:
    """An encoded request.

    Attributes:
      request: what was asked for.
      sequence: lengths of the features: those of the clip, or of one of its windows.
      seconds: length of the sound.
      clip, sync: features `Tc Dc` and `Ts Ds` of the video, `W Tc Dc` and `W Ts Ds` of its windows;
        None for the learned empty ones.
      text: features `Tt Dt` of the prompt.
      windows: in which the clip is sampled; None if it is sampled as a whole.
      negative_text: as `text`, of the negative prompt; None without one.
    """

    request: Request
    sequence: SequenceConfig
    seconds: float
    clip: np.ndarray | None
    sync: np.ndarray | None
    text: np.ndarray
    windows: Windows | None = None
    negative_text: np.ndarray | None = None


def encode_request(request: Request, run: Run, duration: float | None = None) -> Features:
    """Decodes and encodes one request.

    Args:
      request: what is wanted.
      run: whose encoders make the features, and whose `windowing` says how long clips are divided.
      duration: seconds; the sound is as long as the video or, if that is less, `duration`.

    Raises:
      MediaError: the video cannot be read.
      ValueError: the sound would be too short.
    """
    clip = sync = None
    seconds = duration or run.sequence.duration
    if request.video is not None:
        length = probe(request.video).duration
        seconds = min(length, duration or length)
    try:
        sequence = dataclasses.replace(run.sequence, duration=seconds)
        plan = run.windowing.plan(run.sequence, seconds)
    except ValueError as error:
        raise ValueError(f"{request.video or request.id}: {error}") from None
    sequence = plan.sequence if plan else sequence
    if request.video is not None and plan:
        spans = encode_spans(request.video, sequence, run.encoders, plan.times, seconds)
        # As in records, features are float16: there are many of them.
        spans = [[array.astype(np.float16) for array in span] for span in spans]
        clip, sync = (np.stack(arrays) for arrays in zip(*spans))
    elif request.video is not None:
        clip, sync = encode_video(request.video, sequence, run.encoders)
    if request.ignore_picture:
        clip = None
    if request.image is not None:
        clip = encode_image(request.image, sequence, run.encoders)
        clip = np.stack([clip] * len(plan.starts)) if plan else clip
    text = run.encoders.encode_text(request.prompt, sequence)
    negative = None
    if request.negative_prompt:
        negative = run.encoders.encode_text(request.negative_prompt, sequence)
    return Features(request, sequence, seconds, clip, sync, text, plan, negative)


def _network(model: ModelConfig, variables) -> MMDiT:
    """The network, which computes in the dtype of its weights."""
    return MMDiT(model, dtype=jax.tree.leaves(variables["params"])[0].dtype)


@functools.partial(jax.jit, static_argnames=("model", "objective", "sampler", "times"))
def _sample(variables, model, objective, sampler, times, features, noise, keys):
    net = _network(model, variables)
    return sample_latents(net, variables, features, noise, times, objective, sampler, keys)


@functools.partial(jax.jit, static_argnames=("model", "objective", "sampler"))
def _velocity(variables, model, objective, sampler, features, x, t, s):
    net = _network(model, variables)
    return velocity_of_features(net, variables, features, x, t, s, objective, sampler)


def _id_hash(request_id: str) -> int:
    return zlib.crc32(request_id.encode("utf-8", "surrogateescape"))


def _noise(seed: int, request_id: str, shape) -> np.ndarray:
    """Noise as a function of (seed, id), so that it is the same in any batch."""
    rng = np.random.default_rng([seed % 2**64, _id_hash(request_id)])
    return rng.standard_normal(shape, np.float32)


def _decoder_seed(seed: int, request_id: str) -> int:
    """The seed of a codec that draws noise, as a function of (seed, id)."""
    sequence = np.random.SeedSequence([seed % 2**64, _id_hash(request_id)])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def _keys(seed: int, ids: list[str]) -> jax.Array:
    """Keys of a restart sampler's later noise, which are functions of (seed, id) too."""
    hashes = np.array([_id_hash(request_id) for request_id in ids], np.uint32)
    # JAX takes 63 bits.
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed % 2**63)))(hashes)


def start_latents(run: Run, items: list[Features], times, seed: int, batch_size: int, put=None):
    """Latents `batch_size N C` of a batch of items of equal length, dispatched asynchronously.

    The batch is padded with copies of its last item, so that one program serves all batches.

    Args:
      run: from `load_run`.
      items: at most `batch_size`.
      times: as `sampling.sample`'s.
      seed: of the noise, any integer.
      batch_size: rows of the batch.
      put: places a pytree of arrays on the devices; None leaves that to JAX.
    """
    model = run.model.with_lengths(items[0].sequence)
    shape = (model.latent_seq_len, model.latent_dim)
    filled = items + items[-1:] * (batch_size - len(items))
    columns = ([getattr(f, name) for f in filled] for name in _COLUMNS)
    features = _features(model, *columns)
    noise = np.stack([_noise(seed, f.request.id, shape) for f in filled])
    keys = _keys(seed, [f.request.id for f in filled])
    if put is not None:
        features, noise, keys = put((features, noise, keys))
    static = (model, run.objective, run.sampler, sampling.check_times(times))
    return _sample(run.variables, *static, features, noise, keys)


def generate_latents(
    run: Run,
    items: list[Features],
    times,
    seed: int,
    batch_size: int,
    on_step: Callable[[int, int], None] | None = None,
):
    """Latents `N C` of every item, in order; all items have the same length.

    Args:
      run, items, times, seed, batch_size: as `start_latents`'s, for any number of items. Of items
        with windows, `batch_size` windows are sampled at a time.
      on_step: called before each step with the number of steps done and of all steps, once for
        each item. What it raises ends the sampling: each step is then a program of its own.
    """
    if items and (items[0].windows is not None or on_step is not None):
        arguments = times, seed, batch_size, on_step
        return [_latents_in_windows(run, _in_windows(item), *arguments) for item in items]
    latents = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        found = start_latents(run, batch, times, seed, batch_size)
        latents += list(np.asarray(found)[: len(batch)])
    return latents


def _in_windows(item: Features) -> Features:
    """The item itself if it has windows, otherwise with a single one: the whole clip."""
    if item.windows is not None:
        return item
    clip, sync = (None if array is None else array[None] for array in (item.clip, item.sync))
    windows = Windows(item.sequence, item.sequence.latent_seq_len, (0,))
    return dataclasses.replace(item, windows=windows, clip=clip, sync=sync)


def _latents_in_windows(
    run: Run, item: Features, times, seed: int, batch_size: int, on_step=None
) -> np.ndarray:
    model = run.model.with_lengths(item.sequence)

    def velocity(x, indices, t, s):
        clip, sync = (
            [None] * len(indices) if array is None else [array[i] for i in indices]
            for array in (item.clip, item.sync)
        )
        text = [[item.text] * len(indices), [item.negative_text] * len(indices)]
        features = _features(model, clip, sync, *text)
        return _velocity(run.variables, model, run.objective, run.sampler, features, x, t, s)

    x0 = sample_in_windows(
        velocity,
        item.windows,
        _noise(seed, item.request.id, (item.windows.length, model.latent_dim)),
        times,
        batch_size,
        restart=run.sampler.restarts(run.objective),
        noised=run.objective.noised,
        key=_keys(seed, [item.request.id])[0],
        on_step=on_step,
    )
    stats = run.variables["stats"]
    return x0 * np.asarray(stats["latent_std"]) + np.asarray(stats["latent_mean"])


_COLUMNS = ("clip", "sync", "text", "negative_text")  # the features that batches are made of


def _features(model, clip: list, sync: list, text: list, negative: list) -> dict[str, np.ndarray]:
    """A batch as `sample_latents` takes it; all but the features of the prompts may be None.

    Either all clips have a negative prompt or none has.
    """
    features = {
        "clip": _stack(clip, (model.clip_seq_len, model.clip_dim)),
        "sync": _stack(sync, (model.sync_seq_len, model.sync_dim)),
        "text": np.stack(text).astype(np.float32),
        "has_clip": np.array([f is not None for f in clip]),
        "has_sync": np.array([f is not None for f in sync]),
        "has_text": np.ones(len(text), bool),  # an empty prompt has features too
    }
    if negative[0] is not None:
        features["negative_text"] = np.stack(negative).astype(np.float32)
    return features


def _stack(features, shape):
    """Stacks features; None becomes zeros, which the network replaces by the empty condition."""
    zeros = np.zeros(shape, np.float32)
    return np.stack([zeros if f is None else f for f in features]).astype(np.float32)


def generate(
    run: Run,
    items: Iterable[Features],
    times,
    seed: int = 0,
    batch_size: int = 1,
    on_error: Callable[[Features, Exception], None] | None = None,
) -> Iterator[tuple[Features, np.ndarray]]:
    """Yields (item, sound) of every item; a sound is float32, mono, `item.seconds` long.

    `generate_files` does the same in stages, for runs that are not in memory as a whole.

    Args:
      run: from `load_run`.
      items: from `encode_request`. An item waits until a batch of its length is full.
      times: as `sampling.sample`'s, for example `sampling.uniform_times(1)`.
      seed: of the noise, any integer; the noise also depends on the request's id.
      batch_size: clips, or windows of a long clip, at a time.
      on_error: called for an item whose sound cannot be made, which is then left out. Without it
        the error is raised.

    Raises:
      ValueError: the weights give latents that are not finite.
    """
    for item, latent in sample_items(run, items, times, seed, batch_size, on_error):
        try:
            sound = decode(run, item, latent, seed)
        except Exception as error:
            if on_error is None:
                raise
            on_error(item, error)
            continue
        yield item, sound


def sample_items(
    run: Run, items: Iterable[Features], times, seed: int, batch_size: int, on_error
) -> Iterator[tuple[Features, np.ndarray]]:
    """Yields (item, latents `N C`) of every item; the arguments are those of `generate`."""
    waiting: dict[SequenceConfig, list[Features]] = {}
    for item in items:
        if item.windows is not None:  # its windows fill batches
            yield from _latents(run, [item], times, seed, batch_size, on_error)
            continue
        lengths = (
            item.sequence.latent_seq_len,
            item.sequence.clip_seq_len,
            item.sequence.sync_seq_len,
        )
        group = waiting.setdefault(lengths, [])
        group.append(item)
        if len(group) == batch_size:
            yield from _latents(run, waiting.pop(lengths), times, seed, batch_size, on_error)
    for group in waiting.values():
        yield from _latents(run, group, times, seed, batch_size, on_error)


def _latents(run: Run, group: list[Features], times, seed: int, batch_size: int, on_error):
    """(item, latents) of a batch of equal length; if it fails, each item is tried alone."""
    try:
        yield from zip(group, generate_latents(run, group, times, seed, batch_size))
    except Exception as error:
        if on_error is None:
            raise
        if len(group) == 1:
            on_error(group[0], error)
            return
        logging.warning(
            "a batch of %d clips failed (%s); each is tried alone", len(group), type(error).__name__
        )
        for item in group:
            yield from _latents(run, [item], times, seed, 1, on_error)


def decode(run: Run, item: Features, latent: np.ndarray, seed: int) -> np.ndarray:
    """The sound of a request's latents `N C`, cut to its length.

    Args:
      run: whose codec decodes.
      item: the request; a codec's noise is a function of the seed and its id.
      latent: not normalised.
      seed: any integer.

    Raises:
      ValueError: the latents are not finite.
    """
    if not np.isfinite(latent).all():
        raise ValueError("the network's output is not finite: the weights are damaged or diverged")
    sound = run.codec.decode(latent, _decoder_seed(seed, item.request.id))
    return sound[: round(item.seconds * run.codec.sample_rate)]


def write(
    item: Features, sound: np.ndarray, sample_rate: int, path, finish: Finish | None = None
) -> None:
    """Writes the sound as .wav or .flac, or together with the request's picture as a movie.

    Its true peak is limited to -1 dBTP.

    Args:
      item: what the sound was made for.
      sound: (samples,), from `generate`.
      sample_rate: Hz.
      path: of the file.
      finish: the loudness that is wanted, and a count of what the limiter did.

    Raises:
      ValueError: the sound is not finite or, if a loudness is wanted, silent or too short.
    """
    finish, path = finish or Finish(), Path(path)
    if path.suffix.lower() in (".wav", ".flac"):
        finish.write_sound(path, sound, sample_rate)
    elif item.request.image is not None:
        with still_movie(item.request.image, item.seconds) as movie:
            finish.mux(movie, sound, sample_rate, path, item.seconds)
    else:
        finish.mux(item.request.video, sound, sample_rate, path, item.seconds)
