"""Training objectives: pure functions of a network u(x, t, s, cond), one file each.

To add one, write its file and add its settings class to `OBJECTIVES` (docs/objectives.md).
"""

import dataclasses
from collections.abc import Mapping

from vcm_jax.objectives.align_your_flow import AlignYourFlowConfig
from vcm_jax.objectives.alpha_flow import AlphaFlowConfig
from vcm_jax.objectives.base import Objective as Objective
from vcm_jax.objectives.base import Passes as Passes
from vcm_jax.objectives.consistency import ConsistencyConfig
from vcm_jax.objectives.flow_matching import FlowMatchingConfig
from vcm_jax.objectives.imm import IMMConfig
from vcm_jax.objectives.improved_meanflow import ImprovedMeanFlowConfig
from vcm_jax.objectives.lagrangian import LagrangianConfig
from vcm_jax.objectives.meanflow import MeanFlowConfig
from vcm_jax.objectives.reflow import ReflowConfig
from vcm_jax.objectives.shortcut import ShortcutConfig
from vcm_jax.objectives.soflow import SoFlowConfig
from vcm_jax.objectives.split_meanflow import SplitMeanFlowConfig
from vcm_jax.objectives.transition import TransitionConfig
from vcm_jax.objectives.twinflow import TwinFlowConfig
from vcm_jax.objectives.vcm import VCMConfig
from vcm_jax.objectives.wcfm import WCFMConfig

# {name in `config.objective.name`: settings class}
OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        VCMConfig,
        FlowMatchingConfig,
        SoFlowConfig,
        MeanFlowConfig,
        SplitMeanFlowConfig,
        ShortcutConfig,
        ReflowConfig,
        WCFMConfig,
        AlphaFlowConfig,
        ImprovedMeanFlowConfig,
        LagrangianConfig,
        ConsistencyConfig,
        TransitionConfig,
        AlignYourFlowConfig,
        IMMConfig,
        TwinFlowConfig,
    )
}


def make_settings(name: str, **settings) -> Objective:
    """The settings of a named objective; those that are not given have their defaults.

    Raises:
      ValueError: for an unknown name, a setting that this objective does not have, or a value out
        of its range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name {name!r} is not one of {', '.join(OBJECTIVES)}")
    known = [field.name for field in dataclasses.fields(OBJECTIVES[name])]
    if settings.get("guidance") == "conditioned" and "guidance" not in known:
        raise ValueError(
            f"objective.guidance=conditioned: {name} is guided when it is sampled, not in training"
        )
    if foreign := sorted(set(settings) - set(known)):
        raise ValueError(
            f"objective {name} has no setting {', '.join(foreign)}; it has {', '.join(known)} "
            f"(for a config with its own settings: --config=FILE.py:{name})"
        )
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    return OBJECTIVES[name](**values)


def read_section(section: Mapping) -> tuple[Objective, dict]:
    """Reads the section `objective` of a config: `name`, settings, and what steps take from it.

    Returns:
      The settings of the objective; and `anneal_steps`, `dispersive` and the entries whose names
      end in "_prob".

    Raises:
      ValueError: as `make_settings`.
    """
    of_step = lambda key: key in ("anneal_steps", "dispersive") or key.endswith("_prob")
    rest = {key: value for key, value in section.items() if of_step(key)}
    settings = {key: value for key, value in section.items() if key not in rest}
    return make_settings(**settings), rest
