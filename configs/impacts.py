"""The demo: bouncing balls and a network of 1.6M parameters, minutes on a laptop's CPU.

    bash launch/demo.sh

makes the data and runs everything. The training alone is

    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python -m vcm_jax.main --config=configs/impacts.py --workdir=runs/impacts

--config=configs/impacts.py:soflow trains with another objective, see `configs/s16k.py`.

Cost: 7.6 minutes on two CPU cores (160 samples/s).
Expected on 200 test clips: onset F1 0.83 in one step and 0.91 in four. The true sound scores 0.99,
the codec's round trip 0.95, and sound for another clip's video 0.27.
"""

from ml_collections import ConfigDict

from configs import s16k


def get_config(objective: str = "vcm") -> ConfigDict:
    config = s16k.get_config(objective)
    config.steps = 2_200
    config.batch_size = 32
    config.dtype = "float32"
    config.model = "demo"
    if config.objective.get("guidance_scale", 1.0) > 3.0:
        config.objective.guidance_scale = 3.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_steps = (1_700, 2_000)
    config.data.dir = "records/impacts"
    config.data.sources = ("train=1",)
    config.data.val_sources = ("val=1",)
    config.data.num_workers = 0
    config.log_every = 50
    config.checkpoint_every = 500
    config.keep_every = 0
    config.snapshot_every = 500
    config.eval_every = 500
    config.sample_every = 1_000
    return config
