"""The validator's page: what was found, histograms, and some clips to look at and listen to."""

import numpy as np
from matplotlib import pyplot as plt

from vcm_jax.codec import load_codec
from vcm_jax.media import page
from vcm_jax.media.read import MediaError

_EXAMPLES = 4


def _histograms(source, found) -> page.Html:
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
    return page.plot(figure)


def _latents(record: dict, manifest) -> page.Html:
    """The record's latents over time, in units of their standard deviations."""
    figure, axis = plt.subplots(figsize=(11, 1.8), layout="constrained")
    extent = (0, manifest.sequence.duration, manifest.latent_dim - 0.5, -0.5)
    latents = record["latent_mean"] - np.array(manifest.latent_mean)
    latents /= np.maximum(manifest.latent_std, 1e-6)
    axis.imshow(latents.T, aspect="auto", extent=extent, interpolation="nearest", vmin=-2, vmax=2)
    axis.set_xlabel("s", fontsize=8)
    axis.set_ylabel("latent channel", fontsize=8)
    return page.plot(figure)


def _film_strip(clip, duration: float) -> page.Html | None:
    """Frames of a clip's video; None if they cannot be read."""
    try:
        return page.film_strip(clip.path, duration, start=clip.start)
    except MediaError:
        return None


def _example(source, codec, index: int, clips: dict) -> page.Html:
    """One record: its picture if the media file is there, its sound and its latents."""
    try:
        record = source[index]
        sound = np.asarray(codec.decode(record["latent_mean"]))
    except ValueError as error:
        return page.element("p", error, class_="error")
    parts = [page.element("h3", f"{record['id']}: {record['caption'] or '(no caption)'}")]
    if source.manifest.has_video and record["id"] in clips:
        strip = _film_strip(clips[record["id"]], source.manifest.sequence.duration)
        parts += [page.element("div"), page.element("figure", strip)]
    parts.append(page.element("div", page.player(sound, codec.sample_rate)))
    parts.append(page.element("figure", _latents(record, source.manifest)))
    return page.element("div", parts, class_="clip")


def _facts(manifest, found) -> str:
    sequence = manifest.sequence
    return (
        f"{manifest.num_records} records of {sequence.duration:g} s at {sequence.sample_rate} Hz, "
        f"{manifest.num_failures} clips left out; codec {manifest.codec['name']}, encoders "
        f"{manifest.encoders['name']}; {len(set(found.captions))} different captions; "
        f"{sum(shard['bytes'] for shard in manifest.shards) / 1e9:.2f} GB"
    )


def write_page(path, source, found, findings, clips) -> None:
    """Writes the page, which is there completely or not at all.

    Args:
      path: of the HTML file.
      source: RecordSource.
      found: Survey of its records.
      findings: list of Finding.
      clips: {id: Clip} of the media files that were found.

    Raises:
      OSError: the page cannot be written.
    """
    errors = sum(finding.level == "error" for finding in findings)
    verdict = (
        page.element("span", f"not fit to train on: {errors} kinds of errors", class_="error")
        if errors
        else page.element("span", "fit to train on", class_="fit")
    )
    rows = [
        [
            page.element("span", finding.level, class_=finding.level),
            finding.what,
            finding.count,
            page.element("small", ", ".join(finding.examples)),
        ]
        for finding in findings
    ]
    parts = [
        page.element("h1", f"{source.path}: ", verdict),
        page.element("p", _facts(source.manifest, found)),
        page.element("h2", "Found"),
        page.table(["level", "what", "records", "examples"], rows, class_="text")
        if rows
        else page.element("p", "nothing"),
    ]
    if found.ids:
        codec = load_codec(source.path / "codec")
        chosen = np.unique(np.linspace(0, len(source) - 1, _EXAMPLES).astype(int))
        parts += [
            page.element("h2", "Histograms"),
            _histograms(source, found),
            page.element("h2", "Examples"),
            page.element("p", "The sound is decoded from the latents.", class_="note"),
            [_example(source, codec, int(index), clips) for index in chosen],
        ]
    page.write_document(path, f"Records: {source.path.name}", *parts)
