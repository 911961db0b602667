"""The kernel's half of the join: from the driver to ``sk_data_ready``, one row per skb that entered the stack.

Keys (alignment.md 2.1): an skb is (address, generation); a generation ends at the next birth of the same address, never at a
free event, because receive skbs are freed later, on another CPU, or not at all. Every other link is "last before" or "first
after" on the same CPU, bounded by the next event that would belong to another packet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import AsOf, pick
from rxlab.follow.batches import first_rank, ready_of_batches
from rxlab.follow.clockfit import NAT
from rxlab.follow.forwarding import follow_forwarding
from rxlab.follow.hidden import NOTHING_HIDDEN, Hidden
from rxlab.follow.stagetable import StageTable
from rxlab.follow.together import beside
from rxlab.read.columns import Columns
from rxlab.stages import PATH_KINDS, STAGE_INDEX

# Births: each of these events begins a new life of its skbaddr, or continues the life it belongs to (see `_end_of_life`).
BIRTHS = (
    "net:net_dev_queue",
    "net:netif_rx_entry",
    "net:netif_rx",
    "net:napi_gro_receive_entry",
    "net:netif_receive_skb",
)
# In less than this no blind task came and went: within its window a CPU delivers what other tasks do.
WITHOUT_PAUSE_NS = 50_000
_NEVER = np.iinfo(np.int64).max
_EMPTY_TYPES = {"time": np.int64, "rank": np.int64, "cpu": np.int32, "pid": np.int32, "tid": np.int32}
_EMPTY = Columns({name: np.empty(0, dtype) for name, dtype in _EMPTY_TYPES.items()})


@dataclass
class KernelPath(StageTable):
    """One row per ``net:netif_receive_skb`` of the interface.

    Attributes
    ----------
    columns : Columns
        Per skb: ``skbaddr``, ``len``, ``end_rank`` (end of its generation), ``path_kind``, ``rps_cpu``, ``rx_queue``,
        ``hash``, ``socket``, ``sport``/``dport`` as tcp_probe saw them (-1 where it did not), ``probe_len``, ``gso_size``,
        ``wake_limit`` (rank up to which a wake-up is this packet's), ``stamp_low``/``stamp_high``.
    """

    columns: Columns

    def first_event(self) -> np.ndarray:
        """Return each skb's earliest event on the CPU that received it, int64 ns; never one after RPS."""
        first = np.full(len(self.time), _NEVER)
        for name in ("hardirq", "softirq_raise", "softirq", "driver_rx", "netif_receive_skb"):
            time = self.time[:, STAGE_INDEX[name]]
            np.minimum(first, np.where(time == NAT, _NEVER, time), out=first)
        return first

    def select(self, row: np.ndarray) -> KernelPath:
        """Return the given skbs."""
        rows = self.take(row)
        return KernelPath(rows.time, rows.cpu, rows.rank, self.columns.take(row))

    def continued(self, later: KernelPath, events: Mapping[str, Columns]) -> KernelPath:
        """Return these skbs, with what later events say of the end of their lives, followed by the `later` ones not among them."""
        rx = STAGE_INDEX["netif_receive_skb"]
        new = later.select(np.flatnonzero(~np.isin(later.rank[:, rx], self.rank[:, rx])))
        born = _end_of_life(self.columns["entered_rank"], self.columns["skbaddr"], events)
        mine = self.columns.with_columns(
            end_rank=np.minimum(self.columns["end_rank"], born),
            wake_limit=np.minimum(self.columns["wake_limit"], _wake_limit(self, events)),
        )
        return KernelPath(
            np.concatenate((self.time, new.time)),
            np.concatenate((self.cpu, new.cpu)),
            np.concatenate((self.rank, new.rank)),
            mine.followed_by(new.columns),
        )


def event_columns(events: Mapping[str, Columns], name: str) -> Columns:
    """Return the columns of an event, empty where it was not recorded."""
    return events.get(name, _EMPTY)


def task_ids(columns: Columns, field: str) -> np.ndarray:
    """Return a task id field of a scheduler event: the event's own field, not the task that ran (the reader's ``tid``)."""
    name = f"field_{field}" if f"field_{field}" in columns else field
    return columns[name].astype(np.int64) if name in columns else np.empty(0, np.int64)


def _field(columns: Columns, name: str, dtype: type, missing: int = 0) -> np.ndarray:
    """Return a field, or a column of `missing` where this kernel's event does not have it."""
    if name in columns:
        return columns[name].astype(dtype, copy=False)
    return np.full(columns.n, missing, dtype)


def only(columns: Columns, rows: np.ndarray) -> Columns:
    """Return the rows of a mask, without copying where it is all of them."""
    return columns if rows.all() else columns.take(rows)


def on_device(columns: Columns, iface: str) -> Columns:
    """Return the rows of a ``net:*`` event whose device has this name."""
    if "name" not in columns or not columns.n:
        return columns
    return only(columns, is_on_device(columns, iface))


def is_on_device(columns: Columns, iface: str) -> np.ndarray:
    """Tell which rows of a ``net:*`` event are of a device of this name."""
    names = columns.attrs.get("categories", {}).get("name")
    if names is None:
        return np.asarray(columns["name"] == iface.encode())
    is_wanted = np.array([text == iface for text in names] + [False])
    return np.asarray(is_wanted[columns["name"]])


def follow_kernel(
    events: Mapping[str, Columns],
    iface: str,
    irqs: Mapping[int, int] | None = None,
    lossy: Hidden = NOTHING_HIDDEN,
    hidden: Hidden = NOTHING_HIDDEN,
    unseen: Hidden = NOTHING_HIDDEN,
    known_cpus: Mapping[str, np.ndarray] | None = None,
) -> KernelPath:
    """Follow every skb that entered the stack on an interface up to ``sk_data_ready``.

    Parameters
    ----------
    events : mapping of str to Columns
        As :func:`rxlab.read_perfdata` gives them: ``time`` (CLOCK_MONOTONIC ns), ``cpu``, ``tid``, ``rank`` and the fields.
    iface : str
        Device name. It is not unique across network namespaces; the match with the pcap tells the rest apart.
    irqs : mapping of int to int, optional
        Interrupt number of each receive queue; empty for devices without (veth, lo).
    lossy : Hidden
        Where events were lost: links that reach across are not made.
    hidden : Hidden
        Lost or blind: nor are those of packets that RPS moved, which may be processed long after the softirq that moved them.
    known_cpus : mapping of str to integer array, optional
        CPUs on which earlier parts of the recording saw an event.
    unseen : Hidden
        Where the switches alone say that something may be missing: links that take long and reach across are not made.
    """
    receive = on_device(event_columns(events, "net:netif_receive_skb"), iface)
    n = receive.n
    table = StageTable.blank(n)
    facts = Columns({"skbaddr": _field(receive, "skbaddr", np.uint64), "len": _field(receive, "len", np.int64)})
    path = KernelPath(table.time, table.cpu, table.rank, facts)
    path.set_stage("netif_receive_skb", receive, np.arange(n))
    if not n:
        path.columns = path.columns.with_columns(**{name: np.empty(0, np.int64) for name in _COLUMN_NAMES})
        return path
    forwarded = follow_forwarding(receive, events, lambda columns: is_on_device(columns, iface))
    end_of_life = beside(_end_of_life, forwarded.rank, facts["skbaddr"], events)
    driver = _link_driver(path, receive, events, iface, lossy, unseen, known_cpus or {})
    path.columns = path.columns.with_columns(
        end_rank=end_of_life(), entered_rank=forwarded.rank, entered_cpu=forwarded.cpu,
        devices=forwarded.devices, is_out=forwarded.is_out, **driver,
    )  # fmt: skip
    entered = beside(_link_entry, path, events, irqs or {}, lossy, hidden)
    _link_socket(path, events, lossy, unseen)
    entered()
    return path


def _link_entry(
    path: KernelPath, events: Mapping[str, Columns], irqs: Mapping[int, int], lossy: Hidden, hidden: Hidden
) -> None:
    """Link what comes before the stack: stages that the socket's side does not look at."""
    _link_softirq(path, events, irqs, lossy, hidden)
    _link_rps(path, events, hidden)


_COLUMN_NAMES = (
    "end_rank", "path_kind", "rps_cpu", "rx_queue", "hash", "l4_hash", "socket", "sport", "dport", "probe_len", "gso_size",
    "snd_una", "ready_tid", "wake_limit", "stamp_low", "stamp_high", "vlan_tagged",
    "entered_rank", "entered_cpu", "devices", "is_out",
)  # fmt: skip


def _end_of_life(received: np.ndarray, address: np.ndarray, events: Mapping[str, Columns]) -> np.ndarray:
    """Return the rank at which each skb's address is born again after its `received` rank (the largest int64: never)."""
    births = [event_columns(events, name) for name in BIRTHS]
    births = [birth for birth in births if "skbaddr" in birth]
    return first_rank([(birth["rank"], _field(birth, "skbaddr", np.uint64)) for birth in births], received, address)


def _link_driver(
    path: KernelPath,
    receive: Columns,
    events: Mapping[str, Columns],
    iface: str,
    lossy: Hidden,
    unseen: Hidden,
    known_cpus: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Link each skb to the event by which the driver handed it up; tells path kind, queue, hash and the stamp's window."""
    n = receive.n
    address = _field(receive, "skbaddr", np.uint64)
    everything = event_columns(events, "net:netif_receive_skb")
    lives = AsOf(everything["rank"], _field(everything, "skbaddr", np.uint64))
    # An skb address received before: whatever came before that belongs to an earlier life.
    previous = lives.rank_of(lives.last_before(receive["rank"], address), -1)
    kind = np.zeros(n, np.int8)
    facts = {name: np.full(n, -1, np.int64) for name in ("rx_queue", "hash", "l4_hash", "gso_size", "vlan_tagged")}
    best = np.full(n, -1, np.int64)
    handed_over = np.full(n, NAT, np.int64)
    has_entry = event_columns(events, "net:netif_rx_entry").n > 0

    def unseen_at(name: str, columns: Columns) -> Hidden:
        return unseen.of_cpus(np.union1d(columns["cpu"], known_cpus.get(name, columns["cpu"][:0])))

    unreceived = unseen_at("net:netif_receive_skb", everything)
    for name, label in (
        ("net:netif_rx", "backlog"),
        ("net:netif_rx_entry", "backlog"),
        ("net:napi_gro_receive_entry", "napi"),
    ):
        found = on_device(event_columns(events, name), iface)
        if not found.n:
            continue
        index = AsOf(found["rank"], _field(found, "skbaddr", np.uint64))
        row = index.last_before(receive["rank"], address)
        rank = index.rank_of(row, -1)
        # An earlier life of the address would lend its own start, where nobody saw that received nor the next one begin.
        between = pick(found["time"], row, NAT), receive["time"]
        unclear = unseen_at(name, found).touch(*between) & unreceived.touch(*between)
        unclear &= lossy.touch(*between) | (between[1] - between[0] > WITHOUT_PAUSE_NS)
        row = np.where((rank > previous) & ~unclear, row, -1)
        if name == "net:netif_rx":
            handed_over = pick(found["time"], row, NAT)
        # netif_rx_entry precedes netif_rx of the same call and is the better start.
        use = (row >= 0) & ((best < 0) | (label == "napi") | (name == "net:netif_rx_entry"))
        if name == "net:netif_rx" and has_entry:
            # A packet whose entry was lost has no start: the later event of the same call is no substitute for it.
            kind[use] = PATH_KINDS.index(label)
            continue
        best = np.where(use, rank, best)
        kind[use] = PATH_KINDS.index(label)
        at = STAGE_INDEX["driver_rx"]
        path.time[use, at] = found["time"][row[use]]
        path.cpu[use, at] = found["cpu"][row[use]]
        path.rank[use, at] = rank[use]
        for fact, field in (
            ("rx_queue", "queue_mapping"),
            ("hash", "hash"),
            ("l4_hash", "l4_hash"),
            ("gso_size", "gso_size"),
            ("vlan_tagged",) * 2,
        ):
            if field in found:
                facts[fact][use] = found[field][row[use]]
    # skb_record_rx_queue() stores queue + 1, so 0 means "not recorded" (include/linux/skbuff.h).
    facts["rx_queue"] = np.where(facts["rx_queue"] > 0, facts["rx_queue"] - 1, -1)
    entered_on = path.cpu[:, STAGE_INDEX["driver_rx"]]
    moved = (kind > 0) & (entered_on >= 0) & (entered_on != path.cpu[:, STAGE_INDEX["netif_receive_skb"]])
    kind[moved] += 1
    assert PATH_KINDS[1:5] == ("napi", "napi_rps", "backlog", "backlog_rps")
    entry = path.time[:, STAGE_INDEX["driver_rx"]]
    rx_time = path.time[:, STAGE_INDEX["netif_receive_skb"]]
    return {
        **facts,
        "path_kind": kind,
        "rps_cpu": np.where(moved, path.cpu[:, STAGE_INDEX["netif_receive_skb"]], -1).astype(np.int16),
        "stamp_low": np.where(entry == NAT, NAT, entry),
        "stamp_high": np.where(handed_over == NAT, rx_time, handed_over),
    }


def _link_softirq(
    path: KernelPath, events: Mapping[str, Columns], irqs: Mapping[int, int], lossy: Hidden, hidden: Hidden
) -> None:
    """Link hard IRQ, NET_RX raise and softirq entry on the CPU where the packet entered the host."""
    entries, raises = (_net_rx(event_columns(events, name)) for name in ("irq:softirq_entry", "irq:softirq_raise"))
    rx, drv = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["driver_rx"]
    has_driver = path.rank[:, drv] >= 0
    is_backlog = path.columns["path_kind"] >= PATH_KINDS.index("backlog")
    cpu = np.where(has_driver, path.cpu[:, drv], path.cpu[:, rx])
    index = AsOf(entries["rank"], entries["cpu"])
    # NAPI: the poll that handed the skb up. Backlog: the first softirq after netif_rx, which runs process_backlog here or
    # sends the RPS IPI; when that came before netif_rx, the skb was queued from within a running softirq ("polled").
    polled_in = index.last_before(np.where(has_driver, path.rank[:, drv], path.rank[:, rx]), cpu)
    after = index.first_after(path.rank[:, drv], cpu)
    after = np.where(index.rank_of(after, _NEVER) < path.rank[:, rx], after, -1)
    row = np.where(is_backlog, after, polled_in)
    # Without its driver event (lost) it is not known on which CPU a packet entered; where none was recorded it is assumed.
    row = np.where(has_driver | (not any(event_columns(events, name).n for name in BIRTHS[1:4])), row, -1)
    entered = pick(entries["time"], row, NAT)
    start = path.time[:, drv]
    between = np.minimum(entered, start), np.maximum(entered, start)
    is_moved = path.columns["rps_cpu"] >= 0
    row = np.where(lossy.touch(*between, cpu) | (is_moved & hidden.touch(*between, cpu)), -1, row)
    previous = index.last_before(index.rank_of(row, -1), cpu)
    path.set_stage("softirq", entries, row)
    raised = AsOf(raises["rank"], raises["cpu"])
    # The raise that led to this softirq: the first after the previous run. Earlier than the packet itself on a backlog: the
    # softirq was already pending for another packet.
    first = raised.first_after(np.where(previous >= 0, index.rank_of(previous, -1), 0), cpu, inclusive=True)
    first_rank = raised.rank_of(first, _NEVER)
    usable = (row >= 0) & (first_rank < index.rank_of(row, -1)) & (~is_backlog | (first_rank > path.rank[:, drv]))
    usable &= ~lossy.touch(pick(entries["time"], previous, NAT), entered, cpu)
    first = np.where(usable, first, -1)
    path.set_stage("softirq_raise", raises, first)
    handlers = event_columns(events, "irq:irq_handler_entry")
    handlers = handlers.take(np.isin(_field(handlers, "irq", np.int64), sorted(irqs.values())))
    if not handlers.n:
        return
    since, until = index.rank_of(previous, 0), index.rank_of(row, -1)
    hard = _handler_of(handlers, path.columns["rx_queue"], irqs, cpu, since, np.minimum(until, first_rank))
    hard = np.where(pick(handlers["rank"], hard, _NEVER) < until, hard, -1)
    hard = np.where(lossy.touch(pick(handlers["time"], hard, NAT), entered, cpu), -1, hard)
    path.set_stage("hardirq", handlers, hard)
    # Another queue's interrupt may have raised the softirq already; this packet's NAPI was scheduled by its own.
    own = raised.first_after(pick(handlers["rank"], hard, -1), cpu)
    own = np.where(raised.rank_of(own, _NEVER) < until, own, -1)
    path.set_stage("softirq_raise", raises, np.where(hard >= 0, own, first))


def _handler_of(
    handlers: Columns,
    queue: np.ndarray,
    irqs: Mapping[int, int],
    cpu: np.ndarray,
    since: np.ndarray,
    raised: np.ndarray,
) -> np.ndarray:
    """Return the interrupt by which each packet's softirq came: its queue's own, else the last of the device before the raise.

    None older than the previous softirq run (`since`): then the raise came from elsewhere (a timer, ksoftirqd, busy polling).
    A driver whose interrupt finds its NAPI being polled raises nothing, and that run takes the packet: no interrupt led to it.
    """
    any_irq = AsOf(handlers["rank"], handlers["cpu"])
    last = any_irq.last_before(raised, cpu)
    last = np.where(any_irq.rank_of(last, -1) > since, last, -1)
    by_irq = AsOf(handlers["rank"], handlers["cpu"], _field(handlers, "irq", np.int64))
    numbers = np.full(max(irqs, default=0) + 2, -1, np.int64)
    numbers[list(irqs)] = list(irqs.values())
    irq = numbers[np.where((queue >= 0) & (queue < len(numbers)), queue, -1)]
    own = by_irq.first_after(since, cpu, irq)
    return np.where(irq >= 0, own, last)


def _net_rx(columns: Columns) -> Columns:
    """Return the rows of a softirq event for NET_RX (vec 3)."""
    return only(columns, columns["vec"] == 3) if "vec" in columns else columns


def _link_rps(path: KernelPath, events: Mapping[str, Columns], hidden: Hidden) -> None:
    """Link packets that RPS/RFS moved to the arrival of their IPI on the target CPU.

    ``csd_queue_cpu(cpu, func, csd)`` on the entry CPU, then ``csd_function_entry(func, csd)`` on the target. The function is a
    bare kernel address: rps_trigger_softirq is the one that moved packets share. A packet whose target backlog was already
    scheduled has no IPI of its own.
    """
    queued, entered = event_columns(events, "csd:csd_queue_cpu"), event_columns(events, "csd:csd_function_entry")
    drv, rx = STAGE_INDEX["driver_rx"], STAGE_INDEX["netif_receive_skb"]
    moved = np.flatnonzero((path.rank[:, drv] >= 0) & (path.cpu[:, drv] != path.cpu[:, rx]))
    if not queued.n or not entered.n or not len(moved):
        return
    # "cpu" of csd_queue_cpu is the target; the CPU it ran on is the sample's own and must not be shadowed by it.
    target = queued["field_cpu"] if "field_cpu" in queued else queued["cpu"]
    sends = AsOf(queued["rank"], queued["cpu"], target)
    send = sends.first_after(path.rank[moved, drv], path.cpu[moved, drv], path.cpu[moved, rx])
    csd = pick(_field(queued, "csd", np.uint64), send, 0)
    func = pick(_field(queued, "func", np.uint64), send, 0)
    found = func[send >= 0]
    if not len(found):
        return
    values, counts = np.unique(found, return_counts=True)
    arrivals = AsOf(entered["rank"], entered["cpu"], _field(entered, "csd", np.uint64))
    row = arrivals.first_after(sends.rank_of(send, -1), path.cpu[moved, rx], csd)
    good = (row >= 0) & (func == values[np.argmax(counts)]) & (arrivals.rank_of(row, _NEVER) < path.rank[moved, rx])
    sent, arrived = pick(queued["time"], send, NAT), pick(entered["time"], row, NAT)
    good &= ~hidden.touch(path.time[moved, drv], sent, path.cpu[moved, drv])
    good &= ~hidden.touch(sent, arrived, path.cpu[moved, rx])
    every = np.full(len(path.rank), -1, np.int64)
    every[moved] = np.where(good, row, -1)
    path.set_stage("rps_ipi", entered, every)
    # netif_rx from within a running NET_RX softirq: that softirq sends the IPI at its end, and the next one is not this packet's.
    ipi = STAGE_INDEX["rps_ipi"]
    for stage in ("softirq_raise", "softirq"):
        later = (path.time[:, ipi] != NAT) & (path.time[:, STAGE_INDEX[stage]] > path.time[:, ipi])
        path.unset(stage, later)


def _link_socket(path: KernelPath, events: Mapping[str, Columns], *hidden: Hidden) -> None:
    """Link tcp_probe by (skbaddr, generation): it names socket and ports."""
    probes = event_columns(events, "tcp:tcp_probe")
    probe = np.full(len(path.rank), -1, np.int64)
    if "skbaddr" in probes:
        index = AsOf(probes["rank"], _field(probes, "skbaddr", np.uint64))
        probe = index.first_after(path.rank[:, STAGE_INDEX["netif_receive_skb"]], path.columns["skbaddr"])
        probe = np.where(index.rank_of(probe, _NEVER) < path.columns["end_rank"], probe, -1)
        probe = np.where(_touched(path, probes, probe, "netif_receive_skb", *hidden), -1, probe)
    path.set_stage("tcp_rcv", probes, probe)
    path.columns = path.columns.with_columns(
        socket=pick(_field(probes, "skaddr", np.uint64), probe, 0),
        sport=pick(_field(probes, "sport", np.int64), probe, -1),
        dport=pick(_field(probes, "dport", np.int64), probe, -1),
        probe_len=pick(_field(probes, "data_len", np.int64), probe, -1),
        snd_una=pick(_field(probes, "snd_una", np.int64), probe, -1),
    )
    _link_data_ready(path, events, probes, *hidden)


def _touched(
    path: KernelPath, events: Columns, row: np.ndarray, since: str, lossy: Hidden, unseen: Hidden
) -> np.ndarray:
    """Tell for each link from an earlier stage to an event whether other events may be missing between, on either's CPU."""
    if not unseen.any:
        return np.zeros(len(row), bool)
    at = STAGE_INDEX[since]
    start, end = path.time[:, at], pick(events["time"], row, NAT)
    touched = np.zeros(len(row), bool)
    for cpu in (path.cpu[:, at], pick(events["cpu"], row, -1)):
        touched |= lossy.touch(start, end, cpu) | (unseen.touch(start, end, cpu) & (end - start > WITHOUT_PAUSE_NS))
    return touched


def _link_data_ready(path: KernelPath, events: Mapping[str, Columns], probes: Columns, *hidden: Hidden) -> None:
    """Link sk_data_ready on the CPU that queued the data, and tell until when a wake-up there is this packet's."""
    ready = event_columns(events, "sock:sk_data_ready")
    everything = event_columns(events, "net:netif_receive_skb")
    rx, rcv = STAGE_INDEX["netif_receive_skb"], STAGE_INDEX["tcp_rcv"]
    row = np.full(len(path.rank), -1, np.int64)
    socket = path.columns["socket"]
    # AF_UNIX, vsock and netlink data_ready nest in the same softirq (14 of 20,000 mis-linked without this): only inet.
    for protocol in (6, 17) if "family" in ready else ():
        is_inet = (ready["family"] == 2) | (ready["family"] == 10)
        rows = np.flatnonzero(is_inet & (ready["protocol"] == protocol))
        mine, sockets = ready.take(rows), _field(ready, "skaddr", np.uint64)[rows]
        if protocol == 6:
            # The socket lock keeps one segment's probe and data_ready together on its socket, whatever softirq comes between
            # when the reader itself processes its backlog. An out-of-order segment has none before the next probe.
            index = AsOf(mine["rank"], mine["cpu"], sockets)
            start, cpu, wanted = path.rank[:, rcv], path.cpu[:, rcv], path.rank[:, rcv] >= 0
            found = index.first_after(start, cpu, socket)
            limits = AsOf(probes["rank"], probes["cpu"], _field(probes, "skaddr", np.uint64))
            limit = limits.rank_of(limits.first_after(start, cpu, socket), _NEVER)
        else:
            index = AsOf(mine["rank"], mine["cpu"])
            start, cpu, wanted = path.columns["entered_rank"], path.columns["entered_cpu"], path.rank[:, rcv] < 0
            found = index.first_after(start, cpu)
            following = AsOf(everything["rank"], everything["cpu"])
            limit = following.rank_of(following.first_after(start, cpu), _NEVER)
        found = np.where(wanted & (index.rank_of(found, _NEVER) < limit), found, -1)
        if protocol == 17:
            breaks = [mine, probes, event_columns(events, "irq:softirq_entry"), event_columns(events, BIRTHS[3])]
            is_napi = path.columns["path_kind"] == PATH_KINDS.index("napi")
            skbs = path.rank[:, rx], path.cpu[:, rx].astype(np.int64), is_napi
            found = ready_of_batches(skbs, found, index, following, wanted, _ranks_and_cpus(breaks))
        since = "tcp_rcv" if protocol == 6 else "netif_receive_skb"
        # Where events may be missing one that comes as late is another's: whoever is blind need not break the chain of switches.
        late = hidden[0].any & (pick(mine["time"], found, NAT) - path.time[:, STAGE_INDEX[since]] > WITHOUT_PAUSE_NS)
        found = np.where(late | _touched(path, mine, found, since, *hidden), -1, found)
        row = np.where(found >= 0, pick(rows, found, -1), row)
    path.set_stage("data_ready", ready, row)
    path.columns = path.columns.with_columns(
        socket=np.where(row >= 0, pick(_field(ready, "skaddr", np.uint64), row, 0), socket).astype(np.uint64),
        ready_tid=pick(ready["tid"].astype(np.int64), row, -1),
        wake_limit=_wake_limit(path, events),
    )


def _ranks_and_cpus(columns: list[Columns]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(one["rank"], one["cpu"]) for one in columns]


def _wake_limit(path: KernelPath, events: Mapping[str, Columns]) -> np.ndarray:
    """Return the rank of the first event after data_ready, on its CPU, that begins another packet's processing."""
    at = STAGE_INDEX["data_ready"]
    others = [event_columns(events, name) for name in ("net:netif_receive_skb", "tcp:tcp_probe", "sock:sk_data_ready")]
    return first_rank(_ranks_and_cpus(others), path.rank[:, at], path.cpu[:, at])
