"""An exact simulator: perf columns and packets of a world whose truth is known packet by packet.

Two CPUs: the sender's (0), where packets enter by netif_rx, and the reader's (1). Softirq work on a CPU is serial, the reader is
one task that sleeps when its queue is empty. Times are whole nanoseconds. Impairments remove events afterwards, as lost records
and blind tasks do, and leave the truth alone.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rxlab.follow.clockfit import ClockMap, fit_constant
from rxlab.follow.join import Machine
from rxlab.read.columns import Columns

START = 5_000_000_000
OFFSET = 1_790_000_000_123_456_789
READER, OTHER, SPINNER = 4242, 999, 17
SOCKET = 0xFFFF888100000000
MAC_LOCAL, MAC_PEER = 0x020000000002, 0x020000000001


@dataclass
class World:
    """A simulated recording and its truth."""

    events: dict[str, Columns]
    packets: Columns
    clock: ClockMap
    machine: Machine
    truth: dict[str, np.ndarray]
    lost: int = 0


@dataclass
class _Log:
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, event: str, time: int, cpu: int, tid: int, /, **fields: Any) -> None:
        self.rows[event].append({"time": int(time), "cpu": cpu, "tid": tid, "pid": tid, **fields})


def simulate(
    *,
    seed: int = 1,
    n: int = 300,
    proto: str = "tcp",
    rps: bool = False,
    mean_gap_ns: int = 40_000,
    stamp: str = "tap",
    max_payload: int = 1000,
    read_size: int = 65_536,
    merge_share: float = 0.0,
    n_addresses: int = 4096,
    work_ns: int = 1_500,
    blind: tuple[tuple[int, int, int], ...] = (),
    lost_share: float = 0.0,
) -> World:
    """Simulate a world.

    Parameters
    ----------
    mean_gap_ns : int
        Mean of the exponential gaps between packets; small values make the reader find queued data.
    stamp : {"tap", "bracket"}
        Where the pcap stamp is taken.
    merge_share : float
        Share of TCP packets merged into the skb before them by the socket backlog: no tcp_probe, no data_ready.
    n_addresses : int
        skb addresses in circulation: few make reuse frequent. An address is free again once its packet was read, so there
        must be more of them than packets that wait.
    work_ns : int
        What the reader does after each call before it asks for more.
    blind : tuples of (cpu, first ns, last ns) since the start
        Windows in which a CPU delivers nothing.
    lost_share : float
        Share of all events removed at random.
    """
    rng = np.random.default_rng(seed)
    log = _Log()
    stack_cpu = 1 if rps else 0
    gaps = rng.exponential(mean_gap_ns, n).astype(np.int64) + 1
    arrival = START + 10_000 + np.cumsum(gaps)
    payload = rng.integers(30, max_payload, n)
    is_tcp = proto == "tcp"
    merged = np.zeros(n, bool)
    if is_tcp and merge_share:
        merged[1:] = rng.random(n - 1) < merge_share
    header = 52 if is_tcp else 28
    _place_in_time(rng, arrival, merged)
    received, stamped, ready = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    free_at = [START, START]
    address = np.uint64(0xFFFF888200000000) + np.uint64(0x100) * (np.arange(n) % n_addresses).astype(np.uint64)
    first_seq = int(rng.integers(0, 2**32))
    seq = (first_seq + np.concatenate(([0], np.cumsum(payload)[:-1]))) % 2**32
    head = np.arange(n)
    for i in range(1, n):
        if merged[i]:
            head[i] = head[i - 1]
    group_len = np.zeros(n, np.int64)
    np.add.at(group_len, head, payload)
    for i in range(n):
        # The sender's CPU: netif_rx, softirq; the stack there, or on the RPS target after an IPI.
        t = max(int(arrival[i]), free_at[0])
        log.add("net:netif_rx_entry", t, 0, OTHER, name=0, skbaddr=address[i], len=payload[i] + header,
                queue_mapping=0, hash=0xABCD, gso_size=0)  # fmt: skip
        log.add("net:netif_rx", t + 900, 0, OTHER, name=0, skbaddr=address[i], len=payload[i] + header)
        log.add("irq:softirq_raise", t + 1500, 0, OTHER, vec=3)
        log.add("irq:softirq_entry", t + 2200, 0, OTHER, vec=3)
        bracket, rx = t + 400, t + 3100
        free_at[0] = t + 4000
        if rps:
            log.add("csd:csd_queue_cpu", t + 3000, 0, OTHER, field_cpu=1, func=7, csd=0xC5D)
            free_at[0] = t + 3600
            t = max(t + 4200, free_at[1])
            log.add("csd:csd_function_entry", t, 1, SPINNER, func=7, csd=0xC5D)
            log.add("irq:softirq_raise", t + 700, 1, SPINNER, vec=3)
            log.add("irq:softirq_entry", t + 1500, 1, SPINNER, vec=3)
            rx = t + 2500
        log.add("net:netif_receive_skb", rx, stack_cpu, OTHER, name=0, skbaddr=address[i], len=payload[i] + header)
        received[i], stamped[i] = rx, bracket if stamp == "bracket" else rx + 750
        end = rx + 1500
        if is_tcp and not merged[i]:
            log.add("tcp:tcp_probe", rx + 2000, stack_cpu, OTHER, skbaddr=address[i], skaddr=SOCKET, sport=80, dport=5000,
                    data_len=int(group_len[i]) % 65536, snd_una=1)  # fmt: skip
            end = rx + 2600
        ready[i] = end + 400
        if not merged[i]:
            log.add(
                "sock:sk_data_ready", ready[i], stack_cpu, OTHER, skaddr=SOCKET, family=2, protocol=6 if is_tcp else 17
            )
        free_at[stack_cpu] = max(free_at[stack_cpu], int(ready[i]) + 2500)
    truth = _read(log, ready, payload, head, address, stack_cpu, read_size, work_ns, is_tcp)
    truth |= {"received": received, "payload": payload, "merged": merged}
    packets = _packets(stamped, payload, header, seq, is_tcp)
    readings = [{"mono_before": START - 20, "real": START + OFFSET, "mono_after": START + 20}] * 3
    events, lost = _columns(log, rng, blind, lost_share)
    return World(events, packets, fit_constant(readings), Machine("eth0", frozenset({MAC_LOCAL})), truth, lost)


def _place_in_time(rng: np.random.Generator, arrival: np.ndarray, merged: np.ndarray) -> None:
    """Move merged packets close behind the one before, as a burst has them."""
    for i in np.flatnonzero(merged):
        arrival[i:] -= max(0, int(arrival[i] - arrival[i - 1]) - int(rng.integers(4_000, 6_000)))


def _read(
    log: _Log,
    ready: np.ndarray,
    payload: np.ndarray,
    head: np.ndarray,
    address: np.ndarray,
    stack_cpu: int,
    read_size: int,
    work_ns: int,
    is_tcp: bool,
) -> dict[str, np.ndarray]:
    """Run the reader: asleep until woken, then one receive call after the other until its queue is empty."""
    n = len(ready)
    copied, returned = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
    slow = int(ready[0]) + 1
    switch_in = START
    # What can be read at which time: a merged group is readable once its last packet is in.
    readable = ready.copy()
    for i in range(n - 2, -1, -1):
        if head[i + 1] == head[i]:
            readable[i] = readable[i + 1]
    readable = np.maximum.accumulate(readable)
    asleep_since = START + 5_000
    log.add("sched:sched_switch", asleep_since, 1, READER, prev_pid=READER, next_pid=SPINNER, next_comm=b"spinner")
    now, i, taken = asleep_since, 0, 0
    while i < n:
        if readable[i] >= now:
            # Nothing to read: sleep, and be woken by the packet's data_ready (the head's, for a merged group).
            if now > asleep_since:
                log.add("sched:sched_switch", now, 1, READER, prev_pid=READER, next_pid=SPINNER, next_comm=b"spinner")
            wake = max(int(ready[head[i]]) + 700, now + 100)
            log.add("sched:sched_waking", wake, stack_cpu, OTHER, field_pid=READER)
            log.add("sched:sched_wakeup", wake + 900, stack_cpu, OTHER, field_pid=READER)
            switch_in = max(wake + 2_400, int(readable[i]) + 800)
            log.add("sched:sched_switch", switch_in, 1, SPINNER, prev_pid=SPINNER, next_pid=READER, next_comm=b"reader")
            now = switch_in + 500
        # One receive call.
        room, ends = read_size, []
        while room > 0 and i < n and readable[i] < now:
            size = min(room, int(payload[i]) - taken)
            now += 700
            if is_tcp:
                log.add("skb:skb_copy_datagram_iovec", now, 1, READER, skbaddr=address[head[i]], len=size)
                if taken == 0:
                    copied[i] = now
            taken, room = taken + size, room - size
            if taken == payload[i]:
                ends.append(i)
                i, taken = i + 1, 0
            if not is_tcp:
                break
        now += 600
        log.add("sock:sock_recv_length", now, 1, READER, sk=SOCKET, family=2, protocol=6 if is_tcp else 17,
                ret=read_size - room, flags=0)  # fmt: skip
        returned[ends] = now
        now += work_ns
        slow = now
    log.add("sched:sched_switch", slow + 2_000, 1, READER, prev_pid=READER, next_pid=SPINNER, next_comm=b"spinner")
    return {"copied": copied, "returned": returned}


def _packets(stamped: np.ndarray, payload: np.ndarray, header: int, seq: np.ndarray, is_tcp: bool) -> Columns:
    n = len(stamped)

    def full(value: int, dtype: type) -> np.ndarray:
        return np.full(n, value, dtype)

    return Columns(
        {
            "time": stamped + OFFSET,
            "wire_len": (payload + header + 14).astype(np.uint32),
            "caplen": (payload + header + 14).astype(np.uint32),
            "frame": np.arange(1, n + 1),
            "src_mac": full(MAC_PEER, np.uint64),
            "dst_mac": full(MAC_LOCAL, np.uint64),
            "vlan": full(-1, np.int32),
            "ip_version": full(4, np.uint8),
            "src_hi": full(0, np.uint64),
            "src_lo": full(0x0A000001, np.uint64),
            "dst_hi": full(0, np.uint64),
            "dst_lo": full(0x0A000002, np.uint64),
            "proto": full(6 if is_tcp else 17, np.uint8),
            "sport": full(5000, np.uint16),
            "dport": full(80, np.uint16),
            "seq": seq.astype(np.uint32) if is_tcp else full(0, np.uint32),
            "payload_len": payload.astype(np.int32),
            "flow": full(0, np.int32),
            "flow_dir": full(0, np.int8),
        }
    )


def _columns(
    log: _Log, rng: np.random.Generator, blind: tuple[tuple[int, int, int], ...], lost_share: float
) -> tuple[dict[str, Columns], int]:
    """Order all events by (time, CPU), remove what the impairments hide, and lay them out as the reader would."""
    names, times, cpus, rows = [], [], [], []
    for name, entries in log.rows.items():
        for row in entries:
            names.append(name)
            times.append(row["time"])
            cpus.append(row["cpu"])
            rows.append(row)
    order = np.lexsort((cpus, times))
    events: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rank = lost = 0
    for at in order:
        row = rows[at]
        if any(cpu == row["cpu"] and first <= row["time"] - START < last for cpu, first, last in blind):
            continue
        if lost_share and rng.random() < lost_share:
            lost += 1
            continue
        events[names[at]].append({**row, "rank": rank})
        rank += 1
    types = {
        "skbaddr": np.uint64,
        "skaddr": np.uint64,
        "sk": np.uint64,
        "csd": np.uint64,
        "func": np.uint64,
        "cpu": np.int32,
    }
    columns = {}
    for name, entries in events.items():
        arrays = {}
        for key in entries[0]:
            values = [entry[key] for entry in entries]
            arrays[key] = np.array(values, types.get(key)) if key != "next_comm" else np.array(values, "S16")
        columns[name] = Columns(arrays, {"categories": {"name": ["eth0"]}})
    return columns, lost
