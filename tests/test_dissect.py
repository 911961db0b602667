"""pyshark in its worker: answers equal tshark's, and it works from a script, a thread and a notebook cell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from capture_builder import classic, ethernet, http_exchange, ipv4, udp
from nbclient import NotebookClient

from rxlab.errors import FormatError, RxlabError, UsageError
from rxlab.read.dissect import _epoch_ns, _epoch_text, dissect, http_requests

pytestmark = pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")

# A dissection that works 19 times of 20 is what pyshark in a thread would be, hence the hundred on demand.
FULL_READS, SCRIPT_READS = (100, 100) if os.environ.get("RXLAB_LONG") == "1" else (3, 1)


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path = tmp_path / "http.pcap"
    # Nanosecond magic: packet i is stamped 1700000000 + i seconds and i nanoseconds.
    path.write_bytes(classic([*http_exchange(), ethernet(ipv4(udp(b"x"), 17))], magic=0xA1B23C4D))
    return path


def tsharks_reading(capture: Path) -> list[str]:
    """Return the command lines of processes that name the capture."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(capture) in line]


def test_fields_equal_tshark(capture: Path) -> None:
    fields = ("frame.time_epoch", "ip.src", "tcp.len", "udp.length", "http.request.uri", "frame.protocols")
    command = ["tshark", "-r", str(capture), "-T", "fields", *(part for f in fields for part in ("-e", f))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = dissect(capture, fields=fields)
    assert [[row[field] or "" for field in fields] for row in rows] == [
        line.split("\t") for line in printed.splitlines()
    ]
    assert [row["frame"] for row in rows] == [1, 2, 3, 4]
    assert [row["time"] for row in rows] == [(1_700_000_000 + i) * 10**9 + i for i in range(4)]


def test_frames_and_filter_are_combined(capture: Path) -> None:
    assert [row["frame"] for row in dissect(capture, frames=[4, 2, 3])] == [2, 3, 4]
    assert [row["frame"] for row in dissect(capture, frames=[1, 2, 4], display_filter="tcp")] == [1, 2]
    assert dissect(capture, frames=[]) == []
    # "or" inside the filter must not escape from the frame choice
    assert [row["frame"] for row in dissect(capture, frames=[2], display_filter="tcp || udp")] == [2]


def test_more_frames_than_a_filter_can_name(capture: Path) -> None:
    chosen = [2, *range(5, 60_000, 2)]
    assert [row["frame"] for row in dissect(capture, frames=chosen, fields=("udp",))] == [2]


def test_protocol_name_asks_for_presence(capture: Path) -> None:
    assert [row["udp"] for row in dissect(capture, fields=("udp",))] == [False, False, False, True]


def test_http_requests_are_paired(capture: Path) -> None:
    answered, waiting = http_requests(capture)
    assert (answered["method"], answered["uri"], answered["host"]) == ("GET", "/first", "a")
    assert (answered["frame"], answered["response_frame"], answered["status"]) == (1, 2, 204)
    assert answered["latency_ns"] == 1_000_000_001
    assert (waiting["uri"], waiting["frame"], waiting["status"], waiting["latency_ns"]) == ("/second", 3, None, None)


def test_cut_capture_gives_the_packets_before(capture: Path) -> None:
    capture.write_bytes(capture.read_bytes()[:-3])
    assert [row["frame"] for row in dissect(capture)] == [1, 2, 3]


def test_errors_are_one_clear_line(capture: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="display filter"):
        dissect(capture, display_filter="nonsense ==")
    with pytest.raises(UsageError, match="field name"):
        dissect(capture, fields=("ip.src -w /etc/x",))
    with pytest.raises(FormatError, match="no such file"):
        dissect(tmp_path / "absent.pcap")
    text = tmp_path / "text.pcap"
    text.write_text("no capture at all")
    with pytest.raises(RxlabError, match="tshark cannot read"):
        dissect(text)


def test_timeout_ends_worker_and_tshark(tmp_path: Path) -> None:
    big = tmp_path / "big.pcap"
    big.write_bytes(classic(http_exchange() * 20_000))
    with pytest.raises(RxlabError, match=r"more than 0\.5 s"):
        dissect(big, fields=("tcp.seq", "ip.src"), timeout=0.5)
    assert tsharks_reading(big) == []


def test_in_threads(capture: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        counts = list(pool.map(lambda _: len(dissect(capture)), range(FULL_READS)))
    assert counts == [4] * FULL_READS
    assert tsharks_reading(capture) == []


def test_in_a_script(capture: Path) -> None:
    code = f"import rxlab\nfor _ in range({SCRIPT_READS}): print(len(rxlab.dissect({str(capture)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4"] * SCRIPT_READS
    assert tsharks_reading(capture) == []


@pytest.mark.filterwarnings("default")  # the notebook machinery's own
def test_in_a_notebook_cell(capture: Path) -> None:
    cell = f"import rxlab\nprint([len(rxlab.dissect({str(capture)!r})) for _ in range({FULL_READS})])"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
    assert notebook.cells[0].outputs[0]["text"] == f"{[4] * FULL_READS}\n"
    assert tsharks_reading(capture) == []


def test_epoch_of_both_tshark_spellings() -> None:
    assert _epoch_ns("1258133614.621200001") == 1_258_133_614_621_200_001
    assert _epoch_ns("2009-11-13T17:33:34.621200001Z") == 1_258_133_614_621_200_001
    assert _epoch_ns("-1.500000000") == -1_500_000_000
    assert _epoch_text(-1_500_000_000) == "-1.500000000"
