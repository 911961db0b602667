"""Builds perf.data files byte by byte: either byte order, file or pipe, any attribute size, any sample part."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

FORMAT = """name: packet
ID: {id}
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:void * skbaddr;\toffset:8;\tsize:8;\tsigned:0;
\tfield:int len;\toffset:16;\tsize:4;\tsigned:1;
\tfield:__data_loc char[] name;\toffset:20;\tsize:4;\tsigned:0;
\tfield:char comm[16];\toffset:24;\tsize:16;\tsigned:0;
\tfield:__u16 ports[2];\toffset:40;\tsize:4;\tsigned:0;
\tfield:pid_t pid;\toffset:44;\tsize:4;\tsigned:1;
\tfield:__rel_loc unsigned int[] hops;\toffset:48;\tsize:4;\tsigned:0;
\tfield:u8 flag;\toffset:52;\tsize:1;\tsigned:0;
\tfield:s16 delta;\toffset:54;\tsize:2;\tsigned:1;

print fmt: "len=%d reason=%s", REC->len, __print_symbolic(REC->flag, {{ 1, "ONE" }}, {{ 0x10, "SIXTEEN" }})
"""

TRACEPOINT_ID = 777
SAMPLE_TYPE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 7 | 1 << 8 | 1 << 10 | 1 << 16  # IP TID TIME CPU PERIOD RAW IDENTIFIER


@dataclass
class Builder:
    """Puts a recording together.

    Parameters
    ----------
    order : str
        ``<`` or ``>``.
    sample_type, read_format : int
    attr_size : int
        64 to whatever a later kernel may write.
    ids : list of int
        Ids of the one tracepoint.
    """

    order: str = "<"
    sample_type: int = SAMPLE_TYPE
    read_format: int = 0
    attr_size: int = 128
    ids: list[int] = field(default_factory=lambda: [11, 12])
    records: list[bytes] = field(default_factory=list)

    def pack(self, layout: str, *values: int | bytes) -> bytes:
        """Pack values in the recording's byte order."""
        return struct.pack(self.order + layout, *values)

    def record(self, kind: int, body: bytes, *, misc: int = 0) -> bytes:
        """Return a record: header u32 type, u16 misc, u16 size, then its body."""
        return self.pack("IHH", kind, misc, 8 + len(body)) + body

    def add(self, kind: int, body: bytes) -> Builder:
        """Append a record."""
        self.records.append(self.record(kind, body))
        return self

    def payload(self, number: int, name: bytes = b"eth0", hops: tuple[int, ...] = (7, 8)) -> bytes:
        """Return the raw bytes of one tracepoint record of FORMAT."""
        text = name + b"\0"
        start = 56
        after = (start + len(text) + 3) // 4 * 4
        fixed = self.pack("HBBi", TRACEPOINT_ID, 1, 2, 4242)  # common fields
        fixed += self.pack("Qi", 0xFFFF888000000000 + number, -number)  # skbaddr, len
        fixed += self.pack("I", len(text) << 16 | start)  # name: length, offset
        fixed += b"reader\0garbage\0\0"  # comm: what follows the NUL is no text
        fixed += self.pack("HHi", 80, 1000 + number, 5)  # ports, pid
        fixed += self.pack("I", 4 * len(hops) << 16 | after - 52)  # hops: counted from the end of this field
        fixed += self.pack("Bxh", number & 0xFF, -3)  # flag, delta
        return fixed + text.ljust(after - start, b"\0") + self.pack(f"{len(hops)}I", *hops)

    def sample(
        self,
        number: int,
        *,
        time: int,
        cpu: int = 0,
        sample_id: int = 11,
        raw: bytes | None = None,
        before_raw: bytes = b"",
        after_raw: bytes = b"",
    ) -> Builder:
        """Append a SAMPLE record; `before_raw` are the READ and CALLCHAIN parts."""
        words = {
            16: self.pack("Q", sample_id),
            0: self.pack("Q", 0xFFFFFFFF81000000),
            1: self.pack("ii", 100, 101),
            2: self.pack("Q", time),
            3: self.pack("Q", 0xADD0),
            6: self.pack("Q", sample_id),
            9: self.pack("Q", 0x57),
            7: self.pack("ii", cpu, 0),
            8: self.pack("Q", 1),
        }
        body = b"".join(word for bit, word in words.items() if self.sample_type >> bit & 1) + before_raw
        if self.sample_type >> 10 & 1:
            content = self.payload(number) if raw is None else raw
            padded = content.ljust((len(content) + 4 + 7) // 8 * 8 - 4, b"\0")
            body += self.pack("I", len(padded)) + padded
        return self.add(9, body + after_raw)

    def attr(self, *, size: int | None = None) -> bytes:
        """Return the bytes of the attribute."""
        flags = 1 << 18 | 1 << 25 | 1 << 20  # sample_id_all, use_clockid, exclude_guest
        if self.order == ">":  # C bit fields start at the other end there
            flags = int(f"{flags:064b}"[::-1], 2)
        stated = self.attr_size if size is None else size
        fixed = self.pack("IIQQQQQ", 2, stated, TRACEPOINT_ID, 1, self.sample_type, self.read_format, flags)
        fixed += self.pack("IIQQQQIiQIHH", 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0)  # clockid 1 in its place
        return fixed.ljust(self.attr_size, b"\0")[: self.attr_size]

    def tracing(self) -> bytes:
        """Return tracing data with the one format."""
        text = FORMAT.format(id=TRACEPOINT_ID).encode()
        section = b"\x17\x08\x44tracing" + b"0.6\0" + bytes([self.order == ">", 8]) + self.pack("I", 4096)
        section += b"header_page\0" + self.pack("Q", 3) + b"abc" + b"header_event\0" + self.pack("Q", 0)
        section += self.pack("I", 0)  # no ftrace formats
        return section + self.pack("I", 1) + b"rx\0" + self.pack("I", 1) + self.pack("Q", len(text)) + text

    def string(self, text: str) -> bytes:
        """Return a perf_header_string: padded to 64 bytes."""
        content = text.encode().ljust(64, b"\0")
        return self.pack("I", len(content)) + content

    def features(self) -> dict[int, bytes]:
        """Return feature sections by number."""
        described = (
            self.pack("II", 1, self.attr_size) + self.attr() + self.pack("I", len(self.ids)) + self.string("rx:packet")
        )
        described += self.pack(f"{len(self.ids)}Q", *self.ids)
        return {
            1: self.tracing(),
            3: self.string("box"),
            4: self.string("6.18.0"),
            5: self.string("6.1"),
            7: self.pack("II", 8, 4),
            11: self.pack("I", 2) + self.string("perf") + self.string("record"),
            12: described,
            29: self.pack("IIQQ", 1, 1, 1_700_000_000_000_000_000, 5_000),
        }

    def file(self, *, features: dict[int, bytes] | None = None, data_size: int | None = None) -> bytes:
        """Return the recording as a file."""
        sections = self.features() if features is None else features
        data = b"".join(self.records)
        ids_at = 104
        attrs_at = ids_at + 8 * len(self.ids)
        data_at = attrs_at + self.attr_size + 16
        table_at = data_at + len(data)
        section_at = table_at + 16 * len(sections)
        table, contents = b"", b""
        for number in sorted(sections):
            table += self.pack("QQ", section_at + len(contents), len(sections[number]))
            contents += sections[number]
        bits = sum(1 << number for number in sections)
        words = [bits >> 64 * i & (1 << 64) - 1 for i in range(4)]
        magic = b"PERFILE2" if self.order == "<" else b"2ELIFREP"
        header = magic + self.pack("QQ", 104, self.attr_size + 16) + self.pack("QQ", attrs_at, self.attr_size + 16)
        header += self.pack("QQ", data_at, len(data) if data_size is None else data_size) + self.pack(
            "QQ4Q", 0, 0, *words
        )
        ids = self.pack(f"{len(self.ids)}Q", *self.ids)
        return header + ids + self.attr() + self.pack("QQ", ids_at, len(ids)) + data + table + contents

    def pipe(self) -> bytes:
        """Return the recording as perf writes it to a pipe."""
        magic = b"PERFILE2" if self.order == "<" else b"2ELIFREP"
        attr = self.record(64, self.attr() + self.pack(f"{len(self.ids)}Q", *self.ids))
        tracing = self.tracing()
        padded = tracing.ljust((len(tracing) + 7) // 8 * 8, b"\0")
        # The payload follows the record and is not counted in its size.
        head = self.record(66, self.pack("I", len(padded))) + padded
        host = self.record(80, self.pack("Q", 3) + self.string("box"))
        return magic + self.pack("Q", 16) + attr + host + head + b"".join(self.records)
