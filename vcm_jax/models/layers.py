"""Building blocks of the multimodal transformer (MMAudio, model/transformer_layers.py).

Sequences are channel-last, `B L D`. The attribute `dtype` of a module is the dtype of its matrix
products and activations. Parameters stay float32, and normalisations are computed in at least
float32. Names of modules and parameters follow MMAudio's state dict, so that `interop.weights` can
map them by rule.

Elementwise functions between two matrix products are wrapped in `jax.checkpoint`: the backward pass
recomputes them from their inputs, which are kept anyway. So is attention, whose probabilities would
take more memory than anything else. This reduces the activations of small_16k in bfloat16 from 205
to 79 MiB a sample, and repeats one matrix product: queries by keys, 0.4% of the FLOPs of a step.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.models.convolution import conv1d

FLOAT32_EPS = float(np.finfo(np.float32).eps)


def _torch_uniform(fan_in: int):
    """PyTorch's default initialiser of convolutions: uniform in +-1 / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def at_least_float32(x):
    """`x`, cast to float32 if it is narrower."""
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


class Dense(nn.Module):
    """A linear layer on the last axis or, with `kernel_size`, a convolution over the length."""

    features: int
    kernel_size: int | None = None
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        if self.kernel_size is None:
            shape = (x.shape[-1], self.features)
            kernel_init, bias_init = nn.initializers.xavier_uniform(), nn.initializers.zeros
        else:
            shape = (self.kernel_size, x.shape[-1], self.features)
            kernel_init = bias_init = _torch_uniform(self.kernel_size * x.shape[-1])
        kernel = self.param("kernel", self.kernel_init or kernel_init, shape).astype(self.dtype)
        x = x.astype(self.dtype)
        y = x @ kernel if self.kernel_size is None else conv1d(x, kernel)
        if self.use_bias:
            bias = self.param("bias", self.bias_init or bias_init, (self.features,))
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def zero_dense(features: int, kernel_size: int | None = None, **kwargs) -> Dense:
    """A `Dense` layer whose weights are initialised to zero."""
    zeros = nn.initializers.zeros
    return Dense(features, kernel_size, kernel_init=zeros, bias_init=zeros, **kwargs)


@jax.checkpoint
def gate(a, b):
    """`silu(a) * b`."""
    return nn.silu(a) * b


class GatedMLP(nn.Module):
    """`w2(silu(w1 x) * w3 x)` without biases; with `kernel_size` all three are convolutions."""

    mlp_dim: int
    kernel_size: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        def layer(features, name):
            return Dense(features, self.kernel_size, use_bias=False, dtype=self.dtype, name=name)

        gated = gate(layer(self.mlp_dim, "w1")(x), layer(self.mlp_dim, "w3")(x))
        return layer(x.shape[-1], "w2")(gated)


def layer_norm(x):
    """Layer normalisation over channels, without scale or offset, eps 1e-5: `B L D` -> `B L D`."""
    y = at_least_float32(x)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype)


@jax.checkpoint
def modulated_norm(x, shift, scale):
    """`layer_norm(x) (1 + scale) + shift`."""
    return layer_norm(x) * (1 + scale) + shift


def time_frequencies(version: int, features: int) -> np.ndarray:
    """Angular frequencies of the sinusoids that embed a time, `F`, decreasing, float64.

    Version 1 has 128 of them, 10000^(-i/128) (SoundVCM eq. 30, appendix B.2). Version 2 has D / 2,
    10000 / 10000^(2i/D). Its published weights were trained with a table whose every operation was
    rounded to float32, which moves angles by up to 5e-4: this table is rounded in the same way.
    """
    if version == 1:
        return 10_000.0 ** (-np.arange(128) / 128)
    exponents = np.arange(0, features, 2, dtype=np.float32) / np.float32(features)
    powers = np.float32(10_000.0 ** exponents.astype(np.float64))  # NumPy's float32 power is worse
    return np.float64(np.float32(10_000) * (np.float32(1) / powers))


def time_angles(time, frequencies: np.ndarray):
    """Angles `time f` without their whole turns: `B`, `F` -> `B F`.

    The float32 product of a time and a frequency of 10^4 is wrong by up to 5e-4 rad. Here the first
    12 binary digits of the time meet the whole turns of the frequency in products that are exact.
    """
    turns = frequencies / (2 * np.pi)
    whole = np.round(turns)
    first = jnp.round(time * 4096) / 4096
    rest = time - first
    turns, whole, part = (jnp.asarray(a, time.dtype)[None] for a in (turns, whole, turns - whole))
    first, rest = first[:, None], rest[:, None]
    return 2 * np.pi * ((first * whole) % 1 + first * part + rest * turns)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a scalar, cosines first, through a two-layer MLP: `B` -> `B D`.

    The scalar is not rescaled; `version` is that of `ModelConfig`. Of several scalars the features
    are concatenated. With `zero` the weights of the last layer are initialised to zero.
    """

    features: int
    version: int = 1
    dtype: jnp.dtype = jnp.float32
    zero: bool = False

    @nn.compact
    def __call__(self, *scalars):
        frequencies = time_frequencies(self.version, self.features)
        angles = [time_angles(at_least_float32(scalar), frequencies) for scalar in scalars]
        x = jnp.concatenate([wave(a) for a in angles for wave in (jnp.cos, jnp.sin)], -1)
        normal = nn.initializers.normal(0.02)
        layer = functools.partial(Dense, self.features, dtype=self.dtype)
        last = nn.initializers.zeros if self.zero else normal
        x = nn.silu(layer(kernel_init=normal, name="mlp_0")(x))
        return layer(kernel_init=last, name="mlp_2")(x)


def rope_table(length: int, head_dim: int, stretch: float = 1.0) -> np.ndarray:
    """Angles of the rotary embedding, `L dh/2`: position times 10000^(-2i/dh) times `stretch`."""
    frequencies = 10_000.0 ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return np.outer(np.arange(length, dtype=np.float32), frequencies * np.float32(stretch))


def rotate(x, angles):
    """Rotary embedding of neighbouring channels (2i, 2i + 1).

    `B L H dh`, angles `L dh/2` -> `B L H dh`.
    """
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    cos, sin = (np.asarray(wave(angles), dtype)[None, :, None] for wave in (np.cos, np.sin))
    return jax.lax.platform_dependent(x, cos, sin, tpu=rotate_by_product, default=rotate_pairs)


def rotate_pairs(x, cos, sin):
    """`rotate` from the two channels of each pair; cos and sin are `1 L 1 dh/2`."""
    pairs = x.astype(cos.dtype).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_by_product(x, cos, sin):
    """`rotate` with a matrix product that exchanges the channels of each pair: the same numbers.

    TPUs hold the last axis in rows of 128, so that an axis of two wastes most of a row. XLA for a
    v5e counts 182 instead of 460 MB of memory traffic for the layer that makes queries, keys and
    values of 32 clips.
    """
    exchange = np.kron(np.eye(x.shape[-1] // 2), np.array([[0, 1], [-1, 0]]))
    other = jnp.matmul(x, jnp.asarray(exchange, x.dtype), precision="highest").astype(cos.dtype)
    cos, sin = jnp.repeat(cos, 2, -1), jnp.repeat(sin, 2, -1)
    return (x.astype(cos.dtype) * cos + other * sin).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with a learned scale, then `rotate`."""

    @nn.compact
    def __call__(self, x, angles=None):
        """`B L H dh` -> `B L H dh`; rotated if angles `L dh/2` are given."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))

        @jax.checkpoint
        def normalised(x, scale):
            y = at_least_float32(x)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + FLOAT32_EPS)
            y = (y * scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)
            return y if angles is None else rotate(y, angles)

        return normalised(x, scale)


class HeadsDense(nn.Module):
    """The linear layer to queries, keys and values of all heads: `B L D` -> `3 B L H dh`."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        shape = (3, self.num_heads, width // self.num_heads)

        def kernel_init(key, shape):
            return nn.initializers.xavier_uniform()(key, (width, 3 * width)).reshape(shape)

        kernel = self.param("kernel", kernel_init, (width, *shape)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape).astype(self.dtype)
        y = jnp.einsum("bld,djhk->jblhk", x.astype(self.dtype), kernel)
        return y + bias[:, None, None]


class QKV(nn.Module):
    """Queries, keys and values of one stream: `B L D` -> three of `B L H dh`.

    Queries and keys are normalised and, if angles `L dh/2` are given, rotated.
    """

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, angles=None):
        q, k, v = HeadsDense(self.num_heads, self.dtype, name="qkv")(x)
        return RMSNorm(name="q_norm")(q, angles), RMSNorm(name="k_norm")(k, angles), v


ATTENTION = ("xla", "cudnn")


def _with_even_lengths(attend, q, k, v):
    """Attention by cuDNN. JAX refuses its gradient for odd lengths: they get one masked row."""
    lengths = q.shape[1], k.shape[1]
    if lengths[0] % 2 == 0 and lengths[1] % 2 == 0:
        return attend(q, k, v)
    q, k, v = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (q, k, v))
    queries, keys = (jnp.full(q.shape[0], length, jnp.int32) for length in lengths)
    return attend(q, k, v, query_seq_lengths=queries, key_value_seq_lengths=keys)[:, : lengths[0]]


def attention(q, k, v, implementation: str = "xla"):
    """Softmax attention, scale 1/sqrt(dh): `B Lq H dh`, twice `B Lk H dh` -> `B Lq D`.

    Args:
      q, k, v: queries, keys and values.
      implementation: "xla", matrix products and a softmax on any device; or "cudnn", a fused kernel
        on NVIDIA's GPUs, which never stores the probabilities. It takes half precision alone and
        has no JVP.
    """
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    if implementation == "cudnn":
        out = _with_even_lengths(attend, q, k, v)
    else:
        out = jax.checkpoint(attend)(q, k, v)
    return out.reshape(*out.shape[:2], -1)


class StreamBlock(nn.Module):
    """The layers of one stream in a transformer block: everything but the attention itself.

    With `kernel_size` 3 its layers are convolutions, with None (for text) they are linear. A
    `pre_only` block gives queries, keys and values, and does not update its stream.
    """

    features: int
    num_heads: int
    mlp_dim: int
    kernel_size: int | None = 3
    pre_only: bool = False
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.adaLN_modulation_1 = zero_dense(
            (2 if self.pre_only else 6) * self.features, dtype=self.dtype
        )
        self.attn = QKV(self.num_heads, dtype=self.dtype)
        if not self.pre_only:
            self.linear1 = Dense(self.features, self.kernel_size, dtype=self.dtype)
            self.ffn = GatedMLP(self.mlp_dim, self.kernel_size, dtype=self.dtype)

    def modulation(self, c, rows=None):
        """Shifts, scales and gates from the activated condition c, a list of `B L D`.

        With `rows` (`L`, indices) c holds the distinct rows alone, which are spread afterwards:
        that gives the same numbers with fewer products.
        """
        m = self.adaLN_modulation_1(c)
        if rows is not None:
            m = m[:, rows]
        return jnp.split(m, 2 if self.pre_only else 6, -1)

    def qkv(self, x, m, angles=None):
        """The queries, keys and values of the stream, three of `B L H dh`."""
        return self.attn(modulated_norm(x, m[0], m[1]), angles)

    def update(self, x, attended, m):
        """The stream after the attention and the MLP, `B L D`."""
        x = x + self.linear1(attended) * m[2]
        return x + self.ffn(modulated_norm(x, m[3], m[4])) * m[5]


class FusedBlock(StreamBlock):
    """A transformer block on the latent tokens alone."""

    def __call__(self, x, c, rows, angles):
        m = self.modulation(c, rows)
        attended = attention(*self.qkv(x, m, angles), self.attention)
        return self.update(x, attended, m)


class JointBlock(nn.Module):
    """A transformer block on latent, clip and text tokens: one attention, layers for each stream.

    The `last` joint block does not update clip and text, so that it needs the queries of the latent
    tokens alone.
    """

    features: int
    num_heads: int
    mlp_dim: int
    last: bool = False
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        sizes = (self.features, self.num_heads, self.mlp_dim)
        stream = functools.partial(StreamBlock, *sizes, dtype=self.dtype)
        self.latent_block = stream()
        self.clip_block = stream(pre_only=self.last)
        self.text_block = stream(kernel_size=None, pre_only=self.last)

    def __call__(self, latent, clip, text, frame_c, global_c, rows, latent_angles, clip_angles):
        """The three streams after the block.

        Args:
          latent, clip, text: `B N D`, `B Tc D`, `B Tt D`.
          frame_c, global_c: activated conditions, `B Ts D` and `B 1 D`.
          rows: the sync row of each latent token, `N`.
          latent_angles, clip_angles: rotary angles, `N dh/2` and `Tc dh/2`.
        """
        blocks = (self.latent_block, self.clip_block, self.text_block)
        streams = (latent, clip, text)
        m = [block.modulation(global_c) for block in blocks[1:]]
        m = [self.latent_block.modulation(frame_c, rows), *m]
        angles = (latent_angles, clip_angles, None)
        qkv = [block.qkv(*args) for block, *args in zip(blocks, streams, m, angles)]
        k, v = (jnp.concatenate([stream[i] for stream in qkv], 1) for i in (1, 2))
        if self.last:
            attended = attention(qkv[0][0], k, v, self.attention)
            return self.latent_block.update(latent, attended, m[0]), clip, text
        q = jnp.concatenate([stream[0] for stream in qkv], 1)
        attended = attention(q, k, v, self.attention)
        ends = np.cumsum([x.shape[1] for x in streams])[:-1]
        return tuple(
            block.update(*args)
            for block, *args in zip(blocks, streams, jnp.split(attended, ends, 1), m)
        )
