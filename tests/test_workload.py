"""The built-in client and server over loopback, as any user; their logs against what was sent."""

from __future__ import annotations

import os
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxlab import rundir
from rxlab.errors import CaptureError, UsageError
from rxlab.record import client, server, workload
from rxlab.record.testbed import Endpoint
from rxlab.record.workload import Command, Workload, open_traffic, remote_argv

APP = np.dtype(list(rundir.APP_LOG_FIELDS))
CLIENT = np.dtype(list(rundir.CLIENT_LOG_FIELDS))
LOOPBACK = Endpoint(None, "lo", "127.0.0.1", "::1")


def free_port() -> int:
    """Return a port of the test's own: tests on two workers must not meet."""
    return 20_000 + os.getpid() % 20_000


def run(load: Workload | Command, out: Path, src: Endpoint | None = LOOPBACK) -> dict[str, Any]:
    traffic = open_traffic(load, src, LOOPBACK, out)
    try:
        traffic.prepare()
        traffic.go()
        assert traffic.wait(60), "the workload does not end"
    finally:
        result = traffic.finish()
    return result


def app_log(out: Path) -> np.ndarray:
    return np.fromfile(out / rundir.APP_LOG, APP)


def client_log(out: Path) -> np.ndarray:
    return np.fromfile(out / rundir.CLIENT_LOG, CLIENT)


def has_ipv6() -> bool:
    return Path("/proc/sys/net/ipv6").exists() and "00000001 01 80 10" in Path("/proc/net/if_inet6").read_text()


def test_the_client_that_runs_without_rxlab_writes_the_layouts_of_rundir() -> None:
    assert client.MESSAGE_MAGIC == rundir.MESSAGE_MAGIC
    assert client.MESSAGE_HEADER.format == rundir.MESSAGE_HEADER.format
    assert client.CLIENT_LOG_STRUCT.format == rundir.CLIENT_LOG_STRUCT.format


def test_the_client_imports_the_standard_library_only() -> None:
    script = Path(client.__file__)
    argv = [sys.executable, "-I", "-S", str(script), "--help"]
    shown = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "rxlab-client" in shown.stdout
    assert "rxlab" not in [
        line.split()[1].split(".")[0] for line in script.read_text().splitlines() if " import " in line
    ]


@pytest.mark.parametrize("proto", ["tcp", "udp"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_closed_loop_logs_every_message_at_both_ends(proto: str, family: int, tmp_path: Path) -> None:
    if family == 6 and not has_ipv6():
        pytest.skip("no IPv6 loopback")
    result = run(
        Workload(proto=proto, family=family, messages=500, size=100, reply_size=40, port=free_port()), tmp_path
    )
    received, sent = app_log(tmp_path), client_log(tmp_path)
    assert (result["sent"], result["replied"]) == (500, 500)
    assert (result["client_exit_code"], result["server_exit_code"]) == (0, 0)
    messages = received[received["seq"] >= 0]
    np.testing.assert_array_equal(messages["seq"], np.arange(500))
    np.testing.assert_array_equal(messages["ret"], 100)
    np.testing.assert_array_equal(messages["sent"], sent["intended"])
    # One more call: the end of the stream (0 bytes), or the datagram that says END.
    assert len(received) == 501
    assert received["ret"][-1] == (0 if proto == "tcp" else 100)
    assert (received["t1"] >= received["t0"]).all()
    assert (messages["t1"] >= messages["sent"]).all()
    assert (sent["replied"] > messages["t1"]).all(), "a reply is never before the receive call it answers"
    assert set(received["proto"]) == {6 if proto == "tcp" else 17}
    assert set(received["family"]) == {2 if family == 4 else 10}
    assert len(set(received["tid"])) == 1
    assert set(received["local_port"]) == {free_port()}
    assert (messages["scm_time"] > 1_600_000_000 * 10**9).all()


def test_logs_are_for_their_owner_only(tmp_path: Path) -> None:
    run(Workload(messages=5, port=free_port()), tmp_path)
    for name in (rundir.APP_LOG, rundir.CLIENT_LOG):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert not (tmp_path / workload.COMMAND_LOG).exists(), "nothing was printed, so there is no empty log"


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_flows_have_a_reader_each_and_number_their_messages_alone(proto: str, tmp_path: Path) -> None:
    run(Workload(proto=proto, flows=3, messages=50, port=free_port()), tmp_path)
    received = app_log(tmp_path)
    for flow in range(3):
        own = received[(received["flow"] == flow) & (received["seq"] >= 0)]
        np.testing.assert_array_equal(own["seq"], np.arange(50))
        assert len(set(own["tid"])) == 1
        assert len(set(own["peer_port"])) == 1
    assert len(set(received["tid"])) == 3


def test_without_scm_the_log_has_none(tmp_path: Path) -> None:
    run(Workload(proto="udp", messages=20, scm=False, port=free_port()), tmp_path)
    assert (app_log(tmp_path)["scm_time"] == 0).all()


def test_an_open_loop_keeps_to_its_schedule_whatever_the_replies_do(tmp_path: Path) -> None:
    run(Workload(mode="open", arrivals="constant", rate=1000, messages=300, port=free_port()), tmp_path)
    sent = client_log(tmp_path)
    assert len(sent) == 300
    # Constant arrivals: the intended times are a grid fixed before the first message, not moved by late sends.
    np.testing.assert_allclose(np.diff(sent["intended"]), 1_000_000, atol=1)
    assert (sent["sent"] >= sent["intended"]).all()
    assert (sent["replied"] > sent["sent"]).all()


def test_a_stalled_server_does_not_delay_the_intended_times(tmp_path: Path) -> None:
    """Coordinated omission: while the server is stopped, messages stay due, and their latency shows the whole stall."""
    load = Workload(mode="open", arrivals="constant", rate=500, messages=250, port=free_port())
    traffic = open_traffic(load, LOOPBACK, LOOPBACK, tmp_path)
    try:
        traffic.prepare()
        reader = children_of(traffic._server.pid)[0]  # type: ignore[attr-defined]
        os.kill(reader, signal.SIGSTOP)
        traffic.go()
        assert not traffic.wait(0.7), "all 250 messages were due by now, but nobody answers"
        os.kill(reader, signal.SIGCONT)
        assert traffic.wait(30)
    finally:
        traffic.finish()
    sent = client_log(tmp_path)
    np.testing.assert_allclose(np.diff(sent["intended"]), 2_000_000, atol=1)
    latency = sent["replied"] - sent["intended"]
    assert latency[0] > 600e6, "the first message waited through the whole stall"
    # Each later message waited 2 ms less: a closed loop would have hidden all but one of them.
    assert (latency[:200] > 100e6).all()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_poisson_arrivals_follow_the_seed() -> None:
    options = client.parse_arguments(["::1", "1", "--mode", "open", "--messages", "9", "--rate", "5000", "--seed", "7"])
    gaps = np.array([client.gaps_of(options, 0)() for _ in range(3)])
    assert (gaps == gaps[0]).all(), "the same seed and flow draw the same schedule"
    draw = client.gaps_of(options, 0)
    gaps = np.array([draw() for _ in range(20_000)])
    assert gaps.mean() == pytest.approx(200_000, rel=0.03)
    assert gaps.std() == pytest.approx(200_000, rel=0.05)
    assert client.gaps_of(options, 1)() != client.gaps_of(options, 0)()


def test_one_way_traffic_needs_no_replies(tmp_path: Path) -> None:
    result = run(Workload(mode="open", reply_size=0, rate=5000, messages=200, port=free_port()), tmp_path)
    received = app_log(tmp_path)
    assert (result["sent"], result["replied"]) == (200, 0)
    assert received["ret"].sum() == 200 * 64


def test_messages_that_share_a_receive_call_are_logged_by_the_first_that_begins_in_it(tmp_path: Path) -> None:
    run(Workload(mode="open", reply_size=0, rate=1e6, messages=2000, size=1000, port=free_port()), tmp_path)
    received = app_log(tmp_path)
    begins = np.concatenate([[0], np.cumsum(received["ret"])[:-1]])
    first = -(-begins // 1000)
    has_one = first * 1000 < begins + received["ret"]
    np.testing.assert_array_equal(received["seq"], np.where(has_one, first, -1))
    assert received["ret"].sum() == 2000 * 1000


def test_a_reader_moves_on_a_schedule_that_is_logged(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU")
    # A steal of a shared machine delays a move, but none may come before its time and none may be left out of the turn.
    load = Workload(messages=None, duration=1.0, flows=2, migrate=0.05, server_cpu=cpus[0], port=free_port())
    run(load, tmp_path)
    moves = np.fromfile(tmp_path / rundir.MOVES_LOG, np.dtype(list(rundir.MOVE_FIELDS)))
    readers = np.unique(app_log(tmp_path)["tid"])
    assert set(moves["tid"]) == set(readers)
    for reader in readers:
        own = moves[moves["tid"] == reader]
        assert len(own) >= 10
        assert own["cpu"].tolist() == [cpus[number % len(cpus)] for number in range(len(own))]
        assert (own["t1"][1:] - own["t0"][0] >= 0.05e9 * np.arange(1, len(own)) - 1e6).all()
        assert (own["t1"] >= own["t0"]).all()
    assert stat.S_IMODE((tmp_path / rundir.MOVES_LOG).stat().st_mode) == 0o600


@pytest.mark.parametrize("wrong", [{"migrate": 0.0}, {"migrate": 1e-5}, {"migrate_cpus": "0"}, {"migrate_cpus": "a-b"}])
def test_a_schedule_of_moves_that_cannot_be_kept_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="workload: migrate"):
        Workload(**{"migrate": 0.1, **wrong})


def test_a_workload_that_is_stopped_keeps_its_logs(tmp_path: Path) -> None:
    traffic = open_traffic(Workload(messages=None, duration=600, port=free_port()), LOOPBACK, LOOPBACK, tmp_path)
    traffic.prepare()
    traffic.go()
    assert not traffic.wait(0.3)
    result = traffic.finish()
    assert result["sent"] == len(client_log(tmp_path)) > 0
    assert len(app_log(tmp_path)) >= result["replied"] > 0


def test_a_duration_ends_the_workload(tmp_path: Path) -> None:
    result = run(Workload(messages=None, duration=0.2, port=free_port()), tmp_path)
    assert result["stop_ns"] - result["start_ns"] >= 0.2e9
    assert result["sent"] == result["replied"] > 0


def test_the_remote_client_gets_its_source_over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ssh runs the remote command line in a shell here: nothing is installed, the log comes back."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\nwhile [ "$1" != box ]; do shift; done\nshift\ncd /\nexec sh -c "$*"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    load = Workload(messages=3000, remote="ssh:box", port=free_port())
    result = run(load, tmp_path, src=None)
    assert "BatchMode=yes" in (fake.parent / "asked").read_text()
    assert result["sent"] == 3000
    assert (np.sort(client_log(tmp_path)["seq"]) == np.arange(3000)).all()
    assert (app_log(tmp_path)["seq"] >= 0).sum() == 3000


def test_an_unreachable_remote_host_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'ssh: connect to host box port 22: Connection refused' >&2\nexit 255\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(CaptureError) as refused:
        run(Workload(messages=3, remote="ssh:box", port=free_port()), tmp_path, src=None)
    assert "Connection refused" in refused.value.line()
    assert "\n" not in refused.value.line()


def test_the_remote_command_survives_a_shell() -> None:
    argv = remote_argv("ssh:me@box", 12, ["10.0.0.1", "5", "--log", "-"])
    assert argv[:5] == ["ssh", "-T", "-o", "BatchMode=yes", "me@box"]
    assert argv[5].startswith("python3 -c 'import sys; exec(")


def test_a_command_is_a_workload_too(tmp_path: Path) -> None:
    port = free_port() + 1
    listen = f"import socket; s = socket.create_server(('127.0.0.1', {port})); c, _ = s.accept(); c.sendall(c.recv(9)); s.accept()"
    ask = (
        f"import os, socket; c = socket.create_connection((os.environ['RXLAB_SERVER_ADDRESS'], {port})); "
        "c.sendall(b'hello'); print(c.recv(9))"
    )
    load = Command([sys.executable, "-c", ask], [sys.executable, "-c", listen], port)
    result = run(load, tmp_path)
    assert result["client_exit_code"] == 0
    assert "b'hello'" in (tmp_path / workload.COMMAND_LOG).read_text()


def test_a_failing_command_tells_its_status(tmp_path: Path) -> None:
    assert run(Command([sys.executable, "-c", "raise SystemExit(7)"]), tmp_path)["client_exit_code"] == 7


def test_a_command_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such-command-here"):
        run(Command(["no-such-command-here"]), tmp_path)


def test_a_server_that_ends_at_once_is_not_waited_for(tmp_path: Path) -> None:
    load = Command([sys.executable, "-c", ""], [sys.executable, "-c", "raise SystemExit(4)"], free_port())
    with pytest.raises(CaptureError, match="exit status 4"):
        run(load, tmp_path)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_port_in_use_is_one_line(proto: str, tmp_path: Path) -> None:
    port = free_port()
    holder = open_traffic(Workload(proto=proto, messages=1, port=port), LOOPBACK, LOOPBACK, tmp_path)
    second = tmp_path / "second"
    second.mkdir()
    try:
        holder.prepare()
        with pytest.raises(CaptureError, match="Address already in use"):
            run(Workload(proto=proto, messages=1, port=port), second)
    finally:
        holder.finish()


@pytest.mark.parametrize(
    "wrong",
    [
        {"proto": "sctp"}, {"family": 5}, {"mode": "half"}, {"arrivals": "bursty"}, {"flows": 0}, {"size": 8},
        {"size": 65508, "proto": "udp"}, {"size": (64 << 20) + 1}, {"reply_size": 999_999_999_999}, {"duration": -1.0},
        {"reply_size": 0}, {"messages": 0}, {"messages": None}, {"rate": 0.0, "mode": "open"}, {"remote": "box"},
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_usage_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"workload: {next(iter(wrong))}"):
        Workload(**wrong)


def test_the_largest_messages_are_allowed() -> None:
    assert Workload(proto="udp", size=65507, reply_size=65507).size == 65507
    assert Workload(size=64 << 20).size == 64 << 20


def test_traffic_needs_a_sender() -> None:
    with pytest.raises(UsageError, match="--remote ssh:HOST"):
        open_traffic(Workload(), None, LOOPBACK, Path("/nowhere"))


def test_pinning_is_resolved_before_it_is_recorded() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    pinned = Workload().pinned()
    assert (pinned.client_cpu, pinned.server_cpu) == (cpus[0], cpus[-1])
    assert Workload(client_cpu=None, server_cpu=None).pinned().server_cpu is None
    assert Workload(remote="ssh:box").pinned().client_cpu is None, "the remote host's CPUs are not known here"


def test_a_log_grows_without_losing_records() -> None:
    log = client.Log(struct.Struct("<q"), 16)
    for number in range(client.LOG_CHUNK + 40):
        log.append(number)
    np.testing.assert_array_equal(np.frombuffer(log.content(), "<i8"), np.arange(client.LOG_CHUNK + 40))


def test_scm_time_is_read_from_the_ancillary_data() -> None:
    stamp = struct.pack("@ll", 1_700_000_000, 123_456_789)
    assert server.scm_time_of([(1, 7, b""), (1, server.SO_TIMESTAMPNS, stamp)]) == 1_700_000_000_123_456_789
    assert server.scm_time_of([]) == 0


def test_the_readers_take_the_policy_asked_for() -> None:
    """Judge: chrt, which asks the kernel."""
    code = "import os, subprocess; from rxlab.record.server import obey; obey('batch'); subprocess.run(['chrt', '-p', str(os.getpid())])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "SCHED_BATCH" in shown
    argv = Workload(server_policy="fifo:10").server_argv("127.0.0.1", Path("log"))
    assert argv[argv.index("--policy") + 1] == "fifo:10"
    assert "--policy" not in Workload().server_argv("127.0.0.1", Path("log"))
    for wrong in ("fifo", "fifo:0", "fifo:100", "deadline", "batch:1", ""):
        with pytest.raises(UsageError, match="server_policy cannot be"):
            Workload(server_policy=wrong)
