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
    config = s16k.for_cpu(objective)
    config.steps = 1_000
    config.batch_size = 16
    config.model = "laptop"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = ()
    config.log_every = 20
    config.checkpoint_every = 200
    config.snapshot_every = 500
    config.eval_every = 500
    config.eval_clips = 16
    config.sample_every = 500
    return config
