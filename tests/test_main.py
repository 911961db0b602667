"""The command line: what a mistake prints and which status it has; Ctrl-C."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from rxlab import __main__ as cli
from rxlab import pipeline
from rxlab.errors import RxlabError, UsageError
from rxlab.record import runfolder
from rxlab.record.recording import DEFAULT_MIN_FREE
from rxlab.rundir import write_json


def rxlab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rxlab", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, list[str]]:
    """Run main() in this process; its status, and the lines on standard error."""
    monkeypatch.setattr(sys, "argv", ["rxlab", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bogus"], "bogus"),
        (["capture"], "--out"),
        (["capture", "-o", "x", "--nope"], "--nope"),
        (["capture", "-o", "x", "--messages", "many"], "--messages"),
        (["capture", "-o", "x", "--messages", "0"], "--messages"),
        (["compare", "--set", "rps_cpus"], "rps_cpus"),
    ],
)
def test_a_usage_error_is_one_line(
    arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run_main(monkeypatch, capsys, *arguments)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("rxlab: ")
    assert word in lines[0]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["capture", "--testbed", "--gro"], ["capture", "--testbed=veth", "--gro"]),
        (["sweep", "--testbed", "rps_rfs"], ["sweep", "--testbed=veth", "rps_rfs"]),
        (["sweep", "rps_rfs", "--testbed"], ["sweep", "rps_rfs", "--testbed=veth"]),
        (["capture", "--testbed", "ports:a,b"], ["capture", "--testbed", "ports:a,b"]),
        (["capture", "--testbed", "--", "--testbed"], ["capture", "--testbed=veth", "--", "--testbed"]),
    ],
)
def test_the_testbed_needs_no_name(given: list[str], meant: list[str]) -> None:
    assert cli.with_testbed_named(given) == meant


def test_a_testbed_that_does_not_exist_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines = run_main(monkeypatch, capsys, "capture", "-o", "x", "--testbed", "cable:a,b")
    assert status == 2
    assert "ports:IF1,IF2" in lines[0]


@pytest.mark.parametrize(
    "command",
    [
        ["capture", "-o", "x", "--testbed", "--iface", "lo"],
        ["compare", "--set", "rps_cpus=0", "--testbed", "--iface", "lo"],
        ["sweep", "rps_rfs", "--testbed", "--iface", "lo"],
        ["capture", "-o", "x", "--testbed", "--netns", "blue"],
    ],
)
def test_a_testbed_beside_an_interface_is_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, lines = run_main(monkeypatch, capsys, *command)
    other = "--netns blue" if "blue" in command else "--iface lo"
    assert status == 2
    assert len(lines) == 1
    assert f"two places to record on: found {other} and --testbed, expected one of them" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_that_would_not_fit_on_the_disk_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runfolder.shutil, "disk_usage", lambda place: SimpleNamespace(free=DEFAULT_MIN_FREE + 1))
    out = tmp_path / "out"
    status, lines = run_main(monkeypatch, capsys, "compare", "--testbed", "--set", "rps_cpus=0", "-o", str(out))
    assert status == 1
    assert len(lines) == 1
    assert f"{out}: the disk has no room for this" in lines[0]
    assert not out.exists()


def test_a_wrong_command_is_answered_with_a_question_and_no_stop_behind_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, (line,) = run_main(monkeypatch, capsys, "analyse", "x")
    assert status == 2
    assert re.search(r"Did you mean 'analyze'\? Try '.* --help'\.$", line)


def test_a_missing_folder_is_said_before_the_analysis(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "open_run", lambda *_, **__: pytest.fail("it was analysed first"))
    out = tmp_path / "nodir" / "x.nc"
    status, lines = run_main(monkeypatch, capsys, "analyze", str(repo / "data" / "tcp-rps-on"), "-o", str(out))
    assert (status, lines) == (2, [f"rxlab: {out}: no folder for this file: found no {out.parent}. Make it first."])


def test_help_and_no_arguments_print_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rxlab", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "capture" in capsys.readouterr().out
    assert "capture" in rxlab().stdout + rxlab().stderr


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from rxlab import __main__ as cli, doctor
        signal.signal(signal.SIGINT, signal.default_int_handler)
        doctor.examine = lambda iface: os.kill(os.getpid(), signal.SIGINT)
        sys.argv = ["rxlab", "doctor"]
        cli.main()
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (130, "rxlab: interrupted\n")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Have Ctrl-C come after a recording has left these runs in a folder; what is then on standard error."""

    def stop(out: Path, command: list[str], runs: dict[str, dict[str, object]]) -> list[str]:
        for name, content in runs.items():
            (out / name).mkdir(parents=True)
            write_json(out / name / "run.json", content)
            if content["arm"] != "untraced" and content["status"] != "failed":
                (out / name / "perf.data").write_bytes(b"PERFILE2")
        for what in ("record_run", "compare", "run_sweep"):
            monkeypatch.setattr(pipeline, what, lambda *_, **__: signal.default_int_handler(2, None))
        status, lines = run_main(monkeypatch, capsys, *command)
        assert status == 130
        return lines

    return stop


WHOLE, PART, NONE = ({"status": status, "arm": "std"} for status in ("complete", "partial", "failed"))
UNTRACED = {"status": "partial", "arm": "untraced"}


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            {"": PART},
            "interrupted, the run is kept: found a partial run. 'rxlab analyze {out}' takes it as far as it goes.",
        ),
        ({"": UNTRACED}, "interrupted, the run is kept: found a partial run. 'rxlab report {out}' tells of it."),
        ({"": NONE}, "interrupted before a run was complete. To go on, give the same command again."),
        ({}, "interrupted before a run was complete. To go on, give the same command again."),
    ],
)
def test_ctrl_c_in_a_capture_says_what_is_kept(
    tmp_path: Path, interrupted: Callable[..., list[str]], runs: dict[str, dict[str, object]], said: str
) -> None:
    out = tmp_path / "run"
    lines = interrupted(out, ["capture", "-o", str(out), "--testbed"], runs)
    assert lines == [f"rxlab: {out}: " + said.format(out=out)]


@pytest.mark.parametrize(
    ("command", "go_on"),
    [
        (["compare", "--set", "rps_cpus=0", "--testbed"], "choose another --out"),
        (["sweep", "rps_rfs", "--testbed"], "give the same command with --resume"),
    ],
)
def test_ctrl_c_among_many_runs_says_how_many_are_kept_and_how_to_go_on(
    tmp_path: Path, interrupted: Callable[..., list[str]], command: list[str], go_on: str
) -> None:
    lines = interrupted(tmp_path, [*command, "-o", str(tmp_path)], {"a": WHOLE, "b": PART, "c": WHOLE})
    assert lines == [
        f"rxlab: {tmp_path}: interrupted, the runs are kept: found 2 complete runs. "
        f"'rxlab report {tmp_path}' tells of them; to go on, {go_on}."
    ]


def test_what_a_recording_holds_is_told_for_people(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers by perf script and capinfos (data/README.md): 14,949 events, 0 lost; 302 packets in 4.470996604 s."""

    def told(file: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["rxlab", "inspect", str(file)])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    of_perf = told(repo / "data" / "tcp-rps-off" / "perf.data")
    assert of_perf.splitlines()[0].endswith("tcp-rps-off/perf.data: perf.data, 14,949 events of 16 kinds")
    assert "from 5,297.072159156 s to 5,297.716265836 s of perf's clock: 0.644106680 s" in of_perf
    assert "  lost: 0 events" in of_perf
    assert "  sched:sched_switch" in of_perf.splitlines()[3]  # the most frequent first
    of_pcap = told(repo / "data" / "igb-queues" / "rx.pcap")
    assert of_pcap.splitlines()[0].endswith("rx.pcap: pcap, 302 packets")
    assert " UTC: 4.470996604 s" in of_pcap
    assert "interface 0: Ethernet, 302 packets" in of_pcap
    (tmp_path / "cut.pcap").write_bytes((repo / "data" / "igb-queues" / "rx.pcap").read_bytes()[:-9])
    of_cut = told(tmp_path / "cut.pcap")
    assert "301 packets" in of_cut
    assert "cut or damaged" in of_cut
    assert "the record passes the end of the file" in of_cut
    for text in (of_perf, of_pcap, of_cut):
        assert not {"{", "[", "None", "True", "False"} & set(text.replace(":", " ").split())
        assert "{" not in text
        assert "'" not in text.replace("perf's", "")


def test_a_command_that_found_something_wrong_keeps_its_status(tmp_path: Path) -> None:
    done = rxlab("inspect", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr == f"rxlab: {tmp_path / 'nothing'}: no such file\n"


@pytest.mark.parametrize("name", ["notes.md", "folder", "run"])
def test_what_cannot_be_inspected_is_told_what_can(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# notes\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    done = rxlab("inspect", str(tmp_path / name))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "perf.data, pcap or pcapng" in done.stderr
    assert "Errno" not in done.stderr
    assert ("rx.pcap" in done.stderr or "run/perf.data" in done.stderr) == (name == "run")


@pytest.mark.parametrize(
    ("command", "name"), [("analyze", "perf.data"), ("analyze", "rx.pcap"), ("report", "rx.pcap"), ("report", "run.nc")]
)
def test_an_output_replaces_its_own_kind_only(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[1] / "data" / "tcp-rps-on", run)
    pipeline.analyze_run(run)
    kept = (run / name).read_bytes()
    options = ["--no-notebook"] if command == "report" else []
    status, lines = run_main(monkeypatch, capsys, command, str(run), "-o", str(run / name), *options)
    assert status == 2
    assert len(lines) == 1
    assert f"{name}: another kind of file is here" in lines[0]
    assert "Nothing was replaced" in lines[0]
    assert (run / name).read_bytes() == kept


def test_an_older_result_is_replaced(tmp_path: Path) -> None:
    run, out = Path(__file__).parents[1] / "data" / "tcp-rps-on", tmp_path / "x.nc"
    first = pipeline.analyze_run(run, out=out)
    assert pipeline.analyze_run(run, out=out) == first


def test_an_output_that_cannot_be_written_is_called_by_its_name(tmp_path: Path) -> None:
    run = Path(__file__).parents[1] / "data" / "tcp-rps-on"
    with pytest.raises(RxlabError, match=r"missing/x\.nc: no folder for this file"):
        pipeline.analyze_run(run, out=tmp_path / "missing" / "x.nc")
    with pytest.raises(RxlabError, match="^/proc/x.nc: cannot be written: found "):
        pipeline.analyze_run(run, out="/proc/x.nc")
    with pytest.raises(UsageError, match="a folder is here"):
        pipeline.analyze_run(run, out=tmp_path)


def test_a_damaged_description_of_an_event_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).resolve().parent.parent / "data" / "tcp-rps-on", run)
    content = (run / "perf.data").read_bytes()
    (run / "perf.data").write_bytes(content.replace(b"pid_t prev_pid", b"pid_t Xrev_pid", 1))
    status, lines = run_main(monkeypatch, capsys, "analyze", str(run))
    assert status == 1
    assert len(lines) == 1
    assert "a field that is needed is not there" in lines[0]
    assert "expected prev_pid" in lines[0]
