"""What the bytes of coded pictures tell without decoding: damage, and changing parameters.

The codecs are those that mp4 files may keep (`COPIED`). Sources: ISO 14496-10 and 23008-2 (NAL
units of H.264 and HEVC), 14496-15 (how files store them) and 14496-2 (MPEG-4).
"""

import re
from collections.abc import Iterator

DECODED = {"av1", "vp9"}  # whose damage only a decoder finds
COPIED = {"h264", "hevc", "av1", "vp9", "mpeg4"}  # what browsers or players show in mp4
_START = re.compile(b"\0\0\1")
_VOP = b"\0\0\1\xb6"


class Malformed(ValueError):
    """Bytes that are not what the codec says, or that a single mp4 track cannot hold."""


def _stored_units(data: bytes, length_size: int) -> Iterator[bytes]:
    """NAL units that follow their lengths, as in mp4 and Matroska."""
    at = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + length_size], "big")
        at += length_size
        if not 0 < size <= len(data) - at:
            raise Malformed("damaged packets")
        yield data[at : at + size]
        at += size


def _streamed_units(data: bytes) -> Iterator[bytes]:
    """NAL units between start codes, as in MPEG-TS and AVI."""
    starts = [match.end() for match in _START.finditer(data)]
    if not starts:
        raise Malformed("damaged packets")
    for start, end in zip(starts, starts[1:] + [len(data) + 3]):
        yield data[start : end - 3].rstrip(b"\0")


def _check_units(codec: str, extradata: bytes, data: bytes):
    hevc = codec == "hevc"
    if extradata[0] == 1:
        units = _stored_units(data, (extradata[21 if hevc else 4] & 3) + 1)
    else:
        units = _streamed_units(data)
    for unit in units:
        if not unit or unit[0] & 0x80:  # forbidden_zero_bit
            raise Malformed("damaged packets")
        kind = unit[0] >> 1 & 63 if hevc else unit[0] & 31
        if kind in ((32, 33, 34) if hevc else (7, 8)) and unit not in extradata:
            raise Malformed("parameters that change in the middle")


def check_packet(codec: str, extradata: bytes | None, data: bytes):
    """Look whether a coded frame is well-formed and uses the stream's own parameters.

    Nothing is looked at where only a decoder would find damage (`DECODED`).

    Args:
      codec: one of `COPIED`.
      extradata: the stream's parameters.
      data: one packet.

    Raises:
      Malformed: damaged, or with other parameters (size, profile) than the stream's.
    """
    if codec in ("h264", "hevc"):
        if not extradata or len(extradata) < 7 or (codec == "hevc" and len(extradata) < 23):
            raise Malformed("no parameters in the header")
        _check_units(codec, extradata, data)
    elif codec == "mpeg4" and (not extradata or data.count(_VOP) != 1):
        # Several frames in one packet, as DivX packed them, are shown by few players.
        raise Malformed("packets that are not one frame each")
