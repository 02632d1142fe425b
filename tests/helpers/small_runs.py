"""Small records, configs and runs that many tests start from."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from vcm_jax.codec.linear import fit_linear_codec
from vcm_jax.features import extract
from vcm_jax.features.encoders import WeightsFreeEncoders
from vcm_jax.impacts.dataset import write_dataset
from vcm_jax.models import MMDiT
from vcm_jax.records.manifest import Manifest, write_manifest
from vcm_jax.records.schema import (
    EMPTY_TEXT,
    describe_fields,
    deserialize,
    latent_statistics,
    latent_sums,
    serialize,
    write_shard,
)
from vcm_jax.records.sequence import SequenceConfig
from vcm_jax.runs import checkpoint, description
from vcm_jax.training import setup
from vcm_jax.training.state import OptimizerConfig, make_init, make_optimizer
from vcm_jax.training.writer import Writer

CONFIGS = Path(__file__).parents[2] / "configs"


SEQUENCE = SequenceConfig(duration=0.64, text_seq_len=5)


ENCODERS = WeightsFreeEncoders(clip_dim=6, sync_dim=5, text_dim=4)


def load_config(name, *argument):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def write_records(folder, size, seed=0, encoders=ENCODERS):
    rng = np.random.default_rng(seed)
    codec = fit_linear_codec(0.1 * rng.standard_normal((3, SEQUENCE.num_samples)))
    shapes = {
        "latent_mean": (SEQUENCE.latent_seq_len, codec.latent_dim),
        "clip": (SEQUENCE.clip_seq_len, encoders.clip_dim),
        "sync": (SEQUENCE.sync_seq_len, encoders.sync_dim),
        "text": (SEQUENCE.text_seq_len, encoders.text_dim),
    }
    packed, sums = [], 0
    for i in range(size):
        record = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        record |= {"id": str(i), "caption": "x", "latent_std": 0 * record["latent_mean"]}
        packed.append(serialize(record))
        sums = sums + latent_sums(record["latent_mean"], record["latent_std"])
    folder.mkdir(parents=True)
    path = folder / "part.array_record"
    write_shard(path, packed)
    codec.save(folder / "codec")
    np.save(folder / EMPTY_TEXT, encoders.encode_text("", SEQUENCE))
    mean, std = latent_statistics(sums)
    codec_spec = {"name": codec.name, "fingerprint": codec.fingerprint, "latent_dim": 20}
    shard = {"name": path.name, "records": size, "bytes": path.stat().st_size}
    write_manifest(
        folder,
        Manifest(
            SEQUENCE,
            encoders.spec(),
            codec_spec,
            True,
            size,
            0,
            describe_fields(deserialize(packed[0])),
            mean.tolist(),
            std.tolist(),
            [shard],
            str(seed),
        ),
    )


SIZES = dict(clip_dim=6, sync_dim=5, text_dim=4, hidden_dim=16, num_heads=2, depth=2, fused_depth=1)


def make_config(data, objective="vcm", **changes):
    config = load_config("impacts", objective)
    config.update_from_flattened_dict({
        "steps": 6, "batch_size": 8, "data.dir": str(data), "log_every": 2, "checkpoint_every": 3,
        "sample_every": 0, "snapshot_every": 0,
        "eval_every": 3, "eval_batches": 1, "eval_sample_steps": (1,),
        "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2,
        **{f"model_overrides.{name}": size for name, size in SIZES.items()},
        **changes,
    })  # fmt: skip
    return config


def final_state(workdir):
    """The last checkpoint of a run, on the host, whatever devices and processes have saved it."""
    with checkpoint.open_manager(workdir, read_only=True) as manager:
        step = manager.latest_step()
        tree = manager.item_metadata(step)["state"].tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(item=tree, restore_args=on_host)
        return manager.restore(step, args=ocp.args.Composite(state=args))["state"]


def extract_test_records(world, name: str):
    """The folder WORLD/NAME with the records of the test clips of `make_world`."""
    extract.extract(
        world / name,
        videos=world / "data/test",
        captions=world / "data/test.tsv",
        codec=world / "records/codec",
        duration=1.28,
        clip_dim=6,
        sync_dim=5,
        text_dim=4,
    )
    return world / name


def make_world(folder, clips: int, **extraction):
    """Clips, and the workdir of a run whose weights are random and not zero."""
    write_dataset(folder / "data", {"train": clips, "test": 3}, 1.28, seed=0, workers=1)
    extract.extract(
        folder / "records",
        videos=folder / "data/train",
        captions=folder / "data/train.tsv",
        duration=1.28,
        clip_dim=6,
        sync_dim=5,
        text_dim=4,
        **extraction,
    )
    save_run(folder)
    return folder


def save_run(folder, **changes):
    """folder/run: the workdir of a run on folder/records, with weights that are not zero."""
    config = make_config(folder, **{"data.sources": ("records=1",)} | changes)
    (source,), weights = setup.open_sources(config.data.sources, config.data.dir, "sources")
    model = setup.model_config(config, source.manifest)
    stats = setup.mixed_statistics([source], weights) | {"empty_text": source.empty_text}
    init = make_init(MMDiT(model), stats, make_optimizer(OptimizerConfig()), (0.05,))
    state = jax.jit(init)(jax.random.key(0))
    noisy = lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape)
    state = state.replace(ema=jax.tree.map(noisy, state.ema))
    workdir = folder / "run"
    workdir.mkdir()
    settings = json.loads(config.to_json_best_effort())
    description.write(workdir, settings, model, source.manifest, source.path / "codec")
    with checkpoint.Saver(checkpoint.open_manager(workdir)) as saver:
        saver.save(int(state.step), state, {})
    writer = Writer(workdir)
    for step in (1, 2):
        writer.scalars(step, {"train/loss": 1 / step, "train/mse_jump": float("nan")})
    writer.close()
