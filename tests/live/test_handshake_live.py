"""curl's first packets: SYN, listener, accept, as the server's own log has them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rxlab.dataset.run import open_run
from rxlab.follow.clockfit import NAT
from rxlab.host.journal import Transaction
from rxlab.host.settings import parse_settings
from rxlab.record.capture import capture
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Command
from rxlab.stages import HANDSHAKES, STAGE_INDEX

CONNECTIONS, PORT = 60, 47911


@pytest.mark.parametrize("rps", ["off", "1"])
def test_accept_returned_the_connection_that_the_ack_completed(
    journal: Transaction, testbed: Testbed, tmp_path: Path, rps: str
) -> None:
    address, log = testbed.dst.address(4), tmp_path / "accepts.json"
    server = [
        sys.executable,
        str(Path(__file__).with_name("acceptor.py")),
        address,
        str(PORT),
        str(CONNECTIONS),
        str(log),
    ]
    url = f"http://{address}:{PORT}/?[1-{CONNECTIONS}]"
    fetch = (
        f"curl -s -S -o /dev/null '{url}' && for i in $(seq 100); do [ -s '{log}' ] && exit; sleep 0.05; done; exit 1"
    )
    with journal.change(parse_settings({"rps_cpus": rps}, testbed.dst.iface, testbed.dst.netns)):
        capture(
            tmp_path / "run", testbed=testbed, transaction=journal, events="full", idle="spin",
            workload=Command(["sh", "-c", fetch], server, PORT),
        )  # fmt: skip
    joined = open_run(tmp_path / "run").joined
    packets, told = joined.packets, {call["port"]: call for call in json.loads(log.read_text())}
    port = joined.flows["sport"][packets["flow"]]
    word = np.asarray(HANDSHAKES)[packets["handshake"]]
    acks, syns = (
        np.flatnonzero((word == kind) & (joined.flows["dport"][packets["flow"]] == PORT)) for kind in ("ack", "syn")
    )
    assert set(port[acks].tolist()) == set(port[syns].tolist()) == set(told)
    assert len(acks) == len(syns) == CONNECTIONS
    ready = joined.time[acks, STAGE_INDEX["data_ready"]]
    assert (ready != NAT).mean() > 0.9  # perf may deliver nothing while certain tasks run
    listeners = packets["socket"][acks][ready != NAT]
    assert len(set(listeners.tolist())) == 1
    assert (packets["socket"][syns][ready != NAT] == listeners[0]).all()
    begun, returned, tid = (np.array([told[at][name] for at in port[acks].tolist()]) for name in ("t0", "t1", "tid"))
    woken = packets["tid"][acks] >= 0
    assert woken.sum() > CONNECTIONS / 3
    assert (packets["tid"][acks][woken] == tid[woken]).all()
    # Asleep in the very accept() that this connection ended; established before the listener was told, accepted after.
    asleep = packets["sleep_time"][acks]
    slept = asleep != NAT
    assert slept.sum() > CONNECTIONS / 3
    assert ((begun < asleep) & (asleep < returned))[slept].all()
    state, accepted = packets["established_time"][acks], packets["accept_time"][acks]
    both = (state != NAT) & (ready != NAT)
    assert both.mean() > 0.9
    assert (state < ready)[both].all()
    if (accepted != NAT).any():  # none is told where one call is missing
        assert ((ready < accepted) & (begun < accepted) & (accepted < returned)).all()
    else:
        assert joined.gates["blind"]["violations"] > 0
