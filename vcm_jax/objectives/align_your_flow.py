"""Align Your Flow: flow maps by their Eulerian or Lagrangian residual (arXiv 2506.14603, 2025)."""

import dataclasses

import jax
import jax.numpy as jnp

from vcm_jax.objectives import common, flow_maps, times
from vcm_jax.objectives.base import GuidedObjective, Passes
from vcm_jax.settings import TEXT, TIME_INTERVAL, choice, number, setting


@dataclasses.dataclass(frozen=True)
class AlignYourFlowConfig(flow_maps.TimeDerivative, GuidedObjective):
    """Settings of the objective; normalisation and warm-up follow descriptions of the paper.

    The authors' code was not read. The times are those of public copies, which do not agree on
    them, nor on a weight of the residual: with some it is 1 / (t - s) of the one here.

    The paper distils a teacher. With `teacher` the velocity is that of a trained run, with
    classifier-free guidance in place of the paper's autoguidance, which needs a weaker teacher,
    too. Without, it is the guided one of the data (EMD), or the network's own where a jump lands
    (LMD), so that no second network is needed. The s = t rows learn the velocity itself.

    Attributes:
      guidance, guidance_max, target_ema, guidance_scale, mix_ratio, guidance_interval, p, eps,
        instant_ratio, time_mean, time_std: see `GuidedObjective`; the adaptive weight acts on
        the s = t rows, too.
      times: of the jumps: "gap" draws t - s, logit-normal with `time_mean` and `time_std`, and s
        uniformly; "sorted" draws two such times.
      derivative, derivative_step: see `flow_maps.TimeDerivative`.
      kind: "emd", the Eulerian residual d/dt f, or "lmd", the Lagrangian one d/ds f - u(f, s, s).
      warmup: fraction of the run over which EMD's derivative grows to its full weight, 0.99.
      teacher: workdir of the trained run, or public weights; "" for none. It is guided with
        `guidance_scale`, so that this is 1 for a run that has guidance in its weights.
      normaliser: c of the residual g / (rms(g) + c). The paper has the norm of g; its root mean
        square means the same for clips of any length.
    """

    name = "align_your_flow"
    guidance_scale: float = setting(2.0, number(0))
    mix_ratio: float = setting(1.0, number(0, 1))
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), TIME_INTERVAL)
    p: float = setting(0.0, number(0))
    instant_ratio: float = setting(0.5, number(0, 1))
    time_mean: float = setting(-0.8, number())
    times: str = setting("gap", choice("gap", "sorted"))
    kind: str = setting("emd", choice("emd", "lmd"))
    warmup: float = setting(0.1, number(above=0, high=1))
    normaliser: float = setting(0.1, number(above=0))
    teacher: str = setting("", TEXT)

    def __post_init__(self):
        super().__post_init__()
        for name, value in (("mix_ratio", 1), ("target_ema", 0)):
            if self.teacher and getattr(self, name) != value:
                raise ValueError(
                    f"objective.{name} must be {value} with objective.teacher, whose velocity the "
                    f"targets take, not {getattr(self, name):g}"
                )
        if self.kind == "lmd" and not self.teacher and not self.instant_ratio:
            raise ValueError(
                "objective.instant_ratio must be above 0 with objective.kind=lmd and without a "
                "teacher: nothing else would learn from the data"
            )

    @property
    def teacher_velocity(self) -> str:
        return "plain" if self.teacher else ""

    def loss(self, u, *batch, **options):
        return align_your_flow_loss(u, batch, self, **options)

    def passes(self) -> Passes:
        later, emd = 1 - self.instant_ratio, self.kind == "emd"
        if self.teacher:
            return Passes(elsewhere=later * self.derivative_passes)
        guidance = self.guided_passes(self.instant_ratio, later * emd)
        return Passes(guidance, later * (self.derivative_passes + (not emd)))

    def draw(self, key, batch_size: int, num_instant: int, step, steps: int):
        """t and s `B`, and the scalar weight of EMD's derivative."""
        t, s, _ = super().draw(key, batch_size, num_instant, step, steps)
        if self.times == "gap":
            instant = jnp.arange(batch_size) < num_instant
            gap_key, end_key = jax.random.split(jax.random.fold_in(key, 1))
            gap = times.logit_normal(gap_key, (batch_size,), self.time_mean, self.time_std)
            gap = jnp.clip(gap, times.MIN_GAP, 1)
            end = (1 - gap) * jax.random.uniform(end_key, (batch_size,))
            t, s = jnp.where(instant, t, end + gap), jnp.where(instant, s, end)
        part = jnp.asarray(step, jnp.float32) / steps
        return t, s, 0.99 * jnp.minimum(1.0, part / self.warmup)


def align_your_flow_loss(u, batch, config: AlignYourFlowConfig, **options):
    """f(x_t, t, s) is moved against its residual g / (rms(g) + c), as a regression on u.

    EMD: g = d/dt f = v_g - u - r (t - s) d/dt u, and f moves along -g. LMD: g = d/ds f - u(f, s, s)
    with d/ds f = u + (s - t) d/ds u, and f moves along g. With f = x_t + (s - t) u both are
    (t - s)^2 |u - target|^2, whose gradient by f is that of the paper.

    Network evaluations, in forward passes over the batch with r = num_instant / B: the
    unconditional velocity of all rows (EMD) or of the s = t rows (LMD), the derivative (1 - r),
    with LMD u(f, s, s) (1 - r), and the differentiated pass. With a teacher those without gradient
    are the teacher's: V_c and V_null (none for w = 1) at x_t in all rows (EMD), or at x_t in the
    s = t rows and at f in the others (LMD).

    `batch` and `options` are the arguments of `vcm_loss`, and results are as its own; `lam` is the
    r of EMD.
    """
    emd, sg = config.kind == "emd", jax.lax.stop_gradient
    begun = flow_maps.begin(u, batch, config, guide_jumps=emd, **options)
    predicted = target = weight = None
    if begun.has_jumps:
        x, t, s, c = begun.x, begun.t, begun.s, begun.cond
        gap = common.expand(t - s, x)
        if emd:
            predicted, slope = flow_maps.along_flow(begun.u, x, t, s, c, begun.v_later, config)
            wrong = sg(predicted) - begun.v_later + begun.lam * gap * sg(slope)
        else:
            predicted, slope = flow_maps.by_end(begun.u, x, t, s, c, config)
            landed = flow_maps.jump(sg(predicted), x, t, s)
            wrong = sg(predicted) - gap * sg(slope) - begun.field(landed, s)
        size = jnp.sqrt(common.mean_square(wrong)) + config.normaliser
        target = sg(predicted) - wrong / common.expand(size, x) / gap
        weight = (t - s) ** 2
    return flow_maps.finish(begun, predicted, target, config, weight=weight)
