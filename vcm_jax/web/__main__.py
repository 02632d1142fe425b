"""Serves a web page on which visitors drop a video and hear what a model makes of it.

    python -m vcm_jax.web --workdir=RUN
    python -m vcm_jax.web --model=mmaudio_large_44k_v2 --port=8000
    python -m vcm_jax.web --workdir=RUN --other=RUN2 --examples=VIDEOS --votes=votes.tsv
    python -m vcm_jax.web --workdir=RUN --host=0.0.0.0 --auth=NAME:PASSWORD

The page is for this computer alone unless --host says otherwise. It needs gradio, the extra `web`:
pip install "vcm_jax[web]". Visitors' files are temporary; one job works at a time, the others wait.
"""

import dataclasses
import os
import signal
import threading
from pathlib import Path

import numpy as np
from absl import flags

from vcm_jax.cli import define_run_flags, define_weight_flags, heading, run
from vcm_jax.media.clips import list_clips

_SHOWN = 5  # examples


def define_flags():
    heading("Model")
    define_run_flags(required=False)
    flags.DEFINE_string("model", None, "Public weights instead: their name, or a folder of files.")
    flags.DEFINE_string("other", None, "Another run, or other public weights, to compare with.")
    define_weight_flags()
    flags.DEFINE_bool(
        "low_memory", False, "Load public weights' encoders, network and codec for each job."
    )
    heading("Page")
    flags.DEFINE_string("examples", None, "Folder of videos to try, such as the run's test clips.")
    flags.DEFINE_string("captions", None, "TSV with columns id and caption (EXAMPLES.tsv).")
    flags.DEFINE_string("votes", "votes.tsv", "File to which votes of comparisons are added.")
    heading("Server")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: all of this computer.")
    flags.DEFINE_integer("port", None, "Port (the first free one from 7860 on).", 1, 65535)
    flags.DEFINE_string("auth", None, "NAME:PASSWORD that visitors must give.")
    heading("Limits")
    flags.DEFINE_float("max_megabytes", 100.0, "Size of an uploaded file.", 0.001)
    flags.DEFINE_float("max_seconds", 30.0, "Length of a sound.", 0.1)


def read_auth(text: str | None) -> tuple[str, str] | None:
    """(name, password) of NAME:PASSWORD.

    Raises:
      ValueError: one of them is missing.
    """
    if text is None:
        return None
    name, _, password = text.partition(":")
    if not name or not password:
        raise ValueError("--auth is NAME:PASSWORD")
    return name, password


def find_examples(folder: str | None, captions: str | None) -> list[tuple[Path, str]]:
    """(video, caption) of some clips of a folder, evenly spread.

    Args:
      folder: of videos; None for no examples.
      captions: list of captions; None for FOLDER.tsv, if that is there.

    Raises:
      ValueError: the folder or the list cannot be used.
    """
    if folder is None:
        if captions:
            raise ValueError("--captions needs --examples, the folder of its clips")
        return []
    beside = Path(f"{folder.rstrip(os.sep)}.tsv")
    listed = Path(captions) if captions else beside if beside.exists() else None
    clips = list_clips(Path(folder), listed)[0]
    if not clips:
        raise ValueError(f"--examples={folder}: there is no video in it")
    chosen = np.unique(np.linspace(0, len(clips) - 1, _SHOWN).astype(int))
    return [(clips[i].path.absolute(), clips[i].caption) for i in chosen]


def open_models(args) -> list:
    """The models that the flags name.

    Raises:
      ValueError: flags that contradict each other, or as `generation.run.load`.
    """
    from vcm_jax.runs.description import is_run
    from vcm_jax.web.models import open_model

    if bool(args.workdir) == bool(args.model):
        raise ValueError("give --workdir or --model")
    if args.model and args.checkpoint is not None:
        raise ValueError("--checkpoint is for --workdir: public weights have one version only")
    common = {"keep": not args.low_memory, "dtype": args.dtype, "encoder_folder": args.encoders}
    models = [
        open_model(
            args.workdir, args.model, step=args.checkpoint, codec_folder=args.codec, **common
        )
    ]
    if args.other:
        where = (args.other, None) if is_run(args.other) else (None, args.other)
        other = open_model(*where, **common)
        if other.name == models[0].name:
            models[0], other = (
                dataclasses.replace(model, name=name)
                for model, name in zip(
                    (models[0], other), _longer(args.workdir or args.model, args.other)
                )
            )
        models.append(other)
    return models


def _longer(*paths) -> list[str]:
    """Names of two models whose folders have the same name: with that of the folder above."""
    names = [f"{path.parent.name}/{path.name}" for path in (Path(p).absolute() for p in paths)]
    return names if names[0] != names[1] else [f"{names[0]} ({which})" for which in "12"]


def main(args) -> int | None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError('the page needs gradio: pip install "vcm_jax[web]"') from None
    from vcm_jax.web.asked import Limits
    from vcm_jax.web.files import Files

    auth = read_auth(args.auth)
    examples = find_examples(args.examples, args.captions)
    models = open_models(args)
    limits = Limits(megabytes=args.max_megabytes, seconds=args.max_seconds)
    files = Files()
    try:
        return _serve(args, models, limits, files, examples, auth)
    finally:
        files.close()


def _serve(args, models, limits, files, examples, auth) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    from vcm_jax.web.serve import prepare, start

    prepare(files)
    from vcm_jax.web.page import Page
    from vcm_jax.web.votes import Votes

    ended = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())
    page = Page(models, limits, files, Votes(args.votes), examples)
    blocks, address = start(page, args.host, args.port, auth)
    print(f"{address} (Ctrl-C ends it)", flush=True)
    ended.wait()
    blocks.close(verbose=False)


if __name__ == "__main__":
    run(main, define_flags, memory_hint="lower --max_seconds, or give --low_memory")
