"""BiTCAM L-16k, SoFlow's objective on the large network: 1.03B parameters, 8 s at 16 kHz.

    python -m vcm_jax.main --config=configs/l16k.py --workdir=runs/l16k \\
        --config.data.sources="('records/clips=1', 'records/sounds=1')"

The records need a codec with 20 channels. --config=configs/l16k.py:OBJECTIVE trains with another
objective, see `configs/s16k.py`.

The settings are BiTCAM's as far as its page gives them (objectives/soflow.py). It says nothing
about batch size, optimizer and learning-rate schedule: those are S-16k's. Expected, with the
paper's features, data and metrics (VGGSound test, 1 / 4 evaluations): FD_PANNs 15.25 / 7.36, IS
8.15 / 12.15, DeSync 0.913 / 0.843.
"""

from ml_collections import ConfigDict

from configs import s16k


def get_config(objective: str = "soflow") -> ConfigDict:
    config = s16k.get_config(objective)
    config.model = "large_16k"
    return config
