"""From trained or public weights to a model of your own, in a few thousand steps on one device.

    python -m vcm_jax.main --config=configs/finetune.py:flow_matching --workdir=runs/mine \\
        --config.init_from=mmaudio_large_44k_v2 \\
        --config.data.sources="('records/mine=3', 'records/other=1')" \\
        --config.data.val_sources="('records/mine_val=1',)"

flow_matching teaches the weights new sounds, for as many sampling steps as before. vcm, the
default, and the other objectives make of flow-matching weights a network for one to four steps.
init_from is the name of public weights, the workdir of a run, or a folder of imported weights, of
any size and version. docs/finetuning.md goes through both uses, adapters and memory.
"""

from ml_collections import ConfigDict

from configs import s16k
from vcm_jax.objectives import OBJECTIVES


def get_config(objective: str = "vcm") -> ConfigDict:
    config = s16k.get_config(objective)
    config.model = "init_from"  # the sizes of the weights it starts from
    config.steps = 5_000
    # The batch of a device with 80 GB in bfloat16. With less memory keep it, and accumulate.
    config.batch_size = 64
    config.accumulate = 1
    config.remat = "products"

    # New sounds: a third of the rate of the weights' own training, as is customary, keeps what they
    # know. Few steps: their own rate, since every jump is new to them.
    config.optimizer.learning_rate = 3e-5 if OBJECTIVES[objective].instant_only else 1e-4
    config.optimizer.warmup_steps = 200
    # Few steps: the distance falls most after the learning rate does. On Impacts it ended 9% lower
    # with a decay at half of the steps than at three quarters. New sounds were not compared.
    config.optimizer.decay_steps = (4_000 if OBJECTIVES[objective].instant_only else 2_500,)
    # The EMA spans a tenth of the run. One width is enough: each takes the memory of the weights.
    config.ema_sigma_rels = (0.05,)
    config.snapshot_every = 0

    if objective == "vcm":
        # The velocity is known already: half of the rows are jumps, and long first legs (lambda)
        # carry it to long jumps in few steps. With more of both a run on Impacts diverged for a
        # while; with the paper's the distance stays larger. Add model_overrides.blocks_at_s, a
        # third of the blocks, which counts most there (docs/results.md).
        config.objective.instant_ratio = 0.5
        config.objective.lambda_init = 0.3
        config.objective.lambda_end = 0.01
    if OBJECTIVES[objective].instant_only:
        # As MMAudio was trained: video and text are dropped one by one, so that guidance, prompts
        # without a video and videos without a prompt go on working.
        config.objective.null_prob = 0.0
        config.objective.video_drop_prob = 0.1
        config.objective.text_drop_prob = 0.1
    config.log_every = 50
    config.checkpoint_every = 500
    config.keep_every = 0
    config.eval_every = 500
    config.sample_every = 1_000
    return config
