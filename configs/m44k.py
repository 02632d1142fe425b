"""SoundVCM's objective on MMAudio's M-44k network: 621M parameters, 8 s at 44.1 kHz.

    python -m vcm_jax.main --config=configs/m44k.py --workdir=runs/m44k \\
        --config.data.sources="('records/clips=1', 'records/sounds=1')"

The records need a codec with 40 channels. --config=configs/m44k.py:OBJECTIVE trains with another
objective, see `configs/s16k.py`.

No few-step model of this size has been published: MMAudio's model takes 25 guided steps.
"""

from ml_collections import ConfigDict

from configs import s16k


def get_config(objective: str = "vcm") -> ConfigDict:
    config = s16k.get_config(objective)
    config.model = "medium_44k"
    return config
