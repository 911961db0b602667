"""Text and packets into capture blocks, compiled: what pcapng.py writes for every packet.

Block layouts: https://www.ietf.org/archive/id/draft-ietf-opsawg-pcapng-03.html
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rxlab.read.compiler import njit

NONE = np.iinfo(np.int64).min  # no latency: the stage was the first one seen
BLOCK_BYTES = 64  # an enhanced packet block without packet and comment, its options and padding included


class Words(NamedTuple):
    """Texts end to end: word `i` is ``text[start[i]:start[i + 1]]``."""

    text: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, words: list[str]) -> Words:
        """Return the words as UTF-8."""
        parts = [word.encode() for word in words]
        start = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int64)
        return cls(np.frombuffer(b"".join(parts) or b"\0", np.uint8).copy(), start)


class Stories(NamedTuple):
    """What the comments say; dims (row,) and (row, stage). Codes are indices of `words`."""

    words: Words
    phrases: np.ndarray  # int64 (row, phrase): codes written one after the other, -1 none
    numbers: np.ndarray  # int64 (row, phrase): written after the phrase, NONE for none; nanoseconds where is_time
    is_time: np.ndarray  # bool (phrase,)
    order: np.ndarray  # int8 (path kind, stage): stages in the order of the path
    path_kind: np.ndarray  # int8 (row,)
    cpu: np.ndarray  # int16 (row, stage), -1 not seen
    latency: np.ndarray  # int64 ns (row, stage), NONE none
    first_stage: int  # code of the first stage's word


@njit(cache=True, nogil=True, inline="always")
def put32(out, pos, value):
    """Write a little-endian 32-bit word; return the position after it."""
    for k in range(4):
        out[pos + k] = (value >> (8 * k)) & 0xFF
    return pos + 4


@njit(cache=True, nogil=True)
def put_word(out, pos, words, code):
    """Write a word; return the position after it."""
    for k in range(words.start[code], words.start[code + 1]):
        out[pos] = words.text[k]
        pos += 1
    return pos


@njit(cache=True, nogil=True)
def put_int(out, pos, value):
    """Write a decimal number; return the position after it."""
    if value < 0:
        out[pos] = 45  # "-"
        pos += 1
        value = -value
    digits = 1
    rest = value // 10
    while rest:
        digits += 1
        rest //= 10
    for k in range(digits - 1, -1, -1):
        out[pos + k] = 48 + value % 10
        value //= 10
    return pos + digits


@njit(cache=True, nogil=True)
def put_us(out, pos, ns):
    """Write nanoseconds as microseconds with three decimals and their unit; return the position after it."""
    if ns < 0:
        out[pos] = 45
        pos += 1
        ns = -ns
    pos = put_int(out, pos, ns // 1000)
    rest = ns % 1000
    out[pos], out[pos + 1], out[pos + 2], out[pos + 3] = 46, 48 + rest // 100, 48 + rest // 10 % 10, 48 + rest % 10
    out[pos + 4], out[pos + 5] = 117, 115  # "us"
    return pos + 6


@njit(cache=True, nogil=True)
def put_story(out, pos, stories, row):
    """Write a packet's comment; return the position after it."""
    for k in range(stories.phrases.shape[1]):
        code = stories.phrases[row, k]
        if code < 0:
            continue
        pos = put_word(out, pos, stories.words, code)
        number = stories.numbers[row, k]
        if number != NONE:
            pos = put_us(out, pos, number) if stories.is_time[k] else put_int(out, pos, number)
    kind = stories.path_kind[row]
    for k in range(stories.order.shape[1]):
        stage = stories.order[kind, k]
        if stories.cpu[row, stage] < 0:
            continue
        out[pos], out[pos + 1] = 59, 32  # "; "
        pos = put_word(out, pos + 2, stories.words, stories.first_stage + stage)
        if stories.latency[row, stage] != NONE:
            out[pos], out[pos + 1] = 32, 43  # " +"
            pos += 1 if stories.latency[row, stage] < 0 else 2
            pos = put_us(out, pos, stories.latency[row, stage])
        out[pos], out[pos + 1], out[pos + 2], out[pos + 3] = 32, 99, 112, 117  # " cpu"
        pos = put_int(out, pos + 4, np.int64(stories.cpu[row, stage]))
    return pos


@njit(cache=True, nogil=True)
def write_blocks(frames, start, kept, wire_len, time, interface, direction, story, stories, out):
    """Write one enhanced packet block with a comment per packet; return how many bytes.

    Parameters
    ----------
    frames : uint8 array, dims (byte,)
    start, kept, wire_len : int arrays, dims (packet,): first byte, bytes to write, bytes on the wire
    time : int64 array, dims (packet,), ns since 1970
    interface, direction : int arrays, dims (packet,); direction 0 received, 1 sent, -1 not said
    story : int64 array, dims (packet,), row of `stories`
    out : uint8 array, large enough
    """
    pos = 0
    for row in range(len(start)):
        begin, size = pos, np.int64(kept[row])
        stamp = time[row]
        pos = put32(out, pos + 8, np.int64(interface[row]))
        pos = put32(out, put32(out, pos, stamp >> 32), stamp & 0xFFFFFFFF)
        pos = put32(out, put32(out, pos, size), np.int64(wire_len[row]))
        out[pos : pos + size] = frames[start[row] : start[row] + size]
        pos += size
        while pos & 3:
            out[pos] = 0
            pos += 1
        option = pos
        pos = put_story(out, pos + 4, stories, story[row])
        put32(out, option, 1 | (pos - option - 4) << 16)  # opt_comment
        while pos & 3:
            out[pos] = 0
            pos += 1
        if direction[row] >= 0:
            pos = put32(out, pos, 2 | 4 << 16)  # epb_flags: 1 inbound, 2 outbound
            pos = put32(out, pos, np.int64(direction[row]) + 1)
        pos = put32(out, pos, 0)  # opt_endofopt
        total = pos + 4 - begin
        put32(out, begin, 6)
        put32(out, begin + 4, total)
        pos = put32(out, pos, total)
    return pos
