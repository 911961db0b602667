"""What a sweep on a cluster refuses, and what a block keeps; the cluster itself is in tests/live/test_cluster_live.py."""

from __future__ import annotations

import pickle
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxlab.errors import CaptureError, HostSettingError, UsageError
from rxlab.host.access import HostAccess
from rxlab.record import cluster, runfolder
from rxlab.record.cluster import RESOURCE, Block, held_settings, nic_workers, record_block, shared_hosts
from rxlab.record.recording import DEFAULT_MIN_FREE
from rxlab.record.spec import Spec, parse_spec
from rxlab.record.sweep import check_held
from rxlab.rundir import HOST_JSON, RUN_JSON, write_json

HERE = platform.node()


def spec(**content: Any) -> Spec:
    return parse_spec({"repetitions": 2, "workload": {"messages": 10}, **content}, Path("x.toml"))


def block(folder: Path, repetition: int = 0) -> Block:
    return Block(spec(idle="spin"), str(folder), repetition, True, None, False, False, True)


def test_a_block_is_one_repetition_of_everything_and_travels() -> None:
    sent = pickle.loads(pickle.dumps(block(Path("/tmp"), 1)))
    assert {cell.repetition for cell in sent.cells} == {1}
    assert sorted(cell.arm for cell in sent.cells) == ["std", "untraced"]


def test_hosts_with_several_workers() -> None:
    assert shared_hosts({"tcp://a:1": "a", "tcp://a:2": "a", "tcp://b:1": "b"}) == ["a"]


def test_only_workers_with_a_nic_record() -> None:
    workers = {"tcp://a:1": {"resources": {RESOURCE: 1.0}}, "tcp://b:1": {"resources": {}}}
    client = SimpleNamespace(
        scheduler=None,
        scheduler_info=lambda n_workers: {"workers": workers},
        run=lambda function, workers: dict.fromkeys(workers, "a"),
    )
    assert nic_workers(client) == {"tcp://a:1": "a"}  # type: ignore[arg-type]
    del workers["tcp://a:1"]
    with pytest.raises(UsageError, match="no worker may record.*NIC=1"):
        nic_workers(client)  # type: ignore[arg-type]


def test_settings_of_the_host_are_held_when_they_are_fixed() -> None:
    fixed = spec(settings={"rps_sock_flow_entries": 4096, "rps_cpus": ["off", "0"]})
    assert held_settings(fixed, [HERE], True) == {"rps_sock_flow_entries": 4096}
    assert held_settings(spec(settings={"rps_cpus": ["off", "0"]}), ["elsewhere"], True) == {}


@pytest.mark.parametrize(
    ("settings", "host", "testbed", "reason"),
    [
        ({"rps_sock_flow_entries": [0, 4096]}, HERE, True, "varies a setting of that host.*rps_sock_flow_entries"),
        ({"rps_sock_flow_entries": 4096}, "elsewhere", True, "cannot be held from here"),
        ({"rps_cpus": ["off", "0"]}, HERE, False, "cannot share its interface"),
        ({"rps_cpus": ["off", "0"]}, HERE, "ports:eth1,eth2", "cannot share its interface"),
    ],
)
def test_what_two_workers_on_one_host_cannot_do(settings: dict, host: str, testbed: bool | str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        held_settings(spec(settings=settings), [host], testbed)


def test_a_worker_that_does_not_see_the_folder_says_so_and_who_it_is(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=f"{HERE}.*folder is not there") as caught:
        record_block(block(tmp_path / "nowhere"))
    assert "shared folder" in pickle.loads(pickle.dumps(caught.value)).line()


def test_runs_of_another_machine_are_recorded_again(tmp_path: Path) -> None:
    for name, host in (("ours", HERE), ("theirs", "elsewhere")):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / RUN_JSON, {"status": "complete"})
        write_json(tmp_path / name / HOST_JSON, {"hostname": host})
        cluster._drop_foreign(tmp_path / name, HERE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ours"]


def test_a_stopped_sweep_records_nothing_more(tmp_path: Path) -> None:
    cluster._check_stop(tmp_path)
    (tmp_path / cluster.STOP).touch()
    with pytest.raises(CaptureError, match="--resume"):
        cluster._check_stop(tmp_path)


def test_a_held_setting_that_is_gone_is_an_error() -> None:
    held = SimpleNamespace(
        label="rps_sock_flow_entries", wanted="4096", read=lambda access: "0\n", canonical=lambda raw: raw.strip()
    )
    with pytest.raises(HostSettingError, match="not in force.*found 0, expected 4096"):
        check_held([held])  # type: ignore[list-item]
    held.wanted = "0"
    check_held([held])  # type: ignore[list-item]


def test_the_hosts_name_is_the_one_in_host_json() -> None:
    """Blocks are told apart by it: what Python calls the machine must be what the snapshot calls it."""
    with HostAccess(None) as access:
        assert access.read("proc/sys/kernel/hostname").strip() == HERE


def test_a_sweep_too_large_for_the_shared_folder_asks_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfolder.shutil, "disk_usage", lambda place: SimpleNamespace(free=DEFAULT_MIN_FREE + 1000))
    with pytest.raises(CaptureError, match=r"no room for this: found 268 MB free.* Free [0-9]+ MB"):
        cluster.record_on_cluster(spec(), tmp_path / "out", SimpleNamespace(), testbed=True)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
