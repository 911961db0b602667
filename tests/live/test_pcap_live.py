"""Real traffic over a veth pair, captured by tcpdump: every column equals what tshark prints of the same file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tshark_judge import assert_equal_to_tshark

from rxlab.read.dissect import http_requests
from rxlab.read.pcap import read_pcap

# UDP and TCP over both address families, datagrams larger than the MTU (fragments), and one HTTP exchange.
SERVER = """
import http.server, socket, sys, threading
def echo(family, host):
    s = socket.socket(family, socket.SOCK_DGRAM); s.bind((host, 7000))
    while True:
        data, peer = s.recvfrom(65535); s.sendto(data, peer)
for family, host in ((socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::1')):
    threading.Thread(target=echo, args=(family, host), daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header('Content-Length', '40000'); self.end_headers(); self.wfile.write(bytes(40000))
    def log_message(self, *args): pass
class V6(http.server.HTTPServer):
    address_family = socket.AF_INET6
threading.Thread(target=V6(('::1', 8001), Handler).serve_forever, daemon=True).start()
server = http.server.HTTPServer(('0.0.0.0', 8000), Handler)
print('ready', flush=True)
server.serve_forever()
"""
CLIENT = """
import socket, urllib.request
for family, host in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
    s = socket.socket(family, socket.SOCK_DGRAM); s.settimeout(5)
    for size in (0, 1, 1400, 3000, 60000):
        s.sendto(bytes(size), (host, 7000)); s.recv(65535)
for url in ('http://127.0.0.1:8000/first', 'http://127.0.0.1:8000/second', 'http://[::1]:8001/six'):
    assert len(urllib.request.urlopen(url, timeout=5).read()) == 40000
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'the traffic ends here', ('127.0.0.1', 7000))
"""
LAST = b"the traffic ends here"


@pytest.fixture
def namespace() -> Iterator[str]:
    name = f"rxlab-pcap-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up", "mtu", "1500"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def capture(namespace: str, path: Path, *options: str, interface: str = "lo") -> None:
    """Capture the client's traffic with the server in a namespace; its last packet, once in the file, ends it."""
    inside = ["ip", "netns", "exec", namespace]
    # In immediate mode every packet takes a slot of the whole snap length: the usual 2 MiB hold eight, and a busy machine more.
    tcpdump = [*inside, "tcpdump", "-i", interface, "-Z", "root", "--immediate-mode", "-U", "-B", "65536"]
    tcpdump += ["-w", str(path), *options]
    with (
        subprocess.Popen([*inside, sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server,
        subprocess.Popen(tcpdump, stderr=subprocess.PIPE, text=True) as recorder,
    ):
        try:
            assert server.stdout is not None
            assert recorder.stderr is not None
            assert server.stdout.readline() == "ready\n"
            assert any("listening" in line for line in recorder.stderr)  # reads as far as that line
            subprocess.run([*inside, sys.executable, "-c", CLIENT], check=True)
            wait_for(path, LAST)
        finally:
            recorder.terminate()
            recorder.wait(10)
            server.kill()


def wait_for(path: Path, content: bytes, seconds: float = 30) -> None:
    """Wait until a file has some bytes: on a busy machine a recorder that writes nothing for a while has not ended."""
    deadline = time.monotonic() + seconds
    while content not in path.read_bytes():
        assert time.monotonic() < deadline, f"{content!r} never came to {path}"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "interface"),
    [(("--nano",), "lo"), (("--micro", "-s", "96"), "lo"), (("--nano",), "any")],
    ids=["nano", "micro-snaplen", "cooked"],
)
def test_every_column_equals_tshark(namespace: str, tmp_path: Path, options: tuple[str, ...], interface: str) -> None:
    path = tmp_path / "live.pcap"
    capture(namespace, path, *options, interface=interface)
    packets = read_pcap(path)
    assert packets.n > 200, "two datagrams of 60,000 bytes, there and back, are 164 fragments"
    for version, proto in ((4, 6), (4, 17), (6, 6), (6, 17)):
        assert ((packets["ip_version"] == version) & (packets["proto"] == proto)).any(), (version, proto)
    assert (packets["fragment"] == 1).any()
    assert (packets["tsval"] > 0).any()
    assert_equal_to_tshark(packets, path)


def test_tcp_payload_adds_up_and_flows_are_connections(namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "live.pcap"
    capture(namespace, path)
    packets = read_pcap(path)
    answers = (packets["proto"] == 6) & np.isin(packets["sport"], (8000, 8001))
    assert packets["payload_len"][answers].sum() > 3 * 40_000
    for flow in np.unique(packets["flow"][packets["flow"] >= 0]):
        rows = packets.take(packets["flow"] == flow)
        assert len(np.unique(rows["proto"])) == 1
        ports = {frozenset(pair) for pair in zip(rows["sport"].tolist(), rows["dport"].tolist(), strict=True)}
        assert len(ports) == 1
        assert rows["flow_dir"][0] == 0
    requests = http_requests(path)
    assert [request["uri"] for request in requests] == ["/first", "/second", "/six"]
    assert [request["status"] for request in requests] == [200, 200, 200]
    assert all(request["latency_ns"] > 0 for request in requests)
    frames = dict(zip(packets["frame"].tolist(), packets["time"].tolist(), strict=True))
    assert all(frames[request["frame"]] == request["time"] for request in requests)
