"""Digests of captured payloads: what tells datagrams of one flow apart when no header field does.

A UDP header carries no number of its datagram, and Linux leaves the IP ID of an unconnected socket's whole datagrams 0. Their bytes
are the same on both hosts.
"""

from __future__ import annotations

import numpy as np

from rxlab.errors import FormatError
from rxlab.read.columns import Columns
from rxlab.read.compiler import njit
from rxlab.read.pcapfile import open_capture

# Bytes beyond these seldom tell what the first do not.
MAX_BYTES = 128


def payload_room(packets: Columns) -> int:
    """Return how many bytes of payload every packet has in its capture, or all it had; at most `MAX_BYTES`.

    A digest can be compared between two captures where it is of the same bytes: the smaller room of both.
    """
    held = packets["caplen"].astype(np.int64) - packets["payload_offset"]
    cut = (packets["payload_offset"] >= 0) & (held < packets["payload_len"])
    return int(np.clip(held[cut].min(), 0, MAX_BYTES)) if cut.any() else MAX_BYTES


def with_digests(first: Columns, second: Columns) -> tuple[Columns, Columns]:
    """Return the packets of two captures with the column ``digest``, of the same bytes in both."""
    room = min(payload_room(first), payload_room(second))
    left, right = (packets.with_columns(digest=payload_digests(packets, room)) for packets in (first, second))
    return left, right


def payload_digests(packets: Columns, n_bytes: int) -> np.ndarray:
    """Return a digest of the first `n_bytes` of each packet's payload.

    Parameters
    ----------
    packets : Columns
        As :func:`rxlab.read_pcap` gives them; the file they came from is read again.
    n_bytes : int
        As :func:`payload_room` says.

    Returns
    -------
    uint64 array, dims (packet,); 0 where the bytes cannot be read (a compressed capture has no offsets).

    Raises
    ------
    FormatError
        The file is shorter than when its packets were read.
    """
    digest = np.zeros(packets.n, np.uint64)
    rows = np.flatnonzero((packets["payload_offset"] >= 0) & (packets["offset"] >= 0) & (packets["payload_len"] >= 0))
    if not len(rows) or not n_bytes:
        return digest
    content = open_capture(packets.attrs["file"]).buf
    start = packets["offset"][rows] + packets["payload_offset"][rows]
    length = np.minimum(packets["payload_len"][rows], n_bytes).astype(np.int64)
    if int((start + length).max()) > len(content):
        raise FormatError("the capture has shrunk since its packets were read", where=str(packets.attrs["file"]))
    digest[rows] = _digests(content, start, length)
    return digest


@njit(cache=True, nogil=True)
def _digests(content, start, length):
    """FNV-1a, 64 bits, of `length` bytes from each start (Fowler, Noll and Vo); never 0."""
    result = np.empty(len(start), np.uint64)
    for row in range(len(start)):
        word = np.uint64(0xCBF29CE484222325)
        for at in range(start[row], start[row] + length[row]):
            word = (word ^ np.uint64(content[at])) * np.uint64(0x100000001B3)
        result[row] = word | np.uint64(1)
    return result
