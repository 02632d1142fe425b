"""tf.train.Example without TensorFlow: named byte strings, packed and located without copies.

An Example is the message Features { map<string, Feature { BytesList { bytes } }> }. All of its
fields are length-delimited, with field number 1 (tag 0x0a) or 2 (tag 0x12).
"""

from collections.abc import Mapping


def _varint(value: int) -> bytes:
    """Encode an integer as a varint of protocol buffers."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def _delimited(tag: bytes, *content: bytes) -> bytes:
    return b"".join((tag, _varint(sum(map(len, content))), *content))


def pack(features: Mapping[str, bytes]) -> bytes:
    """Pack one byte string per feature into an Example, as TensorFlow Datasets reads it."""
    entries = []
    for name, value in features.items():
        feature = _delimited(b"\n", _delimited(b"\n", value))
        entry = (_delimited(b"\n", name.encode()), _delimited(b"\x12", feature))
        entries.append(_delimited(b"\n", *entry))
    return _delimited(b"\n", *entries)


def _content(data: bytes, position: int, tag: int) -> tuple[int, int]:
    """(start, end) of the content of the field at `position`.

    Raises:
      ValueError, IndexError: the field has another tag, or is cut off.
    """
    if data[position] != tag:
        raise ValueError(f"tag {data[position]:#x} at byte {position}, not {tag:#x}")
    position, length, shift = position + 1, 0, 0
    while True:
        byte = data[position]
        position += 1
        length |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    if position + length > len(data):
        raise ValueError(f"cut off at byte {len(data)}")
    return position, position + length


def unpack(data: bytes) -> dict[str, tuple[int, int]]:
    """Locate the features of an Example: {name: (start, end) of its byte string in `data`}.

    Raises:
      ValueError, IndexError: not an Example as `pack` makes it.
    """
    spans = {}
    position, end = _content(data, 0, 0x0A)
    while position < end:
        start, position = _content(data, position, 0x0A)
        name_start, name_end = _content(data, start, 0x0A)
        start = name_end
        for tag in (0x12, 0x0A, 0x0A):
            start, stop = _content(data, start, tag)
        spans[data[name_start:name_end].decode()] = (start, stop)
    return spans
