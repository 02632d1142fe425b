"""The validator: are these records fit to train on? Prints its findings and writes a page.

    python -m vcm_jax.data.validate RECORDS
    python -m vcm_jax.data.validate RECORDS --videos=DIR --captions=TSV --page=validate.html
    python -m vcm_jax.data.validate RECORDS --against=TEST_RECORDS

It reads every record of the folder. Given the media files, it decodes --media_clips of them; given
the list of captions, it compares every caption; given the records of a test set, it looks for
leaks. The exit code is 0 if the records are fit and 1 if they are not; each error says why.
Warnings alone do not make records unfit. It is 74 if the page that --page names cannot be written.
"""

from pathlib import Path

from absl import flags

from vcm_jax.cli import UNWRITABLE_CODE, run
from vcm_jax.data.checks import (
    check_captions,
    check_files,
    check_leaks,
    check_media,
    check_text,
)
from vcm_jax.data.validate_page import write_page
from vcm_jax.media.clips import (
    SOUND_SUFFIXES,
    VIDEO_SUFFIXES,
    Clip,
    composed,
    list_clips,
    read_captions,
)
from vcm_jax.records.findings import Finding, check_content
from vcm_jax.records.schema import RecordError
from vcm_jax.records.source import RecordSource
from vcm_jax.records.survey import survey


def validate(
    folder,
    *,
    videos=None,
    sounds=None,
    captions=None,
    against=None,
    media_clips: int = 200,
    page=None,
) -> list[Finding]:
    """Run all checks that the arguments allow, and write the page.

    Args:
      folder: of the records.
      videos, sounds: folder of the media files, one of the two or neither.
      captions: TSV that the records were made from.
      against: records of a test set.
      media_clips: how many media files to decode; 0: all.
      page: HTML file to write, or None.

    Returns:
      The findings, errors first.

    Raises:
      ValueError: a list or a folder of media that cannot be used.
    """
    clips = _find_media(videos, sounds, captions)
    rows = [(row.id, row.caption) for row in read_captions(captions)] if captions else None
    try:
        source = RecordSource(folder)
        other = RecordSource(against) if against else None
    except RecordError as error:
        return [Finding("error", str(error))]
    found = survey(source)
    findings = check_files(source) + check_content(source, found) + check_text(source)
    if clips is not None:
        findings += check_media(source, clips, media_clips)
    if rows is not None:
        findings += check_captions(Path(folder), found, rows)
    if other:
        findings += check_leaks(found, survey(other))
    findings.sort(key=lambda finding: finding.level != "error")
    if page:
        try:
            write_page(page, source, found, findings, clips or {})
        except (OSError, ValueError) as error:  # the findings are worth more than the page
            findings.append(Finding("warning", f"{page}: not written ({error})"))
    return findings


def _find_media(videos, sounds, captions) -> dict[str, Clip] | None:
    """{id in Unicode's composed form: clip}; None if there is no folder of media files."""
    if videos and sounds:
        raise ValueError("give one of --videos and --sounds, not both")
    if not (videos or sounds):
        return None
    suffixes = VIDEO_SUFFIXES if videos else SOUND_SUFFIXES + VIDEO_SUFFIXES
    clips, _ = list_clips(videos or sounds, captions, suffixes)
    # Without a list an id may be a path or a stem.
    stems = {} if captions else {composed(clip.path.stem): clip for clip in clips}
    return stems | {composed(clip.id): clip for clip in clips}


def define_flags():
    flags.DEFINE_string("videos", None, "Folder of the videos.")
    flags.DEFINE_string("sounds", None, "Folder of the sounds, for records without pictures.")
    flags.DEFINE_string("captions", None, "TSV that the records were made from.")
    flags.DEFINE_string("against", None, "Records of the test set, to look for leaks.")
    flags.DEFINE_integer("media_clips", 200, "Media files to decode; 0: all.", lower_bound=0)
    flags.DEFINE_string("page", None, "HTML page to write (RECORDS/validate.html).")


def main(args, rest):
    if len(rest) != 1:
        raise ValueError("name one records folder")
    folder = Path(rest[0])
    page = Path(args.page or folder / "validate.html")
    names = ("videos", "sounds", "captions", "against", "media_clips")
    findings = validate(folder, page=page, **{name: args[name].value for name in names})
    for finding in findings:
        print(finding)
    fit = not any(finding.level == "error" for finding in findings)
    written = not any(finding.what.startswith(f"{page}: not written") for finding in findings)
    if written and page.exists():
        print(f"{page}: a page with the findings, histograms and examples")
    print(f"{folder}: {'fit' if fit else 'NOT fit'} to train on")
    if fit and args.page and not written:
        return UNWRITABLE_CODE
    return 0 if fit else 1


if __name__ == "__main__":
    run(main, define_flags, positional="the records folder")
