"""One flow in N: the same choice by tcpdump's filter and by the filters of tracepoints that know the ports.

A flow is taken when its two ports agree in some bits, which is the same in both directions. Bit 0 is left out: Linux gives
connections even ports of their own (``__inet_hash_connect``), so that bit says nothing about a flow. Tracepoint filters have
no arithmetic (kernel/trace/trace_events_filter.c), so there each bit is compared by itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from rxlab.errors import UsageError

LARGEST = 4096
# Both ports are fields of these. An skb, a wakeup or a receive call does not say whose flow it is: those stay whole.
PORT_EVENTS = ("tcp:tcp_probe", "sock:inet_sock_set_state")


def parse_share(text: str | None) -> int:
    """Return N of ``1/N``; 1, every flow, of None.

    Raises
    ------
    UsageError
        N is no power of two.
    """
    if text is None:
        return 1
    one, slash, number = text.partition("/")
    n = int(number) if number.isdecimal() else 0
    if one.strip() != "1" or not slash or n.bit_count() != 1 or n > LARGEST:
        raise UsageError(
            "not a share of the flows",
            where="--flow-sample",
            found=repr(text),
            expected=f"1/N, N = 2, 4, 8 ... {LARGEST}",
        )
    return n


def port_bits(n: int) -> int:
    """Return the bits in which the two ports of a flow of the sample agree."""
    return (n - 1) << 1


def packet_filter(n: int, bpf: str | None = None) -> str | None:
    """Return the BPF filter that lets one flow of TCP or UDP in `n` through, added to another filter."""
    if n == 1:
        return bpf
    mask = port_bits(n)
    # "tcp[0:2]" reads IPv4 alone; of IPv6 the ports follow the fixed header.
    parts = [f"({proto} and ({proto}[0:2] ^ {proto}[2:2]) & {mask} = 0)" for proto in ("tcp", "udp")]
    parts += [f"(ip6[6] = {proto} and (ip6[40:2] ^ ip6[42:2]) & {mask} = 0)" for proto in (6, 17)]
    sample = " or ".join(parts)
    return f"({sample}) and ({bpf})" if bpf else sample


def event_filters(n: int, events: Iterable[str]) -> dict[str, str]:
    """Return the tracepoint filters that take the same flows, for those events that know them."""
    if n == 1:
        return {}
    bits = [1 << place for place in range(16) if port_bits(n) >> place & 1]
    agree = (f"((sport & {bit} && dport & {bit}) || (!(sport & {bit}) && !(dport & {bit})))" for bit in bits)
    expression = " && ".join(agree)
    return {event: expression for event in events if event in PORT_EVENTS}
