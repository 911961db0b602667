"""The function log's recorder against a made-up tracefs; the real one is in tests/vm, where the kernel is ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rxlab.errors import CaptureError, UsageError
from rxlab.host import functiontrace
from rxlab.host.functiontrace import function_tracing_lack, remove_instance
from rxlab.host.journal import apply
from rxlab.host.undo import RestoreReport, remove_instances
from rxlab.read.tracetext import read_function_log
from rxlab.record import functionrecord
from rxlab.record.functionrecord import FunctionRecorder, parse_functions

TRACE = (
    "# tracer: function\n#\n# entries-in-buffer/entries-written: 2/2   #P:2\n"
    "    curl-321     [001] ..s2.  100.000001: tcp_v4_rcv <-ip_protocol_deliver_rcu\n"
    "    curl-321     [001] .....  100.000007: tcp_recvmsg <-inet_recvmsg\n"
)
STATS = "entries: {entries}\noverrun: 0\ncommit overrun: 0\nbytes: 80\ndropped events: {dropped}\nread events: 0\n"


@pytest.fixture
def tracefs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root whose tracefs makes the files of an instance with its folder, and refuses names no function has."""
    root = tmp_path / "root"
    folder = root / "sys/kernel/tracing"
    (folder / "instances").mkdir(parents=True)
    (folder / "available_tracers").write_text("blk function nop\n")
    (folder / "set_ftrace_filter").write_text("")
    make, write = Path.mkdir, functionrecord._filter

    def make_instance(path: Path, *args: object, **options: object) -> None:
        make(path, *args, **options)  # type: ignore[arg-type]
        if path.parent == folder / "instances":
            for name in ("tracing_on", "current_tracer", "buffer_size_kb", "trace_clock", "set_ftrace_filter"):
                (path / name).write_text("")
            make(path / "options")
            (path / "trace").write_text(TRACE)
            for cpu, entries in ((0, 0), (1, 2)):
                make(path / f"per_cpu/cpu{cpu}", parents=True)
                (path / f"per_cpu/cpu{cpu}/stats").write_text(STATS.format(entries=entries, dropped=0))

    monkeypatch.setattr(Path, "mkdir", make_instance)
    monkeypatch.setattr(
        functionrecord, "_filter", lambda instance, pattern: "no_such" not in pattern and write(instance, pattern)
    )
    monkeypatch.setattr(Path, "rmdir", remove_tree)
    return root


def remove_tree(path: Path) -> None:
    """What rmdir does in tracefs: the instance's files go with it."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)


def test_a_log_is_written_and_the_instance_is_gone(tracefs: Path, tmp_path: Path) -> None:
    registered: list[str] = []
    log = tmp_path / "functions.log"
    recorder = FunctionRecorder(log, ["tcp_*", "no_such*"], registered.append, root=tracefs)
    recorder.start()
    assert (tracefs / "sys/kernel/tracing/instances" / recorder.name / "tracing_on").read_text() == "0"
    recorder.switch_on()
    instance = tracefs / "sys/kernel/tracing/instances" / recorder.name
    assert registered == [recorder.name]
    assert [(instance / name).read_text() for name in ("trace_clock", "current_tracer", "tracing_on")] == [
        "mono",
        "function",
        "1",
    ]
    assert (instance / "options/overwrite").read_text() == "0"
    assert (instance / "set_ftrace_filter").read_text() == "tcp_*\n"
    found = recorder.stop()
    assert (found["calls"], found["lost"], found["missing_patterns"]) == (2, 0, ["no_such*"])
    assert not instance.exists()
    assert log.stat().st_mode & 0o777 == 0o600
    calls = read_function_log(log)
    assert calls["time"].tolist() == [100_000_001_000, 100_000_007_000]
    assert recorder.problems == []


def test_calls_that_found_no_room_are_a_problem(tracefs: Path, tmp_path: Path) -> None:
    recorder = FunctionRecorder(tmp_path / "log", ["tcp_*"], lambda name: None, root=tracefs)
    recorder.start()
    stats = tracefs / "sys/kernel/tracing/instances" / recorder.name / "per_cpu/cpu0/stats"
    stats.write_text(STATS.format(entries=9, dropped=30))
    assert recorder.stop()["lost"] == 30
    assert "30 calls" in recorder.problems[0]


def test_no_pattern_matches(tracefs: Path, tmp_path: Path) -> None:
    recorder = FunctionRecorder(tmp_path / "log", ["no_such_*"], lambda name: None, root=tracefs)
    with pytest.raises(CaptureError, match="no kernel function matches"):
        recorder.start()
    recorder.remove()
    assert list((tracefs / "sys/kernel/tracing/instances").iterdir()) == []


def test_a_kernel_that_refuses_is_one_line(tracefs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(instance: Path, pattern: str) -> bool:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(instance / "set_ftrace_filter"))

    monkeypatch.setattr(functionrecord, "_filter", refuse)
    recorder = FunctionRecorder(tmp_path / "log", ["tcp_*"], lambda name: None, root=tracefs)
    with pytest.raises(CaptureError, match="set_ftrace_filter.*Operation not permitted"):
        recorder.start()


def test_what_a_host_lacks(tracefs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert function_tracing_lack(tracefs) is None
    folder = tracefs / "sys/kernel/tracing"
    (folder / "available_tracers").write_text("blk nop\n")
    assert "CONFIG_FUNCTION_TRACER" in (function_tracing_lack(tracefs) or "")
    (folder / "available_tracers").unlink()
    assert "tracefs cannot be read" in (function_tracing_lack(tracefs) or "")


def test_lockdown_is_named(tracefs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lockdown = tracefs / functiontrace.LOCKDOWN
    lockdown.parent.mkdir(parents=True)
    lockdown.write_text("none [integrity] confidentiality\n")
    assert functiontrace._reason(PermissionError(errno.EPERM, "x"), tracefs) == "lockdown mode integrity"
    lockdown.write_text("[none] integrity confidentiality\n")
    assert functiontrace._reason(PermissionError(errno.EPERM, "not permitted"), tracefs) == "not permitted"


def test_an_instance_left_by_a_crash_is_removed(tracefs: Path) -> None:
    (tracefs / "sys/kernel/tracing/instances/rxlab-dead").mkdir()
    report = RestoreReport()
    remove_instances(["rxlab-dead", "rxlab-gone"], tracefs, report)
    assert report.ok
    assert not remove_instance("rxlab-dead", tracefs)


def test_the_journal_knows_the_instance_before_it_exists(tmp_path: Path) -> None:
    with apply(journal_dir=tmp_path / "journal") as journal:
        journal.register_instance("rxlab-00000000")
        (file,) = (tmp_path / "journal").glob("*.journal")
        assert '{"kind": "instance", "name": "rxlab-00000000"}' in file.read_text()


@pytest.mark.parametrize("text", ["", " , ", "tcp_*:mod:ext4", "a;b", "$(reboot)"])
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(UsageError, match="not a function filter"):
        parse_functions(text)


def test_filter_of_the_mission() -> None:
    assert parse_functions("tcp_*,ipv4_* *socket*") == ("tcp_*", "ipv4_*", "*socket*")
