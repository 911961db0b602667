"""Connection set-up followed from the SYN over the listener to accept(): a world in which every time is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rxlab.dataset import schema, store
from rxlab.follow.clockfit import NAT
from rxlab.follow.handshake import handshake_kinds
from rxlab.follow.join import Joined, join
from rxlab.read.columns import Columns
from rxlab.show.life import packet_life
from rxlab.stages import HANDSHAKES, STAGE_INDEX, STATUSES
from tests.joined_builder import make_host, make_run
from tests.simulate import FIRST, OFFSET, START, World, simulate

LISTENER, ACCEPTOR, SENDER = 0xFFFF888300000040, 7000, 999
FLOWS = 3
SYN, ACK = 0x02, 0x10


def connecting(*, busy: bool = False, rejected: bool = False) -> World:
    """A world of three connections that begins with their handshakes, two milliseconds apart; `busy`: nobody sleeps in accept().

    `rejected`: one more accept() returned EAGAIN. The acceptor is on CPU 2, the stack on CPU 0.
    """
    world = simulate(flows=FLOWS, readers=1, n=200, mean_gap_ns=60_000)
    told: dict[str, list[dict]] = {}

    def add(name: str, time: int, cpu: int, tid: int, /, **fields: int | bytes) -> None:
        told.setdefault(name, []).append({"time": time, "cpu": cpu, "tid": tid, "pid": tid, **fields})

    packets = []
    add("sched:sched_switch", START + 1, 2, ACCEPTOR, prev_pid=ACCEPTOR, next_pid=0, next_comm=b"idle", prev_state=1)
    for flow in range(FLOWS):
        for kind, at in ((SYN, 1_000_000), (ACK, 1_900_000)):
            time = START + at + flow * 2_000_000
            address = 0xFFFF888400000000 + 0x100 * (2 * flow + (kind == ACK))
            frame = {"name": 0, "skbaddr": address, "len": 52}
            add("net:netif_rx_entry", time, 0, SENDER, **frame, queue_mapping=0, hash=9, gso_size=0)
            add("net:netif_rx", time + 900, 0, SENDER, **frame)
            add("net:netif_receive_skb", time + 3_000, 0, SENDER, **frame)
            packets.append((time + 3_750, flow, kind))
            if kind == SYN:
                continue
            state = {"sport": 80, "dport": 5000 + flow, "protocol": 6, "newstate": 1, "oldstate": 3, "skaddr": 5}
            add("sock:inet_sock_set_state", time + 5_000, 0, SENDER, **state)
            add("sock:sk_data_ready", time + 6_000, 0, SENDER, skaddr=LISTENER, family=2, protocol=6)
            if not busy:
                add("sched:sched_waking", time + 6_700, 0, SENDER, field_pid=ACCEPTOR)
                add("sched:sched_wakeup", time + 7_600, 0, SENDER, field_pid=ACCEPTOR)
                switch = {"prev_pid": 0, "next_pid": ACCEPTOR, "next_comm": b"acceptor", "prev_state": 0}
                add("sched:sched_switch", time + 20_000, 2, 0, **switch)
            if rejected and flow == 1:
                add("syscalls:sys_exit_accept4", time + 22_000, 2, ACCEPTOR, ret=-11)
            add("syscalls:sys_exit_accept4", time + 25_000, 2, ACCEPTOR, ret=5 + flow)
            switch = {"prev_pid": ACCEPTOR, "next_pid": 0, "next_comm": b"idle", "prev_state": 1}
            if not busy:
                add("sched:sched_switch", time + 30_000, 2, ACCEPTOR, **switch)
    return dataclasses.replace(world, events=merged(world.events, told), packets=with_packets(world.packets, packets))


def merged(events: dict[str, Columns], told: dict[str, list[dict]]) -> dict[str, Columns]:
    """Put the events in, which all come before the world's first packet, and number all of them again."""
    whole = {}
    for name in {*events, *told}:
        there = events.get(name)
        rows = told.get(name, [])
        columns = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else {})}
        if there is not None:
            names = [key for key in there if key != "rank"]
            columns = {
                key: np.concatenate((columns.get(key, np.zeros(len(rows))).astype(there[key].dtype), there[key]))
                for key in names
            }
        order = np.argsort(columns["time"], kind="stable")
        attrs = there.attrs if there is not None else {}
        whole[name] = Columns({key: column[order] for key, column in columns.items()}, attrs)
    time = np.concatenate([whole[name]["time"] for name in whole])
    ranks = np.empty(len(time), np.int64)
    ranks[np.argsort(time, kind="stable")] = np.arange(len(time))
    edges = np.cumsum([0, *(whole[name].n for name in whole)])
    return {
        name: whole[name].with_columns(rank=ranks[low:high])
        for name, low, high in zip(whole, edges[:-1], edges[1:], strict=True)
    }


def with_packets(packets: Columns, handshakes: list[tuple[int, int, int]]) -> Columns:
    n, more = packets.n, len(handshakes)
    columns = {key: np.concatenate((packets[key][:more], packets[key])) for key in packets}
    columns["time"][:more] = [time + OFFSET for time, _, _ in handshakes]
    columns["flow"][:more] = [flow for _, flow, _ in handshakes]
    columns["sport"][:more] = [5000 + flow for _, flow, _ in handshakes]
    columns["payload_len"][:more], columns["wire_len"][:more] = 0, 66
    columns["seq"][:more] = 0
    columns["frame"] = np.arange(1, n + more + 1)
    flags = np.full(n + more, 0x18, np.uint16)
    flags[:more] = [kind for _, _, kind in handshakes]
    return Columns(columns).with_columns(tcp_flags=flags)


def run(world: World) -> Joined:
    return join(world.events, world.packets, world.clock, world.machine)


def test_each_handshake_is_followed_to_accept() -> None:
    joined = run(connecting(rejected=True))
    packets, time = joined.packets, joined.time
    words = np.asarray(HANDSHAKES)[packets["handshake"]]
    assert words[:6].tolist() == ["syn", "ack"] * 3
    assert set(words[6:]) == {"none"}
    assert set(np.asarray(STATUSES)[packets["status"][:6]]) == {"handshake"}
    assert (packets["socket"][:6] == LISTENER).all()
    acks = np.arange(1, 6, 2)
    came = START + 1_900_000 + 2_000_000 * np.arange(3)
    for stage, after in (
        ("driver_rx", 0), ("netif_receive_skb", 3_000), ("data_ready", 6_000), ("waking", 6_700), ("wakeup", 7_600), ("switch_in", 20_000),
    ):  # fmt: skip
        assert (time[acks, STAGE_INDEX[stage]] == came + after).all(), stage
    assert (packets["established_time"][acks] == came + 5_000).all()
    assert (packets["accept_time"][acks] == came + 25_000).all()
    assert (packets["tid"][acks] == ACCEPTOR).all()
    assert (packets["sleep_time"][acks] == np.array([START + 1, came[0] + 30_000, came[1] + 30_000])).all()
    assert (time[::2][:3, STAGE_INDEX["data_ready"]] == NAT).all()  # a SYN wakes nobody
    # The data packets are what they were without.
    assert set(np.asarray(STATUSES)[packets["status"][6:]]) == {"complete"}
    assert joined.verdict == "trusted"


def test_the_story_of_a_handshake_is_told() -> None:
    tree = store.build(run(connecting()), run=make_run(), host=make_host())
    schema.validate(tree)
    shown = packet_life(tree, 2)
    assert (
        f"handshake: ack, listener {LISTENER:#x}, established 5.00 µs after the first stage below, accepted 25.0 µs after"
        in shown
    )
    assert "status handshake" in shown
    assert f"tid {ACCEPTOR} (acceptor)" in shown
    assert "had gone to sleep on cpu 2" in shown


def test_a_listener_that_nobody_waits_for_wakes_nobody() -> None:
    """A server that polls: the connection is queued, nobody is woken, and no task tells whose accept() it was."""
    joined = run(connecting(busy=True))
    acks = np.arange(1, 6, 2)
    assert (joined.time[acks, STAGE_INDEX["data_ready"]] != NAT).all()
    assert (joined.time[acks, STAGE_INDEX["waking"]] == NAT).all()
    assert (joined.packets["tid"][acks] == -1).all()
    assert (joined.packets["accept_time"][acks] == NAT).all()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_an_accept_that_was_not_recorded_leaves_the_others_untold(gone: int) -> None:
    """With one return missing each connection could be given its successor's."""
    world = connecting()
    calls = world.events["syscalls:sys_exit_accept4"]
    world.events["syscalls:sys_exit_accept4"] = calls.take(np.delete(np.arange(3), gone))
    assert (run(world).packets["accept_time"] == NAT).all()


def test_what_makes_a_handshake() -> None:
    """By flags and order in each direction; an ACK with data is a data packet, a reset or an ACK elsewhere no part of it."""
    told = [  # flow, flags, payload
        (0, 0x02, 0, "syn"), (1, 0x02, 0, "syn"), (0, 0x10, 0, "ack"), (0, 0x10, 0, "none"), (1, 0x18, 80, "none"), (2, 0x12, 0, "syn_ack"),
        (3, 0x02, 0, "syn"), (3, 0x04, 0, "none"), (3, 0x10, 0, "none"), (0, 0x02, 0, "syn"), (0, 0x02, 0, "syn"), (0, 0x10, 0, "ack"),
        (4, 0x10, 0, "none"), (5, 0x02, 0, "syn"), (5, 0x11, 0, "none"),
    ]  # fmt: skip
    flow, flags, payload, words = zip(*told, strict=True)
    received = Columns(
        {
            "directed_flow": np.array(flow, np.int32),
            "tcp_flags": np.array(flags, np.uint16),
            "payload_len": np.array(payload, np.int32),
            "proto": np.full(len(told), 6, np.uint8),
        }
    )
    assert [HANDSHAKES[code] for code in handshake_kinds(received)] == list(words)
    assert not handshake_kinds(received.with_columns(proto=np.full(len(told), 17, np.uint8))).any()


def test_the_world_begins_after_its_handshakes() -> None:
    assert (connecting().packets["time"][6:] >= START + FIRST + OFFSET).all()
