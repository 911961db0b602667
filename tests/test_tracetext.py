"""Trace text of every age, line by line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxlab.errors import FormatError, MissingEventError, RxlabError
from rxlab.read.columns import Columns
from rxlab.read.tracetext import read_function_log, read_tracetext


@pytest.fixture
def read(tmp_path: Path):
    """Return a function that reads a trace text."""

    def read_text(text: str, name: str = "trace.txt"):
        path = tmp_path / name
        path.write_text(text)
        return read_tracetext(path)

    return read_text


def texts(columns: Columns, name: str) -> list[str | None]:
    categories = columns.attrs["categories"][name]
    return [None if code < 0 else categories[code] for code in columns[name]]


@pytest.mark.parametrize(
    ("line", "cpu", "pid"),
    [
        ("  my task-12 [003] 7.000000123: softirq_raise: vec=3 [action=NET_RX]", 3, -1),  # before 2.6.33
        ("  my task-12 [003] ..s1 7.000000123: softirq_raise: vec=3 [action=NET_RX]", 3, -1),
        ("  my task-12 [003] d.s2. 7.000000123: softirq_raise: vec=3 [action=NET_RX]", 3, -1),  # 5.15 and later
        ("  my task-12 (   11) [003] ..s1 7.000000123: softirq_raise: vec=3 [action=NET_RX]", 3, 11),
        ("  my task-12 (-----) [003] ..s1 7.000000123: softirq_raise: vec=3 [action=NET_RX]", 3, -1),
        ("  my task-12    [003]     7.000000123: softirq_raise:        vec=3 [action=NET_RX]", 3, -1),  # trace-cmd
    ],
)
def test_columns_of_ftrace_lines(read, line: str, cpu: int, pid: int) -> None:
    trace = read(f"# tracer: nop\n#\n{line}\n")
    event = trace.events["softirq_raise"]
    assert (event["time"].tolist(), event["cpu"].tolist()) == ([7_000_000_123], [cpu])
    assert (event["tid"].tolist(), event["pid"].tolist(), texts(event, "comm")) == ([12], [pid], ["my task"])
    assert trace.meta["format"] == "ftrace"


@pytest.mark.parametrize(
    ("line", "name", "pid", "tid", "cpu"),
    [
        (
            "curl  77/78  [001]   5.000001: sched:sched_wakeup: comm=x pid=9 prio=120 target_cpu=001",
            "sched:sched_wakeup",
            77,
            78,
            1,
        ),
        ("curl    78  [001]   5.000001:     250000 cycles:u: ", "cycles:u", 78, 78, 1),
        ("curl    78   5.000001:          1 cpu-clock:", "cpu-clock", 78, 78, -1),
        (":-1    -1/-1  [000]   5.000001: sched:sched_switch: prev_pid=1", "sched:sched_switch", -1, -1, 0),
        ("Web Content 77/78 [001] 5.000001: net:netif_rx: dev=lo skbaddr=0xffff len=3", "net:netif_rx", 77, 78, 1),
    ],
)
def test_columns_of_perf_script_lines(read, line: str, name: str, pid: int, tid: int, cpu: int) -> None:
    trace = read("# captured on: today\n" + line + "\n\tffffffff81000000 symbol ([kernel])\n")
    event = trace.events[name]
    assert trace.meta["format"] == "perf script"
    assert (event["pid"].tolist(), event["tid"].tolist(), event["cpu"].tolist()) == ([pid], [tid], [cpu])
    assert event["time"].tolist() == [5_000_001_000]
    assert event.n == trace.meta["events"] == 1


def test_latency_format_has_microseconds_and_no_brackets(read) -> None:
    trace = read("    bash-1994    1d..1.   12us+: netif_rx: dev=lo\n")
    event = trace.events["netif_rx"]
    assert (event["time"].tolist(), event["cpu"].tolist(), texts(event, "dev")) == ([12_000], [1], ["lo"])


def test_counter_clock_is_not_taken_for_time(read) -> None:
    trace = read("a-1 [000] .... 1234567: netif_rx: len=1\n")
    assert trace.events["netif_rx"]["time"].tolist() == [1234567]
    assert trace.events["netif_rx"].attrs["clock"] == "counter (ticks, not time)"


def test_field_types(read) -> None:
    lines = [
        "a-1 [000] 1.0: ev: n=1 h=0xffffffff81000000 neg=-5 z=007 mix=1 name=two words gone=1 list=ARRAY[0f, 00]",
        "a-1 [000] 2.0: ev: n=0x3384 (13188) h=0x1 neg=5 z=010 mix=x name=y list=z",
    ]
    event = read("\n".join(lines)).events["ev"]
    assert (event["n"].tolist(), event["n"].dtype) == ([1, 0x3384], np.int64)
    assert (event["h"].tolist(), event["h"].dtype) == ([0xFFFFFFFF81000000, 1], np.uint64)
    assert event["neg"].tolist() == [-5, 5]
    assert event["z"].tolist() == [7, 10]
    assert texts(event, "mix") == ["1", "x"]
    assert texts(event, "name") == ["two words", "y"]
    assert texts(event, "gone") == ["1", None]
    assert texts(event, "list") == ["ARRAY[0f, 00]", "z"]


def test_sched_events_of_kernel_and_plugin_have_the_same_fields(read) -> None:
    kernel = (
        "a-1 [000] 1.0: sched_switch: prev_comm=a b prev_pid=1 prev_prio=120 prev_state=S ==> next_comm=c:0 next_pid=2 next_prio=98\n"
        "a-1 [000] 1.5: sched_wakeup: comm=c:0 pid=2 prio=98 target_cpu=003\n"
    )
    plugin = (
        "a-1 [000] 1.0: sched_switch: a b:1 [120] S ==> c:0:2 [98]\na-1 [000] 1.5: sched_wakeup: c:0:2 [98]<CPU:003\n"
    )
    plugin = plugin.replace("[98]<CPU", "[98] CPU")
    ours, theirs = read(kernel).events, read(plugin).events
    for name in ("prev_pid", "prev_prio", "next_pid", "next_prio"):
        assert ours["sched_switch"][name].tolist() == theirs["sched_switch"][name].tolist()
    for name in ("prev_comm", "prev_state", "next_comm"):
        assert texts(ours["sched_switch"], name) == texts(theirs["sched_switch"], name)
    for name in ("field_pid", "prio", "target_cpu"):
        assert ours["sched_wakeup"][name].tolist() == theirs["sched_wakeup"][name].tolist()
    assert texts(ours["sched_wakeup"], "field_comm") == texts(theirs["sched_wakeup"], "field_comm") == ["c:0"]


def test_symbol_after_the_fields_is_not_part_of_the_last(read) -> None:
    line = "fio 1/1 [009] 0.5: 1 sched:sched_wakeup: comm=fio pid=2 prio=120 target_cpu=031 ffffffff8bad311d ttwu_do_wakeup ([kernel.kallsyms])"
    assert read(line).events["sched:sched_wakeup"]["target_cpu"].tolist() == [31]


def test_print_with_newlines_keeps_its_text(read) -> None:
    trace = read("a-1 [000] 1.0: print: one\ntwo = 3\na-1 [000] 2.0: print: last\n")
    assert texts(trace.events["print"], "text") == ["one\ntwo = 3", "last"]
    assert trace.meta["other_lines"] == 1


def test_rank_orders_all_events_by_time_cpu_and_line(read) -> None:
    lines = ["a-1 [001] 2.0: x: i=0", "a-1 [001] 1.0: y: i=1", "a-1 [000] 2.0: x: i=2", "a-1 [001] 1.0: x: i=3"]
    events = read("\n".join(lines)).events
    assert events["x"]["rank"].tolist() == [3, 2, 1]
    assert events["y"]["rank"].tolist() == [0]


def test_function_log(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(
        "# tracer: function\n"
        "   curl-9 [000] 5.000001: tcp_sendmsg <-inet_sendmsg\n"
        "   <idle>-0 [001] ..s. 5.000002: tcp_v4_rcv <-ip_protocol_deliver_rcu\n"
        "   curl-9 [000] .... 5.000003: nf_hook [nf_tables] <-nf_hook_slow\n"
        "   curl-9 [000] .... 5.000004: sched_waking: comm=x pid=3\n"
    )
    calls = read_function_log(path)
    assert calls["time"].tolist() == [5_000_001_000, 5_000_002_000, 5_000_003_000]
    assert calls["cpu"].tolist() == [0, 1, 0]
    assert calls["pid"].tolist() == [9, 0, 9]
    assert texts(calls, "comm") == ["curl", "<idle>", "curl"]
    assert texts(calls, "function") == ["tcp_sendmsg", "tcp_v4_rcv", "nf_hook"]
    assert texts(calls, "caller") == ["inet_sendmsg", "ip_protocol_deliver_rcu", "nf_hook_slow"]
    assert list(read_tracetext(path).events) == ["sched_waking"]


def test_the_missions_example_is_a_function_log(repo: Path) -> None:
    page = repo.parent / "shared" / "background.txt"
    if not page.is_file():
        pytest.skip("the page with the example is not here")
    printed = [line.split() for line in page.read_text().splitlines() if line.startswith("wget-") and "<-" in line]
    calls = read_function_log(page)
    assert calls.n == len(printed) > 100
    assert texts(calls, "function") == [words[3] for words in printed]
    assert texts(calls, "caller") == [words[4].removeprefix("<-") for words in printed]
    stamps = [words[2].rstrip(":").split(".") for words in printed]
    assert calls["time"].tolist() == [int(whole) * 10**9 + int(part) * 1000 for whole, part in stamps]


def test_errors(tmp_path: Path, read) -> None:
    with pytest.raises(FormatError, match="no trace event"):
        read("just some words\n")
    with pytest.raises(FormatError, match="no trace event"):
        read("")
    with pytest.raises(FormatError, match="No such file"):
        read_tracetext(tmp_path / "absent")
    path = tmp_path / "events.txt"
    path.write_text("a-1 [000] 1.0: x: i=0\n")
    with pytest.raises(MissingEventError, match="no function call"):
        read_function_log(path)


def test_endless_lines_are_skipped(read) -> None:
    trace = read("x" * 5_000_000 + "\n" + " " * 16_000 + "\na-1 [000] 1.0: x: i=0\n" + "a-1 " * 4000 + "\n")
    assert trace.meta["events"] == 1
    assert trace.meta["warnings"] == ["1 lines longer than 16384 characters skipped"]


@given(st.lists(st.text(alphabet="a-1 [0]().:<=>x\t", max_size=60), max_size=20))
@settings(max_examples=200)
def test_any_text_gives_a_result_or_an_rxlab_error(tmp_path_factory, lines: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text("\n".join(lines))
    try:
        trace = read_tracetext(path)
    except RxlabError:
        return
    assert trace.meta["events"] + trace.meta["other_lines"] == trace.meta["lines"]
