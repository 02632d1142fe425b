"""From what is asked for to takes: files with sound, in stages that a job tells of."""

import dataclasses
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vcm_jax import sampling
from vcm_jax.generation.clips import (
    Features,
    Request,
    decode,
    encode_request,
    generate_latents,
    write,
)
from vcm_jax.media.drawing import motion
from vcm_jax.media.streams import MediaError
from vcm_jax.media.write import cut_video
from vcm_jax.web.asked import Asked
from vcm_jax.web.jobs import Job, Stage
from vcm_jax.web.models import Model, sampler


@dataclasses.dataclass(frozen=True)
class Variant:
    """How one take is made.

    Attributes:
      label: what the page calls it.
      model: which makes it.
      steps: of the sampler.
      guidance: its scale; 0: the model's own way.
      seed: of the noise.
    """

    label: str
    model: Model
    steps: int
    guidance: float
    seed: int

    @property
    def facts(self) -> str:
        """How it is sampled, in a few words."""
        own = self.model.run
        twice = sampler(own, self.guidance).is_guided(own.objective)
        count = self.steps * (2 if twice else 1)
        words = [self.model.name, _count(self.steps, "step"), _count(count, "evaluation")]
        if self.guidance:
            words.append(f"guidance {self.guidance:g}")
        return " · ".join([*words, f"seed {self.seed}"])


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


@dataclasses.dataclass(frozen=True)
class Take:
    """A sound that was made.

    Attributes:
      variant: how.
      movie: the mp4 with this sound; None if there is nothing to see.
      wav: the sound alone.
      sound: (samples,) as it was made.
      sample_rate: Hz.
      change: the picture's motion from frame to frame; None without a video.
    """

    variant: Variant
    movie: Path | None
    wav: Path
    sound: np.ndarray
    sample_rate: int
    change: np.ndarray | None


def make(asked: Asked, variants: Sequence[Variant], folder: Path, job: Job) -> None:
    """Makes the takes and says each of them to the job, after its stages.

    Args:
      asked: from `check`.
      variants: one for each take. Those of the same model share its features.
      folder: where the files go.
      job: whose visitor is told.

    Raises:
      Stopped: the job has been cancelled; a step of the sampler is the longest that this takes.
      ValueError: it cannot be made.
    """
    _check_variants(asked, variants)
    maker = _Maker(asked, folder, job, len(variants))
    try:
        maker.read()
        for variant in variants:
            maker.take(variant)
    except MediaError as error:  # of a file whose place is nobody's business
        text = str(error)
        for path in filter(None, (maker.video, asked.video, asked.image)):
            text = text.replace(str(path), asked.name)
        raise ValueError(text) from None


def _check_variants(asked: Asked, variants: Sequence[Variant]) -> None:
    for variant in variants:
        run = variant.model.run
        guided = sampler(run, variant.guidance).is_guided(run.objective)
        if asked.negative_prompt and not guided:
            raise ValueError("a negative prompt needs guidance while sampling: not 0 and not 1")


class _Maker:
    """The stages of `make`, whose arguments these are, and what later ones need again."""

    def __init__(self, asked: Asked, folder: Path, job: Job, count: int):
        self.asked, self.folder, self.job, self.count = asked, folder, job, count
        self.video, self.change = asked.video, None
        self.features: dict[str, Features] = {}
        self.made = 0

    def say(self, text: str, fraction: float) -> None:
        """Tells of a stage of this take; of all the work, a tenth goes before the first take."""
        done = 0.1 + 0.9 * (self.made + fraction) / self.count
        self.job.say(Stage(text, done if fraction >= 0 else 0.0))

    def read(self) -> None:
        """Cuts the video, and measures its motion."""
        asked = self.asked
        if asked.video is not None:
            self.say("Reading the video", -1)
            if asked.needs_cut:
                self.video = self.folder / f"{secrets.token_hex(8)}.mp4"
                cut_video(asked.video, self.video, asked.start, asked.seconds)
            self.change = motion(self.video)

    def encode(self, model: Model) -> Features:
        """What the model's encoders see, and read in the prompts."""
        if model.name not in self.features:
            what = "Seeing" if self.video or self.asked.image else "Reading the prompt"
            self.say(what, 0)
            asked = self.asked
            request = Request(
                asked.name,
                self.video,
                asked.prompt,
                asked.image,
                negative_prompt=asked.negative_prompt,
            )
            with model.run.stage("encoders") as run:
                self.features[model.name] = encode_request(request, run, asked.seconds)
        return self.features[model.name]

    def take(self, variant: Variant) -> None:
        """Samples, decodes and writes one take."""
        whole = variant.model.run
        item = self.encode(variant.model)
        whole = dataclasses.replace(whole, sampler=sampler(whole, variant.guidance))
        times = sampling.uniform_times(variant.steps)

        def on_step(done: int, steps: int) -> None:
            self.say(f"Sampling, step {done + 1} of {steps}", 0.1 + 0.6 * done / steps)

        with whole.stage("variables") as run:
            latents = generate_latents(run, [item], times, variant.seed, 1, on_step)[0]
        self.say("Sounding", 0.7)
        with whole.stage("codec") as run:
            sound, rate = decode(run, item, latents, variant.seed), run.codec.sample_rate
        self.say("Writing", 0.9)
        self._write(variant, item, sound, rate)

    def _write(self, variant: Variant, item: Features, sound: np.ndarray, rate: int) -> None:
        stem = self.folder / secrets.token_hex(8)  # which take it is cannot be told from the name
        wav, movie = stem.with_suffix(".wav"), None
        write(item, sound, rate, wav)
        if self.video is not None or self.asked.image is not None:
            movie = stem.with_suffix(".mp4")
            write(item, sound, rate, movie)
        self.made += 1
        self.job.say(Take(variant, movie, wav, sound, rate, self.change))
