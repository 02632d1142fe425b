"""Every objective on two-dimensional mixtures, where the flow is known exactly.

    python benchmarks/toy_flows.py --out=runs/toy

The velocity of a mixture of Gaussians has a closed form, so that the exact result of any jump can
be integrated. The same small network is trained with each objective, for the same number of steps,
on a ring, on a spiral, and on a ring with classes and guidance (w = 2 for all objectives).

OUT/toy_flows.md gives, for each objective, the energy distance to samples of the exact flow at 1,
2, 4, 8 and 25 steps (`floor` is that of two exact sets), and the root mean square error of u
against the integrated flow. OUT/PROBLEM.png shows samples and trajectories. Reflow learns from the
flow-matching network. Reflow and W-CFM change the coupling and so the flow, so that no error of
their u is given.
"""

import dataclasses
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags
from scipy.spatial.distance import cdist

from vcm_jax import ema
from vcm_jax.atomic import atomic_path
from vcm_jax.objectives import make_settings
from vcm_jax.objectives.guidance import Guidance
from vcm_jax.sampling import OWN_SAMPLER, restart_sample, sample, uniform_times

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = (1, 2, 4, 8, 25)
SHOWN = (1, 2, 4, 25)
GUIDANCE = 2.0
FINE = 200  # Runge-Kutta steps of the exact flow
_EVERYWHERE = dict(guidance_scale=GUIDANCE, guidance_interval=(0.0, 1.0))
# Settings with which all objectives learn the same guided flow.
SETTINGS = {
    "flow_matching": _EVERYWHERE,
    "vcm": _EVERYWHERE,
    "soflow": dict(guidance_scale=GUIDANCE, decay_start=1.0),
    "meanflow": dict(omega=GUIDANCE / 2, kappa=0.5),
    "split_meanflow": _EVERYWHERE,
    "shortcut": _EVERYWHERE,
    "wcfm": _EVERYWHERE | dict(gibbs_eps=4.0),
    "reflow": dict(teacher_steps=25),
    "alpha_flow": _EVERYWHERE,
    "improved_meanflow": _EVERYWHERE | dict(guidance="fixed"),
    "lagrangian": _EVERYWHERE,
    "consistency": _EVERYWHERE,
    "transition": _EVERYWHERE | dict(along="guided"),
    "align_your_flow": _EVERYWHERE,
    "imm": _EVERYWHERE,
    "twinflow": _EVERYWHERE,
}
UNGUIDED = dict(guidance_scale=1.0)


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, as a key of jit's cache
class Mixture:
    """Equally likely Gaussians with means `K 2` and one standard deviation; each has a class."""

    means: np.ndarray
    std: float
    classes: np.ndarray  # K, from 0; with one class there is no guidance

    @property
    def num_classes(self) -> int:
        return int(self.classes.max()) + 1

    def draw(self, key, size: int):
        """Data `n 2` and their classes `n`."""
        k, noise = jax.random.split(key)
        k = jax.random.randint(k, (size,), 0, len(self.means))
        x = jnp.asarray(self.means)[k] + self.std * jax.random.normal(noise, (size, 2))
        return x, jnp.asarray(self.classes)[k]

    def velocity(self, x, t, label):
        """E[x1 - x0 | x_t = x, class], x `n 2`, t scalar, label `n` (-1: any class)."""
        means = jnp.asarray(self.means)
        spread = (1 - t) ** 2 * self.std**2 + t**2
        offset = x[:, None] - (1 - t) * means[None]
        fits = (label[:, None] < 0) | (label[:, None] == jnp.asarray(self.classes)[None])
        log_weight = -jnp.square(offset).sum(-1) / (2 * spread)
        weight = jax.nn.softmax(jnp.where(fits, log_weight, -jnp.inf), -1)
        slope = (t - (1 - t) * self.std**2) / spread
        return (weight[..., None] * (slope * offset - means[None])).sum(1)

    def guided(self, x, t, label, scale=GUIDANCE):
        """The guided velocity; without classes the plain one."""
        v = self.velocity(x, t, label)
        if self.num_classes == 1:
            return v
        return scale * v + (1 - scale) * self.velocity(x, t, -jnp.ones_like(label))

    @functools.partial(jax.jit, static_argnames=("self", "steps"))
    def flow(self, x, t, s, label, scale=GUIDANCE, steps: int = FINE):
        """x_s of the exact (guided) flow from x at t, scalars, by Runge-Kutta of order 4."""
        h = (s - t) / steps
        guided = functools.partial(self.guided, label=label, scale=scale)

        def body(x, i):
            t_i = t + i * h
            k1 = guided(x, t_i)
            k2 = guided(x + h / 2 * k1, t_i + h / 2)
            k3 = guided(x + h / 2 * k2, t_i + h / 2)
            k4 = guided(x + h * k3, t_i + h)
            return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        return jax.lax.scan(body, x, jnp.arange(steps))[0]


def _ring(classes):
    angles = 2 * np.pi * np.arange(8) / 8
    return Mixture(1.5 * np.stack([np.cos(angles), np.sin(angles)], -1), 0.08, classes)


def _spiral():
    angles = np.linspace(0.25, 1, 40) ** 0.5 * 4 * np.pi
    points = angles[:, None] / (2 * np.pi) * np.stack([np.cos(angles), np.sin(angles)], -1)
    return Mixture(points, 0.06, np.zeros(40, int))


PROBLEMS = {
    "ring": _ring(np.zeros(8, int)),
    "spiral": _spiral(),
    "classes": _ring(np.arange(8) % 4),
}


def init_params(rng, cond_size: int, width: int = 128, depth: int = 4):
    """A multilayer perceptron on x, features of t and s - t, and the condition."""
    widths = [2 + 4 * 5 + cond_size, *[width] * depth, 2]
    return [
        (rng.standard_normal((i, o)).astype(np.float32) / np.sqrt(i), np.zeros(o, np.float32))
        for i, o in zip(widths[:-1], widths[1:])
    ]


def network(params, x, t, s, cond):
    """x `n 2`, t and s `n`, cond from `condition`, `n k`."""
    angles = jnp.stack([t, s - t], -1)[..., None] * (2.0 ** np.arange(5))[None, None]
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1).reshape(len(t), -1)
    h = jnp.concatenate([x, features, cond], -1)
    for weight, bias in params[:-1]:
        h = jax.nn.silu(h @ weight + bias[None])
    return h @ params[-1][0] + params[-1][1][None]


def condition(one_hot, guidance=None):
    """What the network sees: the class, and for conditioned guidance log w and the interval."""
    if guidance is None:
        return one_hot
    scale, low, high = guidance.rows(len(one_hot))
    return jnp.concatenate([one_hot, jnp.stack([jnp.log(scale), low, high], -1)], -1)


def settings_of(name: str, guided: bool, **changes):
    """The settings of an objective: the same guided flow for all, or no guidance."""
    given = dict(SETTINGS[name])
    if not guided:
        given |= dict(omega=1.0, kappa=0.0) if name == "meanflow" else UNGUIDED
    return make_settings(name, **given | changes)


def train(name, problem, seed: int, steps: int, batch_size: int, teacher=None, **changes):
    """The trained network as `u(x, t, s, cond)`, which `sample` takes, and seconds a step.

    Args:
      name: of the objective.
      problem: the `Mixture`.
      seed, steps, batch_size: of the training.
      teacher: u of a trained network, for reflow.
      **changes: settings of the objective that differ from `SETTINGS`.
    """
    guided = problem.num_classes > 1
    objective = settings_of(name, guided, **changes)
    n = objective.num_instant(batch_size)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    )
    unguided = Guidance() if objective.guidance_input else None
    null = condition(jnp.zeros((batch_size, problem.num_classes)), unguided)
    params = init_params(np.random.default_rng(seed), null.shape[1])

    def step(state, k):
        params, average, target, opt_state = state
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), k), 4)
        x0, label = problem.draw(keys[0], batch_size)
        guidance = objective.draw_guidance(jax.random.fold_in(keys[2], 2), batch_size)
        cond = condition(jax.nn.one_hot(label, problem.num_classes) * guided, guidance)
        options = {} if guidance is None else {"guidance": guidance}
        x1 = jax.random.normal(keys[1], x0.shape)
        t, s, lam = objective.draw(keys[2], batch_size, n, k, steps)
        is_null = jax.random.bernoulli(keys[3], 0.1 * guided, (batch_size,))
        if objective.target_ema:
            options["target_u"] = functools.partial(network, target)
        if teacher is not None:
            seen = jnp.where(is_null[:, None], null, cond)
            x0 = sample(teacher, x1, uniform_times(objective.teacher_steps), seen)

        def loss(params):
            args = (x0, x1, t, s, lam, cond, null, is_null)
            net = functools.partial(network, params)
            return objective.loss(net, *args, num_instant=n, **options)[0]

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + (p - a) * 0.005, average, params)
        target = ema.follow(target, params, k + 1, objective.target_ema)
        return (params, average, target, opt_state), None

    run = jax.jit(
        lambda state, first: jax.lax.scan(step, state, first + jnp.arange(steps // 10))[0]
    )
    state = (params, params, params, optimizer.init(params))
    seconds = []
    for tenth in range(10):
        started = time.perf_counter()
        state = jax.block_until_ready(run(state, tenth * (steps // 10)))
        seconds.append((time.perf_counter() - started) / (steps // 10))
    net = functools.partial(network, state[1])

    def u(x, t, s, cond):
        return OWN_SAMPLER.velocity(objective, net, jnp.zeros_like(cond))(x, t, s, cond)

    u.restarts = OWN_SAMPLER.restarts(objective)
    return u, min(seconds)


def draw(u, x1, times, cond):
    """Samples from noise, in the objective's own way."""
    if u.restarts:
        return restart_sample(u, x1, times, cond, jax.random.key(7))
    return sample(u, x1, times, cond)


def energy_distance(x, y) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of two sets of points, `n 2` each."""
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()


def errors(u, problem, size: int = 1000) -> tuple[float, float]:
    """Root mean square errors of u at s = t and over jumps, at points of the forward process.

    Of a network that learns jumps to the data alone, those with s = 0 count.
    """
    keys = jax.random.split(jax.random.key(99), 4)
    x0, label = problem.draw(keys[0], size)
    x1 = jax.random.normal(keys[1], x0.shape)
    cond = jax.nn.one_hot(label, problem.num_classes) * (problem.num_classes > 1)
    instant, jump = [], []
    jumps = ((1.0, 0.0), (0.9, 0.4), (0.7, 0.0), (0.5, 0.25), (0.3, 0.0))
    for t, s in [pair for pair in jumps if not (u.restarts and pair[1])]:
        x = (1 - t) * x0 + t * x1
        times, ends = jnp.full(size, t), jnp.full(size, s)
        exact = (problem.flow(x, t, s, label) - x) / (s - t)
        jump.append(jnp.square(u(x, times, ends, cond) - exact).mean())
        error = u(x, times, times, cond) - problem.guided(x, t, label)
        instant.append(jnp.square(error).mean())
    return float(np.sqrt(np.mean(instant))), float(np.sqrt(np.mean(jump)))


def picture(problem, rows, truth):
    """A figure with a row for each objective: samples by number of steps, and trajectories."""
    columns = len(SHOWN) + 1
    figure, axes = plt.subplots(len(rows), columns, figsize=(2.1 * columns, 2.1 * len(rows)))
    bound = 1.25 * np.abs(problem.means).max()
    for line, (name, (found, paths, labels)) in zip(axes, rows.items()):
        colours = plt.get_cmap("tab10")(labels % 10)
        for axis, n in zip(line, SHOWN):
            axis.scatter(*truth.T, s=0.5, color="0.8")
            axis.scatter(*found[n].T, s=0.7, color=colours)
            axis.set_title(f"{name}: {n} step{'s' * (n > 1)}", fontsize=7)
        for path, colour in zip(np.moveaxis(paths, 1, 0)[:60], colours):
            line[-1].plot(*path.T, lw=0.5, color=colour)
        line[-1].set_title("trajectories, 25 steps", fontsize=7)
        for axis in line:
            axis.set(xlim=(-bound, bound), ylim=(-bound, bound), xticks=[], yticks=[], aspect=1)
    figure.tight_layout()
    return figure


def trajectory(u, x1, cond):
    """The points of the 25-step sampler, `26 n 2`."""
    times = uniform_times(25)
    points = [x1]
    for t, s in zip(times[:-1], times[1:]):
        points.append(sample(u, points[-1], (t, s), cond))
    return np.stack(points)


def compare(problem_name: str, names, seed: int, steps: int, batch_size: int, size: int):
    """The rows of the table and the figure of one problem."""
    problem = PROBLEMS[problem_name]
    keys = jax.random.split(jax.random.key(1234), 4)
    _, label = problem.draw(keys[0], size)
    cond = jax.nn.one_hot(label, problem.num_classes) * (problem.num_classes > 1)
    x1, other = jax.random.normal(keys[1], (2, size, 2))
    truth, again = (np.asarray(problem.flow(x, 1.0, 0.0, label)) for x in (other, x1))
    table = [["floor", *[f"{energy_distance(again, truth):.4f}"] * len(STEPS), "0", "0", ""]]
    shown, teacher = {}, None
    for name in names:
        u, seconds = train(
            name, problem, seed, steps, batch_size, teacher if name == "reflow" else None
        )
        if name == "flow_matching":
            teacher = u
        found = {n: np.asarray(draw(u, x1, uniform_times(n), cond)) for n in STEPS}
        own = name in ("reflow", "wcfm")
        error = ("–", "–") if own else (f"{e:.3f}" for e in errors(u, problem))
        distances = [f"{energy_distance(found[n], truth):.4f}" for n in STEPS]
        table.append([name, *distances, *error, f"{1000 * seconds:.2f}"])
        print(problem_name, " | ".join(table[-1]), flush=True)
        shown[name] = (found, trajectory(u, x1[:60], cond[:60]), np.asarray(label))
    return table, picture(problem, shown, truth)


def main(argv):
    if argv[1:]:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    args, names = flags.FLAGS, list(SETTINGS)
    if unknown := set(args.objectives) - set(names):
        raise app.UsageError(f"unknown objectives {sorted(unknown)}: known are {', '.join(names)}")
    names = [name for name in names if name in args.objectives]
    if "reflow" in names and "flow_matching" not in names:
        raise app.UsageError("reflow learns from flow_matching: give it too")
    out = Path(args.out)
    lines = [
        "# Objectives on mixtures in two dimensions",
        "",
        f"{args.steps} steps of {args.batch_size} samples, seed {args.seed}; energy distance of "
        f"{args.samples} samples to the exact flow's.",
    ]
    for problem in args.problems:
        table, figure = compare(
            problem, names, args.seed, args.steps, args.batch_size, args.samples
        )
        head = ["", *(f"{n} step{'s' * (n > 1)}" for n in STEPS)]
        head += ["error at s = t", "error of jumps", "ms a step"]
        lines += ["", f"## {problem}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in table] + ["", f"![]({problem}.png)"]
        with atomic_path(out / f"{problem}.png") as path:
            figure.savefig(path, format="png", dpi=110)
        with atomic_path(out / "toy_flows.md") as path:
            path.write_text("\n".join(lines) + "\n")
    print(out / "toy_flows.md")


def _define_flags():
    flags.DEFINE_string("out", "runs/toy", "Folder for the table and the figures.")
    flags.DEFINE_list("problems", list(PROBLEMS), "Mixtures to train on.")
    flags.DEFINE_list("objectives", list(SETTINGS), "Objectives to train with.")
    flags.DEFINE_integer("steps", 4000, "Training steps of each network.", lower_bound=10)
    flags.DEFINE_integer("batch_size", 256, "Samples in a training step.", lower_bound=8)
    flags.DEFINE_integer("samples", 2000, "Samples to score.", lower_bound=100)
    flags.DEFINE_integer("seed", 0, "Seed of training.")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
