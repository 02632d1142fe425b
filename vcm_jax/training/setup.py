"""From a config to what a run is made of, checked before anything is computed or written."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from vcm_jax import weights as start_weights
from vcm_jax.devices import sharding
from vcm_jax.devices.topology import Topology, describe
from vcm_jax.models import MODELS, MMDiT, ModelConfig
from vcm_jax.models.adapter import AdapterConfig
from vcm_jax.models.config import WIDTHS_OF_DATA
from vcm_jax.objectives import read_section
from vcm_jax.records import mixture
from vcm_jax.records.source import RecordSource, locate
from vcm_jax.training import monitor, ranges
from vcm_jax.training.loss import Teacher, check_network
from vcm_jax.training.rows import StepConfig
from vcm_jax.training.selection import Selection, select
from vcm_jax.training.state import OptimizerConfig
from vcm_jax.training.teacher import load_teacher


class SetupError(ValueError):
    """The run cannot start with its settings or data; one line."""


def _dataclass_from(cls, config, section: str, **extra):
    """`cls(**config)`; SetupError for keys of the section that the class does not have."""
    known = {field.name for field in dataclasses.fields(cls)} - extra.keys()
    if unknown := set(config) - known:
        raise SetupError(
            f"config.{section} has unknown keys {sorted(unknown)}; it knows {sorted(known)}"
        )
    return cls(**config, **extra)


def step_config(config: ConfigDict) -> StepConfig:
    """The settings of the training step, from `config.objective` and `config.steps`."""
    objective, dropout = read_section(config.objective)
    return _dataclass_from(
        StepConfig, dropout, "objective", steps=config.steps, objective=objective
    )


def model_config(config: ConfigDict, manifest) -> ModelConfig:
    """The sizes of the network: those of the named model, with the lengths of the data.

    The models in `WIDTHS_OF_DATA` take the widths of the data, too. The model "init_from" has the
    sizes of the weights that training starts from.

    Args:
      config: of the run.
      manifest: of the records; None keeps the lengths and widths of the named model.

    Raises:
      SetupError: the records have features of other sizes.
    """
    named = _named_model(config)
    sizes = dataclasses.asdict(named.with_lengths(manifest.sequence) if manifest else named)
    widths = _widths(manifest) if manifest else {}
    if config.model in WIDTHS_OF_DATA:
        sizes |= widths
    sizes |= {name: value for name, value in config.model_overrides.items() if value is not None}
    guides = read_section(config.objective)[0].guidance_input
    if sizes["guidance_input"] not in (False, guides):
        raise SetupError(
            "config.model_overrides.guidance_input is for objectives with "
            "config.objective.guidance=conditioned"
        )
    sizes["guidance_input"] = guides
    model = _dataclass_from(ModelConfig, sizes, "model_overrides")
    differing = {name: width for name, width in widths.items() if getattr(model, name) != width}
    if differing:
        theirs = ", ".join(f"{name} {width}" for name, width in differing.items())
        ours = ", ".join(f"{getattr(model, name)}" for name in differing)
        if config.model == ranges.OF_START:
            raise SetupError(
                f"the records have {theirs}, {config.init_from} has {ours}: extract them with the "
                "codec and the encoders of these weights"
            )
        fixes = " ".join(f"--config.model_overrides.{n}={w}" for n, w in differing.items())
        others = " ".join(f"--{n}={getattr(model, n)}" for n in differing if n != "latent_dim")
        raise SetupError(
            f"the records have {theirs}, model {config.model} has {ours}: train with {fixes}"
            + (f", or extract with {others}" if "latent_dim" not in differing else "")
        )
    return model


def _named_model(config: ConfigDict) -> ModelConfig:
    if config.model != ranges.OF_START:
        return MODELS[config.model]
    if not config.init_from:
        raise SetupError(
            "config.model is that of the weights to start from: give --config.init_from=NAME or "
            "DIR, or name a --config.model"
        )
    return start_weights.model_of(config.init_from)


def _widths(manifest) -> dict[str, int]:
    """{setting of the network: width of the records' latents and features}."""
    features = {
        f"{kind}_dim": manifest.encoders[f"{kind}_dim"] for kind in ("clip", "sync", "text")
    }
    return {"latent_dim": manifest.latent_dim} | features


def open_sources(texts, directory: str, key: str, like: RecordSource | None = None):
    """([RecordSource], weights) from the 'PATH=WEIGHT' strings of `config.data.KEY`.

    Raises:
      SetupError: a folder is not complete or damaged, or the sources have other lengths, encoders
        or codecs than each other or `like`. The line names the setting.
    """
    if not texts:
        raise SetupError(f"config.data.{key} is empty: name at least one 'PATH=WEIGHT'")
    try:
        return _open_sources(texts, directory, like)
    except ValueError as error:
        shown = ", ".join(map(repr, texts))
        hint = ""
        if key == "val_sources":
            hint = f'; --config.data.{key}="()" trains without validation'
        raise SetupError(f"config.data.{key}={shown}: {error}{hint}") from error


def _open_sources(texts, directory: str, like: RecordSource | None):
    parsed = [mixture.parse_source(text) for text in texts]
    sources = [RecordSource(locate(path, directory)) for path, _ in parsed]
    like = like or sources[0]
    for source in sources:
        for what in ("sequence", "encoders", "codec"):
            ours, theirs = getattr(like.manifest, what), getattr(source.manifest, what)
            if ours != theirs:
                raise SetupError(
                    f"{source.path} and {like.path} differ in their {what}: {theirs} and {ours}"
                )
        source.check_statistics()
    weights = [weight for _, weight in parsed]
    mixture.check_sources(sources, weights)
    return sources, weights


def mixed_statistics(sources, weights) -> dict[str, np.ndarray]:
    """Mean and std of the latents of a weighted mixture, per channel, float32 `C` each."""
    share = np.divide(weights, sum(weights))
    means = np.stack([source.manifest.latent_mean for source in sources])
    squares = np.stack([source.manifest.latent_std for source in sources]) ** 2 + means**2
    mean = share @ means
    std = np.sqrt(share @ squares - mean**2)
    return {"latent_mean": np.float32(mean), "latent_std": np.float32(std)}


def kept_statistics(start: dict, data: dict, folder) -> dict[str, np.ndarray]:
    """The latent mean and std that belong to the weights which training starts from.

    A network expects latents that are normalised as in its own training, so these statistics
    replace the data's. The log says by how much they differ, and warns if that looks like latents
    of another codec.
    """
    kept = {name: start[name] for name in ("latent_mean", "latent_std") if name in start}
    if len(kept) < 2:
        return {}
    shift = np.abs((data["latent_mean"] - kept["latent_mean"]) / kept["latent_std"]).max()
    factor = np.exp(np.abs(np.log(data["latent_std"] / kept["latent_std"])).max())
    alike = shift < 0.5 and factor < 1.5
    logging.log(
        logging.INFO if alike else logging.WARNING,
        "latents are normalised with the statistics of %s: the data's means differ by up to %.2g "
        "of its stds, and stds by a factor of up to %.3g%s",
        folder,
        shift,
        factor,
        "" if alike else ": are the data's latents those of another codec?",
    )
    return kept


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of. It has been checked, and nothing is written yet."""

    mesh: jax.sharding.Mesh
    topology: Topology | None
    net: MMDiT
    sources: list[RecordSource]
    weights: list[float]
    val: tuple[list[RecordSource], list[float]] | None
    model: ModelConfig
    step: StepConfig
    optimizer: OptimizerConfig
    teacher: Teacher | None
    teacher_variables: dict | None
    profile: tuple[int, int] | None
    selection: Selection

    def compiler_options(self) -> dict:
        """With which the step is compiled."""
        options = dict(self.topology.compiler_options) if self.topology else {}
        if self.net.attention == "cudnn":
            # The gradient of cuDNN's kernel adds in any order otherwise, and a run that resumes
            # would differ in its last bits from one that was never interrupted.
            options["xla_gpu_exclude_nondeterministic_ops"] = True
        return options


def _read_selection(config: ConfigDict, net: MMDiT, dry_run: bool) -> Selection:
    """What is trained.

    Raises:
      ValueError: patterns that match nothing, or frozen parameters of a run without a start.
    """
    adapter = _dataclass_from(AdapterConfig, dict(config.adapter), "adapter")
    found = select(net, config.optimizer.train_only, config.optimizer.freeze, adapter)
    if not (found.is_whole or config.init_from or dry_run):
        raise SetupError(
            "config.init_from is empty: what config.optimizer.train_only, config.optimizer.freeze "
            "or config.adapter.rank leave frozen would stay random"
        )
    return found


def read_setup(config: ConfigDict, without_data: bool) -> Setup:
    """Checks all that can be checked before anything is computed.

    Raises:
      SetupError: a setting or a data source that will not do.
    """
    with _setup_errors():
        ranges.check(config.to_dict())
        settings = step_config(config)
        optimizer = _dataclass_from(OptimizerConfig, dict(config.optimizer), "optimizer")
        model_config(config, None)
        topology = _read_topology(config, without_data)
        mesh = sharding.make_mesh(**config.mesh, devices=topology and topology.devices)
        check_batch(settings, config.batch_size, mesh, config.accumulate)
        if topology is None:
            sharding.process_part(mesh, config.batch_size)
        sources, weights, val = [], [], None
        if config.data.sources or not without_data:
            sources, weights = open_sources(config.data.sources, config.data.dir, "sources")
        if sources and config.data.val_sources and (config.eval_every or config.sample_every):
            val = open_sources(config.data.val_sources, config.data.dir, "val_sources", sources[0])
        model = model_config(config, sources[0].manifest if sources else None)
        sharding.check_model(model, mesh)
        net = MMDiT(
            model,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            attention=_attention(config, model, settings.objective, mesh, topology),
            scan=_scans(config.scan_blocks, mesh),
        )
        check_network(net, settings)
        selection = _read_selection(config, net, dry_run=without_data)
        manifest = sources[0].manifest if sources else None
        teacher, variables = load_teacher(settings.objective, net, manifest)
        profile = monitor.parse_profile(config.profile)
    return Setup(
        mesh=mesh,
        topology=topology,
        net=net,
        sources=sources,
        weights=weights,
        val=val,
        model=model,
        step=settings,
        optimizer=optimizer,
        teacher=teacher,
        teacher_variables=variables,
        profile=profile,
        selection=selection,
    )


def _attention(config: ConfigDict, model: ModelConfig, objective, mesh, topology) -> str:
    """How attention is computed; "auto" takes cuDNN's where it can."""
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda") and topology is None
    if config.attention == "auto":
        fits = config.dtype == "bfloat16" and model.head_dim % 8 == 0 and model.head_dim <= 128
        return "cudnn" if gpu and fits and not objective.needs_jvp else "xla"
    if config.attention == "cudnn" and not gpu:
        raise SetupError("config.attention=cudnn needs NVIDIA GPUs on this machine")
    if config.attention == "cudnn" and config.dtype != "bfloat16":
        raise SetupError(f"config.attention=cudnn takes dtype bfloat16, not {config.dtype}")
    return config.attention


def _scans(setting: bool | None, mesh) -> bool:
    """Whether blocks are scanned: by default on accelerators; on CPUs it is slow."""
    return mesh.devices.flat[0].platform != "cpu" if setting is None else setting


def _read_topology(config: ConfigDict, dry_run: bool) -> Topology | None:
    if not config.topology:
        return None
    if not dry_run:
        raise SetupError(
            f"config.topology={config.topology} describes devices that are not there: it is for "
            "--dry_run"
        )
    try:
        return describe(config.topology)
    except ValueError as error:
        raise SetupError(f"config.topology {error}") from None


def check_batch(step: StepConfig, batch_size: int, mesh, accumulate: int) -> None:
    """Raises ValueError if devices and microbatches do not divide a batch and its s = t rows.

    Also if the objective cannot take the rows of a microbatch.
    """
    sharding.check_batch_size(batch_size, mesh, accumulate)
    instant = step.num_instant(batch_size)
    if instant % accumulate:
        raise SetupError(
            f"config.accumulate {accumulate} does not divide the {instant} rows with s = t of "
            f"batch_size {batch_size}"
        )
    step.objective.check_rows(instant // accumulate, batch_size // accumulate)


def initial_stats(setup: Setup) -> dict[str, np.ndarray]:
    """The network's collection "stats" from the data; without data, values of the same shapes."""
    if not setup.sources:
        c = setup.model
        text = np.zeros((c.text_seq_len, c.text_dim), np.float32)
        return {
            "latent_mean": np.zeros(c.latent_dim, np.float32),
            "latent_std": np.ones(c.latent_dim, np.float32),
            "empty_text": text,
        }
    stats = mixed_statistics(setup.sources, setup.weights)
    return stats | {"empty_text": setup.sources[0].empty_text}


@contextlib.contextmanager
def _setup_errors():
    """Settings are checked where they are used; here their errors get one name."""
    try:
        yield
    except ValueError as error:
        raise SetupError(str(error)) from error
