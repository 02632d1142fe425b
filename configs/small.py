"""Clips of your own on a laptop: 12M parameters, lengths and widths taken from the records.

    python -m vcm_jax.main --config=configs/small.py --workdir=runs/mine \\
        --config.data.sources="('records/mine=1',)"

It takes the records of any extraction, whatever its --duration, --clip_dim, --sync_dim, --text_dim
and codec. Validation is optional: --config.data.val_sources="('records/val=1',)" adds metrics,
sounds in TensorBoard, and `best/`. --config=configs/small.py:soflow trains with another objective,
see `configs/s16k.py`.

The learning rate stays constant, since generation uses EMA weights, so that a run can be resumed
with a larger --config.steps.
"""

from ml_collections import ConfigDict

from configs import s16k


def get_config(objective: str = "vcm") -> ConfigDict:
    config = s16k.get_config(objective)
    config.steps = 1_000
    config.batch_size = 16
    config.dtype = "float32"
    config.model = "laptop"
    if config.objective.name == "vcm":
        # Guidance in the target feeds the network's own errors back. With 39 clips, guidance 3 and
        # a learning rate of 1e-3 the errors of jumps grew without bound after 400 steps.
        config.objective.guidance_scale = 1.0
    elif config.objective.get("guidance_scale", 1.0) > 3.0:
        config.objective.guidance_scale = 3.0
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = ()
    config.data.num_workers = 0
    config.log_every = 20
    config.checkpoint_every = 200
    config.keep_every = 0
    config.snapshot_every = 500
    config.eval_every = 500
    config.eval_clips = 16
    config.sample_every = 500
    return config
