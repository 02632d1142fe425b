"""Training objectives: pure functions of a network u(x, t, s, cond), one file each."""

import dataclasses
from collections.abc import Callable, Mapping

from vcm_jax.objectives import (
    common,
    flow_matching,
    meanflow,
    reflow,
    shortcut,
    soflow,
    split_meanflow,
    vcm,
    wcfm,
)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run needs of its objective.

    Attributes:
      config: dataclass of its settings.
      loss: as `vcm_loss`.
      draw: (key, batch_size, num_instant, step, steps, config) -> t, s, lam of a batch.
      velocity: (net, config) -> u: makes of the network net(x, t, s, cond) the average velocity
        that samplers take.
      instant_only: u(x, t, s, c) is known at s = t alone: Euler steps, guided when sampled.
      noised: (x0, x1, t, config) -> x_t.
    """

    config: type
    loss: Callable
    draw: Callable
    velocity: Callable = lambda net, config: net
    instant_only: bool = False
    noised: Callable = lambda x0, x1, t, config: common.noised(x0, x1, t)


OBJECTIVES = {
    "vcm": Objective(vcm.VCMConfig, vcm.vcm_loss, vcm.draw),
    "flow_matching": Objective(
        flow_matching.FlowMatchingConfig,
        flow_matching.flow_matching_loss,
        flow_matching.draw,
        instant_only=True,
    ),
    "soflow": Objective(
        soflow.SoFlowConfig,
        soflow.soflow_loss,
        soflow.draw,
        velocity=soflow.velocity,
        noised=lambda x0, x1, t, config: soflow.noised(x0, x1, t, config.noising),
    ),
    "meanflow": Objective(meanflow.MeanFlowConfig, meanflow.meanflow_loss, meanflow.draw),
    "split_meanflow": Objective(
        split_meanflow.SplitMeanFlowConfig,
        split_meanflow.split_meanflow_loss,
        split_meanflow.draw,
    ),
    "shortcut": Objective(shortcut.ShortcutConfig, shortcut.shortcut_loss, shortcut.draw),
    "reflow": Objective(reflow.ReflowConfig, reflow.reflow_loss, reflow.draw, instant_only=True),
    "wcfm": Objective(wcfm.WCFMConfig, wcfm.wcfm_loss, wcfm.draw, instant_only=True),
}


def objective_of(config) -> tuple[str, Objective]:
    """The name and the objective that settings belong to."""
    for name, objective in OBJECTIVES.items():
        if type(config) is objective.config:
            return name, objective
    raise TypeError(f"{type(config).__name__} are not the settings of an objective")


def make_settings(name: str, **settings):
    """The settings of a named objective, its defaults where none are given.

    Raises:
      ValueError: an unknown name, a setting that this objective does not have, one out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective.name {name!r} is not one of {', '.join(OBJECTIVES)}")
    config = OBJECTIVES[name].config
    known = [field.name for field in dataclasses.fields(config)]
    if foreign := sorted(set(settings) - set(known)):
        raise ValueError(
            f"objective {name} has no setting {', '.join(foreign)}; it has {', '.join(known)} "
            f"(a config of its own settings: --config=FILE.py:{name})"
        )
    return config(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})


def read_section(section: Mapping) -> tuple[object, dict]:
    """(settings, the rest) of a config's section `objective`: a name, settings, *_prob of the data.

    Raises:
      ValueError: as `make_settings`.
    """
    rest = {key: value for key, value in section.items() if key.endswith("_prob")}
    settings = {key: value for key, value in section.items() if key not in rest}
    return make_settings(**settings), rest
