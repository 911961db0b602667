"""The run directory: what capture writes is what analysis reads, and what is wrong with one is said in one line."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from rxlab import rundir
from rxlab.errors import FormatError, SchemaError


def a_run(folder: Path, **content: object) -> Path:
    """Write the smallest run directory: run.json alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_json(folder / rundir.RUN_JSON, {"status": "complete", **content})
    return folder


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        (rundir.APP_LOG_FIELDS, rundir.APP_LOG_STRUCT),
        (rundir.CLIENT_LOG_FIELDS, rundir.CLIENT_LOG_STRUCT),
    ],
    ids=["app.log", "client.log"],
)
def test_a_log_record_reads_back_field_by_field(fields, layout) -> None:
    # The workload writes with struct (standard library alone), analysis reads with NumPy: two spellings of one layout.
    record = np.dtype(list(fields))
    assert record.itemsize == layout.size
    values = [100 + index for index in range(len(fields))]  # small enough for u1, all different
    row = np.frombuffer(layout.pack(*values), dtype=record)[0]
    assert [int(row[name]) for name, _ in fields] == values


def test_log_times_are_signed_64_bit_and_ports_unsigned() -> None:
    now = 1_800_000_000_123_456_789
    values = [now, now + 1, -1, 0, 0, 4_194_304, -11, 7, 65_535, 1, 17, 10, 0]
    row = np.frombuffer(rundir.APP_LOG_STRUCT.pack(*values), dtype=np.dtype(list(rundir.APP_LOG_FIELDS)))[0]
    assert (int(row["t0"]), int(row["t1"]) - int(row["t0"]), int(row["seq"])) == (now, 1, -1)
    assert (int(row["tid"]), int(row["ret"]), int(row["peer_port"])) == (4_194_304, -11, 65_535)


def test_message_header_is_little_endian_and_begins_with_its_magic() -> None:
    message = rundir.MESSAGE_HEADER.pack(rundir.MESSAGE_MAGIC, 3, 1 << 40, -1)
    assert message[:4] == b"BLXR"  # "RXLB", least significant byte first
    assert rundir.MESSAGE_HEADER.unpack(message) == (rundir.MESSAGE_MAGIC, 3, 1 << 40, -1)


def test_json_is_private_versioned_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        rundir.write_json(tmp_path / "host.json", {"kernel": "6.1"})
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["host.json"]
    assert stat.S_IMODE((tmp_path / "host.json").stat().st_mode) == 0o600
    assert json.loads((tmp_path / "host.json").read_text()) == {
        "schema_version": rundir.SCHEMA_VERSION,
        "kernel": "6.1",
    }


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    rundir.write_json(path, {"status": "running", "problems": ["x"] * 1000})
    rundir.write_json(path, {"status": "complete"})
    assert rundir.read_json(path) == {"schema_version": rundir.SCHEMA_VERSION, "status": "complete"}


def test_integer_nanoseconds_survive_json(tmp_path: Path) -> None:
    reading = {
        "mono_before": 9_007_199_254_740_993,
        "real": 1_800_000_000_123_456_789,
    }  # both beyond float64's integers
    rundir.write_json(tmp_path / "clock.json", {"readings": [reading]})
    assert rundir.read_json(tmp_path / "clock.json")["readings"] == [reading]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("{", FormatError, "not valid JSON"),
        ("\udcff", FormatError, "not valid JSON"),
        ("[1]", FormatError, "not a JSON object: found list"),
        ("{}", SchemaError, "no schema version"),
        ('{"schema_version": "1"}', SchemaError, "no schema version"),
        (
            '{"schema_version": 99}',
            SchemaError,
            "written by a newer rxlab: found schema_version 99, expected at most 1",
        ),
    ],
)
def test_bad_json_is_refused_in_one_line(tmp_path: Path, text: str, kind: type[Exception], message: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(kind, match=message) as caught:
        rundir.read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_json_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="file is missing"):
        rundir.read_json(tmp_path / "clock.json")


def test_open_gives_path_and_contents(tmp_path: Path) -> None:
    run = rundir.open_rundir(a_run(tmp_path / "r", arm="std"))
    assert run.path == tmp_path / "r"
    assert (run.run["arm"], run.json(rundir.RUN_JSON)["status"]) == ("std", "complete")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "found nothing there"),
        (lambda path: path.write_text("x"), "found a file"),
        (lambda path: path.mkdir(), "found an empty directory"),
        (lambda path: (path.mkdir(), (path / "perf.data").touch()), "found perf.data"),
    ],
    ids=["nothing", "file", "empty", "no run.json"],
)
def test_what_is_not_a_run_directory_is_refused(tmp_path: Path, make, found: str) -> None:
    make(tmp_path / "r")
    with pytest.raises(FormatError, match=f"not a run directory: {found}, expected .*run.json"):
        rundir.open_rundir(tmp_path / "r")


def test_a_file_counts_only_with_a_byte_in_it(tmp_path: Path) -> None:
    run = rundir.open_rundir(a_run(tmp_path))
    assert not run.has(rundir.PERF_DATA)
    run.file(rundir.PERF_DATA).touch()
    assert not run.has(rundir.PERF_DATA)
    run.file(rundir.PERF_DATA).write_bytes(b"P")
    assert run.has(rundir.PERF_DATA)


def test_the_capture_is_found_in_either_format(tmp_path: Path) -> None:
    run = rundir.open_rundir(a_run(tmp_path))
    assert run.pcap is None
    (tmp_path / "rx.pcapng").touch()
    assert run.pcap == tmp_path / "rx.pcapng"
    (tmp_path / "rx.pcap").touch()
    assert run.pcap == tmp_path / "rx.pcap"


def test_runs_are_listed_in_name_order_at_any_depth(tmp_path: Path) -> None:
    for name in ("b", "a/2", "a/1"):
        a_run(tmp_path / name)
    (tmp_path / "not-a-run").mkdir()
    assert [str(run.path.relative_to(tmp_path)) for run in rundir.list_runs(tmp_path)] == ["a/1", "a/2", "b"]
    assert [run.path for run in rundir.list_runs(tmp_path / "b")] == [tmp_path / "b"]
