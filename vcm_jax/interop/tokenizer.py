"""CLIP's byte-pair tokenizer, exactly as open_clip's SimpleTokenizer.

transformers' own cleans captions in another way and pads with the end token; features of all 77
positions are used, so that the ids must be the same to the last one. The vocabulary comes from the
folder of the weights.
"""

import gzip
import hashlib
import html
import json
from pathlib import Path

import numpy as np
import regex
import tokenizers

from vcm_jax.interop.state_dict import StateDictError

_GZIP = "bpe_simple_vocab_16e6.txt.gz"
_START, _END = "<start_of_text>", "<end_of_text>"
_HUB_NAMES = {"<|startoftext|>": _START, "<|endoftext|>": _END}  # in vocab.json, tokenizer.json
_WORDS = regex.compile(
    rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte (GPT-2's table), in the order of their ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_LETTERS = _byte_letters()


def _pairs(lines) -> list[tuple[str, str]]:
    """Merges of the lines below a header."""
    return [(first, second) for first, second in (line.split() for line in lines[1:] if line)]


def _read(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of the files in `folder`."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        merges = _pairs((folder / "merges.txt").read_text("utf-8").split("\n"))
    elif (folder / "tokenizer.json").exists():
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary = content["model"]["vocab"] | added
        merges = [tuple(m.split() if isinstance(m, str) else m) for m in content["model"]["merges"]]
    elif (folder / _GZIP).exists():
        lines = gzip.decompress((folder / _GZIP).read_bytes()).decode("utf-8").split("\n")
        merges = _pairs(lines[: 49152 - 256 - 2 + 1])  # the file goes on, the vocabulary does not
        letters = list(_LETTERS.values())
        words = letters + [letter + "</w>" for letter in letters] + ["".join(m) for m in merges]
        vocabulary = {word: i for i, word in enumerate([*words, _START, _END])}
    else:
        raise StateDictError(
            f"{folder}: no vocabulary: vocab.json and merges.txt, tokenizer.json, or {_GZIP}"
        )
    return {_HUB_NAMES.get(word, word): i for word, i in vocabulary.items()}, merges


def clean(text: str) -> str:
    """open_clip's cleaning: mended Unicode, HTML entities, single spaces, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Captions to ids, with the vocabulary of a folder.

    Attributes:
      start, end: ids around each caption.
      size: how many ids there are.
      hash: of the vocabulary, the same for all its file formats.

    Raises:
      StateDictError: no vocabulary in the folder, or a damaged one.
    """

    def __init__(self, folder: Path):
        try:
            vocabulary, merges = _read(Path(folder))
            self.start, self.end = vocabulary[_START], vocabulary[_END]
            missing = [w for a in _LETTERS.values() for w in (a, a + "</w>") if w not in vocabulary]
            if missing:
                raise KeyError(missing[0])
            self._bpe = tokenizers.models.BPE(vocabulary, merges, end_of_word_suffix="</w>")
        except StateDictError:
            raise
        except Exception as error:  # json, gzip, unicode, KeyError, what tokenizers raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            raise StateDictError(f"{folder}: damaged or other vocabulary ({reason})") from error
        self.size = max(vocabulary.values()) + 1
        content = json.dumps([sorted(vocabulary.items()), merges])
        self.hash = hashlib.sha256(content.encode()).hexdigest()[:16]

    def _ids(self, text: str):
        for word in _WORDS.findall(clean(text)):
            if word in (_START, _END):
                yield self.start if word == _START else self.end
            else:
                letters = "".join(_LETTERS[byte] for byte in word.encode())
                yield from (token.id for token in self._bpe.tokenize(letters))

    def __call__(self, texts: list[str], length: int = 77) -> np.ndarray:
        """Ids (B, length) int64: start, the caption's, end, then 0.

        A caption that is too long is cut, its last id is then the end.
        """
        ids = np.zeros((len(texts), length), np.int64)
        for row, text in zip(ids, texts):
            found = [self.start, *self._ids(text), self.end][:length]
            if len(found) == length:
                found[-1] = self.end
            row[: len(found)] = found
        return ids
