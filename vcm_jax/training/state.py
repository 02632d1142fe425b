"""What a run carries from step to step, its optimizer and its learning-rate schedule."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vcm_jax.models import MMDiT
from vcm_jax.models.conditioned import zero_inputs
from vcm_jax.models.mmdit import GUIDANCE_INPUT
from vcm_jax.settings import Range, check, choice, integer, number, patterns, setting
from vcm_jax.training.selection import ALL, Selection


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds of a run; randomness is a function of (seed, step).

    Attributes:
      step: int32 scalar, the number of steps that are done.
      params: float32 parameters.
      stats: what the data determine: latent statistics, features of the empty text.
      opt_state: of the optimizer.
      ema: EMA weights by their width ("0.05"), pytrees like `params`.
      frozen: parameters that are not trained (`selection.py`); None if all are. Checkpoints do not
        hold them.
      target: the EMA of the parameters that the objective's targets are evaluated with; None
        without `target_ema`, and then checkpoints do not have this entry.
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    ema: dict[str, Any]
    frozen: Any = None
    target: Any = None

    def saved(self) -> dict:
        """What checkpoints hold of the state: all but `frozen`, and `target` if there is one."""
        absent = {"frozen"} | ({"target"} if self.target is None else set())
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in absent}


def _increase(steps) -> bool:
    if not isinstance(steps, tuple | list) or not all(map(integer(0).holds, steps)):
        return False
    return list(steps) == sorted(set(steps))


MOMENTS = ("float32", "bfloat16", "factored")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; the defaults are SoundVCM's (section 4.3).

    The learning rate rises linearly from 0 and then falls in steps.

    Attributes:
      learning_rate: the highest learning rate.
      warmup_steps: length of the linear rise.
      decay_steps: at each of these steps the learning rate is multiplied by `decay_factor`.
      b1, b2, eps, weight_decay: of AdamW.
      clip_norm: gradients are scaled down to at most this global norm.
      moments: how the optimizer's state is held. "float32"; "bfloat16" halves the first moment; and
        "factored" has the first moment in bfloat16 and, of each matrix, the means of the second
        moment over its rows and columns alone (Adafactor, Shazeer and Stern 2018).
      train_only, freeze: patterns of the parameters that are trained, and of those that are not
        (`selection.py`); empty tuples train all.

    Raises:
      ValueError: when a setting is out of its range.
    """

    learning_rate: float = setting(1e-4, number(above=0))
    warmup_steps: int = setting(1_000, integer(0))
    decay_steps: tuple[int, ...] = setting(
        (240_000, 270_000), Range("step numbers that increase", _increase)
    )
    decay_factor: float = setting(0.1, number(above=0))
    b1: float = setting(0.9, number(0, below=1))
    b2: float = setting(0.95, number(0, below=1))
    eps: float = setting(1e-6, number(above=0))
    weight_decay: float = setting(1e-6, number(0))
    clip_norm: float = setting(1.0, number(above=0))
    moments: str = setting("float32", choice(*MOMENTS))
    train_only: tuple[str, ...] = setting((), patterns())
    freeze: tuple[str, ...] = setting((), patterns())

    def __post_init__(self):
        check(self, "optimizer")


def learning_rate_schedule(config: OptimizerConfig):
    """A function step -> learning rate; step is 0 for the first update."""

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        decays = sum((step >= boundary).astype(jnp.float32) for boundary in config.decay_steps)
        return config.learning_rate * warmup * config.decay_factor**decays

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW, whose state is held as `config.moments` says."""
    clip, schedule = optax.clip_by_global_norm(config.clip_norm), learning_rate_schedule(config)
    if config.moments != "factored":
        mu_dtype = jnp.bfloat16 if config.moments == "bfloat16" else None
        adamw = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=mu_dtype,
        )
        return optax.chain(clip, adamw)
    return optax.chain(
        clip,
        # Adafactor without its step sizes relative to the weights: learning rates mean the same.
        optax.scale_by_factored_rms(
            decay_rate=0.8, epsilon=config.eps**2, min_dim_size_to_factor=64
        ),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, debias=True, accumulator_dtype=jnp.bfloat16),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def make_init(
    net: MMDiT,
    stats,
    optimizer,
    sigma_rels,
    selection: Selection = ALL,
    has_target: bool = False,
):
    """A function (key, params=None) -> TrainState before the first step.

    It is meant to be jitted with the state's shardings as `out_shardings`. Given `params` take the
    place of random ones; they may lack the network's input for guidance.

    Args:
      net: the network.
      stats: its collection "stats".
      optimizer: of `make_optimizer`.
      sigma_rels: widths of the EMA weights. They start as copies of the parameters, which the
        first update replaces.
      selection: what is trained.
      has_target: whether the state has EMA weights for the objective's targets.
    """

    def init(key, params=None):
        lacking = net.config.guidance_input and GUIDANCE_INPUT not in (params or {})
        if params is None or lacking:
            fresh = net.init(key, *zero_inputs(net.config))["params"]
            params = {GUIDANCE_INPUT: fresh[GUIDANCE_INPUT]} | params if params else fresh
        params, frozen = selection.split(params, jax.random.fold_in(key, 3))
        copy = functools.partial(jax.tree.map, jnp.copy, params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            stats=jax.tree.map(jnp.asarray, stats),
            opt_state=optimizer.init(params),
            ema={f"{sigma_rel:g}": copy() for sigma_rel in sigma_rels},
            frozen=frozen,
            target=copy() if has_target else None,
        )

    return init
