"""The cost of the network's matrix products, counted by hand: the basis of the MFU.

A multiply-add counts as two operations; norms, activations and the softmax are not counted.
`benchmarks/train_step.py` prints XLA's own count of the compiled program beside it.
"""

from vcm_jax.models.config import ModelConfig
from vcm_jax.models.layers import time_frequencies
from vcm_jax.objectives import Passes


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Operations of one forward pass over one clip, arranged as in MMAudio's code.

    Returns:
      {layers: operations}: `conditions` (the projections of clip, sync and text and the global
      condition), `audio` (the projector of the latents), `adaln`, `projections` (to queries, keys
      and values, and the linear layers of the text stream and the time embedders), `attention`,
      `convolutions` (of the blocks and the final layer).
    """
    c, width = config, config.hidden_dim
    latent, clip, text = c.latent_seq_len, c.clip_seq_len, c.text_seq_len

    def dense(rows, inputs, outputs, kernel=1):
        return 2.0 * rows * inputs * outputs * kernel

    def mlp(rows, kernel=1):
        return 3 * dense(rows, width, c.mlp_dim, kernel)

    def attend(queries, keys):
        return 2 * dense(queries, keys, width)

    clip_projection = dense(clip, c.clip_dim, width) + mlp(clip, 3)
    sync_projection = dense(c.sync_seq_len, c.sync_dim, width, 7) + mlp(c.sync_seq_len, 3)
    text_projection = dense(text, c.text_dim, width) + mlp(text)
    pooled = dense(2, width, width) + mlp(1)
    time_features = 2 * len(time_frequencies(c.version, width))
    guidance = (dense(1, 3 * time_features, width) + dense(1, width, width)) * c.guidance_input
    cost = {
        "conditions": guidance + clip_projection + sync_projection + text_projection + pooled,
        "audio": dense(latent, c.latent_dim, width, 7) + mlp(latent, c.audio_kernel),
        "adaln": dense(1, width, 2 * width),
        "projections": 2 * (dense(1, time_features, width) + dense(1, width, width)),
        "attention": 0.0,
        "convolutions": dense(latent, width, c.latent_dim, 7),
    }
    for block in range(c.depth):
        joint, last = block < c.joint_depth, block == c.joint_depth - 1
        tokens = latent + (clip + text) * joint
        cost["adaln"] += dense(latent, width, 6 * width)
        cost["adaln"] += 2 * dense(1, width, (2 if last else 6) * width) * joint
        cost["projections"] += dense(tokens, width, 3 * width)
        cost["attention"] += attend(latent if last else tokens, tokens)
        cost["convolutions"] += dense(latent, width, width, 3) + mlp(latent, 3)
        if joint and not last:
            cost["convolutions"] += dense(clip, width, width, 3) + mlp(clip, 3)
            cost["projections"] += dense(text, width, width) + mlp(text)
    return cost


def step_flops(config: ModelConfig, passes: Passes, features: bool = False) -> float:
    """Operations of one training step, per sample: 262e9 for small_16k with VCM's defaults.

    The differentiated pass counts three times. The conditions are encoded once in it, and the
    empty condition once per batch, which is left out. Passes at x_t share its audio projector. With
    `features` there is a differentiated pass through the first blocks, see `MMDiT.features`.
    """
    cost = forward_flops(config)
    trained = 1 + passes.backward
    repeated = 3 * cost["conditions"] + (trained + passes.elsewhere) * cost["audio"]
    rest = sum(cost.values()) - cost["conditions"] - cost["audio"]
    share = config.feature_depth / config.depth * features
    return (passes.forward + 3 * share) * rest + repeated + 3 * features * cost["audio"]
