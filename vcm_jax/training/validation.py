"""Metrics of generated validation clips while a run trains; the best weights so far are kept."""

import functools
import json
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


def sound_metrics(
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
    """Compares generated sounds of validation clips with the true ones, at several step counts.

    Both are decoded by the codec: the true sound is that of the record's latents. The noise of a
    clip is the same for every step count and every call, so that the metrics of different training
    steps differ by the weights alone.

    Args:
      net: MMDiT.
      params, stats: its variables, usually the EMA weights.
      batches: from `mixture.batches`; clips beyond `max_clips` are not used.
      codec: decodes latents; from `load_codec`.
      key: the key of the noise.
      steps: numbers of network evaluations.
      max_clips: how many clips are compared; decoding takes most of the time.
      objective: settings of the objective, which say how the network is sampled.
      place: a replicated NamedSharding if batches are spread over processes, else None.

    Returns:
      "val/METRIC_N_steps" for the metrics of `SoundMetrics.values`, and for latent_fd, the Frechet
      distance between single latent tokens in units of the training data's standard deviation.
      They are NaN if the sounds are not finite.

    Raises:
      ValueError: there are no clips.
    """
    found = {num: ([], []) for num in steps}  # generated and true latents
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
        raise ValueError("no validation clips: there is nothing to compare")
    std = np.asarray(jax.device_get(stats["latent_std"]))
    truth = [codec.decode(latent) for latent in found[steps[0]][1]]
    values = {}
    for num, pair in found.items():
        try:
            one = _compare(*pair, truth, codec, std)
        except (ValueError, librosa.ParameterError) as error:
            # Bad weights must not end a run that may recover.
            logging.warning("no metrics of sounds in %d steps: %s", num, error)
            one = dict.fromkeys([*METRICS, "latent_fd"], float("nan"))
        values |= {f"val/{name}_{num}_steps": value for name, value in one.items()}
    return values


def _compare(latents, true_latents, truth, codec, std) -> dict[str, float]:
    """The metrics of generated latents; `truth` are the true sounds."""
    sounds = SoundMetrics(codec.sample_rate)
    for i, latent in enumerate(latents):
        sounds.add(f"validation clip {i}", codec.decode(latent), truth[i])
    rows = [np.concatenate(side) / std for side in (latents, true_latents)]
    return sounds.values() | {"latent_fd": frechet_distance(*rows)}


class Overfitting:
    """Compares the validation loss with that of training, and says when it has risen for a while.

    The loss is the error of the instantaneous velocity against the data's, which schedules of the
    objective do not change; of objectives without such rows it is the error against their target.

    Args:
      metrics: metrics.jsonl of the run: a resumed run goes on from its lines.
    """

    LOSSES = ("mse_instant_to_velocity", "mse")
    # So many evaluations in a row must be above the lowest one by this factor: EMA weights and
    # fixed noise leave less than that to chance.
    EVALUATIONS, FACTOR = 3, 1.01

    def __init__(self, metrics: Path):
        self._low, self._low_step, self._above = float("inf"), 0, 0
        if metrics.exists():
            for line in map(json.loads, metrics.read_text().splitlines()):
                self._add(line["step"], self._loss(line, "val"))

    def _loss(self, values: dict, kind: str) -> float | None:
        names = (f"{kind}/{name}" for name in self.LOSSES)
        return next((values[name] for name in names if np.isfinite(values.get(name, np.nan))), None)

    def _add(self, step: int, loss: float | None) -> None:
        if loss is None:
            return
        if loss < self._low:
            self._low, self._low_step, self._above = loss, step, 0
        else:
            self._above = self._above + 1 if loss > self.FACTOR * self._low else 0

    def compare(self, step: int, val: dict[str, float], train: dict[str, float]) -> tuple[str, str]:
        """(a line that compares the losses, a warning that is empty if there is no reason for one).

        Args:
          step: of the evaluation.
          val: `val/...`.
          train: the last `train/...`.
        """
        ours, theirs = self._loss(val, "val"), self._loss(train, "train")
        if ours is None:
            return "", ""
        self._add(step, ours)
        line = f"step {step}: validation loss {ours:.4g}"
        if theirs is not None:
            line += f", training loss {theirs:.4g}"
        line += f"; the lowest validation loss was {self._low:.4g} at step {self._low_step}"
        if self._above != self.EVALUATIONS:  # it is said once, until there is a new lowest one
            return line, ""
        return line, (
            f"the validation loss has risen from {self._low:.4g} at step {self._low_step} to "
            f"{ours:.4g} at step {step}: the run may learn its clips by heart. best/ holds the "
            "weights with the best metric; fewer steps, more clips or an adapter help"
        )


class Best:
    """Keeps the EMA weights of the step with the lowest value of a metric so far.

    WORKDIR/best holds them like the workdir of a run, so that `generate --workdir=WORKDIR/best`
    uses them. A resumed run compares with them again.

    Args:
      workdir: of the run.
      metric: a name that `sound_metrics` returns; lower values are better.
    """

    def __init__(self, workdir, metric: str):
        self.folder, self.metric = Path(workdir) / "best", metric
        self.value = float("inf")
        if not (self.folder / "checkpoints").is_dir():
            return
        with checkpoint.open_manager(self.folder, read_only=True) as manager:
            step = manager.latest_step()
            if step is None:
                return
            try:
                kept = checkpoint.read_meta(manager, step)
            except checkpoint.DamagedError as error:
                logging.warning("the best weights so far are lost: %s", error)
                return
        if kept.get("metric", kept.get("figure")) == metric:  # "figure": an older version's name
            self.value = kept["value"]

    def offer(self, state, values: dict[str, float], meta: dict) -> bool:
        """Saves the EMA weights of a state if its metric is the lowest so far.

        Every process of the run has to call it; the value of the first one decides.

        Args:
          state: TrainState.
          values: from `sound_metrics`.
          meta: what the checkpoint says about its run.

        Returns:
          Whether it was the lowest value.

        Raises:
          StorageError: the weights cannot be saved.
        """
        value = float(values[self.metric])
        if jax.process_count() > 1:
            value = float(multihost_utils.broadcast_one_to_all(np.float32(value)))
        if not value < self.value:
            return False
        self.value = value
        meta = meta | {"metric": self.metric, "value": value}
        # Only what generating needs: a run cannot resume from these checkpoints.
        kept = state.saved()
        kept |= dict.fromkeys({"params", "opt_state", "target"} & kept.keys())
        with checkpoint.Saver(checkpoint.open_manager(self.folder)) as saver:
            saver.save(int(state.step), kept, meta, wait=True)
        return True
