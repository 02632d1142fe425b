"""Writes a run's EMA weights as a PyTorch state dict.

    python -m vcm_jax.interop.export_torch --workdir=RUN --out=vcm_s16k.pth
    python -m vcm_jax.interop.export_torch --workdir=RUN --out=vcm_s16k.pth --step=200000
    python -m vcm_jax.interop.export_torch --workdir=RUN --out=fm_s16k.pth --convention=mmaudio
    python -m vcm_jax.interop.export_torch --workdir=RUN --out=adapter.pth --trained_only

The names are MMAudio's, plus `h_embed.*` for the second time embedder. The latent statistics and
the features of the empty text are in the file, too. `vcm_jax/interop/torch_model.py` loads it. A
network that was trained with flow matching, and so knows instantaneous velocities only, can be
written in MMAudio's own convention (one time, 0 is noise); MMAudio's code then runs it.

An adapter is merged with its base. --trained_only writes it alone, beside the parameters that were
trained themselves: `NAME.lora_A.weight` (R, in) or (R, in, kernel), `NAME.lora_B.weight` (out, R)
or (out, R, 1), and the number `lora_scale`. Its layer has the weight W + lora_scale B A.
"""

from pathlib import Path

import numpy as np
from absl import flags

from vcm_jax import weights
from vcm_jax.atomic import atomic_path
from vcm_jax.cli import run
from vcm_jax.interop.import_network import reverse
from vcm_jax.interop.state_dict import import_torch
from vcm_jax.interop.weights import trained_to_torch, variables_to_torch
from vcm_jax.objectives import OBJECTIVES, read_section
from vcm_jax.runs import averages, description


def to_mmaudio(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MMAudio's own state dict for u(x, t, t, c): time reversed, without the second embedder.

    At s = t the second embedder sees 0 and gives a constant, which is added to the last bias of the
    first one. This is the inverse of `network_from_torch`, where that constant is 0.
    """
    second = {n: np.float64(v) for n, v in state_dict.items() if n.startswith("h_embed.")}
    weight = second["h_embed.mlp.0.weight"]
    features = np.repeat([1.0, 0.0], weight.shape[1] // 2)  # cos 0 and sin 0
    hidden = weight @ features + second["h_embed.mlp.0.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    constant = second["h_embed.mlp.2.weight"] @ hidden + second["h_embed.mlp.2.bias"]
    first = {name: value for name, value in state_dict.items() if name not in second}
    last = "t_embed.mlp.2.bias"
    return reverse(first | {last: np.float32(first[last] + constant)})


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_string("out", None, "File to write, .pth.", required=True)
    flags.DEFINE_integer("step", None, "Training step of the checkpoint (the latest).")
    flags.DEFINE_float("sigma_rel", None, "Relative width of the EMA weights (the narrowest).")
    flags.DEFINE_enum(
        "convention",
        "vcm",
        ["vcm", "mmaudio"],
        "vcm: two times, for torch_model.py; mmaudio: one time, for MMAudio's code.",
    )
    flags.DEFINE_bool("trained_only", False, "Write an adapter, or what was trained, alone.")


def _check_objective(workdir, objective, convention: str) -> None:
    """Raises ValueError if the network of a run cannot be exported in a convention."""
    network = object()
    if objective.velocity(network) is not network:
        raise ValueError(
            f"{workdir}: with its settings of {objective.name} the network is not the average "
            "velocity itself, which is what the file stands for"
        )
    if convention == "mmaudio" and not objective.instant_only:
        possible = [name for name, other in OBJECTIVES.items() if other.instant_only]
        raise ValueError(
            f"--convention=mmaudio holds one time only, but {workdir} was trained with "
            f"{objective.name!r}, which has two; the convention is for {', '.join(possible)}"
        )


def _state_dict(args, described) -> dict[str, np.ndarray]:
    """What the file will hold."""
    if not args.trained_only:
        variables = weights.read_run(args.workdir, args.step, args.sigma_rel)
        state_dict = variables_to_torch(variables, described.model)
        return to_mmaudio(state_dict) if args.convention == "mmaudio" else state_dict
    if described.base is None or args.convention == "mmaudio":
        why = (
            "its weights are whole"
            if described.base is None
            else "--convention=mmaudio is for whole weights"
        )
        raise ValueError(f"--trained_only: {args.workdir} cannot be written alone: {why}")
    found = averages.restore_weights(args.workdir, args.step, args.sigma_rel)
    scale = described.config["adapter"]["scale"]
    return trained_to_torch(found["params"]) | {"lora_scale": np.float32(scale)}


def main(args) -> None:
    torch = import_torch("export_torch")
    if Path(args.out).is_dir():
        raise ValueError(f"--out={args.out} is a folder: name a file, for example vcm_s16k.pth")
    described = description.read(args.workdir)
    objective = read_section(described.config["objective"])[0]
    _check_objective(args.workdir, objective, args.convention)
    if described.model.sync_alignment != "index":
        raise ValueError(
            f"{args.workdir} has model.sync_alignment {described.model.sync_alignment!r}, but "
            "MMAudio's network and torch_model.py spread sync rows by index"
        )
    state_dict = _state_dict(args, described)
    if described.model.blocks_at_s and args.convention == "vcm" and not args.trained_only:
        state_dict["blocks_at_s"] = np.int64(described.model.blocks_at_s)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state_dict.items()}
    with atomic_path(args.out) as temporary:
        torch.save(tensors, temporary)
    print(f"{args.out}: {len(tensors)} tensors")
    if objective.to_data:
        print(f"trained with {objective.name}: jumps end at time 0, so sample in one step")
    if objective.guidance_input:
        print(
            "guidance is an input: give `sample` of torch_model.py guidance_scale, from 1 to "
            f"{objective.guidance_max:g}, and guidance_interval"
        )
    if objective.instant_only and args.convention == "vcm":
        print(
            f"trained with {objective.name}: use it at s = t only, in Euler steps that are guided "
            "while sampling"
        )


if __name__ == "__main__":
    run(main, define_flags)
