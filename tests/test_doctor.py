"""doctor.py and the checks it uses: tracepoints on a made-up tracefs, the task-switch chain on known text."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from rxlab import doctor
from rxlab.doctor import Check, Doctor, file_capabilities, install_command, own_capabilities
from rxlab.errors import CaptureError
from rxlab.host import tools
from rxlab.host.idlecheck import check_chain, check_idle_task
from rxlab.host.tools import find_tool
from rxlab.host.tracepoints import NEEDED_FIELDS, check_tracepoints, event_fields
from rxlab.stages import EVENT_PRESETS, STAGES

FORMAT = """\
name: {name}
ID: 1
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

{fields}

print fmt: "x"
"""


def build_tracefs(root: Path, drop_events: set[str] = frozenset(), drop_fields: dict[str, str] | None = None) -> Path:
    """Write the format files of a kernel that has all events and fields but these."""
    types = {"name": "__data_loc char[] name", "next_comm": "char next_comm[16]", "skbaddr": "void * skbaddr"}
    for event in EVENT_PRESETS["full"]:
        if event in drop_events:
            continue
        names = [name for name in NEEDED_FIELDS.get(event, ("x",)) if name != (drop_fields or {}).get(event)]
        lines = [f"\tfield:{types.get(name, f'unsigned int {name}')};\toffset:8;\tsize:4;\tsigned:0;" for name in names]
        path = root / "sys/kernel/tracing/events" / event.replace(":", "/") / "format"
        path.parent.mkdir(parents=True)
        path.write_text(FORMAT.format(name=event.split(":")[1], fields="\n".join(lines)))
    return root


def test_fields_are_named_as_the_kernel_names_them(tmp_path: Path) -> None:
    root = build_tracefs(tmp_path)
    assert event_fields("net:netif_receive_skb", root) == ["skbaddr", "len", "name"]
    assert event_fields("sched:sched_switch", root) == ["prev_pid", "prev_state", "next_pid", "next_comm"]
    assert event_fields("no:such_event", root) is None


def test_a_kernel_with_everything(tmp_path: Path) -> None:
    report = check_tracepoints(root=build_tracefs(tmp_path))
    assert (report.readable, report.missing, report.missing_fields, report.lost_stages) == (True, [], {}, [])


def test_an_older_kernel_loses_stages(tmp_path: Path) -> None:
    missing = {"sock:sk_data_ready", "csd:csd_function_entry", "net:netif_rx_entry"}
    root = build_tracefs(tmp_path, missing, {"tcp:tcp_probe": "skbaddr", "skb:kfree_skb": "reason"})
    report = check_tracepoints(root=root)
    assert set(report.missing) == missing
    assert report.missing_fields == {"tcp:tcp_probe": ["skbaddr"], "skb:kfree_skb": ["reason"]}
    # driver_rx has other events; a drop without its reason costs no stage
    assert report.lost_stages == ["rps_ipi", "tcp_rcv", "data_ready"]


def test_unreadable_tracefs_says_nothing_about_the_kernel(tmp_path: Path) -> None:
    assert check_tracepoints(root=tmp_path).readable is False
    assert check_tracepoints(root=tmp_path).lost_stages == []


def test_every_stage_event_has_its_needed_fields_listed() -> None:
    assert {event for stage in STAGES for event in stage.events} <= set(NEEDED_FIELDS)


def switch(cpu: int, at: int, prev: int, following: int) -> str:
    return (
        f"[{cpu:03d}] {at // 1000}.{at % 1000:09d}: sched:sched_switch: prev_comm=a b=c prev_pid={prev} prev_prio=120 "
        f"prev_state=S ==> next_comm=x ==> y next_pid={following} next_prio=120"
    )


def test_an_unbroken_chain() -> None:
    lines = []
    for n in range(60):
        lines += [
            switch(0, 10 * n, 7, 0),
            switch(1, 10 * n + 1, 8, 9),
            switch(0, 10 * n + 2, 0, 7),
            switch(1, 10 * n + 3, 9, 8),
        ]
    check = check_chain("\n".join(lines))
    assert sum(check.breaks.values()) == 0
    assert check.idle_entries == {0: 60}
    assert check.is_conclusive
    assert not check.has_fault


def test_a_blind_idle_task_breaks_the_chain_on_its_cpu() -> None:
    lines = []
    for n in range(60):
        # CPU 1: the switch away from the idle task is never delivered
        lines += [switch(0, 10 * n, 7, 0), switch(0, 10 * n + 2, 0, 7), switch(1, 10 * n + 3, 9, 0)]
    check = check_chain("\n".join(lines))
    assert check.blind_cpus == [1]
    assert check.has_fault
    assert check.idle_breaks == {1: 59}
    assert json.loads(json.dumps(check.to_dict()))["blind_cpus"] == [1]


def test_a_single_break_is_no_fault_and_other_tasks_are_told_apart() -> None:
    lines = [text for n in range(100) for text in (switch(0, 10 * n, 7, 0), switch(0, 10 * n + 2, 0, 7))]
    lines.insert(99, switch(0, 491, 7, 55))
    check = check_chain("\n".join(lines))
    assert sum(check.breaks.values()) == 2
    assert check.blind_tids == {55: 1}
    assert not check.has_fault


def test_the_plugin_spelling_of_perf_script() -> None:
    text = "[001]  12.000000001: sched:sched_switch: my task:12 [120] S ==> swapper/1:0 [120]\n"
    text += "[001]  12.000000002: sched:sched_switch: swapper/1:0 [120] R ==> migration/1:18 [-1]\n"
    check = check_chain(text)
    assert check.switches == {1: 2}
    assert check.idle_entries == {1: 1}
    assert not check.breaks


def test_an_idle_task_that_never_ran_is_no_verdict() -> None:
    check = check_chain("\n".join(switch(0, n, n % 2 + 1, (n + 1) % 2 + 1) for n in range(100)))
    assert not check.is_conclusive
    assert not check.has_fault


def test_without_perf_the_check_says_what_to_install() -> None:
    with pytest.raises(CaptureError, match="perf is missing.*apt install linux-perf"):
        check_idle_task(perf="rxlab-no-such-perf")


def test_capabilities_of_a_process() -> None:
    # CAP_NET_RAW is bit 13, CAP_PERFMON bit 38
    assert own_capabilities("Name:\tx\nCapEff:\t0000004000002000\n") == {"CAP_NET_RAW", "CAP_PERFMON"}
    assert own_capabilities("Name:\tx\nCapEff:\t0000000000000000\n") == set()


@pytest.mark.parametrize(
    ("raw", "capabilities"),
    [
        # struct vfs_cap_data: magic with the effective bit, permitted and inheritable of the low and high words
        ("01000002" "00200000" "00000000" "00000000" "00000000", {"CAP_NET_RAW"}),
        ("01000002" "04000000" "00000000" "40000000" "00000000", {"CAP_DAC_READ_SEARCH", "CAP_PERFMON"}),
        ("00000002" "00200000" "00000000" "00000000" "00000000", set()),  # permitted, but not effective on start
    ],
)  # fmt: skip
def test_capabilities_of_a_program(monkeypatch: pytest.MonkeyPatch, raw: str, capabilities: set[str]) -> None:
    monkeypatch.setattr(doctor.os, "getxattr", lambda path, name: bytes.fromhex(raw))
    assert file_capabilities("/usr/bin/perf") == capabilities


def test_a_program_without_capabilities(tmp_path: Path) -> None:
    (tmp_path / "perf").write_text("")
    assert file_capabilities(str(tmp_path / "perf")) == set()
    assert file_capabilities(None) == set()


def test_missing_tools_come_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_tool", lambda name: None if name in ("perf", "tshark") else find_tool(name))
    result = doctor.examine(idle_seconds=0)
    assert result.check("perf").status == "fail"
    assert result.check("perf").do == "sudo apt install linux-perf   (Fedora: sudo dnf install perf)"
    assert result.check("tshark").status == "warn"
    assert not result.ok


def test_tools_of_the_administrator_are_found_by_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rxlab-tool").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "rxlab-tool").chmod(0o755)
    monkeypatch.setattr(tools, "ADMIN_FOLDERS", (str(tmp_path),))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert find_tool("rxlab-tool") == str(tmp_path / "rxlab-tool")
    done = subprocess.run(["rxlab-tool"], env=tools.tool_environment(), capture_output=True, check=True)
    assert done.stdout == b"here\n"


def test_the_folder_a_user_put_first_stays_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"/usr/sbin:{tmp_path}")
    assert tools.tool_path().split(":") == ["/usr/sbin", str(tmp_path), "/usr/local/sbin", "/sbin"]


def test_the_idle_task_is_no_second_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rights perf cannot record: that is said once, by the check of the rights."""
    monkeypatch.setattr(doctor, "find_tool", lambda name: "/bin/true")
    monkeypatch.setattr(doctor, "_lacking_rights", lambda for_perf, paranoid: ["CAP_PERFMON"])
    result = doctor.examine(idle_seconds=0.1)
    assert result.check("may trace").status == "fail"
    assert result.check("idle task") == Check("idle task", "warn", "not checked: needs the rights above")
    monkeypatch.setattr(doctor, "find_tool", lambda name: None)
    assert doctor.examine(idle_seconds=0.1).check("idle task").found == "not checked: needs perf"


def test_an_unknown_interface_fails() -> None:
    check = doctor.examine("rxlab-nic0", idle_seconds=0).check("rxlab-nic0")
    assert check.status == "fail"
    assert "lo" in check.found


def test_warnings_do_not_fail() -> None:
    assert Doctor([Check("a", "ok", ""), Check("b", "warn", "x", "y")]).ok
    assert not Doctor([Check("a", "ok", ""), Check("b", "fail", "x", "y")]).ok


def test_output_for_scripts_and_people(capsys: pytest.CaptureFixture[str]) -> None:
    result = doctor.examine("lo", idle_seconds=0)
    content = json.loads(json.dumps(result.to_dict()))
    names = [check["name"] for check in content["checks"]]
    assert len(names) == len(set(names))
    assert set(content["checks"][0]) == {"name", "status", "found", "do", "facts"}
    result.print()
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    bad = Doctor([Check("perf [x]", "fail", "gone [red]", install_command("a", "b"))])
    bad.print()
    printed = capsys.readouterr().out
    assert "gone [red]" in printed, "text of the system is not markup"
    assert "sudo apt install a" in printed
    assert "cannot capture yet" in printed
