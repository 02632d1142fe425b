"""A run's weights as a PyTorch state dict:

    python -m vcm_jax.interop.export_torch --workdir=RUN --out=vcm_s16k.pth
    python -m vcm_jax.interop.export_torch --workdir=RUN --out=fm_s16k.pth --convention=mmaudio

Names are MMAudio's, plus the second time embedder's, `h_embed.*`; latent statistics and the empty
text's features are among them. `vcm_jax/interop/torch_model.py` loads the file. A model of
instantaneous velocities alone (trained with flow matching) can be written in MMAudio's own
convention (one time, 0 is noise), and then runs in MMAudio's code.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from absl import logging

from vcm_jax.atomic import atomic_path
from vcm_jax.interop.import_network import reverse
from vcm_jax.interop.state_dict import import_torch
from vcm_jax.interop.weights import variables_to_torch
from vcm_jax.objectives import OBJECTIVES, read_section
from vcm_jax.runs import averages, description


def to_mmaudio(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MMAudio's own state dict for u(x, t, t, c): time runs the other way, no second embedder.

    At s = t the second embedder sees 0 and is a constant, which goes into the first one's last
    bias. The inverse of `network_from_torch`, where that constant is 0.
    """
    second = {n: np.float64(v) for n, v in state_dict.items() if n.startswith("h_embed.")}
    features = np.concatenate([np.ones(128), np.zeros(128)])  # cos 0 and sin 0
    hidden = second["h_embed.mlp.0.weight"] @ features + second["h_embed.mlp.0.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    constant = second["h_embed.mlp.2.weight"] @ hidden + second["h_embed.mlp.2.bias"]
    first = {name: value for name, value in state_dict.items() if name not in second}
    last = "t_embed.mlp.2.bias"
    return reverse(first | {last: np.float32(first[last] + constant)})


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vcm_jax.interop.export_torch",
        description="Writes a run's weights as a PyTorch state dict.",
    )
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--out", required=True, help="file to write, .pth")
    parser.add_argument("--step", type=int, help="which checkpoint; the latest by default")
    parser.add_argument(
        "--sigma_rel", type=float, help="width of the weights' average; the narrowest by default"
    )
    parser.add_argument(
        "--convention",
        default="vcm",
        choices=["vcm", "mmaudio"],
        help="vcm: two times, for torch_model.py; mmaudio: one time, for MMAudio's code",
    )
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is normal where nothing is saved
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(args) -> None:
    """Read, convert, write; nothing is written before everything fits."""
    torch = import_torch("export_torch")
    if Path(args.out).is_dir():
        raise ValueError(f"--out={args.out} is a folder: name a file, for example vcm_s16k.pth")
    described = description.read(args.workdir)
    objective = read_section(described.config["objective"])[0]
    name, network = objective.name, object()
    if objective.velocity(network) is not network:
        raise ValueError(
            f"{args.workdir}: with its settings of {name} the network is not the average velocity "
            "itself, which is what the file stands for"
        )
    if args.convention == "mmaudio" and not objective.instant_only:
        possible = [name for name, objective in OBJECTIVES.items() if objective.instant_only]
        raise ValueError(
            f"--convention=mmaudio holds one time only, and {args.workdir} was trained with "
            f"{name!r}, which has two; it is for {', '.join(possible)}"
        )
    config = described.model
    if config.sync_alignment != "index":
        raise ValueError(
            f"{args.workdir} has model.sync_alignment {config.sync_alignment!r}: MMAudio's network "
            "and torch_model spread sync rows by index"
        )
    variables = averages.restore_weights(args.workdir, args.step, args.sigma_rel)
    state_dict = variables_to_torch(variables, config)
    if args.convention == "mmaudio":
        state_dict = to_mmaudio(state_dict)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state_dict.items()}
    with atomic_path(args.out) as temporary:
        torch.save(tensors, temporary)
    print(f"{args.out}: {len(tensors)} tensors")
    if objective.instant_only and args.convention == "vcm":
        print(f"trained with {name}: it knows s = t alone (Euler steps, guided when sampled)")


if __name__ == "__main__":
    main()
