"""Forwarded skbs, event by event: what is one life that goes on at another device, and what is only the same address again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rxlab.follow.forwarding import Forwarded, follow_forwarding
from rxlab.follow.verdict import _wrong_ports
from rxlab.read.columns import Columns

SKB, OTHER = 0xFFFF888000000100, 0xFFFF888000000200
RX, ENTRY, QUEUE, POLL = (
    "net:netif_receive_skb",
    "net:netif_rx_entry",
    "net:net_dev_queue",
    "net:napi_gro_receive_entry",
)
SOFTIRQ, READY = "irq:softirq_entry", "sock:sk_data_ready"


def followed(story: list[tuple[Any, ...]]) -> Forwarded:
    """Follow the skbs of "eth0" through events told in order: (event, CPU, skb, length, device)."""
    rows: dict[str, list[tuple[Any, ...]]] = {}
    for rank, (event, cpu, *rest) in enumerate(story):
        rows.setdefault(event, []).append((rank, cpu, *rest))
    events = {}
    for event, told in rows.items():
        columns = {"rank": np.array([row[0] for row in told]), "cpu": np.array([row[1] for row in told], np.int32)}
        attrs: dict[str, Any] = {}
        if event.startswith("net:"):
            names = sorted({row[4] for row in told})
            columns["skbaddr"] = np.array([row[2] for row in told], np.uint64)
            columns["len"] = np.array([row[3] for row in told])
            columns["name"] = np.array([names.index(row[4]) for row in told], np.int32)
            attrs["categories"] = {"name": names}
        events[event] = Columns(columns, attrs)

    def is_captured(columns: Columns) -> np.ndarray:
        return np.array([name == "eth0" for name in columns.attrs["categories"]["name"]])[columns["name"]]

    receive = events[RX].take(is_captured(events[RX]))
    return follow_forwarding(receive, events, is_captured)


ROUTED = [(RX, 0, SKB, 1000, "eth0"), (QUEUE, 0, SKB, 1014, "pod0"), (ENTRY, 0, SKB, 1000, "eth1")]


@pytest.mark.parametrize("cpu", [0, 1])
def test_routing_and_a_veth_are_one_life(cpu: int) -> None:
    # RPS of the veth may move it.
    found = followed([*ROUTED, (SOFTIRQ, cpu), (RX, cpu, SKB, 1000, "eth1"), (READY, cpu)])
    assert (found.rank.tolist(), found.cpu.tolist(), found.devices.tolist()) == ([4], [cpu], [1])
    assert not found.is_out.any()


def test_a_bridge_takes_it_in_again_at_once_and_may_hand_it_on() -> None:
    story = [(RX, 0, SKB, 90, "eth0"), (RX, 0, SKB, 90, "br0")]
    found = followed(story)
    assert (found.rank.tolist(), found.devices.tolist()) == ([1], [1])
    found = followed([*story, (QUEUE, 0, SKB, 104, "pod0"), (ENTRY, 0, SKB, 90, "eth1"), (RX, 1, SKB, 90, "eth1")])
    assert (found.rank.tolist(), found.cpu.tolist(), found.devices.tolist()) == ([4], [1], [2])


def test_a_container_whose_device_has_the_captured_ones_name() -> None:
    ours = [(RX, 0, SKB, 1000, "eth0"), (QUEUE, 0, SKB, 1014, "pod0"), (ENTRY, 0, SKB, 1000, "eth0")]
    found = followed([*ours, (RX, 0, SKB, 1000, "eth0")])
    assert found.rank.tolist() == [3, 3]
    # Without net_dev_queue it may as well be the next packet of the captured device.
    found = followed([ours[0], ours[2], (RX, 0, SKB, 1000, "eth0")])
    assert found.devices.tolist() == [0, 0]


def test_a_veth_with_napi_takes_it_in_a_softirq_of_its_own() -> None:
    story = [*ROUTED[:2], (SOFTIRQ, 1), (POLL, 1, SKB, 1000, "eth1"), (RX, 1, SKB, 1000, "eth1")]
    assert followed(story).rank.tolist() == [4]
    # Not seen to leave, it may be another packet.
    assert followed([story[0], *story[2:]]).devices.tolist() == [0]


def test_what_leaves_the_host_is_told() -> None:
    found = followed([(RX, 0, SKB, 1000, "eth0"), (QUEUE, 0, SKB, 1014, "eth2"), (RX, 0, OTHER, 60, "eth0")])
    assert (found.devices.tolist(), found.is_out.tolist()) == ([0, 0], [True, False])
    # Later the address is that of a packet that comes in elsewhere, or here.
    for device in ("eth0", "eth1"):
        later = [(SOFTIRQ, 0), (POLL, 0, SKB, 1000, device)] if device == "eth0" else [(POLL, 0, SKB, 900, device)]
        found = followed([(RX, 0, SKB, 1000, "eth0"), (QUEUE, 0, SKB, 1014, "eth2"), *later, (RX, 0, SKB, 900, device)])
        assert found.is_out.tolist()[0]


@pytest.mark.parametrize(
    "between",
    [
        [(READY, 0)],  # a socket had it: then the address was free again
        [(SOFTIRQ, 0)],  # the softirq that had it in hand is over
        [("sched:sched_switch", 0)],
        [("tcp:tcp_probe", 0)],
        [(RX, 0, OTHER, 60, "eth0")],  # the softirq went on to the next
    ],
)
@pytest.mark.parametrize("sent", [True, False])
def test_the_same_address_later_is_another_packet(between: list[tuple[Any, ...]], sent: bool) -> None:
    story = [ROUTED[0], *between, *(ROUTED[1:] if sent else ROUTED[2:]), (RX, 0, SKB, 1000, "eth1")]
    found = followed(story)
    assert found.devices.tolist()[0] == 0
    assert found.rank.tolist()[0] == 0
    assert not found.is_out.any()


@pytest.mark.parametrize("at", [2, 3])
def test_another_length_is_another_packet(at: int) -> None:
    story = [*ROUTED, (RX, 0, SKB, 1000, "eth1")]
    event, cpu, skb, _, device = story[at]
    story[at] = (event, cpu, skb, 999, device)
    assert followed(story).devices.tolist() == [0]


def test_ports_that_nat_changed_on_the_way_are_not_wrong() -> None:
    """Two packets to port 80 that a socket of port 8000 got: one by another device of the host, one not."""
    path = Columns({"sport": np.full(2, 8000), "dport": np.full(2, 5000), "devices": np.array([1, 0])})
    evidence = SimpleNamespace(matched=SimpleNamespace(event=np.arange(2)), path=SimpleNamespace(columns=path))
    flows = Columns({"sport": np.array([5000]), "dport": np.array([80])})
    assert _wrong_ports(Columns({"flow": np.zeros(2, np.int32)}), flows, evidence).tolist() == [False, True]


def test_another_cpus_device_is_another_packet() -> None:
    story = [ROUTED[0], (ENTRY, 1, SKB, 1000, "eth1"), (RX, 1, SKB, 1000, "eth1")]
    assert followed(story).devices.tolist() == [0]
