"""One continuous time line for streams whose time stamps may start again."""

import collections
from collections.abc import Iterable, Iterator

STEP_BACK = 0.1  # s; FFmpeg's own limits between jitter and time stamps that start again
LEAP = 10.0  # s; in formats whose time stamps may jump (MPEG-TS and MPEG-PS)
_PATIENCE = 1000  # packets of sound that wait for the picture to start again


class Line:
    """The time line of one stream, in the stream's ticks."""

    def __init__(self, stream, leaps: bool):
        self.base, self.leaps = stream.time_base, leaps
        rate = stream.average_rate if stream.type == "video" else None
        self.step = max(1, round(1 / (rate * self.base))) if rate else 0
        self.offset, self.last, self.end = 0, None, None
        self.before = None  # (offset, last) before a break, until a second packet has followed it
        self.joined = 0  # how many of the picture's breaks this stream has followed

    def breaks_at(self, packet) -> bool:
        """Whether the time stamps start again with this packet."""
        if packet.dts is None or self.last is None:
            return False
        step = float((packet.dts - self.last) * self.base)
        if self.before and not 0 < step < 1:
            offset, last = self.before
            if 0 < float((packet.dts - last) * self.base) < 1:
                self.offset = offset  # only one time stamp was wrong
                return False
        return step < -STEP_BACK or (self.leaps and step > LEAP)

    def restart(self, packet, offset: int | None = None):
        """Shift time stamps by `offset` from here on; None lets this packet follow the last one."""
        self.before = self.offset, self.last
        first = packet.dts if packet.pts is None else packet.pts
        self.offset = self.end - first if offset is None else offset
        self.last = None

    def stamp(self, packet):
        """Move a packet onto the continuous time line."""
        if packet.dts is not None:
            if self.last is not None:
                self.before = None
            self.last = packet.dts
            packet.dts += self.offset
        if packet.pts is not None:
            packet.pts += self.offset
        shown = packet.dts if packet.pts is None else packet.pts
        if shown is not None:
            end = shown + (packet.duration or self.step)
            self.end = end if self.end is None else max(self.end, end)
        return packet


def continuous(packets: Iterable, lines: dict[int, Line], leader: Line | None) -> Iterator:
    """Pass on the packets of some streams, with time stamps on one continuous line.

    Recordings that were joined end to end have time stamps that start again. There the picture
    continues one frame after its last one, and the sound moves by as much as the picture does.

    Args:
      packets: of any streams; their time stamps are changed in place.
      lines: {stream index: its line} of the wanted streams. While a packet is handled, the line's
        `offset` is the packet's.
      leader: the picture's line; None lets each stream continue where it ended.
    """
    shifts = []  # seconds, one for each time that the picture started again
    held = collections.deque()  # sound

    def release(patience):
        while held:
            line = lines[held[0].stream_index]
            if line.breaks_at(held[0]):
                if line.joined < len(shifts):
                    line.restart(held[0], round(shifts[line.joined] / line.base))
                    line.joined += 1
                elif leader is None or len(held) > patience:
                    line.restart(held[0])
                else:
                    return
            yield line.stamp(held.popleft())

    for packet in packets:
        line = lines.get(packet.stream_index)
        if line is None:
            continue
        if line is leader:
            if line.breaks_at(packet):
                line.restart(packet)
                shifts.append(line.offset * line.base)
            yield line.stamp(packet)
        else:
            held.append(packet)
        yield from release(_PATIENCE)
    yield from release(0)
