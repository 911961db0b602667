"""Sweep specs: what a file means, and what is refused before anything runs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from host_builder import FakeHost

from rxlab.errors import CaptureError, FormatError, HostSettingError, RxlabError, UsageError
from rxlab.host.access import HostAccess
from rxlab.record import runfolder
from rxlab.record import spec as specs
from rxlab.record.estimate import Estimate
from rxlab.record.plan import check_disk, estimate, plan_lines
from rxlab.record.recording import DEFAULT_MIN_FREE
from rxlab.record.spec import SPECS, check_host, load_spec, parse_spec, plan_spec
from rxlab.record.specrun import record_spec
from rxlab.record.workload import Command, Workload

SHIPPED = sorted(path.stem for path in SPECS.glob("*.toml"))

TEXT = """
title = "RPS, RFS, load"
repetitions = 2
arms = ["std", "pcap"]
order = "blocked"
seed = 7
[settings]
gro = false
busy_read = [0, 50]
[axes.rps]
off = { rps_cpus = "off" }
on = { rps_cpus = "same-core", netdev_budget = 600 }
[workload]
mode = "open"
messages = 1000
app_cpu = 1
load = [1000, 4000]
"""


def parse(text: str) -> specs.Spec:
    return parse_spec(tomllib.loads(text), Path("it.toml"))


def test_a_file_becomes_axes_configurations_and_cells() -> None:
    spec = parse(TEXT)
    assert {name: list(labels) for name, labels in spec.axes.items()} == {
        "rps": ["off", "on"], "busy_read": [0, 50], "load": [1000, 4000],
    }  # fmt: skip
    assert spec.fixed == {"gro": "off"}
    assert isinstance(spec.workload, Workload)
    assert (spec.workload.mode, spec.workload.server_cpu, spec.workload.messages) == ("open", 1, 1000)
    assert spec.arms == ("untraced", "std", "pcap"), "untraced gives the verdict and is always there"
    assert len(spec.configurations) == len(spec.labels) == 8
    at = spec.labels.index({"rps": "on", "busy_read": 50, "load": 4000})
    assert spec.configurations[at] == {
        "gro": "off", "rps_cpus": "same-core", "netdev_budget": 600, "busy_read": 50, "load": 4000,
    }  # fmt: skip
    cells = spec.cells()
    assert len(cells) == 8 * 2 * 3
    assert [cell.index for cell in cells] == sorted(cell.index for cell in cells), "blocked"
    assert all(spec.labels[cell.index] == cell.labels for cell in cells)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_are_whole(name: str) -> None:
    spec = load_spec(name)
    assert spec.title != name, "a shipped spec says what it is for"
    assert len(spec.configurations) > 1
    assert (SPECS / f"{name}.toml").read_text().startswith("# "), "and which question it answers"
    assert list(plan_lines(spec, True))


def test_the_issues_specs_are_shipped() -> None:
    assert {"rps_rfs", "irq_affinity", "busy_poll", "coalescing", "observer"} <= set(SHIPPED)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("repetition = 3", ["unknown key 'repetition'", "repetitions"]),
        ("repetitions = 0", ["repetitions", "integer from 1"]),
        ("repetitions = true", ["repetitions", "True"]),
        ('order = "random"', ["order", "shuffled", "blocked"]),
        ('idle = "no"', ["idle", "spin"]),
        ('arms = ["loud"]', ["arms", "loud", "untraced"]),
        ("settings = 3", ["settings", "not a table"]),
        ('[settings]\nrps_cpu = "1"', ["rps_cpu", "rps_cpus"]),
        ('[settings]\nrps_cpus = ["off", "x"]', ["rps_cpus", "'x'", "same-core"]),
        ("[settings]\nbusy_read = [50, 50]", ["busy_read", "differ"]),
        ("[settings]\nbusy_read = []", ["busy_read", "must be there"]),
        ("[settings]\nflows = 2", ["flows", "[workload]"]),
        ('[settings]\nidle = ["spin", "never"]', ["idle", "never"]),
        ("[workload]\nflow = 5", ["'flow'", "flows"]),
        ('[workload]\nproto = "sctp"', ["proto", "sctp"]),
        ("[workload]\nflows = [1, 0]", ["flows", "0"]),
        ("[workload]\nflows = [1, 2.5]", ["flows", "2.5"]),
        ('[workload]\ncommand = "curl"', ["command", "curl"]),
        ('[workload]\ncommand = ["curl"]\nflows = 2', ["flows", "command"]),
        ("[axes]\nrps = 3", ["axes.rps", "not an axis"]),
        ("[axes.cpu]\na = { busy_read = 1 }", ["cpu", "Rename"]),
        ("[settings]\nbusy_read = 1\n[axes.poll]\na = { busy_read = 1 }", ["busy_read", "two places"]),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(text: str, words: list[str]) -> None:
    with pytest.raises(RxlabError) as caught:
        parse(text)
    line = caught.value.line()
    assert "\n" not in line
    for word in words:
        assert word in line


def test_no_file_and_no_toml_are_format_errors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="rps_rfs"):
        load_spec("rps_rsf")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(FormatError, match="not valid TOML"):
        load_spec(tmp_path / "bad.toml")


def test_a_command_is_a_workload_too() -> None:
    spec = parse(
        '[settings]\nbusy_read = [0, 50]\n[workload]\ncommand = ["curl", "x"]\nserver = "nc -l 1"\nserver_port = 1'
    )
    assert isinstance(spec.workload, Command)
    assert (list(spec.workload.argv), list(spec.workload.server_argv)) == (["curl", "x"], ["nc", "-l", "1"])


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostAccess]:
    with FakeHost(tmp_path).open() as access:
        yield access


def check(text: str, host: HostAccess, **where: Any) -> bool:
    return check_host(parse(text), **{"testbed": True, "iface": None, **where}, access=host)


def test_host_wide_settings_are_told_from_those_of_the_testbed(host: HostAccess) -> None:
    assert not check('[settings]\nrps_cpus = ["off", "1"]', host)
    assert check("[settings]\nbusy_read = [0, 50]", host)
    assert check('[settings]\nrps_cpus = ["off", "1"]\n[workload]\nremote = "ssh:x"', host, testbed=False, iface="eth0")


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ('[settings]\nrps_cpus = ["off", "5"]', {}, ["rps_cpus", "0-1"]),
        ("[workload]\napp_cpu = [0, 9]", {}, ["server_cpu", "9"]),
        ('[settings]\nrps_cpus = "same-llc"\n[workload]\napp_cpu = 1', {}, ["same-llc of CPU 1", "last-level cache"]),
        ('place = "iface"', {}, ["makes no sense", "--iface"]),
        ("repetitions = 1", {"testbed": False, "iface": "eth0"}, ["no traffic", "--remote"]),
        (
            '[settings]\ncoalesce_nothing = 1\n',
            {},
            ["coalesce_nothing", "unknown setting"],
        ),
        (
            '[settings]\nnetdev_max_backlog = 5\n[workload]\nremote = "ssh:x"',
            {"testbed": False, "iface": "eth0"},
            ["netdev_max_backlog", "cannot be read"],
        ),
        (
            '[settings]\nrps_cpus = "sibling"\n[workload]\ncommand = ["true"]',
            {},
            ["rps_cpus=sibling", "which CPU the application"],
        ),
    ],
)  # fmt: skip
def test_what_this_host_cannot_do_is_found_first(text: str, where: Any, words: list[str], host: HostAccess) -> None:
    with pytest.raises(RxlabError) as caught:
        check(text, host, **where)
    for word in words:
        assert word in caught.value.line()


def test_sibling_and_other_node_of_the_made_up_host(host: HostAccess) -> None:
    # CPUs 0 and 1 are threads of one core and (impossibly) of two nodes.
    for intent in ("same-core", "sibling", "other-node"):
        assert not check(f'[settings]\nrps_cpus = "{intent}"\n[workload]\napp_cpu = 1', host)


def test_the_plan_names_every_run_with_duration_and_size() -> None:
    spec = parse(TEXT)
    lines = list(plan_lines(spec, True))
    for cell in spec.cells():
        assert sum(line.startswith(cell.name + ":") for line in lines) == 1
    assert "48 runs" in lines[-1]
    assert "MB" in lines[-1]


@pytest.mark.parametrize(
    ("setting", "dropping"),
    [
        ("rx_ring = [256, 512]", ["rx_ring"]),
        ('gro = ["on", "off"]\nchannels = 2', ["channels"]),
        ('gro = ["on", "off"]', []),
    ],
)
def test_the_plan_names_what_takes_the_link_down(setting: str, dropping: list[str]) -> None:
    told = [
        line for line in plan_lines(parse(f"[settings]\n{setting}"), True) if line.startswith("the link may go down")
    ]
    assert [line.rpartition(": ")[2] for line in told] == [", ".join(dropping)] * bool(dropping)


@pytest.mark.parametrize(
    ("text", "testbed", "needing"),
    [
        ('[settings]\nrps_cpus = ["off", "0"]', True, None),
        ('[settings]\nrps_cpus = ["off", "0"]', False, "rps_cpus"),
        ('[settings]\nrps_cpus = ["off", "0"]', "ports:a,b", "rps_cpus"),
        ('[settings]\nrps_cpus = ["off", "0"]\nbusy_read = 50', True, "busy_read"),
        ("[workload]\nflows = [1, 2]", False, None),
    ],
)
def test_the_plan_says_when_the_host_itself_is_changed(text: str, testbed: bool | str, needing: str | None) -> None:
    told = [line for line in plan_lines(parse(text), testbed) if "--allow-system-changes" in line]
    assert [line.rpartition(": ")[2] for line in told] == ([needing] if needing else [])


def test_a_plan_too_large_for_the_disk_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=DEFAULT_MIN_FREE + 20_000_000)
    monkeypatch.setattr(runfolder.shutil, "disk_usage", lambda place: free)
    big = "repetitions = 50\n[workload]\nmessages = 20_000"
    with pytest.raises(
        CaptureError, match=r"no room for this: found 288 MB free, expected about [0-9,]+ MB, and 268 MB"
    ):
        record_spec(parse(big), tmp_path / "out", testbed=True)
    assert not (tmp_path / "out").exists()
    spec = parse(big)
    for cell in spec.cells():
        (tmp_path / cell.name).mkdir()
    check_disk(tmp_path, spec.workload, spec.cells())  # what is there already needs no room


def test_more_load_is_longer_or_larger() -> None:
    def of(text: str, arm: str = "std") -> Estimate:
        spec = parse(text)
        return estimate(spec.workload, next(cell for cell in spec.cells() if cell.arm == arm))

    small, large = (of(f"[workload]\nmessages = {n}") for n in (1000, 100_000))
    assert small.seconds < large.seconds
    assert small.bytes < large.bytes
    assert of("repetitions = 1", "untraced").bytes < of("repetitions = 1").bytes
    slow = of('[workload]\nmode = "open"\nload = 100\nmessages = 1000')
    assert slow.seconds >= 10
    assert of('[workload]\nmode = "open"\nload = 100\nmessages = 1000\nduration = 2').seconds < 8


def test_options_of_the_command_line_win(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    path.write_text('[settings]\nrps_cpus = ["off", "0"]')
    assert plan_spec(path, testbed=True, reps=9).repetitions == 9
    with pytest.raises(UsageError, match="nothing to record on"):
        plan_spec(path)
    with pytest.raises(UsageError, match="two places to record on: found --iface lo and --testbed"):
        plan_spec(path, testbed=True, iface="lo")


def test_a_dry_run_prints_the_plan_and_records_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rxlab", "sweep", "observer", "--testbed", "--reps", "1", "--dry-run"]
    shown = subprocess.run([*command, "-o", "out"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "10 runs, 2 configurations x 1 repetitions x 5 arms" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    wrong = subprocess.run([*command, "--iface", "lo"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_the_host_is_not_changed_without_being_told(tmp_path: Path) -> None:
    spec = parse("[settings]\nbusy_read = [0, 50]")
    with pytest.raises(HostSettingError, match="--allow-system-changes"):
        record_spec(spec, tmp_path / "out", testbed=True)
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_is_there_is_only_continued_when_asked(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UsageError, match="--resume"):
        record_spec(parse("repetitions = 1"), tmp_path, testbed=True)
