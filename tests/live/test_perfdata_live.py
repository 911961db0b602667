"""Recordings made here, in every form perf writes, against perf itself: each value of each field of each tracepoint."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rxlab.read.perfdata import PerfData, inspect_perfdata, read_perfdata
from rxlab.stages import EVENT_PRESETS

TRACEFS = Path("/sys/kernel/tracing/events")

# Loopback traffic for a stated time: TCP and UDP request and reply, new connections, reads that sleep and reads that do not.
TRAFFIC = """
import socket, sys, threading, time
def serve(listener):
    while True:
        connection, _ = listener.accept()
        while received := connection.recv(4096):
            connection.sendall(received)
        connection.close()
def serve_udp(sock):
    while True:
        received, peer = sock.recvfrom(4096)
        sock.sendto(received, peer)
listener = socket.create_server(("127.0.0.1", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 0))
threading.Thread(target=serve, args=(listener,), daemon=True).start()
threading.Thread(target=serve_udp, args=(udp,), daemon=True).start()
stop = time.monotonic() + float(sys.argv[1])
while time.monotonic() < stop:
    with socket.create_connection(listener.getsockname()) as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(1)
        for size in (1, 64, 1400, 3000):
            client.sendall(bytes(size)); client.recv(4096)
            sender.sendto(bytes(size), udp.getsockname()); sender.recv(4096)
        client.setblocking(False)
        try: client.recv(1)
        except BlockingIOError: pass
        time.sleep(0.002)
"""

# Runs inside `perf script -s`: every field as libtraceevent decodes it, by an interpreter and code that are not ours.
ORACLE = """
import json, os
from perf_trace_context import common_flags, common_pc
rows = {}
def trace_unhandled(name, context, fields, sample):
    sampled = sample["sample"]
    row = {"time": sampled["time"], "cpu": sampled["cpu"], "pid": sampled["pid"], "tid": sampled["tid"],
           "common_flags": common_flags(context), "common_preempt_count": common_pc(context), "common_pid": fields["common_pid"]}
    own = {key: value for key, value in fields.items() if not key.startswith("common_")}
    rows.setdefault(name, []).append((row, own))
def trace_end():
    with open(os.environ["RXLAB_ORACLE"], "w") as stream:
        json.dump(rows, stream, default=list)
"""


def available(events: tuple[str, ...]) -> list[str]:
    """Return the events this kernel has."""
    return [event for event in events if (TRACEFS / event.replace(":", "/", 1)).is_dir()]


def record(
    path: Path, *options: str, seconds: float = 2.0, events: list[str] | None = None
) -> subprocess.CompletedProcess:
    """Record loopback traffic with perf."""
    chosen = events if events is not None else available(EVENT_PRESETS["std"])
    command = ["perf", "record", "--all-cpus", "--clockid", "CLOCK_MONOTONIC", "--mmap-pages", "2048"]
    command += [word for event in chosen for word in ("--event", event)]
    command += [*options, "--output", str(path), "--", sys.executable, "-c", TRAFFIC, str(seconds)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return done


def perf_counts(path: Path) -> dict[str, int]:
    """Return the samples per event as ``perf script`` prints them."""
    printed = subprocess.run(
        ["perf", "script", "--fields", "event", "--input", str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return dict(Counter(line.strip().removesuffix(":") for line in printed.stdout.splitlines() if line.strip()))


def own_counts(perf: PerfData) -> dict[str, int]:
    """Return the samples per event, those without samples left out."""
    return {name: columns.n for name, columns in perf.events.items() if columns.n}


@pytest.fixture(scope="module")
def full_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording of all events of the preset "full"."""
    path = tmp_path_factory.mktemp("full") / "perf.data"
    record(path, events=available(EVENT_PRESETS["full"]), seconds=0.7)
    return path


@pytest.fixture(scope="module")
def oracle(full_recording: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Return every field of the recording as perf's own library decodes it."""
    folder = tmp_path_factory.mktemp("oracle")
    (folder / "oracle.py").write_text(textwrap.dedent(ORACLE))
    subprocess.run(
        ["perf", "script", "--script", str(folder / "oracle.py"), "--input", str(full_recording)],
        env={**os.environ, "RXLAB_ORACLE": str(folder / "rows.json")},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return json.loads((folder / "rows.json").read_text())


def as_python(perf: PerfData, event: str, name: str) -> list:
    """Return a column as perf's Python hands it out: integers, lists of integers, texts."""
    columns = perf.events[event]
    values = columns[name].tolist()
    if columns[name].dtype.kind == "i" and columns[name].ndim == 1 and name not in columns.attrs["categories"]:
        # libtraceevent reads numbers unsigned, and perf's Python extends no sign but that of 8 bytes; signs are compared below.
        bits = 8 * columns[name].dtype.itemsize
        return [value & (1 << bits) - 1 if bits < 64 else value for value in values]
    if name in columns.attrs["categories"]:
        categories = columns.attrs["categories"][name]
        return [categories[code] for code in values]
    if columns[name].dtype.kind == "S":
        return [text.decode("latin-1") for text in values]
    return values


def assert_bytes_equal(rows: np.ndarray, expected: list) -> None:
    """Compare byte arrays; perf gives text, which ends at the first NUL, where all bytes before that are printable."""
    for row, value in zip(rows.tolist(), expected, strict=True):
        if isinstance(value, str):
            assert bytes(row).split(b"\0")[0].decode("latin-1") == value
        else:
            assert row == value


def test_every_field_of_every_tracepoint_equals_perf(full_recording: Path, oracle: dict[str, list]) -> None:
    perf = read_perfdata(full_recording).load()
    assert {name.replace(":", "__", 1): count for name, count in own_counts(perf).items()} == {
        name: len(rows) for name, rows in oracle.items()
    }
    compared: Counter[str] = Counter()
    for event, columns in perf.events.items():
        rows = oracle.get(event.replace(":", "__", 1), [])
        for name in rows[0][0] if rows else ():
            assert as_python(perf, event, name) == [common[name] for common, _ in rows], (event, name)
        for name in rows[0][1] if rows else ():
            own = f"field_{name}" if name in ("time", "cpu", "pid", "tid", "rank") else name
            expected = [fields[name] for _, fields in rows]
            if columns[own].dtype == np.uint8 and columns[own].ndim == 2:
                assert_bytes_equal(columns[own], expected)
            else:
                assert as_python(perf, event, own) == expected, (event, name)
            compared[event] += 1
        if rows:
            decoded = {name for name in columns if not name.startswith("common_")} - {
                "time",
                "cpu",
                "pid",
                "tid",
                "rank",
            }
            assert len(decoded) == compared[event], f"{event}: {sorted(decoded)} against {sorted(rows[0][1])}"
    assert sum(compared.values()) > 40
    assert perf.meta["missing_values"] == 0


def test_negative_values_keep_their_sign(full_recording: Path) -> None:
    printed = subprocess.run(
        ["perf", "script", "--fields", "event,trace", "--input", str(full_recording)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    lines = re.findall(r"sock:sock_recv_length: .* length = (-?\d+), error = (-?\d+), flags = (0x[0-9a-f]+)", printed)
    columns = read_perfdata(full_recording).events["sock:sock_recv_length"]
    assert columns.n == len(lines)
    # The event's print format shows the result of a MSG_PEEK (2) as 0.
    is_taken = columns["flags"] & 2 == 0
    expected = [int(length) + int(error) for length, error, flags in lines if not int(flags, 16) & 2]
    assert columns["ret"][is_taken].tolist() == expected
    assert min(expected) < 0, "reading nothing gave -EAGAIN"


def test_order_is_perfs(full_recording: Path) -> None:
    printed = subprocess.run(
        ["perf", "script", "--ns", "--fields", "pid,tid,cpu,time,event", "--input", str(full_recording)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # An exiting task's sample has pid = tid = -1.
    pattern = re.compile(r"\s*(-?\d+)/(-?\d+)\s+\[(\d+)\]\s+(\d+)\.(\d{9}):\s+(\S+):\s*$")
    matches = [pattern.match(line) for line in printed.stdout.splitlines()]
    assert all(matches)
    expected = [(int(m[4]) * 10**9 + int(m[5]), int(m[3]), int(m[1]), int(m[2]), m[6]) for m in matches if m]
    perf = read_perfdata(full_recording)
    found: list = [None] * perf.meta["samples"]
    for name, columns in perf.events.items():
        for row in zip(*(columns[key].tolist() for key in ("rank", "time", "cpu", "pid", "tid")), strict=True):
            found[row[0]] = (*row[1:], name)
    # perf sorts by time alone and leaves ties as they come; ours go on by CPU.
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert sorted(found) == sorted(expected)


def test_pipe_equals_perf(tmp_path: Path) -> None:
    command = ["perf", "record", "--all-cpus", "--clockid", "CLOCK_MONOTONIC", "--output", "-"]
    command += [word for event in available(EVENT_PRESETS["min"]) for word in ("--event", event)]
    path = tmp_path / "pipe.data"
    with path.open("wb") as stream:
        subprocess.run(
            [*command, "--", sys.executable, "-c", TRAFFIC, "0.5"],
            stdout=stream,
            stderr=subprocess.PIPE,
            check=True,
            timeout=60,
        )
    perf = read_perfdata(path).load()
    assert perf.meta["mode"] == "pipe"
    assert not perf.meta["truncated"]
    assert own_counts(perf) == perf_counts(path)
    assert perf.meta["clock"] == "CLOCK_MONOTONIC"


@pytest.mark.parametrize("options", [("--compression-level=1",), ("--compression-level=3", "--mmap-flush=64K")])
def test_compressed_equals_perf(tmp_path: Path, options: tuple[str, ...]) -> None:
    record(tmp_path / "z.data", *options, seconds=0.5)
    perf = read_perfdata(tmp_path / "z.data").load()
    assert own_counts(perf) == perf_counts(tmp_path / "z.data")
    assert perf.meta["missing_values"] == 0


def test_directory_equals_perf(tmp_path: Path) -> None:
    record(tmp_path / "dir.data", "--threads", seconds=0.5)
    perf = read_perfdata(tmp_path / "dir.data").load()
    assert perf.meta["mode"] == "directory"
    assert own_counts(perf) == perf_counts(tmp_path / "dir.data")


def test_directory_of_compressed_streams_equals_perf(tmp_path: Path) -> None:
    record(tmp_path / "dir.data", "--threads", "--compression-level=1", seconds=0.5)
    perf = read_perfdata(tmp_path / "dir.data").load()
    assert own_counts(perf) == perf_counts(tmp_path / "dir.data")


@pytest.mark.parametrize(
    "options",
    [
        ("-g",),
        ("--branch-filter", "any"),
        ("--data", "--phys-data"),
        ("--all-cgroups",),
        ("--data-page-size", "--code-page-size"),
        ("--call-graph", "dwarf,512"),
        ("--intr-regs=ip",),
    ],
)
def test_other_sample_parts_are_skipped(tmp_path: Path, options: tuple[str, ...]) -> None:
    try:
        record(tmp_path / "parts.data", *options, seconds=0.3)
    except AssertionError as error:
        pytest.skip(f"perf cannot record {options} here: {str(error).splitlines()[-1]}")
    perf = read_perfdata(tmp_path / "parts.data").load()
    assert own_counts(perf) == perf_counts(tmp_path / "parts.data")
    assert perf.meta["missing_values"] == 0
    assert set(np.unique(perf.events["net:netif_receive_skb"]["common_type"])) == {
        int((TRACEFS / "net/netif_receive_skb/id").read_text())
    }


def test_groups_are_expanded_as_perf_does(tmp_path: Path) -> None:
    record(tmp_path / "group.data", seconds=0.5, events=["{sched:sched_switch,sched:sched_waking,irq:softirq_entry}:S"])
    perf = read_perfdata(tmp_path / "group.data").load()
    assert own_counts(perf) == perf_counts(tmp_path / "group.data")
    # A member's sample carries the raw bytes of the leader's tracepoint: no value may be made of them.
    assert not perf.events["sched:sched_waking"]["field_pid"].any()
    assert perf.events["sched:sched_switch"]["next_pid"].any()


def test_lost_and_lost_samples_are_kept_apart(tmp_path: Path) -> None:
    record(tmp_path / "lost.data", "--mmap-pages", "1", seconds=1.5, events=available(EVENT_PRESETS["full"]))
    dump = ["perf", "report", "--dump-raw-trace", "--input", str(tmp_path / "lost.data")]
    printed = subprocess.run(dump, capture_output=True, text=True, check=True, timeout=120).stdout
    perf = read_perfdata(tmp_path / "lost.data")
    expected = {
        b"LOST": sum(int(n) for n in re.findall(r"PERF_RECORD_LOST: id:\d+: lost:(\d+)", printed)),
        b"LOST_SAMPLES": sum(
            int(n) for n in re.findall(r"PERF_RECORD_LOST_SAMPLES: id:\d+: lost samples :(\d+)", printed)
        ),
    }
    found = {kind: int(perf.lost["count"][perf.lost["kind"] == kind].sum()) for kind in expected}
    assert found == expected
    if not any(found.values()):
        pytest.skip("this machine lost nothing with one page of ring buffer")
    assert perf.stats()["lost"] == max(found.values())


def test_killed_recorder_is_salvaged(tmp_path: Path) -> None:
    path = tmp_path / "killed.data"
    command = [
        "perf",
        "record",
        "--all-cpus",
        "--clockid",
        "CLOCK_MONOTONIC",
        "--event",
        "sched:sched_switch",
        "--mmap-pages",
        "16",
    ]
    # The workload keeps the scheduler busy until the recorder is killed, and ends by itself a little later.
    workload = ["--", sys.executable, "-c", TRAFFIC, "6"]
    recorder = subprocess.Popen([*command, "--output", str(path), *workload], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and (not path.exists() or path.stat().st_size < 1_500_000):
        time.sleep(0.05)
    recorder.send_signal(signal.SIGKILL)
    recorder.wait(20)
    perf = read_perfdata(path)
    assert perf.meta["truncated"]
    number = int((TRACEFS / "sched/sched_switch/id").read_text())
    assert f"tracepoint:{number}" in perf.events
    assert perf.meta["samples"] > 100
    with_formats = read_perfdata(path, local_formats=True)
    assert with_formats.events["sched:sched_switch"]["next_pid"].any()
    assert inspect_perfdata(path)["truncated"]


def test_overwrite_mode_equals_perf(tmp_path: Path) -> None:
    record(tmp_path / "over.data", "--overwrite", seconds=0.5, events=["sched:sched_switch"])
    perf = read_perfdata(tmp_path / "over.data").load()
    assert own_counts(perf) == perf_counts(tmp_path / "over.data")
