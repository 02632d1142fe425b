"""The validator's page: what was found, histograms, and some clips to look at and listen to."""

import base64
import html
import io

import matplotlib
import numpy as np
import soundfile

from vcm_jax.atomic import atomic_path
from vcm_jax.codec import load_codec
from vcm_jax.media.read import MediaError, read_frames

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_EXAMPLES = 4
_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse; width: 100% } td { padding: .25em .6em; vertical-align: top;
border-top: 1px solid #ddd } .error { color: #b00 } .warning { color: #a60 } .fit { color: #070 }
img { max-width: 100% } small { color: #666; overflow-wrap: anywhere }
.clips { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5em } audio { width: 100% }
"""


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _figure(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    plt.close(figure)
    return f'<img src="{_data_uri("image/png", buffer.getvalue())}">'


def _histograms(source, found) -> str:
    names = list(found.values)
    rows = -(-(len(names) + 1) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(12, 2.4 * rows), layout="constrained")
    axes = axes.ravel()
    for axis, name in zip(axes, names):
        values = found.values[name][np.isfinite(found.values[name])]
        axis.hist(values, bins=40, color="#4477aa")
        axis.set_title(name, fontsize=10)
        axis.set_ylabel("records", fontsize=8)
    axis = axes[len(names)]
    channels = np.arange(source.manifest.latent_dim)
    axis.errorbar(channels, source.manifest.latent_mean, source.manifest.latent_std, fmt="o", ms=3)
    axis.set_title("latents: mean and std per channel", fontsize=10)
    for axis in axes[len(names) + 1 :]:
        axis.set_visible(False)
    return _figure(figure)


def _shrink(frame: np.ndarray) -> np.ndarray:
    step = max(1, len(frame) // 90)
    return frame[::step, ::step]


def _pictures(clip, duration: float) -> str:
    """Four frames of a clip's video, side by side; nothing if it has none."""
    try:
        frames = read_frames(clip.path, {4 / duration: _shrink}, duration, clip.start)[4 / duration]
    except MediaError:
        return ""
    buffer = io.BytesIO()
    plt.imsave(buffer, np.concatenate(list(frames), axis=1), format="png")
    return f'<img src="{_data_uri("image/png", buffer.getvalue())}">'


def _example(source, codec, index: int, clips) -> str:
    record = source[index]
    sequence = source.manifest.sequence
    figure, axis = plt.subplots(figsize=(6, 1.8), layout="constrained")
    extent = (0, sequence.duration, source.manifest.latent_dim - 0.5, -0.5)
    latents = record["latent_mean"] - np.array(source.manifest.latent_mean)
    latents /= np.maximum(source.manifest.latent_std, 1e-6)
    axis.imshow(latents.T, aspect="auto", extent=extent, interpolation="nearest", vmin=-2, vmax=2)
    axis.set_xlabel("s", fontsize=8)
    axis.set_ylabel("latent channel", fontsize=8)
    sound = np.asarray(codec.decode(record["latent_mean"]))
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.clip(sound, -1, 1), codec.sample_rate, format="WAV", subtype="PCM_16"
    )
    caption = html.escape(record["caption"]) or "(no caption)"
    parts = [
        f"<p><b>{html.escape(record['id'])}</b><br>{caption}",
        f'<audio controls src="{_data_uri("audio/wav", buffer.getvalue())}"></audio>',
        _figure(figure),
    ]
    if source.manifest.has_video and record["id"] in clips:
        parts.append(_pictures(clips[record["id"]], sequence.duration))
    return f"<div>{''.join(parts)}</div>"


def write_page(path, source, found, findings, clips) -> None:
    """Write the page, atomically.

    Args:
      path: of the HTML file.
      source, found, findings: RecordSource, Survey, [Finding].
      clips: {id: Clip} of the media files, as far as they are there.
    """
    manifest = source.manifest
    errors = sum(finding.level == "error" for finding in findings)
    verdict = (
        f'<span class="error">not fit to train on: {errors} kinds of errors</span>'
        if errors
        else '<span class="fit">fit to train on</span>'
    )
    lines = [
        f'<tr><td class="{f.level}">{f.level}<td>{html.escape(f.what)}<td>{f.count}'
        f"<td><small>{html.escape(', '.join(f.examples))}</small>"
        for f in findings
    ] or ["<tr><td>nothing"]
    sequence = manifest.sequence
    facts = (
        f"{manifest.num_records} records of {sequence.duration:g} s at {sequence.sample_rate} Hz, "
        f"{manifest.num_failures} clips left out; codec {manifest.codec['name']}, encoders "
        f"{manifest.encoders['name']}; {len(set(found.captions))} different captions; "
        f"{sum(shard['bytes'] for shard in manifest.shards) / 1e9:.2f} GB"
    )
    parts = [
        f"<!doctype html><meta charset=utf-8><title>Records</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(str(source.path))}: {verdict}</h1><p>{html.escape(facts)}",
        f"<h2>Found</h2><table>{''.join(lines)}</table>",
    ]
    if found.ids:
        codec = load_codec(source.path / "codec")
        chosen = np.unique(np.linspace(0, len(source) - 1, _EXAMPLES).astype(int))
        parts += ["<h2>Histograms</h2>", _histograms(source, found), "<h2>Examples</h2>"]
        parts.append("<p>The sound is what the codec makes of the latents.<div class=clips>")
        for index in chosen:
            try:
                parts.append(_example(source, codec, int(index), clips))
            except ValueError as error:
                parts.append(f'<div class="error">{html.escape(str(error))}</div>')
        parts.append("</div>")
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
