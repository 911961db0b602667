"""A run's packets as pcapng, each with a comment that tells its life: stage latencies, status, task, CPUs.

Wireshark shows the comment as a column (``frame.comment``). Without ``reveal`` the addresses are pseudonyms and the payload is
gone (hide.py); with it the packets are the recorded ones, byte for byte.
https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-03.html
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rxlab import __version__
from rxlab.dataset import schema
from rxlab.dataset.run import Run
from rxlab.errors import RxlabError
from rxlab.read.pcap import open_reader
from rxlab.read.pcapfile import NAT, PacketIndex, empty_index
from rxlab.show.blocks import BLOCK_BYTES, NONE, Stories, Words, write_blocks
from rxlab.show.hide import Pseudonyms
from rxlab.show.redact import Redactor
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX, STAGE_NAMES

BATCH = 16_384
NOT_FOLLOWED = "rxlab: not followed (sent by this host, or not received by it)"
# What a comment's fixed part says before the stages; numbers follow the phrases.
PHRASES = ("status", "total", "path", "why", "task", "tid")


def to_pcapng(
    run: Run, path: str | os.PathLike[str], *, reveal: bool = False, redactor: Redactor | None = None
) -> Path:
    """Write a run's packets as pcapng, in capture order, a comment on each.

    Parameters
    ----------
    run : Run
        A traced run.
    reveal : bool
        Packets as recorded. Else pseudonyms for MAC and IP addresses, headers only; times, lengths on the wire, ports and
        sequence numbers stay, and so does what Wireshark says of a checksum it can verify.
    redactor : Redactor, optional
        The pseudonyms; by default new ones.
    """
    if not run.is_traced:
        raise RxlabError(
            "nothing to annotate", where=str(run.path), found="a run without trace", expected="perf.data and rx.pcap"
        )
    assert run.rundir.pcap is not None
    reader, _ = open_reader(run.rundir.pcap)
    redactor = None if reveal else redactor or Redactor.of_hosts([run.host])
    stories, row_of_frame = tell_stories(run.tree, redactor)
    pseudonyms = None if redactor is None else Pseudonyms(redactor)
    target, written = Path(path), 0
    with open(target, "wb") as stream:
        stream.write(_section_header())
        for index in _batches(reader):
            for interface in reader.interfaces[written:]:
                stream.write(_interface(interface))
            written = len(reader.interfaces)
            stream.write(_blocks(reader.buf, index, stories, row_of_frame, pseudonyms))
    return target


def _batches(reader: Any) -> Iterator[PacketIndex]:
    more = True
    while more:
        index = empty_index(BATCH)
        n, more = reader.fill(index, 0, BATCH)
        yield PacketIndex(*(column[:n] for column in index))


def _blocks(
    buf: np.ndarray, index: PacketIndex, stories: Stories, row_of_frame: np.ndarray, pseudonyms: Pseudonyms | None
) -> bytes:
    """Return the blocks of one batch of packets."""
    if not len(index.frame):
        return b""
    # Packets of a batch lie close together: one copy takes them with what stands between them.
    first = int(index.position.min())
    last = int((index.position + index.caplen).max())
    frames, start = buf[first:last].copy(), index.position - first
    kept = index.caplen.astype(np.int64)
    if pseudonyms is not None:
        kept = pseudonyms.hide(frames, start, index.caplen, index.linktype)
    frame = np.minimum(index.frame, len(row_of_frame) - 1)
    story = np.where(index.frame < len(row_of_frame), row_of_frame[frame], len(stories.path_kind) - 1)
    out = np.empty(int(kept.sum()) + len(kept) * (BLOCK_BYTES + _longest(stories)), np.uint8)
    # pcapng has no packet block with a comment and no time: such a packet gets the epoch.
    time = np.where(index.time == NAT, 0, index.time)
    size = write_blocks(
        frames, start, kept, index.wire_len, time, index.interface, index.direction, story, stories, out
    )
    return out[:size].tobytes()


def _longest(stories: Stories) -> int:
    """Return more bytes than any comment takes."""
    number = 32
    word = int(np.diff(stories.words.start).max())
    return stories.phrases.shape[1] * (word + number) + len(STAGE_NAMES) * (word + 2 * number)


def tell_stories(tree: xr.DataTree, redactor: Redactor | None = None) -> tuple[Stories, np.ndarray]:
    """Return what to say of each row of /packets, and the row of each frame number.

    The last row is that of packets which were not followed; `row_of_frame` gives it for their frames.
    """
    packets, hops = tree["packets"].to_dataset(), tree["hops"].to_dataset()
    n = packets.sizes["packet"]
    vocabulary: list[str] = []

    def codes(name: str, prefix: str) -> np.ndarray:
        words = schema.meanings(packets[name]) if "flag_values" in packets[name].attrs else {}
        column, found = packets[name].values, np.full(n + 1, -1, np.int64)
        for code, word in words.items():
            found[:n][column == code] = len(vocabulary)
            vocabulary.append(prefix + (word if redactor is None else redactor.text(word)))
        return found

    phrases = np.full((n + 1, len(PHRASES)), -1, np.int64)
    numbers = np.full(phrases.shape, NONE, np.int64)
    phrases[:, 0], phrases[:, 2] = codes("status", "rxlab: "), codes("path_kind", ", path ")
    phrases[:, 3], phrases[:, 4] = codes("attribution", ", reader "), codes("comm", ", task ")
    has_reader = np.append(packets["tid"].values >= 0, False)
    phrases[~has_reader, 3:5] = -1
    latency = _whole_ns(hops["latency"].values)
    numbers[:n, 1] = latency[:, list(hops["hop"].values).index("total_latency")]
    numbers[:n, 5] = packets["tid"].values
    phrases[numbers[:, 1] != NONE, 1] = len(vocabulary)
    phrases[has_reader, 5] = len(vocabulary) + 1
    phrases[n, 0] = len(vocabulary) + 2
    vocabulary += [", total ", " tid ", NOT_FOLLOWED]
    steps = np.full((n + 1, len(STAGE_NAMES)), NONE, np.int64)
    steps[:n, 1:] = latency[:, : len(STAGE_NAMES) - 1]
    cpu = np.full((n + 1, len(STAGE_NAMES)), -1, np.int16)
    cpu[:n] = np.where(np.isnat(packets["time"].values), -1, packets["cpu"].values)
    stories = Stories(
        words=Words.of([*vocabulary, *STAGE_NAMES]),
        phrases=phrases,
        numbers=numbers,
        is_time=np.array([name == "total" for name in PHRASES]),
        order=np.array([[STAGE_INDEX[stage] for stage in ORDER[kind]] for kind in PATH_KINDS], np.int8),
        path_kind=np.append(packets["path_kind"].values, 0).astype(np.int8),
        cpu=cpu,
        latency=steps,
        first_stage=len(vocabulary),
    )
    return stories, _rows_by_frame(packets["pcap_frame"].values)


def _rows_by_frame(frames: np.ndarray) -> np.ndarray:
    rows = np.full(int(frames.max(initial=0)) + 1, len(frames), np.int64)
    rows[frames[frames > 0]] = np.flatnonzero(frames > 0)
    return rows


def _whole_ns(latency: np.ndarray) -> np.ndarray:
    is_seen = ~np.isnan(latency)
    return np.where(is_seen, np.where(is_seen, latency, 0).astype(np.int64), NONE)


def _block(kind: int, body: bytes) -> bytes:
    size = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + size + body + size


def _options(pairs: Sequence[tuple[int, bytes]]) -> bytes:
    padded = (struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4) for code, value in pairs)
    return b"".join(padded) + bytes(4)


def _section_header() -> bytes:
    application = f"rxlab {__version__}".encode()
    # byte-order magic, version 1.0, section length not given; option 4: shb_userappl
    return _block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1) + _options([(4, application)]))


def _interface(described: dict[str, Any]) -> bytes:
    # if_name (2), if_tsresol (9): 10^-9 s
    name = str(described.get("name") or "").encode()
    options = [*([(2, name)] if name else []), (9, b"\x09")]
    return _block(1, struct.pack("<HHI", described["linktype"], 0, described["snaplen"]) + _options(options))
