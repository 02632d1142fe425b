"""SoundVCM's ablations (Table 2): one setting differs from the main run.

    python -m vcm_jax.main --config=configs/ablations.py:w=2 --workdir=runs/w2 \\
        --config.data.sources="('records/vggsound/2.0.0/train=1', 'records/audio_text=1')"

w (guidance scale: 1, 2, 3, 4), m (mixing ratio: 0.25, 0.5, 0.75, 1), r (part of the s = t rows: 0,
0.25, 0.5, 0.75), p (adaptive weight: 0, 0.5, 1, 1.5), lambda_end (1/250, 1/500, 1/1000). Commas
separate several of them, as in w=2,m=1. `base=impacts` changes the demo's config instead:
--config=configs/ablations.py:base=impacts,r=0. `sync=time` is not in the paper: each latent frame
takes the sync row nearest to it in time, for rows of overlapping segments.

Cost: that of the main run. Expected FD_PANNs, by the paper (5.95 in the main run): r = 0 and p = 0
are far worse (30.8 and 20.0), guidance helps (12.4 at w = 1), a small m helps (6.8 at m = 1), and
lambda_end hardly matters (6.1 and 6.2).
"""

from fractions import Fraction

from ml_collections import ConfigDict

from configs import impacts, s16k

BASES = {"s16k": s16k, "impacts": impacts}
KEYS = {
    "w": "guidance_scale",
    "m": "mix_ratio",
    "r": "instant_ratio",
    "p": "p",
    "lambda_end": "lambda_end",
}


def get_config(changes: str = "") -> ConfigDict:
    given = dict(change.partition("=")[::2] for change in changes.split(",") if change)
    base = given.pop("base", "s16k")
    if base not in BASES:
        raise ValueError(f"ablation base {base!r} is not one of {', '.join(BASES)}")
    config = BASES[base].get_config()
    if sync := given.pop("sync", ""):
        config.model_overrides.sync_alignment = sync
    for key, value in given.items():
        if key not in KEYS:
            raise ValueError(f"ablation {key!r} is not one of {', '.join([*KEYS, 'sync', 'base'])}")
        try:
            config.objective[KEYS[key]] = float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"ablation {key}={value} is not a number") from None
    return config
