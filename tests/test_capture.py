"""Capture without root: what it makes of the tools' output, its refusals, the untraced arm, and tools that misbehave."""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxlab import stages
from rxlab.errors import CaptureError, UsageError
from rxlab.host.journal import apply
from rxlab.record import capture as capturing
from rxlab.record import pcaprecord, perfrecord, runfolder
from rxlab.record.capture import capture
from rxlab.record.pcaprecord import PcapRecorder
from rxlab.record.perfrecord import PerfRecorder, count_lost, filter_of, split_events
from rxlab.record.recording import DEFAULT_MIN_FREE, Recording
from rxlab.record.spinner import start_spinners, stop_spinners
from rxlab.record.workload import Workload
from rxlab.rundir import write_json

# What tcpdump 4.99 prints: at its start, on SIGUSR1 (one line), at its end (three lines).
TCPDUMP_START = "tcpdump: listening on lo, link-type EN10MB (Ethernet), snapshot length 192 bytes\n"
TCPDUMP_END = "5 packets captured\n5 packets received by filter\n0 packets dropped by kernel\n"


@pytest.fixture
def transaction(tmp_path: Path) -> Any:
    """Journal of the test's own; holds helpers only."""
    with apply(journal_dir=tmp_path / "journal") as journal:
        yield journal


def fake_tool(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Python script in front of a tool of that name."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable} -IS\n" + textwrap.dedent(body))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def fake_tracefs(folder: Path, monkeypatch: pytest.MonkeyPatch, **formats: str) -> None:
    """Make a tracefs with the given events, named ``sys__event``."""
    (folder / "events" / "sched").mkdir(parents=True)
    for name, text in formats.items():
        event = folder / "events" / name.replace("__", "/")
        event.mkdir(parents=True)
        (event / "format").write_text(text)
    monkeypatch.setattr(perfrecord, "TRACEFS", (folder,))


# -- perf.data: losses


def perf_file(*records: bytes) -> bytes:
    """Build a perf.data of records alone: magic, header size, attr size, then the sections attrs, data, event types."""
    data = b"".join(records)
    header = b"PERFILE2" + struct.pack("<QQ", 104, 144)
    header += struct.pack("<QQ", 0, 0) + struct.pack("<QQ", 104, len(data)) + struct.pack("<QQ", 0, 0)
    return header.ljust(104, b"\0") + data


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<IHH", kind, 0, 8 + len(body)) + body


SAMPLE = record(9, bytes(40))
LOST = record(2, struct.pack("<QQ", 77, 12) + bytes(24))
LOST_SAMPLES = record(13, struct.pack("<Q", 30) + bytes(24))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (perf_file(SAMPLE, SAMPLE), 0),
        (perf_file(SAMPLE, LOST, SAMPLE, LOST), 24),
        (perf_file(LOST, SAMPLE, LOST_SAMPLES), 42),
        (perf_file(SAMPLE, record(81, bytes(32)), LOST), None),  # compressed: cannot be walked here
        (perf_file(SAMPLE) + b"", 0),
        (b"PERFILE2", None),
        (b"NOTPERF!" + bytes(200), None),
        (perf_file(LOST, SAMPLE)[:-10], 12),  # cut short
        (perf_file(LOST, struct.pack("<IHH", 9, 0, 0)), None),  # a record without size would never end
    ],
)
def test_losses_are_summed_from_the_records(content: bytes, expected: int | None, tmp_path: Path) -> None:
    path = tmp_path / "perf.data"
    path.write_bytes(content)
    assert count_lost(path) == expected


def test_a_perf_data_whose_size_was_never_written_is_walked_to_its_end(tmp_path: Path) -> None:
    content = bytearray(perf_file(SAMPLE, LOST))
    struct.pack_into("<Q", content, 48, 0)  # perf was killed: data.size is still 0
    (tmp_path / "perf.data").write_bytes(content)
    assert count_lost(tmp_path / "perf.data") == 12


def test_no_file_no_losses(tmp_path: Path) -> None:
    assert count_lost(tmp_path / "perf.data") is None


# -- perf: events and filters

FORMAT = (
    "name: x\nformat:\n\tfield:unsigned short common_type;\toffset:0;\n\tfield:{};\toffset:8;\tsize:4;\tsigned:0;\n"
)


def test_events_the_kernel_lacks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tracefs(tmp_path, monkeypatch, net__netif_rx=FORMAT.format("int a"))
    assert split_events(["net:netif_rx", "sock:sk_data_ready"]) == (["net:netif_rx"], ["sock:sk_data_ready"])


def test_a_filter_is_used_only_where_the_field_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_family = FORMAT.format("__u16 family")
    fake_tracefs(
        tmp_path,
        monkeypatch,
        sock__sk_data_ready=with_family,
        sock__sock_recv_length=FORMAT.format("__u16 proto"),
        net__netif_rx=with_family,
    )
    assert filter_of("sock:sk_data_ready") == stages.EVENT_FILTERS["sock:sk_data_ready"]
    assert filter_of("sock:sock_recv_length") is None
    assert filter_of("net:netif_rx") is None
    recorder = PerfRecorder(tmp_path / "perf.data", ["sock:sk_data_ready", "sock:sock_recv_length", "net:nothing"])
    assert recorder.missing_events == ["net:nothing"]
    assert any("sock:sock_recv_length" in problem for problem in recorder.problems)
    argv = recorder.argv()
    position = argv.index("sock:sk_data_ready")
    assert argv[position - 1 : position + 3] == [
        "-e", "sock:sk_data_ready", "--filter", stages.EVENT_FILTERS["sock:sk_data_ready"],
    ]  # fmt: skip
    assert argv.count("--filter") == 1


def test_extra_filters_join_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tracefs(tmp_path, monkeypatch, net__netif_rx=FORMAT.format("int a"))
    extra = {"net:netif_rx": 'name == "eth0"', "net:other": "a == 1"}
    recorder = PerfRecorder(tmp_path / "perf.data", ["net:netif_rx"], extra_filters=extra)
    assert recorder.filters == {"net:netif_rx": 'name == "eth0"'}


def test_the_rings_fit_the_size_limit() -> None:
    cpus = os.cpu_count() or 1
    assert perfrecord.pages_within(8192, None) == 8192
    assert perfrecord.pages_within(8192, 1 << 40) == 8192
    few = perfrecord.pages_within(8192, 64 * cpus << 20)
    assert few * mmap.PAGESIZE * cpus <= 32 * cpus << 20
    assert perfrecord.pages_within(8192, 1) == perfrecord.MIN_PAGES


def test_no_event_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tracefs(tmp_path, monkeypatch)
    with pytest.raises(CaptureError, match="none of the events"):
        PerfRecorder(tmp_path / "perf.data", ["net:netif_rx"])


@pytest.mark.parametrize(
    ("error", "remedy"), [(PermissionError, "rxlab doctor"), (FileNotFoundError, "mount -t tracefs none")]
)
def test_tracepoints_that_cannot_be_read_name_the_remedy(
    error: type[OSError], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> list[str]:
        raise error(path)

    fake_tracefs(tmp_path, monkeypatch)
    monkeypatch.setattr("rxlab.record.perfrecord.os.listdir", refuse)
    with pytest.raises(CaptureError, match=remedy) as refused:
        capture(tmp_path / "run", iface="lo", attach=True, duration=1)
    assert "\n" not in refused.value.line()
    assert not (tmp_path / "run").exists(), "nothing was made"


def test_presets_never_record_raw_syscalls() -> None:
    assert not [
        event for events in stages.EVENT_PRESETS.values() for event in events if event.startswith("raw_syscalls")
    ]


# -- perf and tcpdump that misbehave


def one_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PerfRecorder:
    fake_tracefs(tmp_path / "tracefs", monkeypatch, sock__sk_data_ready=FORMAT.format("__u16 family"))
    return PerfRecorder(tmp_path / "perf.data", ["sock:sk_data_ready"])


def test_a_perf_that_is_not_permitted_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complaint = "Error:\\nAccess to performance monitoring is limited.\\nError: No permission to enable event.\\n"
    fake_tool(tmp_path / "bin", "perf", f'import sys; sys.stderr.write("{complaint}"); sys.exit(255)', monkeypatch)
    recorder = one_event(tmp_path, monkeypatch)
    with pytest.raises(CaptureError, match="perf did not start") as refused:
        recorder.start()
    assert "\n" not in refused.value.line()
    assert not list(tmp_path.glob(".perf.*")), "the control FIFOs are gone"


FAKE_PERF = """
    import os, signal, sys
    argv = sys.argv
    if "--version" in argv:
        print("perf version 0"); sys.exit()
    if "--filter" in argv and {refuse_filters}:
        sys.stderr.write('failed to set filter "x" on event y with 22 (Invalid argument)\\n'); sys.exit(255)
    control, ack = argv[argv.index("--control") + 1][5:].split(",")
    said = open(argv[argv.index("-o") + 1] + ".said", "w")
    signal.signal(signal.SIGINT, lambda *_: (said.write("interrupted"), said.close(), os._exit({status})))
    with open(control) as commands, open(ack, "w") as answers:
        for line in commands:
            said.write(line)
            answers.write("ack\\n")
            answers.flush()
"""


def test_perf_is_enabled_and_disabled_by_commands_it_acknowledges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(tmp_path / "bin", "perf", FAKE_PERF.format(refuse_filters=False, status=0), monkeypatch)
    recorder = one_event(tmp_path, monkeypatch)
    recorder.start()
    result = recorder.stop()
    assert (tmp_path / "perf.data.said").read_text() == "enable\ndisable\ninterrupted"
    assert (result["exit_code"], result["version"], recorder.problems) == (0, "perf version 0", [])
    assert not list(tmp_path.glob(".perf.*"))


def test_a_kernel_that_refuses_the_filters_records_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path / "bin", "perf", FAKE_PERF.format(refuse_filters=True, status=0), monkeypatch)
    recorder = one_event(tmp_path, monkeypatch)
    recorder.start()
    result = recorder.stop()
    assert result["filters"] == {}
    assert "filters not used" in recorder.problems[0]


def test_a_perf_that_never_answers_is_no_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alive, silent, and recording nothing: the traffic must not start, or the run would look complete."""
    fake_tool(tmp_path / "bin", "perf", "import time; time.sleep(30)", monkeypatch)
    monkeypatch.setattr(perfrecord, "ACK_TIMEOUT", 0.3)
    recorder = one_event(tmp_path, monkeypatch)
    with pytest.raises(CaptureError, match="acknowledged 'enable'"):
        recorder.start()
    assert recorder.process is None or recorder.process.poll() is not None


def test_a_perf_that_fails_at_its_end_makes_the_run_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path / "bin", "perf", FAKE_PERF.format(refuse_filters=False, status=5), monkeypatch)
    recorder = one_event(tmp_path, monkeypatch)
    recorder.start()
    assert recorder.stop()["exit_code"] == 5
    assert "status 5" in recorder.problems[0]


FAKE_TCPDUMP = """
    import signal, sys
    if "--version" in sys.argv:
        print("tcpdump version 0"); sys.exit()
    numbers = iter({numbers})
    signals = {{signal.SIGUSR1, signal.SIGINT}}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    sys.stderr.write({start!r}); sys.stderr.flush()
    while signal.sigwait(signals) == signal.SIGUSR1:
        captured, received = next(numbers)
        print(f"tcpdump: {{captured}} packets captured, {{received}} packets received by filter, "
              f"0 packets dropped by kernel", file=sys.stderr, flush=True)
    sys.stderr.write({end!r}); sys.exit({status})
"""


def fake_tcpdump(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    numbers: list[tuple[int, int]],
    end: str = TCPDUMP_END,
    status: int = 0,
) -> PcapRecorder:
    body = FAKE_TCPDUMP.format(numbers=numbers, start=TCPDUMP_START, end=end, status=status)
    fake_tool(tmp_path / "bin", "tcpdump", body, monkeypatch)
    return PcapRecorder(tmp_path / "rx.pcap", "lo")


def test_tcpdump_is_not_stopped_before_it_took_what_was_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = fake_tcpdump(tmp_path, monkeypatch, [(0, 5), (3, 5), (5, 5)])
    recorder.start()
    result = recorder.stop()
    assert result["fence"] == {"captured": 5, "received": 5}
    assert (result["captured"], result["received"], result["dropped"]) == (5, 5, 0)
    assert capturing.pcap_problems(result) == []


def test_on_live_traffic_the_fence_is_what_was_received_when_it_was_first_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = fake_tcpdump(tmp_path, monkeypatch, [(90, 100), (190, 200)])
    recorder.start()
    assert recorder.stop()["fence"] == {"captured": 190, "received": 100}


def test_on_loopback_each_packet_is_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libpcap hides the copy of the sending side, the kernel counts it."""
    end = "8 packets captured\n16 packets received by filter\n0 packets dropped by kernel\n"
    recorder = fake_tcpdump(tmp_path, monkeypatch, [(7, 16), (8, 16), (8, 16)] + [(8, 16)] * 9, end)
    recorder.start()
    result = recorder.stop()
    assert (result["captured"], result["received"], result["copies"]) == (8, 8, 2)
    assert result["fence"] == {"captured": 8, "received": 8}
    recorder = fake_tcpdump(tmp_path, monkeypatch, [(8, 16)] * 1000, end)
    monkeypatch.setattr(pcaprecord, "FENCE_TIMEOUT", 0.1)
    recorder.iface = "eth0"
    recorder.start()
    assert recorder.stop()["received"] == 16, "elsewhere half is half"


def test_packets_tcpdump_never_took_make_the_run_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcaprecord, "FENCE_TIMEOUT", 0.2)
    lost = "0 packets captured\n200 packets received by filter\n0 packets dropped by kernel\n"
    recorder = fake_tcpdump(tmp_path, monkeypatch, [(0, 200)] * 1000, lost)
    recorder.start()
    result = recorder.stop()
    assert (result["captured"], result["received"]) == (0, 200)
    assert "did not take every packet" in capturing.pcap_problems(result)[0]


def test_drops_and_exit_codes_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = "5 packets captured\n9 packets received by filter\n4 packets dropped by kernel\n"
    recorder = fake_tcpdump(tmp_path, monkeypatch, [(5, 5)] * 9, end, status=1)
    recorder.start()
    problems = capturing.pcap_problems(recorder.stop())
    assert any("4 packets dropped" in problem for problem in problems)
    assert any("status 1" in problem for problem in problems)


def test_tcpdump_is_asked_for_nanoseconds_and_immediate_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    argv = PcapRecorder(Path("/x/rx.pcap"), "eth0", "ns1", "tcp port 80", 128).argv()
    assert argv[:4] == ["ip", "netns", "exec", "ns1"]
    assert {"--immediate-mode", "--time-stamp-precision=nano", "-n"} <= set(argv)
    assert argv[argv.index("-Z") + 1] == "root"
    assert argv[argv.index("-s") + 1] == "128"
    assert argv[-1] == "tcp port 80"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "-Z" not in PcapRecorder(Path("/x/rx.pcap"), "eth0").argv()


# -- choices


def test_unknown_choices_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="event preset 'most'"):
        capture(tmp_path / "a", iface="lo", duration=1, events="most")
    with pytest.raises(UsageError, match="idle choice"):
        capture(tmp_path / "b", iface="lo", duration=1, idle="deep", events="none")
    with pytest.raises(UsageError, match="nothing to record"):
        capture(tmp_path / "c", iface="lo")
    with pytest.raises(UsageError, match="--attach"):
        capture(tmp_path / "d", iface="lo", attach=True, workload=Workload())
    with pytest.raises(UsageError, match="no interface"):
        capture(tmp_path / "e", duration=1, events="none")
    assert not list(tmp_path.iterdir())


def test_an_interface_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no such interface"):
        capture(tmp_path / "run", iface="nothing0", duration=1, events="none")


@pytest.mark.parametrize(
    ("idle", "blind", "spins"),
    [
        ("spin", None, True), ("spin", False, True), ("off", True, False),
        ("auto", True, True), ("auto", False, False), ("auto", None, True),
    ],
)  # fmt: skip
def test_spinners_run_when_asked_or_when_the_idle_task_may_be_blind(idle: str, blind: bool | None, spins: bool) -> None:
    assert Recording(idle=idle, idle_task_is_blind=blind).spins is spins


def test_a_spinner_gives_way_to_everything_and_stays_on_its_cpu() -> None:
    cpu = min(os.sched_getaffinity(0))
    spinners = start_spinners([cpu])
    try:
        assert os.sched_getscheduler(spinners[0].pid) == os.SCHED_IDLE
        assert os.sched_getaffinity(spinners[0].pid) == {cpu}
    finally:
        stop_spinners(spinners)
    assert spinners[0].returncode is not None


# -- the untraced arm, for real


def test_the_untraced_arm_records_logs_counters_and_clocks_alone(tmp_path: Path, transaction: Any) -> None:
    load = Workload(messages=300, port=20_500 + os.getpid() % 20_000, remote=None)
    # The sender and the receiver are both this machine's loopback.
    run = capture(
        tmp_path / "run", iface="lo", workload=load, events="none", idle="off", transaction=transaction,
        configuration={"rps_cpus": "off"}, sweep={"cell": "c00", "repetition": 0},
    )  # fmt: skip
    assert run.run["status"] == "complete", run.run["problems"]
    assert run.run["arm"] == "untraced"
    assert (run.run["perf"], run.run["tcpdump"]) == (None, None)
    assert run.run["configuration"] == {"rps_cpus": "off"}
    assert run.run["sweep"]["cell"] == "c00"
    assert run.run["workload"]["scm"] is True
    assert run.run["got"]["workload"]["sent"] == 300
    assert run.run["start_ns"] < run.run["stop_ns"]
    files = {entry.name for entry in run.path.iterdir()}
    assert files == {"run.json", "host.json", "clock.json", "counters.json", "app.log", "client.log"}
    assert all(stat.S_IMODE((run.path / name).stat().st_mode) == 0o600 for name in files)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    whens = [reading["when"] for reading in run.json("clock.json")["readings"]]
    assert (whens[0], whens[-1]) == ("before", "after")
    assert run.json("counters.json")["difference"]


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CaptureError, match="there is a run here already"):
        capture(tmp_path, iface="lo", duration=1, events="none")


def test_a_failed_start_leaves_nothing_and_the_user_s_own_files(tmp_path: Path, transaction: Any) -> None:
    load = Workload(messages=5, remote="ssh:box")
    os.environ["PATH"], path = f"{tmp_path}:{os.environ['PATH']}", os.environ["PATH"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    try:
        (tmp_path / "ssh").write_text("#!/bin/sh\necho 'no route' >&2\nexit 255\n")
        (tmp_path / "ssh").chmod(0o755)
        for out in (tmp_path / "new" / "run", mine):
            with pytest.raises(CaptureError, match="no route"):
                capture(out, iface="lo", workload=load, events="none", idle="off", transaction=transaction)
    finally:
        os.environ["PATH"] = path
    assert {entry.name for entry in tmp_path.iterdir()} == {"ssh", "mine", "journal"}
    assert [entry.name for entry in mine.iterdir()] == ["notes.txt"]


def failed_run(folder: Path) -> None:
    """Leave what a capture leaves that failed before any traffic."""
    folder.mkdir()
    for name in ("host.json", "command.log"):
        (folder / name).write_text("{}")
    write_json(folder / "run.json", {"status": "failed", "problems": ["x"]})


def test_a_start_that_failed_does_not_block_the_next(tmp_path: Path, transaction: Any) -> None:
    failed_run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run = capture(
        tmp_path / "run", iface="lo", duration=0.1, events="none", idle="off", transaction=transaction
    )  # fmt: skip
    assert run.run["status"] == "complete"
    assert not (run.path / "command.log").exists()
    assert (run.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["perf.data", "rx.pcap", "app.log", "client.log"])
def test_a_failed_run_with_something_recorded_stays(tmp_path: Path, name: str) -> None:
    assert name in runfolder.RECORDINGS
    failed_run(tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"x")
    with pytest.raises(CaptureError, match="there is a run here already"):
        capture(tmp_path / "run", iface="lo", duration=0.1, events="none")
    assert (tmp_path / "run" / name).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duration": -1}, "not a duration: found -1 s"),
        ({"duration": 0}, "not a duration"),
        ({"duration": float("nan")}, "not a duration"),
        ({"duration": 1, "cpus": "0-9999"}, "CPUs that are online"),
        ({"duration": 1, "cpus": "none"}, "--cpus"),
        ({"command": ["/no/such/cmd"]}, "does not exist: /no/such/cmd"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        capture(tmp_path / "run", iface="lo", events="none", idle="off", **options)
    assert not (tmp_path / "run").exists()


def test_the_client_that_failed_says_why_in_the_run(tmp_path: Path, transaction: Any) -> None:
    command = ["sh", "-c", "echo first; echo 'no such cable' >&2; exit 3"]
    run = capture(
        tmp_path / "run", iface="lo", command=command, events="none", idle="off", transaction=transaction
    )  # fmt: skip
    assert run.run["problems"] == ["the workload's client ended with status 3: no such cable"]


def test_a_wrong_filter_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "tcpdump: can't parse filter expression: syntax error"
    fake_tool(tmp_path / "bin", "tcpdump", f"import sys; sys.exit({said!r})", monkeypatch)
    with pytest.raises(UsageError, match="not a capture filter.*tcp prt 80.*syntax error"):
        PcapRecorder(tmp_path / "x.pcap", "lo", capture_filter="tcp prt 80").start()


def test_the_command_of_a_user_is_a_workload(tmp_path: Path, transaction: Any) -> None:
    run = capture(
        tmp_path / "run", iface="lo", command=[sys.executable, "-c", "raise SystemExit(3)"], events="none", idle="off",
        transaction=transaction,
    )  # fmt: skip
    assert run.run["status"] == "partial"
    # Whatever else the real host's settings did meanwhile is a problem of its own.
    assert "the workload's client ended with status 3" in run.run["problems"]


def test_a_size_limit_ends_the_run_early(tmp_path: Path, transaction: Any) -> None:
    grow = (
        f"import time\nwith open({str(tmp_path / 'run' / 'big')!r}, 'w') as f:\n f.write('x' * 4000000)\ntime.sleep(60)"
    )
    run = capture(
        tmp_path / "run", iface="lo", command=[sys.executable, "-c", grow], events="none", idle="off",
        max_size=3_000_000, transaction=transaction,
    )  # fmt: skip
    assert run.run["status"] == "partial"
    assert "--max-size" in run.run["problems"][0]
    assert run.run["got"]["seconds"] < 50


def test_a_disk_too_small_is_said_before_the_start(tmp_path: Path, transaction: Any) -> None:
    with pytest.raises(CaptureError, match="the disk has no room for this: found .* MB free, expected"):
        capture(tmp_path / "deep" / "run", iface="lo", duration=1, min_free=1 << 60, transaction=transaction)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        # 60 s of 2,000 messages a second, 4.5 kB each.
        ({"workload": Workload(mode="open", rate=2000, messages=None, duration=60)}, 500),
        ({"workload": Workload(mode="open", rate=2000, messages=None, duration=60), "max_size": 20_000_000}, 20),
        ({"duration": 60}, 60),
    ],
)
def test_a_run_that_would_not_fit_is_refused_with_what_to_free(
    options: dict[str, Any], needs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transaction: Any
) -> None:
    """It used to start, and to end early when the disk was full."""
    monkeypatch.setattr(capturing, "check_tools", lambda *_: None)
    rings = 100_000_000
    monkeypatch.setattr(capturing, "ring_bytes", lambda *_: rings)
    monkeypatch.setattr(runfolder.shutil, "disk_usage", lambda place: SimpleNamespace(free=DEFAULT_MIN_FREE + rings))
    with pytest.raises(CaptureError) as refused:
        capture(tmp_path / "run", iface="lo", idle="off", transaction=transaction, **options)
    line = refused.value.line()
    freed = int(re.search(r"Free ([0-9,]+) MB", line)[1].replace(",", ""))
    assert needs <= freed <= 1.3 * needs
    assert list(tmp_path.glob("run")) == []


def test_a_disk_that_gets_too_full_ends_the_run_early(
    tmp_path: Path, transaction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "check_space", lambda *_: None)
    run = capture(
        tmp_path / "run", iface="lo", command=[sys.executable, "-c", "import time; time.sleep(60)"], events="none",
        idle="off", min_free=1 << 60, transaction=transaction,
    )  # fmt: skip
    assert run.run["status"] == "partial"
    assert "bytes left" in run.run["problems"][0]


def test_an_interrupt_ends_the_run_in_order(tmp_path: Path) -> None:
    """In a process of its own, as Ctrl-C reaches one: the run is partial, its logs are there."""
    script = f"""
import sys
from pathlib import Path
from rxlab.host.journal import apply
from rxlab.record.capture import capture
from rxlab.record.workload import Workload
def progress(seconds):
    if seconds > 0.2:
        print("running", flush=True)
with apply(journal_dir=Path({str(tmp_path / "journal")!r})) as journal:
    capture({str(tmp_path / "run")!r}, iface="lo", events="none", idle="off", transaction=journal, progress=progress,
            workload=Workload(messages=None, duration=60, port={21_000 + os.getpid() % 20_000}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    process.send_signal(2)
    process.stdout.read()
    process.stdout.close()
    assert process.wait(30) != 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["status"] == "partial"
    assert "ended early: interrupted" in run["problems"]
    assert (tmp_path / "run" / "app.log").stat().st_size > 0
    assert not list((tmp_path / "journal").glob("*.journal"))
