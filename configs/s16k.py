"""SoundVCM S-16k, the paper's main run (section 4.3): 157M parameters, 8 s at 16 kHz.

    python -m vcm_jax.main --config=configs/s16k.py --workdir=runs/s16k \\
        --config.data.sources="('records/vggsound/2.0.0/train=1', 'records/audio_text=1')"

--config=configs/s16k.py:OBJECTIVE trains with another objective: flow_matching (MMAudio's), soflow
(BiTCAM's S-16k), meanflow, or any other of docs/objectives.md. reflow also needs a trained run,
--config.objective.teacher=WORKDIR. All of them drop the whole condition of a row at once
(objective.null_prob), so that they can be compared; video_drop_prob and text_drop_prob drop one
modality alone.

The sources are folders made by `python -m vcm_jax.features.extract`. The weights say how often each
of them is drawn, whatever its size. The paper draws video-text-audio and text-audio equally often.

Cost: the paper reports 30 hours on four H100 for 300,000 steps of 512 samples.
Expected, with the paper's features, data and metrics (VGGSound test, 1 / 4 evaluations):
FD_PANNs 5.95 / 5.08, IS 12.54 / 13.62, IB 25.31 / 27.32, DeSync 0.632 / 0.553.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vcm_jax.models import ModelConfig
from vcm_jax.objectives import OBJECTIVES, make_settings

# The sizes of the network that a run may change. Its lengths follow from the duration of the data,
# and its input for guidance from the objective.
MODEL_FIELDS = {
    field.name: field.type
    for field in dataclasses.fields(ModelConfig)
    if not field.name.endswith("_seq_len") and field.name not in ("latent_rate", "guidance_input")
}


def objective_config(name: str) -> ConfigDict:
    """The settings of an objective, with the defaults that its file explains, and the dropout."""
    return ConfigDict(
        dict(
            name=name,
            **dataclasses.asdict(make_settings(name)),
            null_prob=0.1,
            video_drop_prob=0.0,
            text_drop_prob=0.0,
            anneal_steps=0,  # in so many first steps jumps grow to their full length
            dispersive=0.0,  # weight of a loss that moves activations of a batch apart
        )
    )


def get_config(objective: str = "vcm") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 300_000
    config.batch_size = 512
    config.dtype = "bfloat16"
    config.model = "small_16k"
    config.model_overrides = ConfigDict(
        {name: placeholder(kind) for name, kind in MODEL_FIELDS.items()}
    )
    config.init_from = ""

    config.objective = objective_config(objective)
    config.optimizer = ConfigDict(
        dict(
            learning_rate=1e-4,
            warmup_steps=1_000,
            decay_steps=(240_000, 270_000),
            decay_factor=0.1,
            b1=0.9,
            b2=0.95,
            eps=1e-6,
            weight_decay=1e-6,
            clip_norm=1.0,
            moments="float32",  # or "bfloat16", "factored": less memory
            train_only=(),  # patterns of parameters, see docs/finetuning.md
            freeze=(),
        )
    )
    config.adapter = ConfigDict(dict(rank=0, scale=1.0, patterns=("*",)))
    config.ema_sigma_rels = (0.05, 0.10)

    config.snapshot_every = 10_000  # EMA snapshots, from which other widths can be made later

    config.accumulate = 1  # microbatches of a batch, computed one after another
    config.remat = "none"  # or "products", "full": less memory, more computation
    config.attention = "auto"  # or "xla", or "cudnn" on GPUs
    # Equal blocks as one program that runs several times; by default on GPUs and TPUs alone.
    config.scan_blocks = placeholder(bool)
    config.on_nonfinite = "stop"  # or "skip"
    config.allow_config_change = False
    config.profile = ""  # "START:STOP" traces these steps
    config.topology = ""  # for --dry_run: devices that are not there, such as v5e:4x4 or h100x8
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    config.data = ConfigDict(dict(dir="", sources=(), val_sources=(), num_workers=2))

    config.log_every = 100
    config.checkpoint_every = 5_000
    config.keep_every = 50_000
    config.eval_every = 5_000
    config.eval_batches = 4
    config.sample_every = 10_000  # sounds and spectrograms of validation clips
    config.sample_clips = 4
    # Numbers of steps in which validation clips are generated, the first one for `best/`; () for
    # none.
    config.eval_sample_steps = (25,) if OBJECTIVES[objective].instant_only else (1, 4)
    config.eval_clips = 64
    return config


def for_cpu(objective: str) -> ConfigDict:
    """The settings that runs of minutes on a CPU share: small data, and networks that fit."""
    config = get_config(objective)
    config.dtype = "float32"
    config.data.num_workers = 0
    config.keep_every = 0
    settings = config.objective
    if OBJECTIVES[objective].instant_only:
        settings.guidance_scale = min(settings.guidance_scale, 3.0)
    else:
        # Guidance in the target costs a pass and feeds the network's own errors back: with 39 clips
        # and guidance 3 the errors of VCM's jumps grew without bound.
        settings.guidance = "fixed"
        if objective == "meanflow":
            settings.omega = 1 - settings.kappa  # a scale of 1
        else:
            settings.guidance_scale = 1.0
    return config
