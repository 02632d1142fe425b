"""What a run carries from step to step, its optimizer and its learning rate."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from vcm_jax.models import Conditions, MMDiT


@flax.struct.dataclass
class TrainState:
    """Everything a checkpoint holds of a run; randomness is a function of (seed, step).

    Attributes:
      step: int32 scalar, steps that are done.
      params: float32 parameters.
      stats: what the data determine: latent statistics, features of the empty text.
      opt_state: of the optimizer.
      ema: power-function averages of the parameters, by their width ("0.05").
    """

    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any
    ema: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, warm-up, a learning rate that falls in steps; the defaults are SoundVCM's (4.3).

    Attributes:
      learning_rate: at its peak.
      warmup_steps: linear, from 0.
      decay_steps: after each of them the rate is `decay_factor` times what it was.
      b1, b2, eps, weight_decay: of AdamW.
      clip_norm: of the global gradient norm.

    Raises:
      ValueError: when a setting is out of its range.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 1_000
    decay_steps: tuple[int, ...] = (240_000, 270_000)
    decay_factor: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-6
    weight_decay: float = 1e-6
    clip_norm: float = 1.0

    def __post_init__(self):
        for name in ("learning_rate", "decay_factor", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} must be > 0, not {getattr(self, name)}")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), not {getattr(self, name)}")
        if not self.weight_decay >= 0 or not self.warmup_steps >= 0:
            raise ValueError("optimizer.weight_decay and optimizer.warmup_steps must be >= 0")
        if list(self.decay_steps) != sorted(set(self.decay_steps)):
            raise ValueError(f"optimizer.decay_steps must increase, not {self.decay_steps}")


def learning_rate_schedule(config: OptimizerConfig):
    """step (0 for the first update) -> learning rate."""

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        decays = sum((step >= boundary).astype(jnp.float32) for boundary in config.decay_steps)
        return config.learning_rate * warmup * config.decay_factor**decays

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )


def make_init(net: MMDiT, stats, optimizer, sigma_rels):
    """(key, params=None) -> TrainState before the first step; jit it with the state's shardings.

    `params` come in place of random ones.

    Args:
      net: the network.
      stats: its collection "stats".
      optimizer: of `make_optimizer`.
      sigma_rels: widths of the averages; they start as copies and forget that at once.
    """
    c = net.config
    cond = Conditions(
        jnp.zeros((1, c.clip_seq_len, c.clip_dim)),
        jnp.zeros((1, c.sync_seq_len, c.sync_dim)),
        jnp.zeros((1, c.text_seq_len, c.text_dim)),
    )

    def init(key, params=None):
        if params is None:
            x, time = jnp.zeros((1, c.latent_seq_len, c.latent_dim)), jnp.zeros(1)
            params = net.init(key, x, time, time, cond)["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            stats=jax.tree.map(jnp.asarray, stats),
            opt_state=optimizer.init(params),
            ema={f"{sigma_rel:g}": jax.tree.map(jnp.copy, params) for sigma_rel in sigma_rels},
        )

    return init
