"""pcap and pcapng files built byte by byte: every format, byte order, time resolution, compression and damage."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from capture_builder import (
    block,
    classic,
    enhanced,
    ethernet,
    http_exchange,
    interface,
    ipv4,
    option,
    section,
    simple,
    tcp,
    udp,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlab.errors import FormatError, RxlabError, TruncatedFileError, UsageError
from rxlab.read import pcap as pcap_module
from rxlab.read import pcapfile
from rxlab.read.pcap import inspect_pcap, read_pcap
from rxlab.read.pcapfile import NAT
from rxlab.read.pcapng import ticks_to_ns

PACKETS = [*http_exchange(), ethernet(ipv4(udp(b"abc"), 17)), ethernet(bytes(40), 0x0806)]
START = 1_700_000_000


def write(folder: Path, content: bytes, name: str = "capture") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("n", [18_800, 19_000, 19_200])
def test_zstd_stream_without_an_end_gives_every_packet_that_came(tmp_path: Path, n: int) -> None:
    # A little more than a mebibyte in few compressed bytes, as a recorder that was killed leaves it.
    compressor = zstandard.ZstdCompressor().compressobj()
    content = classic([ethernet(bytes(26), 0x0806)] * n)
    stream = compressor.compress(content) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = write(tmp_path, stream)
    packets = read_pcap(path)
    assert packets["frame"].tolist() == list(range(1, n + 1))
    # Cut exactly between two packets: nothing but the frame without an end tells of it.
    assert packets.attrs["truncated"]
    assert "its last frame does not end" in packets.attrs["warnings"][0]
    assert inspect_pcap(path)["truncated"]


def test_zstd_stream_of_several_frames_is_whole_when_its_last_one_ends(tmp_path: Path) -> None:
    content = classic(PACKETS)
    skippable = (
        (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"idx"
    )  # as pzstd writes them, RFC 8878 3.1.2
    frames = [zstandard.compress(part) for part in (content[:50], content[50:])]
    for stream in (frames, [*frames, skippable], [frames[0], skippable, frames[1]]):
        packets = read_pcap(write(tmp_path, b"".join(stream)))
        assert packets.n == len(PACKETS)
        assert not packets.attrs["truncated"]
    with pytest.raises(
        TruncatedFileError, match="nothing can be salvaged.*zstd stream is cut .* its last frame does not end"
    ):
        read_pcap(write(tmp_path, zstandard.compress(content)[:20]))
    for lost in (1, 2):  # as gzip's: its checksum and size come last
        packets = read_pcap(write(tmp_path, b"".join([*frames, skippable])[:-lost]))
        assert packets.n == len(PACKETS)
        assert packets.attrs["truncated"]


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize(("magic", "tick"), [(0xA1B2C3D4, 1000), (0xA1B23C4D, 1), (0xA1B2CD34, 1000)])
def test_classic_formats(tmp_path: Path, endian: str, magic: int, tick: int) -> None:
    content = classic(PACKETS, endian=endian, magic=magic)
    packets = read_pcap(write(tmp_path, content))
    assert packets["time"].tolist() == [(START + i) * 10**9 + i * tick for i in range(len(PACKETS))]
    assert packets["frame"].tolist() == [1, 2, 3, 4, 5]
    assert packets["caplen"].tolist() == [len(packet) for packet in PACKETS]
    assert [content[o : o + n] for o, n in zip(packets["offset"], packets["caplen"], strict=True)] == PACKETS
    assert packets["direction"].tolist() == ([0, 1, 0, 1, 0] if magic == 0xA1B2CD34 else [-1] * 5)
    assert packets.attrs["clock"] == "CLOCK_REALTIME"
    assert not packets.attrs["truncated"]


def test_frame_check_sequence_bits_are_not_the_link_type(tmp_path: Path) -> None:
    packets = read_pcap(write(tmp_path, classic(PACKETS, linktype=1 | 0x44000000)))
    assert set(packets["linktype"].tolist()) == {1}
    assert packets["ip_version"].tolist() == [4, 4, 4, 4, 0]


def test_time_after_2038_and_fraction_beyond_a_second(tmp_path: Path) -> None:
    content = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + struct.pack(
        "<IIII", 2**32 - 1, 1_500_000, 0, 0
    )
    assert read_pcap(write(tmp_path, content))["time"].tolist() == [(2**32 - 1) * 10**9 + 1_500_000_000]


# ---------------------------------------------------------------------------------------------------- pcapng


def test_pcapng_sections_have_their_own_byte_order_and_interfaces(tmp_path: Path) -> None:
    one, two = PACKETS[0], ipv4(tcp(b"", 1, 2))
    content = b"".join(
        (
            section("<"),
            interface("<", options=option(2, b"eth0") + option(9, b"\x09") + option(0, b"")),
            interface("<", linktype=101, options=option(9, b"\x8a")),  # 2**-10 s
            enhanced(one, 5, 0),
            enhanced(two, 3 << 10 | 512, 1),
            section(">"),
            interface(">", options=option(14, struct.pack(">q", 100), ">")),  # offset; microseconds by default
            enhanced(one, 7, 0, endian=">"),
        )
    )
    packets = read_pcap(write(tmp_path, content))
    assert packets["time"].tolist() == [5, 3_500_000_000, 100_000_007_000]
    assert packets["interface"].tolist() == [0, 1, 2]
    assert packets["linktype"].tolist() == [1, 101, 1]
    assert packets["ip_version"].tolist() == [4, 4, 4]
    links = packets.attrs["interfaces"]
    assert [(link["section"], link["id"]) for link in links] == [(0, 0), (0, 1), (1, 0)]
    assert (links[0]["name"], links[1]["tsresol"], links[2]["tsoffset"]) == ("eth0", 0x8A, 100)
    assert packets.attrs["sections"] == 2


@pytest.mark.parametrize("endian", ["<", ">"])
def test_pcapng_block_types(tmp_path: Path, endian: str) -> None:
    packet = PACKETS[0]
    old = struct.pack(endian + "HHIIII", 0, 9, 0, 2_000_000, len(packet), len(packet)) + packet  # obsolete Packet Block
    statistics = struct.pack(endian + "III", 0, 0, 0) + option(4, struct.pack(endian + "Q", 50), endian)
    statistics += option(5, struct.pack(endian + "Q", 3), endian)
    content = b"".join(
        (
            section(endian),
            interface(endian, snaplen=40),
            enhanced(packet, 1_000_000, endian=endian, wire_len=500),
            block(0xBAD, bytes(12), endian),  # Custom Block: Wireshark numbers it as a frame
            block(2, old, endian),
            block(4, bytes(4), endian),  # name resolution: no frame
            block(0x0000000A, bytes(8), endian),  # decryption secrets: no frame
            block(0x7777, bytes(20), endian),  # unknown
            simple(packet[:40], endian, wire_len=len(packet)),
            block(5, statistics, endian),
        )
    )
    packets = read_pcap(write(tmp_path, content))
    assert packets["time"].tolist() == [10**9, 2 * 10**9, NAT]
    assert packets["frame"].tolist() == [1, 3, 4]
    assert packets["caplen"].tolist() == [len(packet), len(packet), 40]
    assert packets["wire_len"].tolist() == [500, len(packet), len(packet)]
    assert (packets.attrs["interfaces"][0]["received"], packets.attrs["interfaces"][0]["dropped"]) == (50, 3)
    assert packets.attrs["warnings"] == ["1 packets have no time that int64 nanoseconds can hold"]


def test_pcapng_packet_options(tmp_path: Path) -> None:
    flags = [option(2, struct.pack("<I", way)) for way in (1, 2, 0)]
    blocks = [enhanced(PACKETS[0], i, options=flags[i] + option(0, b"")) for i in range(3)]
    blocks.append(enhanced(PACKETS[0], 3, options=option(1, "späť".encode()) + flags[1]))
    packets = read_pcap(write(tmp_path, section() + interface() + b"".join(blocks)))
    assert packets["direction"].tolist() == [0, 1, -1, 1]
    assert packets.attrs["comments"] == [(4, "späť")]


@given(ticks=st.integers(0, 2**64 - 1), tsresol=st.integers(0, 255), offset=st.integers(-(10**9), 10**9))
@settings(max_examples=300)
def test_ticks_to_ns_is_exact(ticks: int, tsresol: int, offset: int) -> None:
    base = 2 if tsresol & 0x80 else 10
    exact = ticks * 10**9 // base ** (tsresol & 0x7F) + offset * 10**9
    if abs(exact) < 9_223_372_035 * 10**9:
        assert ticks_to_ns(np.uint64(ticks), tsresol, offset) == exact
    else:
        assert ticks_to_ns(np.uint64(ticks), tsresol, offset) == NAT


# ---------------------------------------------------------------------------------------------------- compression, chunks


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_files_have_the_same_columns(tmp_path: Path, compress) -> None:
    content = classic(PACKETS * 50)
    plain, packed = read_pcap(write(tmp_path, content)), read_pcap(write(tmp_path, compress(content), "packed"))
    for name in plain:
        if name != "offset":
            assert np.array_equal(plain[name], packed[name]), name
    assert set(packed["offset"].tolist()) == {-1}


def test_cut_gzip_gives_what_it_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    frames = [ethernet(rng.bytes(800), 0x1234) for _ in range(100)]
    packed = gzip.compress(classic(frames))
    packets = read_pcap(write(tmp_path, packed[: len(packed) // 2]))
    assert 30 < packets.n < 60
    assert packets.attrs["truncated"]
    assert "gzip stream is cut" in packets.attrs["warnings"][0]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress) -> None:
    monkeypatch.setattr(pcapfile, "FREE_BYTES", 1 << 20)
    bomb = compress(classic([]) + bytes(32 << 20))
    with pytest.raises(FormatError, match="unfolds to more than"):
        read_pcap(write(tmp_path, bomb))


@pytest.mark.parametrize("form", ["pcap", "pcapng"])
def test_a_file_guessed_too_short_is_whole(tmp_path: Path, monkeypatch, form: str) -> None:
    # Long packets first: the first bytes promise few packets, and thousands of short ones follow.
    packets = [ethernet(ipv4(udp(bytes(1400), 5000 + i, 9), 17)) for i in range(20)] + PACKETS * 200
    content = classic(packets)
    if form == "pcapng":
        content = section() + interface() + b"".join(enhanced(packet, i) for i, packet in enumerate(packets))
    path = write(tmp_path, content)
    counted = read_pcap(path)
    monkeypatch.setattr(pcap_module, "_COUNTED_BYTES", 10_000)
    monkeypatch.setattr(pcap_module, "_BATCH", 64)
    grown: list[int] = []
    grow = pcap_module._Piece.grow
    monkeypatch.setattr(pcap_module._Piece, "grow", lambda piece, rows: (grown.append(rows), grow(piece, rows)))
    guessed = read_pcap(path)
    assert grown == [len(packets) + 1]
    assert counted.n == guessed.n == len(packets)
    for name in counted:
        np.testing.assert_array_equal(guessed[name], counted[name], err_msg=name)


@pytest.mark.parametrize("chunks", [1, 3, 250, 1000])
def test_chunks_together_are_the_whole(tmp_path: Path, chunks: int) -> None:
    path = write(tmp_path, classic(PACKETS * 50))
    whole, pieces = read_pcap(path), list(read_pcap(path, chunks=chunks))
    assert all(piece.n <= chunks for piece in pieces)
    for name in whole:
        assert np.array_equal(whole[name], np.concatenate([piece[name] for piece in pieces])), name
    assert pieces[-1].attrs == whole.attrs


def test_batches_of_the_decoder_join_seamlessly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More packets than one batch: rows decoded by different threads are the same as one by one."""
    monkeypatch.setattr("rxlab.read.pcap._BATCH", 999)
    path = write(tmp_path, classic(PACKETS * 7000))
    packets = read_pcap(path)
    assert packets["frame"].tolist() == list(range(1, 35_001))
    for name in ("sport", "payload_len", "flow", "flow_dir", "ethertype"):
        assert np.array_equal(packets[name], np.tile(packets[name][:5], 7000)), name


# ---------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "content",
    [classic(PACKETS), section() + interface() + b"".join(enhanced(p, i) for i, p in enumerate(PACKETS))],
    ids=["pcap", "pcapng"],
)
def test_cut_anywhere_gives_every_whole_packet(tmp_path: Path, content: bytes) -> None:
    whole = read_pcap(write(tmp_path, content))
    ends = whole["offset"] + whole["caplen"]
    trailer = 0 if content[:4] == b"\xd4\xc3\xb2\xa1" else 4
    ends = ends + (-whole["caplen"].astype(np.int64) % 4 + 4 if trailer else 0)
    for size in range(len(content)):
        path = write(tmp_path, content[:size])
        expected = int((ends <= size).sum())
        if expected == 0:
            try:
                assert read_pcap(path).n == 0
            except RxlabError:
                continue
            continue
        packets = read_pcap(path)
        assert packets.n == expected
        assert packets.attrs["truncated"] == (size not in ends)
        if packets.attrs["truncated"]:
            assert packets.attrs["truncated_at"] == ends[expected - 1]
            assert f"byte {ends[expected - 1]}" in packets.attrs["warnings"][0]


def test_impossible_lengths_stop_the_reading(tmp_path: Path) -> None:
    good = classic(PACKETS)
    for caplen in (262_145, 2**31, 2**32 - 1):
        packets = read_pcap(write(tmp_path, good + struct.pack("<IIII", 0, 0, caplen, 60) + bytes(300_000)))
        assert packets.n == len(PACKETS)
        assert packets.attrs["truncated_at"] == len(good)
    ng = section() + interface() + enhanced(PACKETS[0], 1)
    for kind in (6, 3, 1, 5, 0x7777, 0x0A0D0D0A):
        for size in (0, 4, 8, 12, 13, 2**31, 2**32 - 4):
            body = struct.pack("<II", kind, size) + bytes(400)
            packets = read_pcap(write(tmp_path, ng + body))
            assert packets.n == 1, (kind, size)


def test_pcapng_packet_of_an_undescribed_interface_stops_the_reading(tmp_path: Path) -> None:
    content = section() + interface() + enhanced(PACKETS[0], 1) + enhanced(PACKETS[0], 2, 1)
    packets = read_pcap(write(tmp_path, content))
    assert (packets.n, packets.attrs["truncated"]) == (1, True)


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (b"", TruncatedFileError, "empty"),
        (b"\xd4\xc3", FormatError, "not a capture"),
        (b"PERFILE2" + bytes(100), FormatError, "not a capture"),
        (classic(PACKETS)[:20], TruncatedFileError, "header is cut"),
        (classic(PACKETS)[:30], TruncatedFileError, "nothing can be salvaged"),
        (section(major=2), FormatError, "version 2"),
        (b"\x0a\x0d\x0d\x0a" + bytes(30), FormatError, "byte order"),
        (gzip.compress(b"no capture", mtime=0), FormatError, "not a capture"),
    ],
)
def test_what_is_no_capture_is_one_clear_line(tmp_path: Path, content: bytes, error: type, text: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(error, match=text) as caught:
        read_pcap(path)
    assert str(path) in str(caught.value)
    with pytest.raises(error):
        inspect_pcap(path)


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        read_pcap(tmp_path / "absent")
    with pytest.raises(UsageError, match="chunks"):
        read_pcap(write(tmp_path, classic(PACKETS)), chunks=0)


def test_capture_without_packets_has_columns_without_rows(tmp_path: Path) -> None:
    for content in (classic([]), section(), section() + interface()):
        packets = read_pcap(write(tmp_path, content))
        assert packets.n == 0
        assert packets["time"].dtype == np.int64


def test_inspect(tmp_path: Path) -> None:
    content = section() + interface() + interface() + simple(PACKETS[3])
    content += enhanced(PACKETS[0], 9_000_000, 1) + enhanced(PACKETS[1], 4_000_000, 1, wire_len=1000)
    found = inspect_pcap(write(tmp_path, content + b"\x06"))
    expected = {"kind": "pcapng", "packets": 3, "first_ns": 9 * 10**9, "last_ns": 4 * 10**9, "min_ns": 4 * 10**9}
    expected |= {"max_ns": 9 * 10**9, "sum_caplen": sum(len(PACKETS[i]) for i in (0, 1, 3)), "truncated": True}
    expected |= {"sum_len": len(PACKETS[0]) + 1000 + len(PACKETS[3]), "truncated_at": len(content)}
    assert {name: found[name] for name in expected} == expected
    assert [link["packets"] for link in found["interfaces"]] == [1, 2]
    assert json.loads(json.dumps(found)) == found


# ---------------------------------------------------------------------------------------------------- mutations

_SEEDS = [
    classic(PACKETS),
    classic(PACKETS, endian=">", magic=0xA1B2CD34),
    section()
    + interface(options=option(9, b"\x09"))
    + enhanced(PACKETS[0], 1, options=option(1, b"hi"))
    + simple(PACKETS[1]),
    section(">")
    + interface(">")
    + enhanced(PACKETS[0], 1, endian=">")
    + section("<")
    + interface("<")
    + simple(PACKETS[1]),
    gzip.compress(classic(PACKETS)),
]


@given(
    seed=st.sampled_from(_SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.integers(0, 2000),
)
@settings(max_examples=300)
def test_mutated_files_give_a_result_or_an_rxlab_error(tmp_path_factory, seed: bytes, edits, cut: int) -> None:
    content = bytearray(seed)
    for at, value in edits:
        at %= len(content)
        content[at : at + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(content[: max(1, len(content) - cut)] if cut % 3 == 0 else content)
    try:
        packets = read_pcap(path)
    except RxlabError:
        return
    assert packets.n * 12 <= len(content) * 50
    if not packets.attrs["compression"]:
        assert ((packets["offset"] + packets["caplen"]) <= len(content)).all()
    assert inspect_pcap(path)["packets"] == packets.n
