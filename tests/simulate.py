"""An exact simulator: perf columns and packets of a world whose truth is known packet by packet.

Packets enter on CPU 0 by netif_rx and reach the stack there, or on CPU 1 after an RPS interrupt. Softirq work on a CPU is serial. Each
reader is a task on a CPU of its own: it sleeps when its sockets are empty, or asks again and again. Times are whole nanoseconds.
Impairments remove events afterwards, as lost records and blind tasks do, and leave the truth alone.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rxlab.follow.clockfit import NAT, ClockMap, fit_constant
from rxlab.follow.received import Machine
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX, STAGE_NAMES

START = 5_000_000_000
OFFSET = 1_790_000_000_123_456_789
READER, OTHER, SPINNER = 4242, 999, 17
BLIND, UNSEEN = 77, 55
SOCKET = 0xFFFF888100000000
MAC_LOCAL, MAC_PEER = 0x020000000002, 0x020000000001
EAGAIN = -11
FIRST = 20_000_000  # ns of silence before the first packet
DROP_REASON = 42


@dataclass
class World:
    """A simulated recording and its truth.

    ``truth``, dims (packet,): ``received, copied, returned`` (ns, -1: never), ``slept`` (when its reader had gone to sleep), ``payload``, ``merged``, ``dropped``, ``duplicate``,
    ``tid``, ``knowable`` (the events that name its reader were delivered) and ``stages``, dims (packet, stage), NaT where
    the packet has no such event.
    """

    events: dict[str, Columns]
    packets: Columns
    clock: ClockMap
    machine: Machine
    truth: dict[str, np.ndarray]
    lost: int = 0
    lost_records: Columns | None = None


@dataclass(frozen=True)
class Recipe:
    """What a world is like; the parameters of :func:`simulate`.

    Attributes
    ----------
    mean_gap_ns : int
        Mean of the exponential gaps between packets; small values make the reader find queued data.
    stamp : {"tap", "bracket"}
        Where the pcap stamp is taken.
    merge_share : float
        Share of TCP packets merged into the skb before them by the socket backlog: no tcp_probe, no data_ready. With
        `behind_ack` each such group is merged behind a pure ACK of its own.
    n_addresses : int
        skb addresses in circulation: few make reuse frequent. An address is free again once its packet was read, so there
        must be more of them than packets that wait.
    work_ns : int
        What a reader does after each call before it asks for more.
    flows : int
        TCP: connections, each with its socket. UDP: flows spread over `sockets`, as an SO_REUSEPORT group does.
    readers : int
        Tasks. One serves all sockets (epoll); with `shared` all of them serve every socket, else each its own.
    stall_share : float
        UDP calls preempted for 60 us between taking a datagram and returning.
    entries : bool
        The entries of the receive calls are recorded too.
    rings : int
        Readers, the first ones, that receive by io_uring: each call is followed by its completion.
    peek, polling : bool
        Readers look with MSG_PEEK before they read; ask again when there is nothing instead of sleeping.
    closes : int
        Before this packet the last UDP socket of the group was closed: its flows go on in the others; 0: never.
    behind : bool
        UDP: data_ready is called only where the receive queue was empty (Linux 6.10 on). A reader moves that whole queue aside.
    lock_every : int
        In every such call the reader waits, uninterruptibly, between its copies and its return; 0: never.
    drop_share, repeat_share, swap_share : float
        Packets the socket drops (kfree_skb with a reason); retransmitted though delivered; overtaken by their successors (TCP).
    swap_depth : int
        How many successors overtake such a packet.
    gro : int
        Segments of every TCP packet, merged by GRO before the tap.
    blind : tuples of (cpu, first ns, last ns)
        Windows in which a CPU delivers nothing, times since the first packet may come: a blind task runs there, and no reader.
        The switch to it is seen, the one away from it is not, so that the next one that is seen breaks the chain.
    lost_share, lost_burst : float
        Share of all events removed, and the mean number lost in a row on a CPU (1: each for itself).
    """

    seed: int = 1
    n: int = 300
    proto: str = "tcp"
    rps: bool = False
    mean_gap_ns: int = 40_000
    stamp: str = "tap"
    max_payload: int = 1000
    read_size: int = 65_536
    merge_share: float = 0.0
    behind_ack: bool = False
    n_addresses: int = 4096
    work_ns: int = 1_500
    flows: int = 1
    sockets: int = 1
    readers: int = 1
    shared: bool = False
    stall_share: float = 0.0
    entries: bool = False
    rings: int = 0
    closes: int = 0
    behind: bool = False
    peek: bool = False
    polling: bool = False
    drop_share: float = 0.0
    repeat_share: float = 0.0
    swap_share: float = 0.0
    swap_depth: int = 1
    lock_every: int = 0
    gro: int = 1
    blind: tuple[tuple[int, int, int], ...] = ()
    lost_share: float = 0.0
    lost_burst: float = 1.0

    @property
    def is_tcp(self) -> bool:
        """Whether the world speaks TCP."""
        return self.proto == "tcp"


@dataclass
class _Log:
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, event: str, time: int, cpu: int, tid: int, /, **fields: Any) -> dict[str, Any]:
        """Add an event; the row returned tells later, by ``_kept``, whether the recording has it."""
        row = {"time": int(time), "cpu": cpu, "tid": tid, "pid": tid, **fields}
        self.rows[event].append(row)
        return row


@dataclass
class _Packet:
    """One packet on the wire, its place in its stream and the events it caused, by stage."""

    number: int
    flow: int
    socket: int
    seq: int
    payload: int
    fate: str = "read"  # read, dropped, duplicate, ack
    head: int = -1  # the packet into whose skb it was merged
    arrival: int = 0
    ready: int = 0
    stamp: int = 0
    address: int = 0
    lives: dict[str, dict[str, Any]] = field(default_factory=dict)
    taken: int = 0
    woken: int = -1  # the reader that came for it
    slept: int = 0
    is_swapped: bool = False


def simulate(**recipe: Any) -> World:
    """Simulate the world of a :class:`Recipe`."""
    told = Recipe(**recipe)
    rng = np.random.default_rng(told.seed)
    log = _Log()
    packets = _wire(told, rng)
    _stack(log, told, packets)
    _Readers(log, told, packets).run()
    events, records = _columns(log, rng, told)
    readings = [{"mono_before": START - 20, "real": START + OFFSET, "mono_after": START + 20}] * 3
    machine = Machine("eth0", frozenset({MAC_LOCAL}))
    lost = int(records["count"].sum())
    clock = fit_constant(readings)
    return World(events, _pcap(told, packets), clock, machine, _truth(told, packets), lost, records)


def _wire(told: Recipe, rng: np.random.Generator) -> list[_Packet]:
    """Return the packets in the order they arrive."""
    seq = rng.integers(0, 2**32, told.flows).tolist()
    payloads = rng.integers(30, told.max_payload, told.n).tolist()
    flows = rng.integers(0, told.flows, told.n).tolist() if told.flows > 1 else [0] * told.n
    gaps = (rng.exponential(told.mean_gap_ns, told.n).astype(np.int64) + 1).tolist()
    chance = rng.random((4, told.n)).tolist()
    packets: list[_Packet] = []
    last: dict[int, _Packet] = {}
    clock = START + FIRST
    for i in range(told.n):
        flow, size = flows[i], payloads[i] * told.gro
        merged = told.is_tcp and flow in last and chance[0][i] < told.merge_share
        # Merged packets come close behind the one before, as in a burst.
        clock += 4_000 + gaps[i] % 2_000 if merged else gaps[i]
        if merged and told.behind_ack and last[flow].fate != "ack" and last[flow].head < 0:
            ack = _Packet(len(packets), flow, flow, seq[flow], 0, "ack", arrival=clock)
            packets.append(ack)
            last[flow], clock = ack, clock + 4_000
        n_sockets = told.sockets - (told.closes > 0 and i >= told.closes)
        socket = flow if told.is_tcp else flow % n_sockets
        packet = _Packet(len(packets), flow, socket, seq[flow], size, arrival=clock)
        seq[flow] = (seq[flow] + size) % 2**32
        if merged:
            before = last[flow]
            packet.head = before.head if before.head >= 0 else before.number
        if not told.is_tcp and chance[1][i] < told.drop_share:
            packet.fate = "dropped"
        packets.append(packet)
        last[flow] = packet
        if told.is_tcp and told.flows == 1 and i > told.swap_depth and chance[2][i] < told.swap_share:
            _delay_first(packets[-1 - told.swap_depth :])
        if told.is_tcp and chance[3][i] < told.repeat_share and packet.head < 0 and not told.swap_share:
            again = _Packet(
                len(packets), flow, socket, packet.seq, packet.payload, "duplicate", arrival=clock + 150_000
            )
            packets.append(again)
    packets.sort(key=lambda packet: packet.arrival)
    renumber = {packet.number: at for at, packet in enumerate(packets)}
    for packet in packets:
        packet.head = renumber.get(packet.head, -1)
        packet.number = renumber[packet.number]
        packet.address = 0xFFFF888200000000 + 0x100 * (packet.number % told.n_addresses)
    return packets


def _delay_first(run: list[_Packet]) -> None:
    """Let the first of some packets of a stream arrive last; not where any of them is merged, no data, or displaced already."""
    if any(packet.head >= 0 or packet.fate != "read" or packet.is_swapped for packet in run):
        return
    content = [(packet.seq, packet.payload) for packet in run]
    for packet, (seq, payload) in zip(run, content[1:] + content[:1], strict=True):
        packet.seq, packet.payload, packet.is_swapped = seq, payload, True


def _stack(log: _Log, told: Recipe, packets: list[_Packet]) -> None:
    """Let every packet through driver, RPS and protocol: fills ready, stamp and the stages up to data_ready."""
    cpu = 1 if told.rps else 0
    free_at = [START, START]
    header = 52 if told.is_tcp else 28
    grown: dict[int, int] = defaultdict(int)
    final: dict[int, int] = {}
    reached: dict[int, int] = {}
    waiting: dict[int, int] = {}
    for packet in packets:
        head = packet.head if packet.head >= 0 else packet.number
        grown[head] += packet.payload
        final[head] = packet.number
    for packet in packets:
        # The sender's CPU: netif_rx, softirq; the stack there, or on the RPS target after an IPI.
        t, size, live = max(packet.arrival, free_at[0]), packet.payload + header, packet.lives
        frame = {"name": 0, "skbaddr": packet.address, "len": size}
        live["driver_rx"] = log.add(
            "net:netif_rx_entry", t, 0, OTHER, **frame, queue_mapping=0, hash=0xABCD + packet.flow,
            gso_size=packet.payload // told.gro if told.gro > 1 else 0,
        )  # fmt: skip
        log.add("net:netif_rx", t + 900, 0, OTHER, **frame)
        live["softirq_raise"] = log.add("irq:softirq_raise", t + 1500, 0, OTHER, vec=3)
        live["softirq"] = log.add("irq:softirq_entry", t + 2200, 0, OTHER, vec=3)
        bracket, rx = t + 400, t + 3100
        free_at[0] = t + 4000
        if told.rps and free_at[1] > t + 3000:
            # The target's backlog is still scheduled: no interrupt, this packet is next in the same softirq.
            free_at[0], rx = t + 3600, free_at[1]
        elif told.rps:
            log.add("csd:csd_queue_cpu", t + 3000, 0, OTHER, field_cpu=1, func=7, csd=0xC5D)
            free_at[0] = t + 3600
            t = max(t + 4200, free_at[1])
            live["rps_ipi"] = log.add("csd:csd_function_entry", t, 1, SPINNER, func=7, csd=0xC5D)
            log.add("irq:softirq_raise", t + 700, 1, SPINNER, vec=3)
            log.add("irq:softirq_entry", t + 1500, 1, SPINNER, vec=3)
            rx = t + 2500
        live["netif_receive_skb"] = log.add("net:netif_receive_skb", rx, cpu, OTHER, **frame)
        packet.stamp = bracket if told.stamp == "bracket" else rx + 750
        end, sock = rx + 1500, SOCKET + 0x1000 * packet.socket
        # Segments that wait in the backlog are merged there: the protocol sees their head once all of them are in it.
        head = packets[packet.head] if packet.head >= 0 else packet
        is_last = final[head.number] == packet.number
        if told.is_tcp and is_last:
            head.lives["tcp_rcv"] = log.add(
                "tcp:tcp_probe", rx + 2000, cpu, OTHER, skbaddr=head.address, skaddr=sock, sport=80,
                dport=5000 + packet.flow, data_len=grown[head.number] % 65536, snd_una=1,
            )  # fmt: skip
            end = rx + 2600
        packet.ready = head.ready = end + 400
        in_order = not told.swap_share or packet.seq == reached.get(packet.flow, packet.seq)
        if told.swap_share and packet.fate == "read":
            waiting[packet.seq] = (packet.seq + packet.payload) % 2**32
            at = packet.seq if in_order else None
            while at in waiting:
                at = reached[packet.flow] = waiting.pop(at)
        if packet.fate == "dropped":
            log.add("skb:kfree_skb", end, cpu, OTHER, skbaddr=packet.address, reason=DROP_REASON)
        elif is_last and packet.fate != "duplicate" and in_order and (packet.fate != "ack" or grown[packet.number]):
            head.lives["data_ready"] = log.add(
                "sock:sk_data_ready", packet.ready, cpu, OTHER, skaddr=sock, family=2, protocol=6 if told.is_tcp else 17
            )
        free_at[cpu] = max(free_at[cpu], packet.ready + 2500)


class _Readers:
    """The reading tasks: asleep until woken, then one receive call after the other until their queues are empty."""

    def __init__(self, log: _Log, told: Recipe, packets: list[_Packet]) -> None:
        self.log, self.told, self.packets = log, told, packets
        self.rng = np.random.default_rng(told.seed + 1)
        self.n_sockets = told.flows if told.is_tcp else told.sockets
        self.queues: list[deque[_Packet]] = [deque() for _ in range(self.n_sockets)]
        self.asleep = dict.fromkeys(range(told.readers), START)
        self.left_cpu: dict[int, dict[str, Any]] = {}
        self.came: dict[int, dict[str, Any]] = {}
        self.slept: dict[int, dict[str, Any]] = {}
        self.ran: dict[int, tuple[int, dict[str, Any]]] = {}
        self.calls = 0
        self.inside: set[int] = set()  # tasks that went to sleep in a receive call
        self.waiting, self.aside = [0] * self.n_sockets, [0] * self.n_sockets
        self.blind: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for cpu, first, last in sorted(told.blind):
            self.blind[cpu].append((START + FIRST + first, START + FIRST + last))
        self.serves = [[s for s in range(self.n_sockets) if task in self._tasks(s)] for task in self.asleep]
        self.heap: list[tuple[int, int, int, int]] = []
        for task in self.asleep:
            self._switch(START, task, out=True)
        self.left = self._plan()
        if told.polling:
            for task in list(self.asleep):
                del self.asleep[task]
                self._switch(START + FIRST + 6_000, task, out=False)
                self._push(START + FIRST + 6_500, 1, task)

    def _plan(self) -> int:
        """Queue the arrivals: data is readable when its group is in and nothing before it in the stream is missing."""
        wanted: dict[int, int] = {}
        held: dict[int, list[_Packet]] = defaultdict(list)
        groups: dict[int, list[_Packet]] = defaultdict(list)
        self.batches: list[tuple[list[_Packet], _Packet]] = []
        for packet in self.packets:
            groups[packet.head if packet.head >= 0 else packet.number].append(packet)
        done: set[int] = set()
        for packet in self.packets:
            key = packet.head if packet.head >= 0 else packet.number
            if packet.fate in ("dropped", "duplicate") or key in done:
                continue
            done.add(key)
            members = [member for member in groups[key] if member.payload]
            if not members:
                continue
            if self.told.swap_share:
                held[packet.flow].append(packet)
                stream = sorted(held[packet.flow], key=lambda one: (one.seq - members[0].seq + 2**31) % 2**32)
                if wanted.get(packet.flow, packet.seq) != stream[0].seq and packet.flow in wanted:
                    continue
                members, held[packet.flow] = stream, []
                wanted[packet.flow] = (members[-1].seq + members[-1].payload) % 2**32
            self.batches.append((members, packet))
            self._push(max(max(m.ready for m in members), packet.ready), 0, len(self.batches) - 1)
        return sum(len(batch) for batch, _ in self.batches)

    def _push(self, time: int, kind: int, what: int) -> None:
        heapq.heappush(self.heap, (int(time), kind, what, 0))

    def _tasks(self, socket: int) -> list[int]:
        """Return the tasks that serve a socket."""
        if self.told.shared or self.told.readers == 1:
            return list(range(self.told.readers))
        return [socket % self.told.readers]

    def _switch(self, time: int, task: int, *, out: bool, state: int = 1) -> None:
        tid, cpu = READER + task, 1 + task
        pair = (tid, SPINNER) if out else (SPINNER, tid)
        name = b"spinner" if out else b"reader"
        row = self.log.add(
            "sched:sched_switch",
            time,
            cpu,
            pair[0],
            prev_pid=pair[0],
            next_pid=pair[1],
            next_comm=name,
            prev_state=state if out else 0,
        )
        if out:
            self.left_cpu[task] = row
        else:
            self.came[task], self.slept[task] = row, self.left_cpu[task]

    def run(self) -> None:
        """Run until everything was read."""
        while self.heap:
            time, kind, what, _ = heapq.heappop(self.heap)
            if kind == 0:
                self._arrive(time, what)
            else:
                self._work(time, what)

    def _arrive(self, time: int, number: int) -> None:
        """Queue a batch and wake a task that sleeps on its socket."""
        members, waker = self.batches[number]
        socket = members[0].socket
        self.queues[socket].extend(members)
        self.waiting[socket] += 1
        if self.told.behind and not self.told.is_tcp and self.waiting[socket] > 1:
            waker.lives.pop("data_ready")["_is_absent"] = True
            return
        sleeping = [task for task in self._tasks(socket) if task in self.asleep]
        if not sleeping:
            return
        task, cpu = sleeping[0], 1 if self.told.rps else 0
        since = self.asleep.pop(task)
        head = self.packets[waker.head] if waker.head >= 0 else waker
        wake = max(head.ready + 700, since + 100)
        if wake > head.ready + 700:  # asleep only since then: it was not this packet's data_ready that woke it
            cpu = 1 + task
        target = {"field_pid": READER + task}
        waking = self.log.add("sched:sched_waking", wake, cpu, OTHER, **target)
        wakeup = self.log.add("sched:sched_wakeup", wake + 900, cpu, OTHER, **target)
        came = self._not_blind(max(wake + 2_400, time + 800), 0, task)
        self._switch(came, task, out=False)
        if wake == head.ready + 700:
            head.lives |= {"waking": waking, "wakeup": wakeup, "switch_in": self.came[task]}
            head.woken = task
        self._push(came + 500, 1, task)

    def _not_blind(self, time: int, length: int, task: int) -> int:
        """Return when a reader can run on its CPU for some time: at the last instant of a blind window, if not now."""
        for first, last in self.blind[1 + task]:
            if first - length < time < last:
                time = last - 1
        return time

    def _work(self, now: int, task: int) -> None:
        """Make one receive call, or go to sleep."""
        waiting = sum(len(queue) for queue in self.queues) if self.told.blind else 0
        free = self._not_blind(now, 70_000 + 700 * waiting, task)
        if free > now:
            # The blind task takes its CPU; the switch back is not seen. A datagram that was there is the reader's since it first ran.
            if not self.told.is_tcp:
                self.ran.setdefault(task, (now, self.came[task]))
            self._switch(now, task, out=True, state=0)
            self.log.rows["sched:sched_switch"][-1]["next_pid"] = BLIND
            self._switch(free, task, out=False)
            self._push(free + 500, 1, task)
            return
        ran = self.ran.pop(task, None)
        mine = [s for s in self.serves[task] if self.queues[s]]
        if not mine:
            if not self.told.polling:
                self._enter(now - 100, task, stays=True)
                self.asleep[task] = now
                self._switch(now, task, out=True)
            elif self.left:
                self._enter(now - 100, task)
                self._return(now + 600, task, self.serves[task][0], EAGAIN, 0)
                self._push(now + 600 + self.told.work_ns, 1, task)
            return
        socket, tcp = mine[0], self.told.is_tcp
        self._enter(now - 100, task)
        if self.told.peek:
            first = self.queues[socket][0]
            size = min(self.told.read_size, first.payload - first.taken)
            if tcp:
                self._copy(now + 700, task, first, size)
            self._return(now + 1_300, task, socket, size, 2)
            now += 2_000
            self._enter(now - 100, task)
        room, ends = self.told.read_size, []
        while room > 0 and self.queues[socket]:
            packet = self.queues[socket][0]
            if not self.aside[socket]:
                self.aside[socket], self.waiting[socket] = self.waiting[socket], 0
            self.aside[socket] -= 1
            size = min(room, packet.payload - packet.taken)
            now += 700
            if tcp:
                row = self._copy(now, task, packet, size)
                packet.lives.setdefault("copy", row)
            room, packet.taken = room - size, packet.taken + size
            if packet.woken != task:
                packet.lives["switch_in"] = ran[1] if ran and packet.ready < ran[0] else self.came[task]
            packet.woken = task
            packet.slept = packet.slept or self.slept[task]["time"]
            if packet.taken == packet.payload:
                ends.append(self.queues[socket].popleft())
                self.left -= 1
            if not tcp:
                break
        self.calls += 1
        if self.told.lock_every and self.calls % self.told.lock_every == 0:
            self._switch(now + 200, task, out=True, state=2)
            now += 5_000
            self._switch(now + 300, task, out=False)
        if self.told.stall_share and self.rng.random() < self.told.stall_share:
            # Preempted with the datagram in hand: the other readers go on meanwhile.
            self._switch(now + 200, task, out=True, state=0)
            now += 60_000
            self._switch(now, task, out=False)
        row = self._return(now + 600, task, socket, self.told.read_size - room, 0)
        if task < self.told.rings:
            self.log.add(
                "io_uring:io_uring_complete", now + 750, 1 + task, READER + task, res=self.told.read_size - room
            )
        for packet in ends:
            packet.lives["recvmsg"] = row
        self._push(now + 600 + self.told.work_ns, 1, task)

    def _enter(self, time: int, task: int, *, stays: bool = False) -> None:
        """Enter a receive call, unless the task slept in one, and leave it again unless it `stays`."""
        if self.told.entries and task not in self.inside:
            self.log.add("syscalls:sys_enter_recvfrom", time, 1 + task, READER + task)
        (self.inside.add if stays else self.inside.discard)(task)

    def _copy(self, time: int, task: int, packet: _Packet, size: int) -> dict[str, Any]:
        owner = self.packets[packet.head] if packet.head >= 0 else packet
        return self.log.add(
            "skb:skb_copy_datagram_iovec", time, 1 + task, READER + task, skbaddr=owner.address, len=size
        )

    def _return(self, time: int, task: int, socket: int, ret: int, flags: int) -> dict[str, Any]:
        return self.log.add(
            "sock:sock_recv_length", time, 1 + task, READER + task, sk=SOCKET + 0x1000 * socket, family=2,
            protocol=6 if self.told.is_tcp else 17, ret=ret, flags=flags,
        )  # fmt: skip


def _truth(told: Recipe, packets: list[_Packet]) -> dict[str, np.ndarray]:
    """Lay the truth out by packet."""
    stages = np.full((len(packets), len(STAGE_NAMES)), NAT, np.int64)
    needs = ("netif_receive_skb", "copy" if told.is_tcp else "data_ready", "recvmsg")
    knowable = np.zeros(len(packets), bool)
    for packet in packets:
        for stage, row in packet.lives.items():
            stages[packet.number, STAGE_INDEX[stage]] = row["time"]
        knowable[packet.number] = all(packet.lives.get(name, {}).get("_kept", False) for name in needs)

    def when(stage: str) -> np.ndarray:
        time = stages[:, STAGE_INDEX[stage]]
        return np.where(time == NAT, -1, time)

    return {
        "received": when("netif_receive_skb"), "copied": when("copy"), "returned": when("recvmsg"), "stages": stages,
        "payload": np.array([packet.payload for packet in packets]),
        "merged": np.array([packet.head >= 0 for packet in packets]),
        "dropped": np.array([packet.fate == "dropped" for packet in packets]),
        "duplicate": np.array([packet.fate == "duplicate" for packet in packets]),
        "tid": np.array([packet.lives.get("recvmsg", {}).get("tid", -1) for packet in packets]),
        "slept": np.array([packet.slept for packet in packets]),
        "knowable": knowable,
    }  # fmt: skip


def _pcap(told: Recipe, packets: list[_Packet]) -> Columns:
    n = len(packets)
    header = 52 if told.is_tcp else 28

    def full(value: int, dtype: type) -> np.ndarray:
        return np.full(n, value, dtype)

    payload = np.array([packet.payload for packet in packets])
    flow = np.array([packet.flow for packet in packets], np.int32)
    columns = Columns(
        {
            "time": np.array([packet.stamp for packet in packets]) + OFFSET,
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
            "proto": full(6 if told.is_tcp else 17, np.uint8),
            "sport": (5000 + flow).astype(np.uint16),
            "dport": full(80, np.uint16),
            "seq": np.array([packet.seq if told.is_tcp else 0 for packet in packets]).astype(np.uint32),
            "payload_len": payload.astype(np.int32),
            "flow": flow,
            "flow_dir": full(0, np.int8),
        }
    )
    return columns


def _switch_around(log: _Log, cpu: int, first: int, last: int) -> None:
    """Add the switches around a blind window that are seen: to the blind task, and one by another whose coming nobody saw."""
    seen = sorted((row["time"], row["next_pid"]) for row in log.rows["sched:sched_switch"] if row["cpu"] == cpu)

    def current(time: int) -> int:
        return next((task for at, task in reversed(seen) if at <= time), SPINNER)

    ends = [(first - 1, current(first - 1), BLIND), (last, UNSEEN, current(last))]
    # Where it took a reader's CPU, or gives one its CPU, those are the switches.
    for time, prev_pid, next_pid in [end for end in ends if end[1] != BLIND and end[2] < READER]:
        log.add(
            "sched:sched_switch",
            time,
            cpu,
            prev_pid,
            prev_pid=prev_pid,
            next_pid=next_pid,
            next_comm=b"other",
            prev_state=0,
        )


_TYPES = {**dict.fromkeys(("skbaddr", "skaddr", "sk", "csd", "func"), np.uint64), "cpu": np.int32, "next_comm": "S16"}


def _columns(log: _Log, rng: np.random.Generator, told: Recipe) -> tuple[dict[str, Columns], Columns]:
    """Order all events by (time, CPU), remove what the impairments hide, and lay them out as the reader would.

    Also returns the LOST records.
    """
    for cpu, first, last in told.blind:
        _switch_around(log, cpu, START + FIRST + first, START + FIRST + last)
    groups = [(name, [row for row in rows if "_is_absent" not in row]) for name, rows in log.rows.items()]
    everything = [row for _, rows in groups for row in rows]
    time, cpu = (np.array([row[key] for row in everything], np.int64) for key in ("time", "cpu"))
    order = np.lexsort((cpu, time))
    kept, lost = _kept(time[order], cpu[order], rng.random(len(order)), told)
    rank = np.full(len(order), -1)
    rank[order[kept]] = np.arange(kept.sum())
    columns, at = {}, 0
    attrs = {"categories": {"name": ["eth0"]}, "symbols": {"reason": {DROP_REASON: "SOCKET_RCVBUFF"}}}
    for name, rows in groups:
        of_rows, at = rank[at : at + len(rows)], at + len(rows)
        mine = np.flatnonzero(of_rows >= 0)
        seen = [rows[row] for row in mine[np.argsort(of_rows[mine])].tolist()]
        for row in seen:
            row["_kept"] = True
        if seen:
            keys = [key for key in seen[0] if key != "_kept"]
            arrays = {key: np.array([row[key] for row in seen], _TYPES.get(key)) for key in keys}
            columns[name] = Columns({**arrays, "rank": np.sort(of_rows[mine])}, attrs)
    return columns, lost


def _kept(time: np.ndarray, cpu: np.ndarray, chance: np.ndarray, told: Recipe) -> tuple[np.ndarray, Columns]:
    """Tell which events, in order, are in the recording, and return its LOST records.

    The kernel writes one just after the stamp of the first sample that found room again, and counts what was lost at the very end
    nowhere but in the sum.
    """
    kept = np.ones(len(time), bool)
    for number, first, last in told.blind:
        kept &= ~((cpu == number) & (first <= time - START - FIRST) & (time - START - FIRST < last))
    losing: dict[int, int] = defaultdict(int)
    records: list[tuple[int, int, int]] = []
    share, burst = told.lost_share, told.lost_burst
    enter, leave = (min(1.0, share / (1 - share) / burst), 1 / burst) if burst > 1 else (share, 1 - share)
    if share:
        seen = (np.flatnonzero(kept), time[kept], cpu[kept], chance[kept])
        for at, when, number, one in zip(*(array.tolist() for array in seen), strict=True):
            if one >= leave if losing[number] else one < enter:
                losing[number] += 1
                kept[at] = False
            elif losing[number]:
                records.append((when + 40, number, losing.pop(number)))
    rest = sum(losing.values())
    table = np.array(records + ([(-1, -1, rest)] if rest else []), np.int64).reshape(-1, 3)
    kind = np.where(table[:, 0] >= 0, b"LOST", b"LOST_SAMPLES").astype("S12")
    lost = Columns({"time": table[:, 0], "cpu": table[:, 1].astype(np.int32), "count": table[:, 2], "kind": kind})
    return kept, lost
