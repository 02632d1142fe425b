"""What the program asks of a training objective."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from vcm_jax.objectives import common, guidance, times
from vcm_jax.objectives.guidance import Guidance
from vcm_jax.settings import TIME_INTERVAL, check, choice, number, setting


@dataclasses.dataclass(frozen=True)
class Passes:
    """The network evaluations of one training step, in forward passes over the whole batch.

    Every objective has one differentiated pass on top of these.

    Attributes:
      at_x_t: passes without gradient at the noised samples x_t of the differentiated pass.
      elsewhere: passes without gradient at other points, and tangents of a JVP.
      backward: the backward pass of the differentiated one counts as two; gradients through a
        tangent come on top.
    """

    at_x_t: float = 0.0
    elsewhere: float = 0.0
    backward: float = 2.0

    @property
    def total(self) -> float:
        """All evaluations, the differentiated pass included."""
        return self.at_x_t + self.elsewhere + 1

    @property
    def forward(self) -> float:
        """The cost of the step: all evaluations and the backward pass."""
        return self.total + self.backward


@dataclasses.dataclass(frozen=True)
class Objective:
    """The settings of an objective, and everything that the program asks of it.

    A subclass declares its settings as fields with ranges (`vcm_jax.settings`), sets `name`, and
    defines `loss` and `passes`; the other methods have defaults. Instances are hashable, so that
    they can be static arguments of `jax.jit`.

    Attributes:
      name: what `config.objective.name` calls it.
      instant_only: the network learns u(x, t, t, c) alone, the instantaneous velocity. All rows of
        a batch then have s = t, and sampling takes Euler steps with classifier-free guidance, for
        which the settings need `guidance_scale` and `guidance_interval`. Other objectives need
        `instant_ratio`, the fraction of the rows that have s = t.
      to_data: the network learns jumps to s = 0 alone; several steps of a sampler then restart,
        see `sampling.restart_sample`.
      needs_jvp: the loss differentiates the network in forward mode.
      needs_teacher: the objective always learns from a trained run, whose workdir is its setting
        `teacher`. With `teacher_steps` the data x0 come from the sampler of that run.
      teacher_velocity: which velocity of the teacher the loss takes, as its argument `teacher_u`:
        "plain", its instantaneous velocity u(x, t, t, c) without guidance; "guided", the one that
        its sampler takes; "" for none.
      couples_rows: the loss of a row depends on the other rows of the batch, so that devices cannot
        compute the losses of their own rows by themselves.
      target_ema: decay of the EMA parameters that targets are evaluated with; 0 for none.

    Raises:
      ValueError: when a setting is out of its range.
    """

    name: ClassVar[str]
    instant_only: ClassVar[bool] = False
    needs_jvp: ClassVar[bool] = False
    to_data: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    teacher_velocity: ClassVar[str] = ""
    couples_rows: ClassVar[bool] = False
    target_ema = 0.0

    def __post_init__(self):
        check(self, "objective")

    def loss(self, u: Callable, *batch, **options):
        """(scalar loss, aux) of one batch; arguments and results as `vcm.vcm_loss`'s."""
        raise NotImplementedError

    def passes(self) -> Passes:
        """The cost of one training step in network evaluations."""
        raise NotImplementedError

    def num_instant(self, batch_size: int) -> int:
        """How many rows of a batch have s = t; they come first."""
        return batch_size if self.instant_only else round(self.instant_ratio * batch_size)

    def check_rows(self, num_instant: int, batch_size: int) -> None:
        """Raises ValueError for a batch, or microbatch, whose rows the loss cannot take."""
        del num_instant, batch_size

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """The times of a batch: (t, s, lam), with t and s float32 `B`.

        By default t and s are logit-normal, with `time_mean` and `time_std`, and lam is None.

        Args:
          key: of the random numbers.
          batch_size: B.
          num_instant: the number of rows with s = t, which come first.
          step, steps: number of the training step, from 0, and of all steps.
        """
        del step, steps
        t, s = times.sample_times(key, batch_size, num_instant, self.time_mean, self.time_std)
        return t, s, None

    @property
    def has_teacher(self) -> bool:
        """Whether a trained run teaches with these settings."""
        return self.needs_teacher or bool(self.teacher_velocity)

    @property
    def guidance_input(self) -> bool:
        """Whether the network takes guidance as an input, so that it is chosen when sampling."""
        return False

    def draw_guidance(self, key, batch_size: int) -> Guidance | None:
        """The guidance of each row, an input of the network; None where it has no such input.

        The network is then given it with the condition, and `loss` as its argument `guidance`.
        """
        del key, batch_size
        return None

    def velocity(self, net: Callable) -> Callable:
        """The average velocity u(x, t, s, cond) that samplers take, from the network.

        The network itself by default; an objective whose network predicts another quantity
        converts it here.
        """
        return net

    def noised(self, x0, x1, t):
        """x_t `B N C` from data, noise and times `B`: (1 - t) x0 + t x1 by default."""
        return common.noised(x0, x1, t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetGuidance(Objective):
    """An objective with guidance inside the training target, which the network's passes make.

    A subclass has `guidance_scale` (w) and `guidance_interval`. Its loss takes the argument
    `guidance`, the `Guidance` of each row, or None for the fixed one of its settings, and
    `target_u`, the network with the parameters of the targets, or None for those that are trained.

    Attributes:
      guidance: "fixed" trains for the one scale and interval of the settings. "conditioned" draws
        both for each row (`guidance.draw_guidance`) and makes them an input of the network, so that
        they are chosen when the run is sampled, still at one evaluation a step; the settings then
        are what sampling takes by default.
      guidance_max: the largest w that conditioned guidance draws.
      target_ema: the targets are evaluated with an exponential moving average of the parameters,
        target <- d target + (1 - d) parameters after each step; this is its decay d, which is
        1 - 1/k at most in step k. 0 takes the parameters themselves. The derivatives of u, which
        are part of some targets, are those of the parameters in any case.

    Raises:
      ValueError: the default guidance is not within the range that is drawn.
    """

    guidance: str = setting("fixed", choice("fixed", "conditioned"))
    guidance_max: float = setting(8.0, number(above=1))
    target_ema: float = setting(0.0, number(0, below=1))

    def __post_init__(self):
        super().__post_init__()
        if self.guidance_input:
            self.check_guidance(
                Guidance(self.guidance_scale, *self.guidance_interval), "objective."
            )

    @property
    def guidance_input(self) -> bool:
        return self.guidance == "conditioned"

    def draw_guidance(self, key, batch_size: int) -> Guidance | None:
        if not self.guidance_input:
            return None
        return guidance.draw_guidance(key, batch_size, self.guidance_max)

    def check_guidance(self, given: Guidance, prefix: str = "") -> None:
        """Raises ValueError for guidance that conditioned training does not draw.

        Args:
          given: numbers.
          prefix: comes before the names of the settings in the error.
        """
        (low_from, low_to), (high_from, high_to) = guidance.LOW_ENDS, guidance.HIGH_ENDS
        if not 1 <= given.scale <= self.guidance_max:
            raise ValueError(
                f"{prefix}guidance_scale {given.scale:g} is not in [1, {self.guidance_max:g}], the "
                "range that conditioned guidance is trained in (objective.guidance_max)"
            )
        if not (low_from <= given.low <= low_to and high_from <= given.high <= high_to):
            raise ValueError(
                f"{prefix}guidance_interval {given.low:g},{given.high:g}: conditioned guidance is "
                f"trained with a low end in [{low_from:g}, {low_to:g}] and a high end in "
                f"[{high_from:g}, {high_to:g}]"
            )

    def interval(self, given: Guidance | None):
        """The ends of the interval in which guidance applies: two numbers, or two arrays `B`."""
        return self.guidance_interval if given is None else (given.low, given.high)

    def scale(self, given: Guidance | None):
        """w: a number, or an array `B`."""
        return self.guidance_scale if given is None else given.scale

    @property
    def guides(self) -> bool:
        """Whether any row has another w than 1."""
        return self.guidance_input or self.guidance_scale != 1

    def guided_passes(self, instant: float, later: float) -> float:
        """The passes of `guidance.guided_target` over shares of the batch.

        Args:
          instant: share of rows whose trained prediction serves as the network's guided velocity,
            as long as targets have no parameters of their own.
          later: share of the other rows.
        """
        own = later + instant * (self.target_ema > 0)
        null = self.guides and self.mix_ratio > 0
        return (instant + later) * null + own * (self.mix_ratio < 1)


@dataclasses.dataclass(frozen=True)
class GuidedObjective(TargetGuidance):
    """Settings that most objectives with guidance inside the training target share.

    Attributes:
      guidance, guidance_max, target_ema: see `TargetGuidance`.
      guidance_scale: w of SoundVCM eq. 15; 1 is no guidance.
      mix_ratio: m of SoundVCM eq. 16; 1 does not use the network's own guided velocity.
      guidance_interval: times t, both ends included, at which guidance and mixing apply.
      p, eps: of the adaptive weight, SoundVCM eq. 11; p = 0 is the plain mean squared error.
      instant_ratio: r, the fraction of the rows with s = t.
      time_mean, time_std: mu and sigma of the logit-normal times.
    """

    guidance_scale: float = setting(4.0, number(0))
    mix_ratio: float = setting(0.25, number(0, 1))
    guidance_interval: tuple[float, float] = setting((0.0, 0.8), TIME_INTERVAL)
    p: float = setting(1.0, number(0))
    eps: float = setting(0.01, number(above=0))
    instant_ratio: float = setting(0.75, number(0, 1))
    time_mean: float = setting(-0.4, number())
    time_std: float = setting(1.0, number(above=0))
