"""The training step of the learned codec: a pure function, with data parallelism over a mesh.

Training has two stages. First the decoder is deterministic and learns the spectra; then it draws
noise and learns its distribution by the energy distance, so that what is random in the sounds is
drawn rather than blurred. Discriminators, if wanted, join in the second stage.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from vcm_jax import ema
from vcm_jax.codec import discriminators, fourier, losses
from vcm_jax.codec.encoders import ENCODERS, LearnedEncoder, kl_divergence
from vcm_jax.codec.learned import N_FFT
from vcm_jax.codec.mel import MELS, STACK, stacked_mel
from vcm_jax.settings import check, choice, integer, number, setting

MARGIN = 1  # latents of real sound on either side of a crop, for the spectrogram of its ends
_SIGMA_REL = 0.02  # width of the EMA weights
# Weight of both draws' distance to the true sound beside the energy distance. With it the noise is
# a little weaker than the true one, and hides fewer weak impacts (docs/results.md).
_CLOSENESS = 0.5


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Settings of a training run.

    Attributes:
      mode: "16k" or "44k".
      size: of the networks.
      encoder: "linear" or "learned".
      latent_dim: C.
      steps: training steps in all.
      noise_from: share of the steps after which the decoder draws noise.
      batch_size: crops.
      crop: latents in a crop.
      learning_rate: constant after the warm-up; linear to 0 in the last 30% of the steps.
      warmup_steps: steps in which the learning rate rises.
      kl_weight: weight of the divergence of learned latents.
      adversarial: whether discriminators join in the second stage.
      seed: of the initial weights, the crops and the noise.
    """

    mode: str = setting("16k", choice(*MELS))
    size: str = setting("tiny", choice(*fourier.DECODERS))
    encoder: str = setting("linear", choice("linear", "learned"))
    latent_dim: int = setting(20, integer(1))
    steps: int = setting(2_400, integer(1))
    noise_from: float = setting(0.4, number(0, 1))
    batch_size: int = setting(6, integer(1))
    crop: int = setting(32, integer(8))
    learning_rate: float = setting(1.5e-3, number(above=0))
    warmup_steps: int = setting(50, integer(0))
    kl_weight: float = setting(1e-3, number(0))
    adversarial: bool = False
    seed: int = setting(0, integer(0))

    def __post_init__(self):
        check(self, "codec")

    @property
    def crop_samples(self) -> int:
        """Samples of a training crop with its margins."""
        return (self.crop + 2 * MARGIN) * STACK * MELS[self.mode].hop


class CodecState(struct.PyTreeNode):
    """State of a training run.

    Attributes:
      step: number of steps done.
      params: {"decoder": ..., and with a learned encoder "encoder": ...}.
      ema: EMA weights, of the same structure.
      optimizer: state of the optimizer.
      critic: parameters of the discriminators; {} without them.
      critic_optimizer: state of their optimizer.
    """

    step: jax.Array
    params: dict
    ema: dict
    optimizer: optax.OptState
    critic: dict
    critic_optimizer: optax.OptState


def make_optimizer(config: CodecConfig) -> optax.GradientTransformation:
    """AdamW with the learning-rate schedule that `CodecConfig` describes."""
    rate, warmup = config.learning_rate, min(config.warmup_steps, config.steps // 10)
    decay = max(1, round(0.3 * config.steps))
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0, rate, warmup),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0, decay),
        ],
        [warmup, config.steps - decay],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.99, weight_decay=1e-4)
    )


def _critic_optimizer(config: CodecConfig) -> optax.GradientTransformation:
    """Of the discriminators, which begin in the second stage: without a schedule."""
    return optax.adamw(0.3 * config.learning_rate, 0.8, 0.99)


def _networks(config: CodecConfig):
    decoder = fourier.FourierDecoder(fourier.DECODERS[config.size], N_FFT[config.mode])
    return decoder, LearnedEncoder(ENCODERS[config.size], config.latent_dim)


def init_state(config: CodecConfig) -> CodecState:
    """The state before the first step."""
    decoder, encoder = _networks(config)
    key = jax.random.key(config.seed)
    latents = jnp.zeros((1, config.crop, config.latent_dim))
    params = {"decoder": decoder.init(jax.random.fold_in(key, 0), latents)["params"]}
    if config.encoder == "learned":
        rows = jnp.zeros((1, config.crop, STACK * MELS[config.mode].bands))
        params["encoder"] = encoder.init(jax.random.fold_in(key, 1), rows)["params"]
    critic = {}
    if config.adversarial:
        sound = jnp.zeros((1, config.crop * N_FFT[config.mode]))
        critic = discriminators.Discriminators().init(jax.random.fold_in(key, 2), sound)["params"]
    return CodecState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        optimizer=make_optimizer(config).init(params),
        critic=critic,
        critic_optimizer=_critic_optimizer(config).init(critic),
    )


def _row_keys(key, count: int, axes) -> jax.Array:
    """A key for each row of the global batch, whatever the mesh."""
    first = jax.lax.axis_index(axes) * count
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(count))


def _latents(params, statistics, sound, keys, config: CodecConfig):
    """(normalised latents `B crop C`, their KL divergence) of crops with margins."""

    def fixed(name):
        return statistics[name][None, None]

    rows = stacked_mel(sound, MELS[config.mode])[:, MARGIN:-MARGIN] - fixed("encoder/mean")
    if config.encoder == "linear":
        latents = rows @ statistics["encoder/components"].T
        return (latents - fixed("decoder/mean")) / fixed("decoder/std"), jnp.zeros(())
    rows = rows / fixed("encoder/std")
    _, encoder = _networks(config)
    mean, log_variance = encoder.apply({"params": params["encoder"]}, rows)
    drawn = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + jnp.exp(0.5 * log_variance) * drawn, kl_divergence(mean, log_variance)


def _loss(params, critic, statistics, sound, keys, config: CodecConfig, noisy: bool):
    """(loss, (metrics, a generated batch)); `sound` (B, crop_samples)."""
    mode, n_fft = config.mode, N_FFT[config.mode]
    latents, kl = _latents(params, statistics, sound, keys, config)
    decoder, _ = _networks(config)
    head = decoder.apply({"params": params["decoder"]}, latents)
    margin, rate = MARGIN * n_fft, MELS[mode].sample_rate
    truth = sound[:, margin:-margin]
    wanted = losses.analyse(truth, rate)
    metrics = {"kl": kl}
    if not noisy:
        y = fourier.inverse_stft(fourier.spectrum(head, None), n_fft)
        distance = losses.distance(wanted, losses.analyse(y, rate))
        magnitudes = losses.relative_l1(y, truth, 2 * n_fft)
        metrics |= {"distance": distance, "relative_l1": magnitudes}
        return 2 * distance + 0.2 * magnitudes + config.kl_weight * kl, (metrics, y)

    def draw(number):
        shape = (*head[0].shape[1:], 2)
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))
        return fourier.inverse_stft(fourier.spectrum(head, noise(keys)), n_fft)

    y, other = draw(1), draw(2)
    draws = [losses.analyse(sound, rate) for sound in (y, other)]
    distance = sum(losses.distance(wanted, found) for found in draws)
    energy = losses.energy_distance(wanted, *draws)
    metrics |= {"energy_distance": energy, "distance": distance / 2}
    loss = energy + _CLOSENESS * distance + config.kl_weight * kl
    if config.adversarial:
        network = discriminators.Discriminators()
        real, found = (network.apply({"params": critic}, s) for s in (truth, y))
        adversarial, features = discriminators.adversarial_losses(real, found)
        metrics |= {"adversarial": adversarial, "feature_distance": features}
        loss += 0.1 * adversarial + 0.2 * features
    return loss, (metrics, y)


def _critic_loss(critic, truth, generated):
    network = discriminators.Discriminators()
    real, found = (network.apply({"params": critic}, s) for s in (truth, generated))
    return discriminators.discriminator_loss(real, found)


def _local_gradients(state_parts, statistics, sound, key, *, config, noisy, axes):
    """Gradients and metrics of this device's rows, averaged over all devices."""
    params, critic = state_parts
    keys = _row_keys(key, sound.shape[0], axes)
    grad = jax.value_and_grad(_loss, has_aux=True)
    (loss, (metrics, generated)), gradients = grad(
        params, critic, statistics, sound, keys, config, noisy
    )
    metrics["loss"], critic_gradients = loss, {}
    if config.adversarial and noisy:
        margin = MARGIN * N_FFT[config.mode]
        truth = sound[:, margin:-margin]
        critic_grad = jax.value_and_grad(_critic_loss)
        critic_loss, critic_gradients = critic_grad(critic, truth, jax.lax.stop_gradient(generated))
        metrics["critic_loss"] = critic_loss
    return jax.lax.pmean((gradients, critic_gradients, metrics), axes)


def train_step(
    state: CodecState, statistics, sound, key, *, config: CodecConfig, noisy: bool, mesh, axes
):
    """One step of training; jit it with the keyword arguments bound.

    Args:
      state: of the run.
      statistics: arrays that are not trained, from `vcm_jax.codec.train`.
      sound: (batch_size, crop_samples) in [-1, 1], sharded over `axes` of the mesh.
      key: of the run; the step's own follows from it and the step.
      config, noisy: settings, and whether this step is of the second stage.
      mesh, axes: over which axes of which mesh the rows are spread.

    Returns:
      (the next state, {name: mean metric}).
    """
    local = functools.partial(_local_gradients, config=config, noisy=noisy, axes=axes)
    whole, rows = PartitionSpec(), PartitionSpec(axes)
    # FFTs are not partitioned by the compiler: every device takes its own rows.
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(whole, whole, rows, whole), out_specs=whole, check_vma=False
    )
    key = jax.random.fold_in(key, state.step)
    gradients, critic_gradients, metrics = spread(
        (state.params, state.critic), statistics, sound, key
    )
    optimizer = make_optimizer(config)
    metrics["grad_norm"] = optax.tree.norm(gradients)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    critic, critic_optimizer = state.critic, state.critic_optimizer
    if config.adversarial and noisy:
        updates, critic_optimizer = _critic_optimizer(config).update(
            critic_gradients, critic_optimizer, critic
        )
        critic = optax.apply_updates(critic, updates)
    step = state.step + 1
    average = ema.update(state.ema, params, step, ema.gamma_from_sigma_rel(_SIGMA_REL))
    return CodecState(step, params, average, optimizer_state, critic, critic_optimizer), metrics
