"""The doctor on this machine: what it says must be what perf and tcpdump then do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rxlab import doctor
from rxlab.host.idlecheck import check_idle_task
from rxlab.host.tracepoints import check_tracepoints
from rxlab.stages import EVENT_PRESETS

EXAMINE = "import json; from rxlab import doctor; print(json.dumps(doctor.examine(idle_seconds=0.2).to_dict()))"


def test_this_machine_can_capture() -> None:
    result = doctor.examine("lo", idle_seconds=0.3)
    assert result.ok, [check for check in result.checks if check.status == "fail"]


def test_events_are_those_perf_lists() -> None:
    listed = subprocess.run(
        ["perf", "list", "--no-desc", "tracepoint"], capture_output=True, text=True, check=True
    ).stdout
    known = {line.split()[0] for line in listed.splitlines() if "Tracepoint event" in line}
    report = check_tracepoints()
    assert report.readable
    assert set(report.missing) == set(EVENT_PRESETS["full"]) - known


@pytest.mark.parametrize("capabilities", ["-all", "-all,+perfmon,+net_raw", "-all,+net_raw"])
def test_permissions_are_what_the_tools_meet(tmp_path: Path, capabilities: str) -> None:
    """Root with a bounding set: only the capabilities named are left, files stay readable as root's own."""
    limited = ["setpriv", f"--bounding-set={capabilities}"]
    done = subprocess.run([*limited, sys.executable, "-c", EXAMINE], capture_output=True, text=True, check=True)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    record = ["perf", "record", "-q", "-a", "-e", "sched:sched_switch", "-o", str(tmp_path / "perf.data"), "--", "true"]
    perf_works = subprocess.run([*limited, *record], capture_output=True, check=False).returncode == 0
    sniff = ["timeout", "0.5", "tcpdump", "-i", "lo", "-c", "1", "-w", os.devnull, "-Z", "root"]
    tcpdump = subprocess.run([*limited, *sniff], capture_output=True, text=True, check=False)
    may_sniff = "permission" not in tcpdump.stderr.lower()
    assert (checks["may trace"]["status"] == "ok") == perf_works
    assert (checks["may sniff"]["status"] == "ok") == may_sniff, tcpdump.stderr
    assert checks["idle task"]["status"] != "fail"
    assert ("not checked" in checks["idle task"]["found"]) != perf_works
    assert "setcap" in (checks["may trace"]["do"] or "setcap")


def test_with_spinners_the_idle_task_is_never_entered() -> None:
    """The cure: with a SCHED_IDLE spinner on every CPU the check sees (almost) no entry of the idle task."""
    spin = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\n"
    spin += "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nprint('on', flush=True)\nwhile True: pass\n"
    spinners = [
        subprocess.Popen([sys.executable, "-c", spin, str(cpu)], stdout=subprocess.PIPE)
        for cpu in os.sched_getaffinity(0)
    ]
    try:
        for spinner in spinners:
            assert spinner.stdout is not None
            spinner.stdout.readline()
        check = check_idle_task(0.5)
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.communicate()
    assert sum(check.switches.values()) > 50
    assert sum(check.idle_breaks.values()) == 0
    assert sum(check.idle_entries.values()) <= 0.02 * sum(check.switches.values())


def test_a_check_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    code = "from rxlab.host.idlecheck import check_idle_task; print('up', flush=True); check_idle_task(1.0)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        time.sleep(0.4)
        process.kill()
    assert list(tmp_path.iterdir()) == []
    time.sleep(1)  # perf ends by itself with its sleep
