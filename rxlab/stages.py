"""The path of a received packet: stages, the events that show them, path kinds and hops.

This table is the only one. README, docs/schema.md and the notebooks print it from here (``python -m rxlab.stages``).
Kernel functions and files are those of Linux 6.x.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One station on the way from the wire to user space.

    Attributes
    ----------
    name : str
        Label on the ``stage`` coordinate.
    what : str
        What happens there, in a few words.
    function, source : str
        Kernel function and the file it lives in.
    events : tuple of str
        Tracepoints ``sys:name`` that show it, the preferred one first.
    """

    name: str
    what: str
    function: str
    source: str
    events: tuple[str, ...]


STAGES: tuple[Stage, ...] = (
    Stage("nic", "the NIC stamps the frame", "(hardware)", "driver, PHC", ()),
    Stage(
        "hardirq", "the queue's interrupt handler runs", "driver ISR", "kernel/irq/handle.c", ("irq:irq_handler_entry",)
    ),
    Stage(
        "softirq_raise", "NAPI scheduled, NET_RX raised", "__napi_schedule", "net/core/dev.c", ("irq:softirq_raise",)
    ),
    Stage("softirq", "NET_RX softirq entered", "net_rx_action", "net/core/dev.c", ("irq:softirq_entry",)),
    Stage(
        "driver_rx",
        "the driver hands the skb up",
        "napi_gro_receive / netif_rx",
        "net/core/gro.c, net/core/dev.c",
        ("net:napi_gro_receive_entry", "net:netif_rx_entry", "net:netif_rx"),
    ),
    Stage(
        "rps_ipi",
        "RPS/RFS chose another CPU, its IPI arrives",
        "rps_trigger_softirq",
        "net/core/dev.c",
        ("csd:csd_function_entry",),
    ),
    Stage(
        "netif_receive_skb",
        "the skb enters the protocol stack",
        "__netif_receive_skb_core",
        "net/core/dev.c",
        ("net:netif_receive_skb",),
    ),
    Stage(
        "tcp_rcv",
        "the established socket processes the segment",
        "tcp_rcv_established",
        "net/ipv4/tcp_input.c",
        ("tcp:tcp_probe",),
    ),
    Stage(
        "data_ready",
        "data queued, sk->sk_data_ready() called",
        "sock_def_readable",
        "net/core/sock.c",
        ("sock:sk_data_ready",),
    ),
    Stage("waking", "the waitqueue wakes the reader", "try_to_wake_up", "kernel/sched/core.c", ("sched:sched_waking",)),
    Stage(
        "wakeup",
        "the reader is runnable on a run queue",
        "ttwu_do_activate",
        "kernel/sched/core.c",
        ("sched:sched_wakeup",),
    ),
    Stage(
        "switch_in", "the scheduler runs the reader", "context_switch", "kernel/sched/core.c", ("sched:sched_switch",)
    ),
    Stage(
        "copy",
        "bytes copied to user memory",
        "skb_copy_datagram_iter",
        "net/core/datagram.c",
        ("skb:skb_copy_datagram_iovec",),
    ),
    Stage(
        "recvmsg",
        "the receive call returns",
        "tcp_recvmsg / udp_recvmsg",
        "net/ipv4/tcp.c, net/ipv4/udp.c",
        ("sock:sock_recv_length",),
    ),
)

STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)
STAGE_INDEX: dict[str, int] = {name: index for index, name in enumerate(STAGE_NAMES)}

# How a packet entered the kernel. Each kind has an order of its own (ORDER) and its own hard gates.
PATH_KINDS: tuple[str, ...] = (
    "unknown",
    "napi",  # NIC, or veth with GRO: hard IRQ -> NAPI poll -> napi_gro_receive -> stack, all on one CPU
    "napi_rps",  # the same, then RPS/RFS put the skb on a CPU's backlog
    "backlog",  # loopback, veth without GRO: netif_rx in the sender's context, then process_backlog
    "backlog_rps",  # the same, and RPS/RFS put the skb on another CPU's backlog
    "busy_poll",  # polled from the reader's own system call, no softirq of its own
)

# Stage order by path kind. "softirq_raise" and "softirq" are those of the CPU where the packet entered the host; the
# second softirq on an RPS target is covered by the hop rps_ipi -> netif_receive_skb.
_NAPI = ("nic", "hardirq", "softirq_raise", "softirq", "driver_rx")
_BACKLOG = ("nic", "hardirq", "driver_rx", "softirq_raise", "softirq")
_STACK = ("rps_ipi", "netif_receive_skb", "tcp_rcv", "data_ready", "waking", "wakeup", "switch_in", "copy", "recvmsg")
ORDER: dict[str, tuple[str, ...]] = {
    "unknown": _NAPI + _STACK,
    "napi": _NAPI + _STACK,
    "napi_rps": _NAPI + _STACK,
    "backlog": _BACKLOG + _STACK,
    "backlog_rps": _BACKLOG + _STACK,
    "busy_poll": _NAPI + _STACK,
}

# Why the reader ran when it did (alignment: attribution classes).
ATTRIBUTION_MEANINGS: dict[str, str] = {
    "none": "no reader seen",
    "own_wake": "this packet's data_ready woke the task that consumed it",
    "coalesced": "the reader was already woken by an earlier packet and not yet switched in",
    "running": "the reader was on a CPU since before data_ready",
    "other_wake": "another thread or packet woke the reader",
    "preempted": "the reader was runnable, no wake was needed",
}
ATTRIBUTIONS: tuple[str, ...] = tuple(ATTRIBUTION_MEANINGS)

# How a packet's bytes were taken out of the socket.
READER_KINDS: tuple[str, ...] = (
    "unknown",  # no reader seen, or the recording lacks io_uring's event
    "syscall",  # recv*, read*: a receive system call
    "io_uring",  # a request in an io_uring
)

# What became of a row. Bad values are kept and counted, never dropped.
STATUS_MEANINGS: dict[str, str] = {
    "complete": "every stage is there that its path kind and attribution require",
    "incomplete": "a required stage is missing, of no known cause",
    "no_payload": "nothing a reader could consume: a pure ACK",
    "gro_merged": "merged by GRO into the skb of an earlier segment",
    "no_reader": "delivered to a socket, and no receive call in the recording took it: not read, or by splice(), MSG_TRUNC or kTLS, which copy without an event",
    "duplicate": "retransmitted bytes that were consumed already",
    "dropped": "freed by the kernel; drop_reason says why",
    "ambiguous": "several partners fit, or the evidence contradicts itself",
    "negative": "a hop ran backwards: the row is kept, and left out of statistics",
    "unmatched": "in the pcap, no skb event found",
    "lost": "a stage is missing inside a window in which perf says that it lost events",
    "blind": "a stage is missing inside a window in which perf delivered nothing (sched_switch does not go on where it ended)",
    "outside_window": "before perf was enabled or after it was disabled",
    "handshake": "sets a connection up: SYN, SYN-ACK, the ACK that completes it",
    "fragment": "part of a datagram; the fragment that completed it tells what became of it",
    "forwarded": "the host sent it on by another of its devices; no socket here got it",
}
STATUSES: tuple[str, ...] = tuple(STATUS_MEANINGS)

# A packet's part in the set-up of its connection.
HANDSHAKES: tuple[str, ...] = ("none", "syn", "syn_ack", "ack")

# Named latencies: (name, end stage, start stage, definition).
TOTALS: tuple[tuple[str, str, str, str], ...] = (
    ("total_latency", "recvmsg", "t0_stage", "first kernel stage seen -> recvmsg"),
    ("nic_latency", "hardirq", "nic", "hardware stamp -> interrupt handler"),
    ("softirq_latency", "softirq", "softirq_raise", "NET_RX raised -> net_rx_action entered"),
    ("rps_latency", "netif_receive_skb", "driver_rx", "driver_rx -> netif_receive_skb where RPS/RFS moved the packet"),
    ("stack_latency", "data_ready", "netif_receive_skb", "netif_receive_skb -> data_ready"),
    ("wakeup_latency", "switch_in", "waking", "waking -> switch_in"),
    ("runqueue_delay", "switch_in", "wakeup", "runnable -> switch_in"),
    ("copy_latency", "copy", "switch_in", "switch_in -> copy"),
)


@dataclass(frozen=True)
class Phase:
    """One part of a connection's life, as a log of kernel functions shows it.

    Attributes
    ----------
    name : str
    what : str
        What happens there, in a few words.
    functions : tuple of str
        Shell patterns of functions that begin it. Helpers that every phase calls are not named: they belong to the phase
        they are called in.
    """

    name: str
    what: str
    functions: tuple[str, ...]


# The first phase with a matching pattern counts. Names of Linux 2.6.28 to 6.12 (system calls are sys_X, SyS_X, __x64_sys_X, do_X).
PHASES: tuple[Phase, ...] = (
    Phase(
        "socket",
        "a socket is made, bound, given options",
        (
            "*sys_socket",
            "*sys_socketpair",
            "*socket_create",
            "*socket_post_create",
            "sock_alloc*",
            "*_init_sock",
            "*socket_bind",
            "*socket_setsockopt",
            "*socket_getsockname",
            "*insert_socket",
        ),
    ),
    Phase(
        "listen",
        "the server waits for connections",
        ("*socket_listen", "*socket_accept", "*csk_accept", "*csk_listen*"),
    ),
    Phase(
        "connect",
        "handshake: SYN, SYN-ACK, ACK",
        (
            "*socket_connect",
            "tcp_v[46]_connect",
            "tcp_connect",
            "tcp_rcv_synsent*",
            "tcp_rcv_state_process",
            "tcp_finish_connect",
            "tcp_conn_request",
            "tcp_v[46]_conn_request",
            "tcp_v[46]_syn_recv_sock",
            "tcp_v[46]_hnd_req",
            "tcp_check_req",
            "tcp_child_process",
            "tcp_create_openreq_child",
            "tcp_make_synack",
            "tcp_v[46]_send_synack",
            "tcp_init_transfer",
        ),
    ),
    Phase(
        "send",
        "data goes out",
        ("*socket_sendmsg", "tcp_sendmsg*", "tcp_sendpage*", "tcp_splice_eof", "tcp_push", "tcp_push_one"),
    ),
    Phase(
        "close",
        "FIN, and what is left of the connection",
        (
            "tcp_close",
            "__tcp_close",
            "tcp_shutdown",
            "*socket_shutdown",
            "tcp_send_fin",
            "tcp_fin",
            "tcp_time_wait",
            "tcp_done",
            "tcp_v[46]_destroy_sock",
            "*remove_socket",
            "*drop_socket",
            "*socket_release",
        ),
    ),
    Phase(
        "receive",
        "a segment arrives: softirq, socket lookup, queue, wake-up",
        (
            "tcp_v[46]_early_demux",
            "tcp_v[46]_rcv",
            "tcp_v[46]_do_rcv",
            "tcp_rcv_established",
            "tcp_data_queue",
            "tcp_queue_rcv",
            "tcp_data_ready",
            "tcp[46]_gro_receive",
            "tcp_gro_receive",
            "*socket_sock_rcv_skb",
        ),
    ),
    Phase("poll", "the task asks whether there is data, and sleeps", ("tcp_poll", "tcp_stream_memory_free")),
    Phase(
        "read",
        "bytes are copied to the task",
        (
            "*socket_recvmsg",
            "tcp_recvmsg*",
            "tcp_read_sock",
            "tcp_splice_read",
            "tcp_cleanup_rbuf",
            "tcp_rcv_space_adjust",
        ),
    ),
)

# The system calls that receive.
_RECEIVE_CALLS = ("read", "readv", "recvfrom", "recvmsg", "recvmmsg")

# Event presets. Each costs 0.5 to 0.7 us per event on the path, so "min" exists. raw_syscalls is never recorded.
_MIN = (
    "net:netif_receive_skb",
    "tcp:tcp_probe",
    "sock:sk_data_ready",
    "sched:sched_waking",
    "sched:sched_switch",
    "skb:skb_copy_datagram_iovec",
    "sock:sock_recv_length",
)
_STD = (
    *_MIN,
    "irq:irq_handler_entry",
    "irq:softirq_raise",
    "irq:softirq_entry",
    "net:netif_rx_entry",
    "net:netif_rx",
    "net:napi_gro_receive_entry",
    "csd:csd_queue_cpu",
    "csd:csd_function_entry",
    "sched:sched_wakeup",
    "skb:kfree_skb",
    "sock:sock_rcvqueue_full",
    "io_uring:io_uring_complete",
)
_FULL = (
    *_STD,
    "irq:irq_handler_exit",
    "irq:softirq_exit",
    "napi:napi_poll",
    "net:net_dev_queue",
    "net:net_dev_start_xmit",
    "net:netif_rx_exit",
    "net:netif_receive_skb_entry",
    "net:napi_gro_receive_exit",
    "net:napi_gro_frags_entry",
    "net:netif_receive_skb_list_entry",
    "csd:csd_function_exit",
    "ipi:ipi_send_cpu",
    "skb:consume_skb",
    "sock:inet_sock_set_state",
    "sched:sched_migrate_task",
    *(
        f"syscalls:sys_{edge}_{call}"
        for call in (*_RECEIVE_CALLS, "epoll_wait", "accept", "accept4")
        for edge in ("enter", "exit")
    ),
)
EVENT_PRESETS: dict[str, tuple[str, ...]] = {"min": _MIN, "std": _STD, "full": _FULL}

# perf tracepoint filters that keep rates down. vec 3 is NET_RX_SOFTIRQ (include/linux/interrupt.h); family 2 and 10 are
# AF_INET and AF_INET6: AF_UNIX data_ready events nest in the same softirq and were mis-joined without the filter.
EVENT_FILTERS: dict[str, str] = {
    "irq:softirq_raise": "vec == 3",
    "irq:softirq_entry": "vec == 3",
    "irq:softirq_exit": "vec == 3",
    "sock:sk_data_ready": "family == 2 || family == 10",
    "sock:sock_recv_length": "family == 2 || family == 10",
}


# Recorded instead of an event that the kernel lacks (rxlab/follow/older.py).
SUBSTITUTES: dict[str, tuple[str, ...]] = {
    "sock:sock_recv_length": tuple(f"syscalls:sys_exit_{call}" for call in _RECEIVE_CALLS),
}
# Since when a receive call can have taken something; not needed, but it tells readers of one UDP socket apart.
RECEIVE_ENTRIES: tuple[str, ...] = tuple(f"syscalls:sys_enter_{call}" for call in _RECEIVE_CALLS)


def stages_without(recorded: set[str]) -> list[str]:
    """Return the stages that cannot be seen when only the events in `recorded` exist."""
    recorded = recorded | {name for name, others in SUBSTITUTES.items() if recorded.intersection(others)}
    return [stage.name for stage in STAGES if stage.events and not recorded.intersection(stage.events)]


def markdown_table() -> str:
    """Return the stage table as Markdown, for README, docs/schema.md and the notebooks."""
    rows = ["| # | stage | what happens | kernel function | file | events |", "|---|---|---|---|---|---|"]
    for index, stage in enumerate(STAGES):
        events = ", ".join(f"`{event}`" for event in stage.events) or "hardware stamp in the pcap"
        rows.append(f"| {index} | `{stage.name}` | {stage.what} | `{stage.function}` | {stage.source} | {events} |")
    return "\n".join(rows)


def markdown_meanings() -> str:
    """Return what statuses and attributions mean as Markdown, for docs/schema.md."""
    tables = []
    for title, meanings in (("status", STATUS_MEANINGS), ("attribution", ATTRIBUTION_MEANINGS)):
        rows = [f"| {title} | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in meanings.items())]
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    print(markdown_table(), markdown_meanings(), sep="\n\n")
