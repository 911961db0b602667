"""Phases of a function log: hand-made logs whose phases are known, and the log of the user's own document."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rxlab.follow.functionphases import PHASE_NAMES, during, find_phases, phase_of
from rxlab.read.tracetext import read_function_log

LOG = """# tracer: function
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
   curl-10      [000] .....  1.000000: __sys_socket <-__x64_sys_socket
   curl-10      [000] .....  1.000002: tcp_v4_init_sock <-inet_create
   curl-10      [000] .....  1.000003: tcp_init_sock <-tcp_v4_init_sock
   curl-10      [000] .....  1.000010: security_socket_connect <-__sys_connect
   curl-10      [000] .....  1.000011: tcp_v4_connect <-__inet_stream_connect
   curl-10      [000] ..s2.  1.000020: tcp_v4_rcv <-ip_protocol_deliver_rcu
   curl-10      [000] .....  1.000021: tcp_set_state <-tcp_v4_connect
   curl-10      [000] .....  1.000050: tcp_sendmsg <-inet_sendmsg
   nginx-20     [001] .....  1.000051: tcp_recvmsg <-inet_recvmsg
   curl-10      [000] ..s2.  1.000060: tcp_ack <-tcp_rcv_established
   curl-10      [000] .....  1.500050: tcp_recvmsg <-inet_recvmsg
"""


def words(columns, name: str) -> list[str]:
    categories = columns.attrs["categories"][name]
    return [categories[code] if code >= 0 else "-" for code in columns[name]]


@pytest.fixture
def spans(tmp_path: Path):
    path = tmp_path / "functions.log"
    path.write_text(LOG)
    return find_phases(read_function_log(path))


def test_each_context_is_followed_by_itself(spans) -> None:
    assert list(zip(words(spans, "phase"), words(spans, "comm"), spans["calls"].tolist(), strict=True)) == [
        ("socket", "curl", 3),
        ("connect", "curl", 3),  # the interrupt in between is not curl's
        ("receive", "-", 2),  # tcp_ack begins nothing: it belongs to what the interrupts of that CPU were at
        ("send", "curl", 1),
        ("read", "nginx", 1),
        ("read", "curl", 1),
    ]
    assert spans["pid"].tolist() == [10, 10, -1, 10, 20, 10]
    assert spans["cpu"].tolist() == [0, 0, 0, 0, 1, 0]


def test_durations_and_gaps_are_of_the_context(spans) -> None:
    assert (spans["end"] - spans["start"]).tolist() == [3_000, 11_000, 40_000, 0, 0, 0]
    assert spans["gap"].tolist() == [-1, 7_000, -1, 29_000, -1, 500_000_000]


def test_a_pause_ends_a_span(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        "a-1 [000] 1.000000: tcp_poll <-sock_poll\na-1 [000] 1.000100: tcp_poll <-x\na-1 [000] 1.000201: tcp_poll <-x\n"
    )
    spans = find_phases(read_function_log(path))
    assert (spans["calls"].tolist(), spans["gap"].tolist()) == ([2, 1], [-1, 101_000])
    assert find_phases(read_function_log(path), pause_ns=10**9)["calls"].tolist() == [3]


def test_what_happened_while_a_task_was_at_it(spans) -> None:
    assert words(during(spans, "nginx"), "comm") == ["nginx"]
    assert words(during(spans, "curl"), "comm") == words(spans, "comm")
    assert during(spans, "wget").n == 0


def test_no_call_is_lost_or_counted_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    names = ["tcp_poll", "tcp_v4_rcv", "tcp_ack", "tcp_sendmsg", "unknown_function", "__sys_socket"]
    lines = [
        f"t-{rng.integers(1, 4)} [00{rng.integers(2)}] ..{rng.choice(['s', '.'])}1. {1 + i * 1e-6:.6f}: {rng.choice(names)} <-x"
        for i in range(500)
    ]
    path = tmp_path / "log"
    path.write_text("\n".join(lines))
    calls = read_function_log(path)
    spans = find_phases(calls)
    assert spans["calls"].sum() == calls.n == 500
    assert (np.diff(spans["start"]) >= 0).all()
    # Spans and the gaps before them tile the time of each context.
    keys = np.where(calls["in_interrupt"] == 1, -1 - calls["cpu"].astype(np.int64), calls["pid"])
    total = sum(np.ptp(calls["time"][keys == key]) for key in np.unique(keys))
    assert (spans["end"] - spans["start"]).sum() + spans["gap"][spans["gap"] >= 0].sum() == total


@pytest.mark.parametrize(
    ("function", "phase"),
    [
        ("__sys_socket", "socket"),
        ("sys_socket", "socket"),
        ("security_socket_create", "socket"),
        ("apparmor_socket_connect", "connect"),
        ("tcp_v6_connect", "connect"),
        ("tcp_v4_rcv", "receive"),
        ("cap_socket_sock_rcv_skb", "receive"),
        ("tcp_sendmsg_locked", "send"),
        ("tcp_recvmsg_locked", "read"),
        ("tcp_fin", "close"),
        ("tcp_ack", None),
        ("tcp_set_state", None),
    ],
)
def test_what_begins_a_phase(function: str, phase: str | None) -> None:
    code = phase_of(function)
    assert (PHASE_NAMES[code] if code >= 0 else None) == phase


@pytest.mark.corpus
def test_the_wget_of_2009(corpus: Path) -> None:
    """The log in the user's document has no flags column: one task, one context, from the first socket to the last read."""
    calls = read_function_log(corpus.parent / "background.txt")
    spans = find_phases(calls)
    phases = words(spans, "phase")
    assert set(spans["pid"].tolist()) == {12509}
    assert phases[0] == "socket"
    first_http = phases.index("receive")
    assert {"connect", "send", "poll"} <= set(phases)
    assert phases.index("connect") < len(phases) - phases[::-1].index("read")
    assert spans["calls"].sum() == calls.n
    assert first_http > 0
