"""Tables, separated by tabs or commas, as pandas, spreadsheets and people write them."""

import codecs
import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vcm_jax.atomic import atomic_path

_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class TableError(ValueError):
    """A table that cannot be read without losing something; one line with the line's number."""


def read_rows(path, delimiter: str = "\t") -> list[tuple[int, list[str]]]:
    """Read a table in either of its two dialects.

    In the dialect of pandas and spreadsheets a field may be in double quotes; it can then contain
    delimiters, line breaks and doubled quotes. In the plain dialect quotes mean nothing. A table
    is plain if it cannot be read in the other dialect, but it must not use both. Encodings are
    UTF-8 and, with a byte order mark, UTF-16. Bytes that are not UTF-8 become surrogates, as in
    Python's file names. Blank lines are skipped.

    Returns:
      (number of its first line, fields) of each row.

    Raises:
      TableError: unreadable, or with quotes that do not match, so that a field would be cut.
    """
    text = _decode(path)
    try:
        return list(_parse(text, delimiter, csv.QUOTE_MINIMAL))
    except _RowError as error:
        return _parse_plain(path, text, delimiter, error)


def read_table(path, delimiter: str = "\t") -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Read a table with a header, see `read_rows`.

    Returns:
      The names of the columns, and (number of its first line, {column: field}) of each row. Names
      and fields have no whitespace around them.

    Raises:
      TableError: see `read_rows`; also for a row with more or fewer fields than the header.
    """
    rows = read_rows(path, delimiter)
    header = [name.strip() for name in rows[0][1]] if rows else []
    table = []
    for line, fields in rows[1:]:
        while len(fields) > len(header) and not fields[-1].strip():
            fields.pop()
        if len(fields) != len(header):
            raise TableError(
                f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)}: put "
                f"a field that contains a {'tab' if delimiter == chr(9) else 'comma'} or a line "
                "break in double quotes"
            )
        table.append((line, dict(zip(header, map(str.strip, fields)))))
    return header, table


def write_table(path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table that `read_table` reads back, in the dialect of pandas."""
    rows = [header, *rows]
    # The csv module does not know that a carriage return needs quotes.
    returns = any("\r" in field for row in rows for field in row)
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n", quoting=quoting).writerows(rows)


def _decode(path) -> str:
    try:
        data = Path(path).read_bytes()
        for bom, encoding in _BOMS.items():
            if data.startswith(bom):
                return data[len(bom) :].decode(encoding)
        return data.decode("utf-8", "surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TableError(f"{path}: unreadable ({reason})") from error


class _RowError(Exception):
    """What the csv module says about the row that begins at `line`."""

    def __init__(self, line: int, reason: str):
        super().__init__(reason)
        self.line = line


def _parse(text: str, delimiter: str, quoting: int) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, fields) of each row that is not blank."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _RowError(line, str(error)) from None
        if len(fields) > 1 or (fields and fields[0].strip()):
            yield line, fields


def _parse_plain(
    path, text: str, delimiter: str, mismatch: _RowError
) -> list[tuple[int, list[str]]]:
    """The rows of a table in which quotes mean nothing; `mismatch`: why they mean nothing."""
    try:
        rows = list(_parse(text, delimiter, csv.QUOTE_NONE))
    except _RowError as error:
        raise TableError(f"{path}, line {error.line}: unreadable ({error})") from None
    if any(_is_ambiguous(field) for _, fields in rows for field in fields):
        raise TableError(
            f"{path}, line {mismatch.line}: the double quotes do not match, so that a field would "
            "be cut: put the field in double quotes and double those inside of it"
        )
    return rows


def _is_ambiguous(field: str) -> bool:
    """Whether a field of a plain table could be a field of the other dialect, or cut off."""
    if not field.startswith('"'):
        return False
    inner, last = field[1:-1], field[-1]
    unclosed = '"' not in field[1:]
    return unclosed or (last == '"' and '"' not in inner.replace('""', ""))
