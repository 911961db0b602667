"""The schema is one table, its document says the same, and validate() teaches."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from joined_builder import make_app_logs, make_counters, make_host, make_joined, make_run

from rxlab import stages
from rxlab.dataset import schema, store
from rxlab.errors import SchemaError

DOCUMENT = Path(__file__).parents[1] / "docs" / "schema.md"


@pytest.fixture
def tree() -> xr.DataTree:
    return store.build(
        make_joined(20),
        run=make_run(),
        host=make_host(),
        counters=make_counters(),
        app_latency=make_app_logs(np.full(5, 9e3)),
    )


def _between(tag: str) -> str:
    found = re.search(rf"<!-- {tag}: .*? -->\n(.*?)<!-- end -->", DOCUMENT.read_text(), flags=re.S)
    assert found, f"docs/schema.md has no section {tag}"
    return found[1].strip()


def test_document_prints_the_schema_and_the_stages():
    assert _between("schema") == schema.markdown_table().strip(), "run: python -m rxlab.dataset.schema"
    assert _between("stages") == stages.markdown_table().strip(), "run: python -m rxlab.stages"
    assert _between("meanings") == stages.markdown_meanings(), "run: python -m rxlab.stages"


def test_module_prints_the_table():
    done = subprocess.run([sys.executable, "-m", "rxlab.dataset.schema"], capture_output=True, text=True, check=True)
    assert done.stdout == schema.markdown_table()


def test_names_are_unique_and_every_entry_is_whole():
    assert len(schema.BY_PATH) == len(schema.SCHEMA)
    for spec in schema.SCHEMA:
        assert spec.long_name, spec.path
        assert spec.definition, spec.path
        assert spec.dtype == "str" or np.dtype(spec.dtype), spec.path
        if spec.dtype not in ("str", "datetime64[ns]"):
            assert spec.units, spec.path


def test_every_stage_but_the_first_ends_a_step_and_no_total_is_named_like_one():
    assert set(schema.STEP_NAMES) == set(stages.STAGE_NAMES) - {"nic"}
    assert not set(schema.TOTAL_NAMES) & set(stages.STAGE_NAMES)
    assert set(schema.HOP_NAMES) == set(schema.STEP_NAMES) | {name for name, *_ in stages.TOTALS}


def _change(tree: xr.DataTree, group: str, dataset: xr.Dataset) -> xr.DataTree:
    groups = {node.path: node.to_dataset(inherit=False) for node in tree.subtree}
    return xr.DataTree.from_dict({**groups, f"/{group}": dataset})


@pytest.mark.parametrize(
    ("group", "spoil", "message"),
    [
        ("hops", lambda ds: ds.drop_vars("latency"), "hops/latency: variable is missing"),
        ("hops", lambda ds: ds.assign(latency=ds.latency.astype("float32")), "wrong dtype"),
        ("hops", lambda ds: ds.assign(latency=ds.latency.T), "wrong dims"),
        ("hops", lambda ds: ds.assign(latency=ds.latency.assign_attrs(units="us")), "found 'us', expected 'ns'"),
        ("packets", lambda ds: ds.assign(time=ds.time.assign_attrs(clock="CLOCK_TAI")), "wrong clock"),
        ("packets", lambda ds: ds.assign(statuss=("packet", np.zeros(20))), "Did you mean 'status'"),
        ("packets", lambda ds: ds.rename(comm="command"), "packets/comm: variable is missing: found command"),
        ("packets", lambda ds: ds.isel(packet=slice(5)), "groups differ in their packets"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_right(tree, group, spoil, message):
    with pytest.raises(SchemaError, match=re.escape(message)):
        schema.validate(_change(tree, group, spoil(tree[group].to_dataset())))


def test_a_missing_group_is_named(tree):
    groups = {node.path: node.to_dataset() for node in tree.subtree if node.name != "clocks"}
    with pytest.raises(SchemaError, match="/clocks: group is missing"):
        schema.validate(xr.DataTree.from_dict(groups))


def test_newer_and_foreign_datasets_are_refused(tree):
    newer = tree.copy()
    newer.attrs["schema_version"] = schema.SCHEMA_VERSION + 1
    with pytest.raises(SchemaError, match="newer rxlab"):
        schema.validate(newer)
    with pytest.raises(SchemaError, match="not an rxlab dataset"):
        schema.validate(xr.DataTree())


def test_extra_variables_with_units_and_long_name_are_welcome(tree):
    extra = tree["hops"].to_dataset().assign(excess=("packet", np.zeros(20), {"units": "ns", "long_name": "excess"}))
    schema.validate(_change(tree, "hops", extra))


def test_unknown_variable_names_the_near_ones():
    with pytest.raises(SchemaError, match="hops/latency"):
        schema.variable("hops", "latencies")


def test_codes_read_back_as_words(tree):
    words = schema.meanings(tree["packets"]["status"])
    assert [words[int(code)] for code in tree["packets"]["status"][:2]] == ["complete", "complete"]
    assert schema.meanings(tree["packets"]["same_cpu"]) == {-1: "unknown", 0: "different", 1: "same"}
    assert schema.meanings(tree["packets"]["comm"]) == {0: "rx_server"}
