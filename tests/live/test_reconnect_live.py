"""Connections from one port one after the other: the same 5-tuple, other sockets, sequence numbers that lie over each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from reconnector import SIZE

from rxlab.dataset.run import open_run
from rxlab.host.journal import Transaction
from rxlab.host.settings import parse_settings
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Command
from rxlab.stages import HANDSHAKES, STAGE_INDEX, STATUSES

CONNECTIONS, PORT, FROM = 30, 47915, 47916
PROGRAM = str(Path(__file__).with_name("reconnector.py"))


@pytest.mark.parametrize("rps", ["1"])
def test_bytes_of_a_connection_are_not_those_of_the_one_before(
    journal: Transaction, testbed: Testbed, tmp_path: Path, rps: str
) -> None:
    address, log = testbed.dst.address(4), tmp_path / "calls.json"
    server = [sys.executable, PROGRAM, "serve", address, str(PORT), str(CONNECTIONS), str(log)]
    client = [sys.executable, PROGRAM, "connect", address, str(PORT), str(CONNECTIONS), str(FROM)]
    with journal.change(parse_settings({"rps_cpus": rps}, testbed.dst.iface, testbed.dst.netns)):
        capture(
            tmp_path / "run", testbed=testbed, transaction=journal, events="full", idle="spin",
            workload=Command(client, server, PORT),
        )  # fmt: skip
    joined = open_run(tmp_path / "run").joined
    packets = joined.packets
    flow, seq, is_syn = (
        packets["flow"],
        packets["seq"].astype(np.int64),
        packets["handshake"] == HANDSHAKES.index("syn"),
    )
    assert len(np.unique(flow[is_syn])) == is_syn.sum() == CONNECTIONS
    # The truth: a packet's bytes count from its connection's SYN, a call's from the connection's calls before it.
    connection, isn = np.cumsum(is_syn) - 1, seq[is_syn]
    assert ((np.diff(isn) % 2**32) < SIZE).any(), "no sequence number came twice: the test shows nothing"
    end = (seq - isn[connection] - 1) % 2**32 + packets["payload_len"]
    calls = np.array(json.loads(log.read_text()))
    taken = np.concatenate([np.cumsum(calls[calls[:, 0] == number, 3]) for number in range(CONNECTIONS)])
    data = np.flatnonzero(packets["is_data"] & (joined.flows["dport"][flow] == PORT))
    assert len(data) > CONNECTIONS * 2
    call = np.searchsorted(calls[:, 0] * (SIZE + 1) + taken, connection[data] * (SIZE + 1) + end[data])
    returned, trusted = joined.time[data, STAGE_INDEX["recvmsg"]], packets["trusted"][data]
    assert not (trusted & ((returned < calls[call, 1]) | (returned > calls[call, 2]))).any()
    hidden = np.isin(np.asarray(STATUSES)[packets["status"][data]], ["blind", "lost"])
    assert trusted[~hidden].mean() > 0.99
    assert hidden.mean() < 0.5
    for name in ("flow", "status", "trusted"):
        assert (open_run(tmp_path / "run", chunks=2000).joined.packets[name] == packets[name]).all()
