"""The page itself: what visitors see, and what happens when they press a button."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr

from vcm_jax.generation.outputs import reason
from vcm_jax.media import page as html
from vcm_jax.web import results
from vcm_jax.web.asked import Asked, Limits, check
from vcm_jax.web.files import Files
from vcm_jax.web.jobs import Desk, Stage, Stopped
from vcm_jax.web.making import Take, Variant, make
from vcm_jax.web.models import Model
from vcm_jax.web.votes import VOTES, Votes

_TAKES, _BY_STEPS, _BY_RUN = "Takes", "Two numbers of steps", "Two runs"


@dataclasses.dataclass
class Comparison:
    """What a visitor is asked to judge; the server keeps it, so that a blind one stays blind."""

    asked: Asked
    takes: list[Take]
    blind: bool


class Page:
    """The page of one or two models.

    Args:
      models: the model, and maybe another one to compare it with.
      limits: what is accepted.
      files: the folder of all temporary files.
      votes: where votes of comparisons go.
      examples: (video, prompt) of clips to try.
    """

    def __init__(
        self,
        models: Sequence[Model],
        limits: Limits,
        files: Files,
        votes: Votes,
        examples: Sequence[tuple[Path, str]] = (),
    ):
        self.models, self.limits, self.files, self.votes = models, limits, files, votes
        self.examples = [(files.copy(path), prompt) for path, prompt in examples]
        self.desk = Desk()

    steps = (1, 4, 25)  # to choose from, besides the model's own number
    device = "device"  # the queue in which all jobs wait, for a device that does one at a time
    vote_texts = VOTES

    by_steps = _BY_STEPS

    @property
    def modes(self) -> list[str]:
        return [_TAKES, _BY_STEPS] + [_BY_RUN] * (len(self.models) > 1)

    # What happens

    def check(self, video, image, prompt, negative, start, seconds) -> Asked:
        return check(self.limits, video, image, prompt, negative, start, seconds)

    def variants(self, mode, steps, other_steps, guidance, seed, takes) -> list[Variant]:
        """The takes that are wanted.

        Raises:
          ValueError: numbers that are out of range.
        """
        try:
            seed, takes, guidance = int(seed or 0), int(takes or 1), float(guidance or 0)
            steps, other_steps = int(steps), int(other_steps or steps)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("seed, takes, steps and guidance are numbers") from None
        for count in (steps, other_steps):
            if not 1 <= count <= self.limits.steps:
                raise ValueError(f"steps: {count}; from 1 to {self.limits.steps} here")
        if not 1 <= takes <= self.limits.takes:
            raise ValueError(f"takes: {takes}; from 1 to {self.limits.takes} here")
        first, second = self.models[0], self.models[-1]
        if mode == _BY_STEPS:
            if steps == other_steps:
                raise ValueError("two numbers of steps: choose different ones")
            pair = [(first, steps), (first, other_steps)]
        elif mode == _BY_RUN:
            if len(self.models) < 2:
                raise ValueError("two runs: the page was started without --other")
            pair = [(first, steps), (second, steps)]
        else:
            labels = [f"Take {i + 1}" if takes > 1 else "Result" for i in range(takes)]
            return [
                Variant(label, first, steps, guidance, seed + i) for i, label in enumerate(labels)
            ]
        return [
            Variant(label, model, count, guidance, seed)
            for label, (model, count) in zip("AB", pair)
        ]

    def work(self, session: str, asked: Asked, variants) -> Iterator[Stage | Take]:
        """Makes the takes; yields stages and takes."""
        folder = self.files.folder(session)
        job = self.desk.open(session)
        yield from job.follow(lambda job: make(asked, variants, folder, job))

    def on_generate(
        self, video, image, prompt, negative, mode, steps, other_steps, guidance, seed, takes,
        start, seconds, blind, request: gr.Request,
    ):  # fmt: skip
        """Yields (status, slots, whether to ask for a vote, the comparison)."""
        empty = [gr.update(value="", visible=False)] * self.limits.takes
        same = [gr.skip()] * self.limits.takes
        hide, cleared = gr.update(visible=False), True
        try:
            asked = self.check(video, image, prompt, negative, start, seconds)
            variants = self.variants(mode, steps, other_steps, guidance, seed, takes)
            is_comparison = mode in (_BY_STEPS, _BY_RUN)
            blind = bool(blind) and is_comparison
            if blind:
                random.SystemRandom().shuffle(variants)
                labels = zip("AB", variants)
                variants = [dataclasses.replace(v, label=label) for label, v in labels]
            made: list[Take] = []
            for said in self.work(request.session_hash, asked, variants):
                if isinstance(said, Stage):
                    said = Stage("Working", said.done) if blind else said
                    slots = empty if cleared else same
                    yield results.status(said), *slots, hide, None
                else:
                    made.append(said)
                    if not blind:
                        yield gr.skip(), *self._slots(made[-1:], len(made) - 1), hide, None
                cleared = False
            comparison = Comparison(asked, made, blind) if is_comparison else None
            text = "Listen to both, then vote." if is_comparison else _done(made)
            slots = self._slots(made, 0, blind)
            yield results.note(text), *slots, gr.update(visible=is_comparison), comparison
        except Stopped:
            yield results.note("Cancelled."), *same, hide, None
        except Exception as error:
            yield results.note(reason(error), "error"), *same, hide, None

    def _slots(self, takes: Sequence[Take], first: int, blind: bool = False) -> list:
        """Updates of the slots: the takes are shown from the slot `first` on."""
        shown = [gr.update(value=results.card(take, blind=blind), visible=True) for take in takes]
        rest = self.limits.takes - first - len(shown)
        after = [gr.skip()] * rest if first else [gr.update(visible=False)] * rest
        return [gr.skip()] * first + shown + after

    def on_cancel(self, request: gr.Request):
        self.desk.stop(request.session_hash)
        return results.note("Cancelled.")

    def on_vote(self, vote: str, comparison: Comparison | None):
        """(status, the two slots with what they are, whether to ask for a vote, nothing)."""
        if comparison is None:
            return results.note("There is nothing to vote on."), *[gr.skip()] * 2, gr.skip(), None
        asked, (a, b) = comparison.asked, comparison.takes
        facts = a.variant.facts, b.variant.facts
        try:
            self.votes.add(asked.name, asked.prompt, *facts, comparison.blind, vote)
            text = f"Noted: {VOTES[vote]}. A: {facts[0]}. B: {facts[1]}."
        except OSError as error:
            text = f"The vote could not be kept: {reason(error)}"
        return results.note(text), *self._slots([a, b], 0)[:2], gr.update(visible=False), None

    def on_api(
        self, request: gr.Request, video=None, image=None, prompt=None, negative_prompt=None,
        steps=None, guidance=None, seed=None, takes=None, start=None, seconds=None,
    ):  # fmt: skip
        """Makes sound for a video, a picture or a prompt.

        Yields (what is being done, None), and at last ("done", files): for each take an mp4, if
        there is something to see, and a wav.
        """
        files = []
        try:
            asked = self.check(video, image, prompt, negative_prompt, start, seconds)
            variants = self.variants(_TAKES, steps, None, guidance, seed, takes)
            for said in self.work(request.session_hash, asked, variants):
                if isinstance(said, Stage):
                    yield said.text, None
                else:
                    files += [str(path) for path in (said.movie, said.wav) if path]
        except Stopped:
            raise gr.Error("cancelled", print_exception=False) from None
        except Exception as error:
            raise gr.Error(reason(error), print_exception=False) from None
        yield "done", files

    def on_leave(self, request: gr.Request):
        """A visitor has closed the page."""
        self.desk.stop(request.session_hash)
        self.files.drop(request.session_hash)

    # What is seen

    def head(self) -> str:
        """What this is, and which models it has."""
        element = html.element
        facts = [
            element("p", element("b", model.name), ": ", model.facts, ". Sampled by default in ",
                    model.can.sampling, ".", class_="facts")
            for model in self.models
        ]  # fmt: skip
        return str(
            element(
                "div",
                element("h1", "Sound for silent videos"),
                element("p", "Drop a video, and hear what a network makes of it."),
                facts,
                class_="head",
            )
        )

    def build(self) -> gr.Blocks:
        """The page, which has to be launched."""
        from vcm_jax.web.layout import build

        return build(self)


def _done(takes: Sequence[Take]) -> str:
    return (
        "Done: play it, or click on a drawing." if len(takes) == 1 else f"Done: {len(takes)} takes."
    )
