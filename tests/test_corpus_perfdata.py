"""Every perf.data of the corpus against its reference answers, and why the reference is not always perf's plain word."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxlab.errors import TruncatedFileError
from rxlab.read.perfdata import inspect_perfdata, read_perfdata

pytestmark = pytest.mark.corpus

FOLDER = Path(os.environ.get("RXLAB_CORPUS") or Path(__file__).resolve().parents[2] / "shared" / "corpus")

# perf script decodes the AUX area (Intel PT) of this file into more events; no SAMPLE records of them are in it.
SYNTHESIZED = {"perf.data.intel_pt-4.14": {"psb", "cbr", "branches"}}


def manifest() -> list[dict[str, Any]]:
    """Return the manifest's perf.data entries; none without a corpus (the fixture then says so)."""
    path = FOLDER / "manifest.json"
    entries = json.loads(path.read_text())["files"] if path.is_file() else []
    return [entry for entry in entries if entry["kind"] == "perf.data"]


WHOLE = [entry for entry in manifest() if not entry.get("damaged")]
DAMAGED = [entry for entry in manifest() if entry.get("damaged")]


def test_there_is_a_corpus(corpus: Path) -> None:
    assert len(WHOLE) + len(DAMAGED) == 30


@pytest.mark.parametrize("entry", WHOLE, ids=lambda entry: entry["file"].removeprefix("perfdata/"))
def test_equals_reference(corpus: Path, entry: dict[str, Any]) -> None:
    path, reference = corpus / entry["file"], entry["reference"]
    perf = read_perfdata(path).load()
    assert perf.meta["samples"] == reference["samples"]
    # The lines of `perf script`, not the counts of `perf report`, which counts a branch stack's entries as samples.
    skipped = SYNTHESIZED.get(path.name, set())
    expected = {name: count for name, count in reference["script_lines_per_event"].items() if name not in skipped}
    assert {name: columns.n for name, columns in perf.events.items() if columns.n} == expected
    assert (perf.meta["first_ns"], perf.meta["last_ns"]) == (reference["first_sample_ns"], reference["last_sample_ns"])
    cpus = {int(cpu) for columns in perf.events.values() for cpu in np.unique(columns["cpu"])}
    # A CPU of 0xffffffff is the kernel's "no CPU", which the reference has both signed and unsigned.
    assert cpus == {cpu if cpu < 1 << 31 else cpu - (1 << 32) for cpu in reference["sample_cpus"]}
    ranks = np.concatenate([columns["rank"] for columns in perf.events.values()])
    np.testing.assert_array_equal(np.sort(ranks), np.arange(reference["samples"]))
    assert not perf.meta["truncated"]
    assert perf.meta["missing_values"] == 0
    traits = entry["traits"]
    assert (perf.meta["endian"], perf.meta["mode"]) == (traits["endian"], traits["mode"])
    for trait, key in (("perf_version", "perf_version"), ("arch", "arch")):
        if traits.get(trait):
            assert perf.meta[key] == traits[trait]
    if "clockid" in traits:
        assert [perf.meta["clockid"]] == traits["clockid"]


@pytest.mark.parametrize("entry", DAMAGED, ids=lambda entry: entry["file"].removeprefix("perfdata/"))
def test_damaged_files_give_every_sample_before_the_damage(corpus: Path, entry: dict[str, Any]) -> None:
    # perf itself gives up on these; the reference counts whole samples in file order.
    path, salvaged = corpus / entry["file"], entry["reference"]["walk_samples_file_order"]
    assert read_perfdata(path).load().meta["samples"] == salvaged
    if salvaged:
        assert inspect_perfdata(path)["samples"] == salvaged
    else:
        with pytest.raises(TruncatedFileError, match="nothing could be salvaged"):
            inspect_perfdata(path)


def test_user_events_have_their_fields(corpus: Path) -> None:
    perf = read_perfdata(corpus / "perfdata" / "LinuxTracepoints" / "perf.data")
    switches = perf.events["sched:sched_switch"]
    # On each CPU the task switched out is the one switched in before: the scheduler's own bookkeeping judges the fields.
    for cpu in np.unique(switches["cpu"]):
        rows = switches["cpu"] == cpu
        pairs = zip(switches["next_pid"][rows][:-1], switches["prev_pid"][rows][1:], strict=True)
        agreeing = [bool(came == went) for came, went in pairs]
        assert sum(agreeing) >= 0.9 * len(agreeing)
