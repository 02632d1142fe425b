"""What a run sounds like while it trains: figures on validation clips, and its best step kept."""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import librosa
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from vcm_jax import sampling
from vcm_jax.metrics import SoundMetrics, frechet_distance
from vcm_jax.metrics.sounds import METRICS
from vcm_jax.models.conditioned import sample_latents
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.runs import checkpoint

VCM = VCMConfig()


@functools.partial(jax.jit, static_argnames=("net", "objective", "num_steps", "place"))
def generate(params, stats, batch, key, net, objective, num_steps, place):
    """(generated latents, true latents), `B N C` each, in the data's units."""
    variables = {"params": params, "stats": stats}
    noise = jax.random.normal(key, batch["latent_mean"].shape)
    times = sampling.uniform_times(num_steps)
    found = sample_latents(net, variables, batch, noise, times, objective)
    truth = batch["latent_mean"]
    return (
        (found, truth) if place is None else jax.lax.with_sharding_constraint((found, truth), place)
    )


def figures(
    net,
    params,
    stats,
    batches: Iterable[dict],
    codec,
    key,
    steps: Sequence[int] = (1, 4, 25),
    max_clips: int = 64,
    place=None,
    objective=VCM,
) -> dict[str, float]:
    """How generated sounds of validation clips compare with the true ones, at several step counts.

    Both go through the codec: the true sound is that of the record's latents. The noise of a clip
    is the same for every step count and every call, so that figures of different training steps
    differ by the weights alone.

    Args:
      net: MMDiT; params, stats: its variables, best the averaged ones.
      batches: as `mixture.batches` yields them; clips beyond `max_clips` are not looked at.
      codec: decodes latents, `load_codec`.
      key: of the noise.
      steps: numbers of network evaluations.
      max_clips: how many clips; decoding takes most of the time.
      objective: settings of the objective, which say how the network is sampled.
      place: a replicated NamedSharding where batches are spread over processes; None elsewhere.

    Returns:
      "val/FIGURE_N_steps" for the figures of `SoundMetrics.values`, and latent_fd, the Frechet
      distance of single latent tokens in units of the training data's standard deviation.

      NaN where the weights make sounds that are not finite.

    Raises:
      ValueError: no clips.
    """
    found = {num: ([], []) for num in steps}
    count = 0
    for i, batch in enumerate(batches):
        take = min(max_clips - count, len(batch["latent_mean"]))
        for num in steps:
            pair = generate(
                params, stats, batch, jax.random.fold_in(key, i), net, objective, num, place
            )
            for kept, latents in zip(found[num], jax.device_get(pair)):
                kept += list(latents[:take])
        count += take
        if count == max_clips:
            break
    if not count:
        raise ValueError("no validation clips: there is nothing to make figures of")
    values, std = {}, np.asarray(jax.device_get(stats["latent_std"]))
    truth = [codec.decode(latent) for latent in found[steps[0]][1]]
    for num, (latents, true_latents) in found.items():
        sounds = SoundMetrics(codec.sample_rate)
        try:
            for i, latent in enumerate(latents):
                sounds.add(f"validation clip {i}", codec.decode(latent), truth[i])
            rows = [np.concatenate(side) / std for side in (latents, true_latents)]
            one = sounds.values() | {"latent_fd": frechet_distance(*rows)}
        except (
            ValueError,
            librosa.ParameterError,
        ) as error:  # bad weights must not end a run that may recover
            logging.warning("no figures in %d steps: %s", num, error)
            one = dict.fromkeys([*METRICS, "latent_fd"], float("nan"))
        values |= {f"val/{name}_{num}_steps": value for name, value in one.items()}
    return values


class Best:
    """Keeps the averaged weights of the step whose figure was the lowest so far.

    WORKDIR/best holds them as a run's workdir does, so that `generate --workdir=WORKDIR/best` takes
    them; a resumed run goes on comparing with it.
    """

    def __init__(self, workdir, figure: str):
        """figure: a name of what `figures` returns, of which less is better."""
        self.folder, self.figure = Path(workdir) / "best", figure
        self.value = float("inf")
        if (self.folder / "checkpoints").is_dir():
            with checkpoint.open_manager(self.folder, read_only=True) as manager:
                step = manager.latest_step()
                if step is not None:
                    kept = checkpoint.read_meta(manager, step)
                    if kept["figure"] == figure:
                        self.value = kept["value"]

    def offer(self, state, values: dict[str, float], meta: dict) -> bool:
        """Saves the state's averages if the figure is the lowest so far; says whether it was.

        Every process must call it; the first one's figure decides.

        Raises:
          StorageError: when it cannot be saved.
        """
        value = float(values[self.figure])
        if jax.process_count() > 1:
            value = float(multihost_utils.broadcast_one_to_all(np.float32(value)))
        if not value < self.value:
            return False
        self.value = value
        meta = meta | {"figure": self.figure, "value": value}
        # Only what generating needs: these are no checkpoints to resume from.
        kept = state.replace(params=None, opt_state=None)
        with checkpoint.Saver(checkpoint.open_manager(self.folder)) as saver:
            saver.save(int(state.step), kept, meta, wait=True)
        return True
