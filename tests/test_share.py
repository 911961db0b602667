"""What leaves the lab holds no address, MAC or host name of it: page, dataset, notebook, packets, tables; revealed, it does."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from joined_builder import make_host, make_joined, make_run

import rxlab
from rxlab import __main__ as cli
from rxlab.dataset import schema, store
from rxlab.dataset.run import each_run, left_out_text, open_run
from rxlab.dataset.store import open_dataset
from rxlab.errors import RxlabError, UsageError
from rxlab.rundir import read_json, write_json
from rxlab.show import evidence, exports, share
from rxlab.show.redact import Redactor
from rxlab.show.share import report_runs

HOST = "lab-machine-17"


@pytest.fixture(scope="module")
def lab(tmp_path_factory, repo) -> Path:
    """A sweep of recorded runs on a host whose name, and whose peer's addresses, stand in every place a run has for texts."""
    folder = tmp_path_factory.mktemp("lab")
    for name, peer in (("tcp-rps-off", "10.77.0.1"), ("tcp-rps-on", "10.77.0.2")):
        shutil.copytree(repo / "data" / name, folder / name)
        run = read_json(folder / name / "run.json")
        run["command"] = [*run["command"], "--filter", f"host 10.77.0.1 or host {HOST}", "--remote", f"ssh:{HOST}"]
        run["workload"] = {**run["workload"], "remote": f"ssh:{HOST}"}
        run["configuration"] = {**run["configuration"], "peer": f"{peer} on {HOST}"}
        run["sweep"] = {
            "cell": f"c{len(peer)}-{name}",
            "repetition": 0,
            "labels": {"rps": name[-3:].strip("-"), "peer": peer},
        }
        run["problems"] = [f"the link to {HOST} (10.77.0.2) was slow"]
        write_json(folder / name / "run.json", run)
        host = read_json(folder / name / "host.json")
        write_json(folder / name / "host.json", {**host, "hostname": f"{HOST}.example.org"})
    return folder


def originals(run: rxlab.Run) -> dict[str, list[bytes]]:
    """Return what must not be found: as text, and as packets spell it."""
    addresses = sorted({text.split("/")[0] for text in run.run["local_addresses"]} | {"10.77.0.1", "10.77.0.2"})
    macs = sorted({str(mac) for mac in run.run["local_macs"] if int(str(mac).replace(":", ""), 16)})
    assert macs, "the recording names its MACs"
    four = [text for text in addresses if ":" not in text and not text.startswith("127.")]
    return {
        "text": [text.encode() for text in (*four, *macs, HOST, "example.org")],
        "packets": [bytes(map(int, text.split("."))) for text in four]
        + [bytes.fromhex(m.replace(":", "")) for m in macs],
    }


def _page(path: Path) -> bytes:
    """Return a page's text with its images unpacked."""
    html = path.read_text()
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    return html.encode() + b"".join(base64.b64decode(image) for image in images)


def _netcdf(path: Path) -> bytes:
    """Return every text of a netCDF file, compressed ones too, and its raw bytes."""
    found = [path.read_bytes()]

    def visit(_name, item):
        found.extend(str(value).encode() for value in item.attrs.values())
        if isinstance(item, h5py.Dataset) and item.dtype.kind == "O":
            found.extend(bytes(word) for word in np.ravel(item[()]))

    with h5py.File(path) as file:
        found.extend(str(value).encode() for value in file.attrs.values())
        file.visititems(visit)
    return b"\n".join(found)


@pytest.fixture(scope="module")
def shared(lab, tmp_path_factory) -> dict[bool, dict[str, bytes]]:
    """Everything that can be given away, revealed or not, as bytes to search."""
    found: dict[bool, dict[str, bytes]] = {}
    for reveal in (False, True):
        out = tmp_path_factory.mktemp("out")
        with pytest.MonkeyPatch.context() as patch:
            if reveal:  # figures and notebook take nearly all the time, and show again what the page says
                patch.setattr(evidence, "draw_figures", lambda *_, **__: iter(()))
            written = report_runs([lab], out / "report.html", reveal=reveal, notebook=not reveal)
        one = {"page": _page(written["report"])}
        if not reveal:
            one["notebook"] = written["notebook"].read_bytes()
        for to in exports.EXPORTS:
            path = exports.export_run(lab / "tcp-rps-on", to, out / f"x.{to}", reveal=reveal)
            one[to] = _netcdf(path) if to == "netcdf" else path.read_bytes()
        found[reveal] = one
    return found


@pytest.mark.parametrize("what", ["page", "notebook", *exports.EXPORTS])
def test_no_original_is_found(lab, shared, what):
    wanted = originals(rxlab.open_run(lab / "tcp-rps-on"))
    for original in wanted["text"] + (wanted["packets"] if what == "pcapng" else []):
        assert original not in shared[False][what], original


@pytest.mark.parametrize("what", ["page", "netcdf", "pcapng", "pyperf"])
def test_revealed_they_are_there(lab, shared, what):
    """The search above would find them: they are in the same places when asked for."""
    wanted = originals(rxlab.open_run(lab / "tcp-rps-on"))
    searched = wanted["packets"] if what == "pcapng" else [HOST.encode(), b"10.77.0.2"]
    for original in searched[:2]:
        assert original in shared[True][what], original


def test_the_shared_dataset_is_valid_and_keeps_everything_else(lab, tmp_path):
    run = rxlab.open_run(lab / "tcp-rps-on")
    path = exports.export_run(run.path, "netcdf", tmp_path / "shared.nc")
    assert path.stat().st_mode & 0o777 == 0o600
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        schema.validate(tree)
        xr.testing.assert_equal(tree["hops"].to_dataset(), run.tree["hops"].to_dataset())
        xr.testing.assert_equal(tree["packets"]["time"], run.tree["packets"]["time"])
        flows, before = tree["flows"].to_dataset(), run.tree["flows"].to_dataset()
        # Two ends of one subnet stay two ends of one subnet, whichever flow they are in.
        assert len(set(flows["src"].values) | set(flows["dst"].values)) == len(
            set(before["src"].values) | set(before["dst"].values)
        )
        assert flows["sport"].equals(before["sport"])


def test_kernel_addresses_become_numbers_that_are_equal_where_they_were():
    tree = store.build(make_joined(40), run=make_run(), host=make_host())
    shared = share.redact_tree(tree, Redactor(b"k" * 32))
    skb, before = shared["packets"]["skb"].values, tree["packets"]["skb"].values
    assert skb.dtype == before.dtype
    assert skb.max() == 16
    assert skb[0] == 1
    np.testing.assert_array_equal(skb[:, None] == skb, before[:, None] == before)


def test_task_names_stay_unless_asked(lab, tmp_path):
    kept = exports.export_run(lab / "tcp-rps-on", "pcapng", tmp_path / "a.pcapng")
    hidden = exports.export_run(lab / "tcp-rps-on", "pcapng", tmp_path / "b.pcapng", hide_tasks=True)
    assert b"task python" in kept.read_bytes()
    assert b"python" not in hidden.read_bytes()
    assert re.search(rb"task task-\d", hidden.read_bytes())
    run = open_run(lab / "tcp-rps-on")
    blind = run.joined.gates["blind"]["tasks"]
    dataset = exports.export_run(lab / "tcp-rps-on", "netcdf", tmp_path / "b.nc", hide_tasks=True)
    assert dataset.stat().st_mode & 0o777 == 0o600
    hidden_gates = json.loads(open_dataset(dataset).attrs["gates"])["blind"]["tasks"]
    assert len(hidden_gates) == len(blind) > 0, "the run has blind windows, or this says nothing"
    assert not set(hidden_gates) & set(blind)
    with pytest.raises(UsageError, match="one of them"):
        exports.export_run(lab / "tcp-rps-on", "pcapng", tmp_path / "c", reveal=True, hide_tasks=True)


def test_the_notebook_is_executed_and_answers(shared):
    notebook = json.loads(shared[False]["notebook"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    answer = "".join(code[-1]["outputs"][-1]["data"]["text/markdown"])
    assert answer.startswith("**Answer:**")
    # The sweep's own labels, its peers in one /30 as before, and parameters that are not the notebook's.
    first, second = re.search(r"rps=on, peer=(\S+) against rps=off, peer=(\S+):", answer).groups()
    # .1 and .2 differ from the second last bit on, and so do their pseudonyms; the last one is any.
    assert int(ipaddress.ip_address(first)) ^ int(ipaddress.ip_address(second)) in (2, 3)
    assert f"peer={first}".encode() in shared[False]["page"]
    assert [cell["source"] for cell in code if "injected-parameters" in cell["metadata"].get("tags", [])]


def test_the_notebook_of_the_package_is_that_of_the_folder(repo):
    inside = repo / "rxlab" / "show" / "templates" / share.NOTEBOOK
    assert inside.read_bytes() == (repo / "notebooks" / share.NOTEBOOK).read_bytes()


def test_a_damaged_run_is_left_out_of_the_report_and_said(repo, tmp_path, capsys, monkeypatch):
    """What can be read is reported; what cannot is named on the page and on standard error, and the status says so."""
    for name in ("tcp-rps-off-untraced-1", "tcp-rps-on-untraced-1", "tcp-rps-on-untraced-2"):
        shutil.copytree(repo / "data" / name, tmp_path / "runs" / name)
    damaged = tmp_path / "runs" / "tcp-rps-on-untraced-2"
    (damaged / "run.json").write_text((damaged / "run.json").read_text()[:200])
    monkeypatch.setattr(evidence, "draw_figures", lambda *_, **__: iter(()))
    page = tmp_path / "report.html"
    arguments = ["report", str(tmp_path / "runs"), "-o", str(page), "--no-notebook"]
    monkeypatch.setattr(sys, "argv", ["rxlab", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, error = capsys.readouterr()
    assert ended.value.code == 1
    (line,) = error.splitlines()
    assert "1 of 3 runs could not be read" in line
    assert "tcp-rps-on-untraced-2/run.json: not valid JSON" in line
    assert f"report: {page}" in out
    html = page.read_text()
    assert "could not be read: tcp-rps-on-untraced-2/run.json" in html
    assert "tcp-rps-off-untraced-1" in html
    assert "tcp-rps-on-untraced-1" in html


def test_a_cut_recording_and_an_unreadable_file_cost_no_other_run(repo, tmp_path):
    """Every way of being damaged that is an RxlabError or the system's; only where no run is left it is refused."""
    good, cut, empty = (tmp_path / name for name in ("a-good", "b-cut", "c-empty"))
    for folder in (good, cut, empty):
        shutil.copytree(repo / "data" / "tcp-rps-off", folder)
        (folder / "run.nc").unlink(missing_ok=True)
    (cut / "perf.data").write_bytes((repo / "data" / "tcp-rps-off" / "perf.data").read_bytes()[:60])
    (empty / "run.nc").write_bytes(b"no netCDF")
    taken, damaged = each_run([good, cut, empty], lambda run: run.tree.attrs["verdict"])
    assert taken == ["trusted"]
    assert list(damaged) == [cut, empty]
    assert left_out_text(damaged).startswith("b-cut/perf.data: ")
    with pytest.raises(RxlabError, match="b-cut"):
        each_run([cut], lambda run: run.tree)
