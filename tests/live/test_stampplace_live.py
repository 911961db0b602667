"""TCP and UDP in one capture of the host's own traffic: the kernel stamps them at two places (pairing.StampPlace)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rxlab.dataset.run import open_run
from rxlab.host.journal import Transaction
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Command
from rxlab.stages import STATUSES

PORT = 47917
SERVER = f"""
import socket
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); datagrams.bind(("127.0.0.1", {PORT}))
listener = socket.create_server(("127.0.0.1", {PORT})); stream, _ = listener.accept()
while True:
    left = stream.recv(1)
    if left == b"": break
    if left == b"t": stream.send(b"x" * 70)
    else: datagrams.sendto(*(lambda got: (got[0] * 3, got[1]))(datagrams.recvfrom(100)))
"""
CLIENT = """
import socket, sys, time
stream = socket.create_connection(("127.0.0.1", PORT)); stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); datagrams.connect(("127.0.0.1", PORT))
for _ in range(TCP): stream.send(b"t"); stream.recv(100); time.sleep(2e-4)
for _ in range(UDP): stream.send(b"u"); datagrams.send(b"d" * 30); datagrams.recv(100); time.sleep(2e-4)
"""


@pytest.mark.parametrize(("n_tcp", "n_udp"), [(300, 20), (5, 300)])
def test_packets_of_both_protocols_are_matched(
    journal: Transaction, testbed: Testbed, tmp_path: Path, n_tcp: int, n_udp: int
) -> None:
    client = CLIENT.replace("PORT", str(PORT)).replace("TCP)", f"{n_tcp})").replace("range(UDP", f"range({n_udp}")
    capture(
        tmp_path / "run", iface="lo", netns=testbed.dst.netns, transaction=journal, idle="spin", events="std",
        workload=Command([sys.executable, "-c", client], [sys.executable, "-c", SERVER], PORT),
    )  # fmt: skip
    run = open_run(tmp_path / "run")
    packets, clock = run.joined.packets, run.joined.clock
    status = np.asarray(STATUSES)[packets["status"]]
    for proto, n in ((6, 2 * n_tcp + n_udp), (17, 2 * n_udp)):
        data = packets["is_data"] & (packets["proto"] == proto)
        assert data.sum() == n, clock
        assert not (status[data] == "unmatched").any()
        # Where perf delivered nothing nobody knows; else each was read, by a task whose name is python's.
        assert np.isin(status[data], ["complete", "blind"]).all()
        assert (status[data] == "complete").mean() > 0.5
    assert run.joined.verdict != "refused"
