"""The stage table: everything else names stages, path kinds and events by it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rxlab import stages
from rxlab.stages import EVENT_FILTERS, EVENT_PRESETS, ORDER, PATH_KINDS, STAGE_INDEX, STAGE_NAMES, STAGES, TOTALS

# The names that docs, notebooks, datasets on disk and other people's scripts hold: a change here breaks them.
PUBLISHED = [
    "nic",
    "hardirq",
    "softirq_raise",
    "softirq",
    "driver_rx",
    "rps_ipi",
    "netif_receive_skb",
    "tcp_rcv",
    "data_ready",
    "waking",
    "wakeup",
    "switch_in",
    "copy",
    "recvmsg",
]


def test_stage_names_and_their_order_are_the_published_ones() -> None:
    assert list(STAGE_NAMES) == PUBLISHED
    assert [STAGE_INDEX[name] for name in STAGE_NAMES] == list(range(len(STAGES)))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_says_what_where_and_by_which_event(stage: stages.Stage) -> None:
    assert stage.what
    assert stage.function
    assert stage.source
    assert all(re.fullmatch(r"[a-z_0-9]+:[a-z_0-9]+", event) for event in stage.events)
    assert stage.events or stage.name == "nic", "only the NIC's own stamp comes without a tracepoint"


@pytest.mark.parametrize("kind", PATH_KINDS)
def test_every_path_kind_orders_all_stages(kind: str) -> None:
    assert sorted(ORDER[kind]) == sorted(STAGE_NAMES)


def test_order_knows_no_other_path_kind() -> None:
    assert set(ORDER) == set(PATH_KINDS)


def test_without_napi_the_driver_comes_before_the_softirq() -> None:
    # netif_rx runs in the sender's context and raises the softirq itself (net/core/dev.c, enqueue_to_backlog).
    for kind in ("backlog", "backlog_rps"):
        assert ORDER[kind].index("driver_rx") < ORDER[kind].index("softirq_raise")
    for kind in ("napi", "napi_rps", "busy_poll"):
        assert ORDER[kind].index("softirq") < ORDER[kind].index("driver_rx")


def test_presets_grow_and_hold_no_event_twice() -> None:
    smallest, middle, largest = (EVENT_PRESETS[name] for name in ("min", "std", "full"))
    assert set(smallest) < set(middle) < set(largest)
    for events in EVENT_PRESETS.values():
        assert len(set(events)) == len(events)


def test_raw_syscalls_is_never_recorded() -> None:
    # It stops tail latencies from meaning anything: the 99th percentile grew 60-fold with it.
    assert not [event for events in EVENT_PRESETS.values() for event in events if event.startswith("raw_syscalls:")]


def test_std_shows_every_stage_that_software_can_see() -> None:
    assert stages.stages_without(set(EVENT_PRESETS["std"])) == []


def test_min_gives_up_the_stages_before_the_stack_and_the_wakeup_only() -> None:
    assert stages.stages_without(set(EVENT_PRESETS["min"])) == [
        "hardirq", "softirq_raise", "softirq", "driver_rx", "rps_ipi", "wakeup",
    ]  # fmt: skip


def test_a_missing_event_takes_its_stage_away_unless_another_shows_it() -> None:
    recorded = set(EVENT_PRESETS["std"])
    assert stages.stages_without(recorded - {"sock:sk_data_ready"}) == ["data_ready"]
    assert stages.stages_without(recorded - {"net:netif_rx_entry"}) == []


def test_filters_belong_to_events_that_are_recorded() -> None:
    assert set(EVENT_FILTERS) <= set(EVENT_PRESETS["full"])


def test_totals_run_between_stages() -> None:
    names = [name for name, *_ in TOTALS]
    assert len(set(names)) == len(names)
    for name, end, start, definition in TOTALS:
        assert name.endswith(("_latency", "_delay"))
        assert end in STAGE_INDEX
        assert start in STAGE_INDEX or start == "t0_stage"
        assert definition


def test_labels_are_unique() -> None:
    for labels in (STAGE_NAMES, PATH_KINDS, stages.ATTRIBUTIONS, stages.STATUSES):
        assert len(set(labels)) == len(labels)


def test_printed_table_has_one_row_per_stage(repo: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "rxlab.stages"], cwd=repo, capture_output=True, text=True, check=True
    ).stdout
    table, statuses, attributions = (
        [row.split(" | ") for row in part.splitlines()[2:]] for part in shown.strip().split("\n\n")
    )
    assert [row[1].strip("`") for row in table] == list(STAGE_NAMES)
    assert {len(row) for row in table} == {6}
    assert [row[0].strip("|` ") for row in statuses] == list(stages.STATUSES)
    assert [row[0].strip("|` ") for row in attributions] == list(stages.ATTRIBUTIONS)


@pytest.mark.parametrize("page", ["README.md", "docs/schema.md"])
def test_pages_that_show_the_table_show_this_one(repo: Path, page: str) -> None:
    path = repo / page
    text = path.read_text() if path.is_file() else ""
    shown = [line for line in text.splitlines() if re.match(r"\| (#|\d+) \| ", line) and "stage" in text]
    if shown and shown[0].startswith("| # | stage |"):
        table = stages.markdown_table().splitlines()
        assert shown == [table[0], *table[2:]]


def test_the_readmes_picture_shows_every_stage(repo: Path) -> None:
    shown = re.findall(r">([a-z_]+)</text>", (repo / "docs" / "path.svg").read_text())
    assert [name for name in shown if name in STAGE_INDEX] == list(STAGE_NAMES)
    totals = {name for name in shown if name.endswith(("_latency", "_delay"))}
    assert totals <= {name for name, *_ in TOTALS}
