"""The command line: what a mistake prints and which status it has; Ctrl-C."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rxlab import __main__ as cli


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
