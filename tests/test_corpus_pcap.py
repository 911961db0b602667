"""Captures by others: packets, times, lengths and interfaces equal the reference; header columns equal tshark's.

Where a reference is wrong, the table says why and what is compared instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tshark_judge import differences, tshark_rows

from rxlab.errors import RxlabError
from rxlab.read.columns import Columns
from rxlab.read.pcap import inspect_pcap, read_pcap
from rxlab.read.pcapfile import NAT

pytestmark = pytest.mark.corpus

TSHARK_KNOWS_NO_LINK = "tcpdump (tshark does not know the link type)"
# file -> (columns that are not compared with the reference, why the reference is wrong there)
WRONG_REFERENCES: dict[str, tuple[set[str], str]] = {
    "pcap/zeek-pcapng/issue-32.pcapng": ({"max"}, "two stamps 47 ns apart: the reference compared them as float64"),
    "pcap/tcpdump/atm-oam-heapoverflow.pcap": (
        {"caplen", "len"},
        "tshark takes SunATM's 4 pseudo-header bytes off both lengths",
    ),
    "pcap/tcpdump/rx_serviceid_oobr.pcap": (
        {"time"},
        "a fraction of 3.8e9 us: tshark keeps it in a signed 32-bit word",
    ),
    "pcap/tcpdump/timestamp_invalid_micro.pcap": (
        {"time"},
        "fractions of a second and more: tshark prints 10 digits, or wraps",
    ),
    "pcap/pcapplusplus/pcapng-example.pcapng.zst": (
        {"time"},
        "times of the year 586,512 do not fit int64 ns and are NAT",
    ),
}
# A sample for the everyday run; RXLAB_LONG=1 asks tshark about all files (minutes).
JUDGED = (
    "pcap/pcapplusplus/one_tcp_stream.pcap",
    "pcap/pcapplusplus/ip4_fragments.pcap",
    "pcap/pcapplusplus/VlanPackets.pcap",
    "pcap/pcapplusplus/sll2.pcap",
    "pcap/pcapplusplus/null_loopback.pcap",
    "pcap/pcapplusplus/one_ipv6_http_stream.pcap",
    "pcap/libpcap/geneve.pcap",
    "pcap/libpcap/ipv6_ext_headers.pcap",
    "pcap/libpcap/ipv6_ah_modes.pcap",
    "pcap/pcapng-test-generator-le/test202.pcapng",
    "pcap/tcpdump/ipv4_invalid_hdr_length.pcap",
)
# file -> why tshark's header fields differ
WRONG_FIELDS = {
    "pcap/tcpdump/bigtcp-ipv6.pcap": "tshark 4.0 takes a BIG TCP packet (IPv6 payload length 0) for an empty one",
    "pcap/zeek/ipv4-internally-truncated-header.pcap": "the fixed header is there, its options are cut: tshark stops before ip.dst",
    "pcap/tcpdump/DTP.pcap": "Cisco ISL: tshark shows the inner frame's address as eth.dst",
    "pcap/pcapplusplus/pcapng-example.pcapng.zst": "times beyond int64 ns",
    "pcap/tcpdump/atm-oam-heapoverflow.pcap": "SunATM pseudo-header",
    "pcap/tcpdump/rx_serviceid_oobr.pcap": "wrapped time",
    "pcap/tcpdump/timestamp_invalid_micro.pcap": "wrapped time",
}


def entries(corpus: Path) -> list[dict[str, Any]]:
    files = json.loads((corpus / "manifest.json").read_text())["files"]
    return [entry for entry in files if entry["file"].startswith("pcap/")]


def seconds_to_ns(text: str) -> int:
    whole, _, fraction = text.partition(".")
    return int(whole) * 10**9 + int(fraction)


def frame_columns(packets: Columns, skip: set[str]) -> str:
    """Return the text whose sha256 the reference holds: time, interface, captured and wire length of each frame."""
    links = packets.attrs["interfaces"]
    pcapng = packets.attrs["kind"] == "pcapng"
    rows = []
    for time, link, caplen, wire_len in zip(
        *(packets[n].tolist() for n in ("time", "interface", "caplen", "wire_len")), strict=True
    ):
        stamp = "" if time == NAT else f"{time // 10**9}.{time % 10**9:09d}"
        rows.append(f"{stamp}\t{links[link]['id'] if pcapng else ''}\t{caplen}\t{wire_len}")
    return "\n".join(rows)


def compare(packets: Columns, reference: dict[str, Any], skip: set[str]) -> list[str]:
    """Return what differs from the reference."""
    times = packets["time"][packets["time"] != NAT]
    ours: dict[str, Any] = {"caplen": int(packets["caplen"].sum()), "len": int(packets["wire_len"].sum())}
    theirs: dict[str, Any] = {"caplen": reference["sum_caplen"], "len": reference["sum_len"]}
    if len(times) and "time" not in skip:
        ours |= {"min": int(times.min()), "max": int(times.max())}
        theirs |= {name: seconds_to_ns(reference[name]) for name in ("min", "max")}
        for name, row in (("first", 0), ("last", -1)):
            ours[name] = int(packets["time"][row])
            theirs[name] = seconds_to_ns(reference[name]) if reference[name] else NAT
    if not skip & {"time", "caplen", "len"}:
        ours["columns"] = hashlib.sha256(frame_columns(packets, skip).encode()).hexdigest()
        theirs["columns"] = reference["frame_columns_sha256"]
    return [
        f"{name}: {ours[name]} not {theirs[name]}" for name in ours if name not in skip and ours[name] != theirs[name]
    ]


def test_packets_times_lengths_and_interfaces(corpus: Path) -> None:
    wrong: list[str] = []
    compared = 0
    for entry in entries(corpus):
        name, reference = entry["file"], entry["reference"]
        try:
            packets = read_pcap(corpus / name)
        except RxlabError as error:
            if reference["packets_expected"]:
                wrong.append(f"{name}: {error}")
            continue
        if packets.n != reference["packets_expected"]:
            wrong.append(f"{name}: {packets.n} packets, not {reference['packets_expected']}")
        elif "sum_len" in reference and reference["packets"] == packets.n:
            skip = WRONG_REFERENCES.get(name, (set(), ""))[0]
            wrong += [f"{name}: {difference}" for difference in compare(packets, reference, skip)]
            compared += 1
    assert not wrong, "\n".join(wrong)
    assert compared > 500


def test_custom_blocks_are_frames_of_tshark_but_no_packets(corpus: Path) -> None:
    """tshark counts pcapng Custom Blocks as frames: the packets keep the numbers it shows, the rest is not there."""
    checked = 0
    for entry in entries(corpus):
        reference = entry["reference"]
        if not reference["packets_expected_from"].startswith("packet blocks") or reference["packets_expected"] == 0:
            continue
        packets = read_pcap(corpus / entry["file"])
        assert packets["frame"][-1] <= reference["packets"]
        assert reference["packets"] - packets.n >= 3
        checked += 1
        if shutil.which("tshark"):
            assert differences(packets, tshark_rows(corpus / entry["file"])) == [], entry["file"]
    assert checked == 4


def test_inspect_agrees_with_the_columns(corpus: Path) -> None:
    for entry in entries(corpus):
        try:
            packets = read_pcap(corpus / entry["file"])
        except RxlabError as error:
            with pytest.raises(type(error)):
                inspect_pcap(corpus / entry["file"])
            continue
        found = inspect_pcap(corpus / entry["file"])
        times = packets["time"][packets["time"] != NAT]
        assert found["packets"] == packets.n
        assert (found["sum_caplen"], found["sum_len"]) == (packets["caplen"].sum(), packets["wire_len"].sum())
        ends = (int(times[0]), int(times[-1])) if len(times) else (None, None)
        assert (found["first_ns"], found["last_ns"]) == ends
        assert found["truncated"] == packets.attrs["truncated"]
        assert sum(link["packets"] for link in found["interfaces"]) == packets.n


def test_chunks_agree_with_the_whole(corpus: Path) -> None:
    path = corpus / "pcap/pcap-parser/wireshark_samples-test.pcapng"
    whole, pieces = read_pcap(path), list(read_pcap(path, chunks=100))
    for name in whole:
        assert np.array_equal(whole[name], np.concatenate([piece[name] for piece in pieces])), name


def test_header_columns_equal_tshark(corpus: Path) -> None:
    if shutil.which("tshark") is None:
        pytest.skip("tshark is not installed")
    names = list(JUDGED)
    if os.environ.get("RXLAB_LONG") == "1":
        names = [e["file"] for e in entries(corpus) if e["reference"]["packets_expected_from"] != TSHARK_KNOWS_NO_LINK]
    wrong: list[str] = []
    for name in names:
        if name in WRONG_FIELDS:
            continue
        try:
            packets = read_pcap(corpus / name)
        except RxlabError:
            continue
        wrong += [f"{name}: {line}" for line in differences(packets, tshark_rows(corpus / name))]
    assert not wrong, "\n".join(wrong[:20])
