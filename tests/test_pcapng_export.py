"""The annotated pcapng, judged by tshark: counts, times, comments, checksums; nobody's address is left in it."""

from __future__ import annotations

import struct
import subprocess
from ipaddress import ip_address

import numpy as np
import pytest
from capture_builder import classic, ethernet
from typer.testing import CliRunner

import rxlab
from rxlab.__main__ import app
from rxlab.errors import RxlabError
from rxlab.read.pcap import read_pcap
from rxlab.show import hide
from rxlab.show.exports import export_run
from rxlab.show.pcapng import to_pcapng
from rxlab.show.redact import Redactor

KEY = b"k" * 32
RUNS = ("tcp-rps-on", "udp-rps-off", "http")
CHECKED = ("ip.check_checksum:TRUE", "tcp.check_checksum:TRUE", "udp.check_checksum:TRUE")
STATUS = ("ip.checksum.status", "tcp.checksum.status", "udp.checksum.status", "icmpv6.checksum.status")
ADDRESSES = (
    "eth.src",
    "eth.dst",
    "ip.src",
    "ip.dst",
    "ipv6.src",
    "ipv6.dst",
    "arp.src.proto_ipv4",
    "arp.dst.proto_ipv4",
)
BAD, GOOD = "0", "1"


def tshark(path, *fields: str) -> list[list[str]]:
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-E", "occurrence=f", "-E", "separator=|"]
    command += [part for name in fields for part in ("-e", name)] + [
        part for preference in CHECKED for part in ("-o", preference)
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split("|") for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=RUNS)
def exported(request, repo, tmp_path_factory):
    run = rxlab.open_run(repo / "data" / request.param)
    folder = tmp_path_factory.mktemp("pcapng")
    return run, to_pcapng(run, folder / "hidden.pcapng"), to_pcapng(run, folder / "revealed.pcapng", reveal=True)


def test_counts_times_and_lengths_are_equal(exported):
    run, *files = exported
    fields = ("frame.number", "frame.time_epoch", "frame.len", "tcp.seq_raw", "tcp.srcport", "udp.srcport")
    for file in files:
        assert tshark(file, *fields) == tshark(run.rundir.pcap, *fields)


def test_every_packet_has_a_comment_and_it_tells_the_dataset(exported):
    run, *files = exported
    packets, hops = run.tree["packets"].to_dataset(), run.tree["hops"].to_dataset()
    row_of = {int(frame): row for row, frame in enumerate(packets["pcap_frame"].values)}
    for file in files:
        told = 0
        for frame, comment in tshark(file, "frame.number", "frame.comment"):
            assert comment.startswith("rxlab: ")
            row = row_of.get(int(frame))
            if row is None:
                assert "not followed" in comment
                continue
            parts = dict((words[0], words[1:]) for words in (part.split() for part in comment.split("; ")[1:]))
            seen = ~np.isnat(packets["time"].values[row])
            assert set(parts) == set(packets["stage"].values[seen])
            for stage, words in parts.items():
                column = list(packets["stage"].values).index(stage)
                assert words[-1] == f"cpu{packets['cpu'].values[row, column]}"
                latency = hops["latency"].values[row, column - 1] if column else np.nan
                assert np.isnan(latency) == (len(words) == 1)
                if len(words) == 2:
                    assert round(float(words[0][:-2]) * 1000) == latency
                    told += 1
            if "complete" in comment:
                assert f"tid {packets['tid'].values[row]}" in comment
        assert told


def test_revealed_packets_are_the_recorded_bytes(exported, tmp_path):
    run, _, revealed = exported
    subprocess.run(["editcap", "-F", "nsecpcap", str(revealed), str(tmp_path / "x.pcap")], check=True)
    # All but the file header, which names the snap length.
    assert (tmp_path / "x.pcap").read_bytes()[24:] == run.rundir.pcap.read_bytes()[24:]


def test_nothing_right_becomes_wrong_and_no_address_is_left(exported):
    run, hidden, _ = exported
    before, after = tshark(run.rundir.pcap, *STATUS), tshark(hidden, *STATUS)
    for old, new in zip(before, after, strict=True):
        for was, now in zip(old, new, strict=True):
            assert was != GOOD or now != BAD
    originals = {text for row in tshark(run.rundir.pcap, *ADDRESSES) for text in row if text}
    unicast = {text for text in originals if not text.startswith(("33:33", "ff:", "ff02", "01:", "00:00:00:00", "::"))}
    assert unicast
    shown = {text for row in tshark(hidden, *ADDRESSES) for text in row}
    assert not unicast & shown
    raw = hidden.read_bytes()
    for text in unicast:
        packed = ip_address(text).packed if "." in text or "::" in text else bytes.fromhex(text.replace(":", ""))
        assert packed not in raw
        assert text.encode() not in raw


def test_a_real_captures_checksums_stay_as_right_and_as_wrong_as_they_were(repo, tmp_path):
    """82 whole segments came over the emulated cable with right sums; 90 the sending port had still to fill in."""
    run = rxlab.open_run(repo / "data" / "igb-queues")
    before = tshark(run.rundir.pcap, *STATUS)
    after = tshark(to_pcapng(run, tmp_path / "hidden.pcapng"), *STATUS)
    assert [sum(row[1] == status for row in before) for status in (GOOD, BAD)] == [82, 90]
    assert after == before


def test_no_payload_is_left(exported):
    run, hidden, _ = exported
    packets = read_pcap(hidden)
    has_transport = packets["payload_offset"] > 0
    assert has_transport.any()
    assert (packets["caplen"][has_transport] == packets["payload_offset"][has_transport]).all()
    np.testing.assert_array_equal(packets["payload_len"][has_transport], run.packets["payload_len"][has_transport])
    assert b"GET /" not in hidden.read_bytes()


# ------------------------------------------------------------------------------------------ packets of known truth


def total(*parts: bytes) -> int:
    """Return the one's complement sum of 16-bit words (RFC 1071), complemented."""
    joined = b"".join(part + bytes(len(part) % 2) for part in parts)
    value = sum(struct.unpack(f">{len(joined) // 2}H", joined))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value ^ 0xFFFF


def ip(segment: bytes, proto: int, src: str, dst: str, options: bytes = b"", fragment: int = 0) -> bytes:
    a, b = ip_address(src).packed, ip_address(dst).packed
    if len(a) == 16:
        return struct.pack(">IHBB", 6 << 28, len(segment), proto, 64) + a + b + segment
    fields = (0x40 | 5 + len(options) // 4, 0, 20 + len(options) + len(segment), 7, fragment, 64, proto)
    head = struct.pack(">BBHHHBB", *fields)
    return head + struct.pack(">H", total(head, a, b, options)) + a + b + options + segment


def whole(proto: int, src: str, dst: str, body: bytes, options: bytes = b"") -> bytes:
    """Return a packet whose layer 4 checksum is right."""
    a, b = ip_address(src).packed, ip_address(dst).packed
    if proto == 6:
        head = struct.pack(">HHIIBBH", 40000, 80, 1, 2, (20 + len(options)) // 4 << 4, 0x18, 500)
        at, segment = 16, head + bytes(4) + options + body
    elif proto == 17:
        at, segment = 6, struct.pack(">HHHH", 5000, 53, 8 + len(body), 0) + body
    else:
        at, segment = 2, body
    pseudo = b"" if proto == 1 else a + b + struct.pack(">IHBB", len(segment), 0, 0, proto)
    check = total(pseudo, segment)
    return ip(segment[:at] + struct.pack(">H", check) + segment[at + 2 :], proto, src, dst)


A4, B4, A6, B6 = "192.0.2.17", "198.51.100.99", "2001:db8:1::17", "2001:db8:1::99"
MPTCP_ADDRESS = bytes([30, 8, 0x30, 1]) + ip_address(A4).packed
SECRET = b"the secret payload!!"
FRAMES = {
    "tcp4": ethernet(whole(6, A4, B4, SECRET)),
    "tcp4 options": ethernet(
        whole(6, A4, B4, SECRET, MPTCP_ADDRESS + b"\1\1\1\1" + bytes([8, 10]) + bytes(8) + b"\1\1")
    ),
    "udp4": ethernet(whole(17, A4, B4, SECRET)),
    "tcp6": ethernet(whole(6, A6, B6, SECRET), 0x86DD),
    "udp6 vlan": ethernet(whole(17, A6, B6, SECRET + b"x"), 0x86DD, [(0x8100, 7)]),
    "icmp6 solicitation": ethernet(
        whole(58, A6, "ff02::1:ff00:99", b"\x87\0\0\0" + bytes(4) + ip_address(B6).packed), 0x86DD
    ),
}


def hidden(frame: bytes) -> bytes:
    """Return what is kept of one Ethernet frame."""
    buffer = np.frombuffer(frame, np.uint8).copy()
    one = [np.array([value]) for value in (0, len(frame), 1)]
    kept = hide.Pseudonyms(Redactor(KEY)).hide(buffer, *one)
    return buffer[: kept[0]].tobytes()


@pytest.mark.parametrize("name", FRAMES)
def test_checksums_stay_right_where_the_payload_is_put_back(tmp_path, name):
    frame = FRAMES[name]
    shown = hidden(frame)
    assert len(shown) < len(frame)
    (tmp_path / "x.pcap").write_bytes(classic([frame, shown + frame[len(shown) :]]))
    before, after = tshark(tmp_path / "x.pcap", *STATUS)
    assert GOOD in before
    assert BAD not in before
    assert after == before


def test_whole_packets_without_payload_verify_as_they_are(tmp_path):
    shown = hidden(ethernet(whole(6, A4, B4, b"")))
    assert len(shown) == 54
    (tmp_path / "x.pcap").write_bytes(classic([shown]))
    assert tshark(tmp_path / "x.pcap", *STATUS)[0][:2] == [GOOD, GOOD]


def test_a_wrong_checksum_stays_wrong(tmp_path):
    frame = bytearray(ethernet(whole(6, A4, B4, b"")))
    frame[14 + 20 + 17] ^= 1
    (tmp_path / "x.pcap").write_bytes(classic([hidden(bytes(frame))]))
    assert tshark(tmp_path / "x.pcap", *STATUS)[0][:2] == [GOOD, BAD]


def test_an_udp_checksum_of_none_stays_none():
    segment = struct.pack(">HHHH", 5000, 53, 8, 0)
    assert hidden(ethernet(ip(segment, 17, A4, B4)))[-2:] == b"\0\0"


ARP = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + bytes.fromhex("020000000001") + ip_address(A4).packed
ARP += bytes.fromhex("020000000002") + ip_address(B4).packed
EVERYTHING = {
    **FRAMES,
    "arp": ethernet(ARP, 0x0806),
    "record route": ethernet(ip(b"", 6, A4, B4, b"\7\7\4" + ip_address(B4).packed + b"\0")),
    "icmp error": ethernet(whole(1, A4, B4, b"\3\1\0\0" + bytes(4) + ip(b"", 17, B4, A4))),
    "tunnel": ethernet(ip(ip(SECRET, 17, A4, B4), 4, A4, B4)),
    "later fragment": ethernet(ip(SECRET, 17, A4, B4, fragment=100)),
    "routing header": ethernet(ip(struct.pack(">BBBBI", 59, 2, 0, 1, 0) + ip_address(A6).packed, 43, A6, B6), 0x86DD),
    "lldp": ethernet(SECRET + ip_address(A4).packed, 0x88CC),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_original_is_left_however_the_frame_is_cut(name):
    frame = EVERYTHING[name]
    originals = [ip_address(text).packed for text in (A4, B4, A6, B6)]
    originals += [bytes.fromhex("020000000001"), bytes.fromhex("020000000002"), SECRET[:8]]
    for size in range(len(frame) + 1):
        shown = hidden(frame[:size])
        assert len(shown) <= size
        assert not [value for value in originals if value in shown]
        # Half an address is an address to who knows the subnet.
        assert not [value for value in originals[:4] if shown.endswith(value[: len(value) // 2])]


def test_the_same_address_is_the_same_pseudonym_in_every_header():
    shown = hidden(EVERYTHING["arp"])
    assert shown[22:28] == shown[6:12]  # ARP's sender is the frame's
    assert shown[28:32] == hidden(FRAMES["tcp4"])[26:30] == ip_address(Redactor(KEY).address(A4)).packed


def test_the_command_line_exports(repo, tmp_path):
    for to, options in (("pcapng", ["--reveal"]), ("pcapng", ["--force"]), ("perfetto", [])):
        done = CliRunner().invoke(
            app, ["export", str(repo / "data" / "http"), "--to", to, "-o", str(tmp_path / to), *options]
        )
        assert done.exit_code == 0, done.output
        assert (tmp_path / to).stat().st_size > 1000


def test_a_run_without_trace_is_refused(repo, tmp_path):
    with pytest.raises(RxlabError, match="nothing to annotate"):
        export_run(repo / "data" / "tcp-rps-off-untraced-1", "pcapng", tmp_path / "x.pcapng")
