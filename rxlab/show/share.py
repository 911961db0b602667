"""What is given to others besides the page: a run's dataset and the executed notebook, without what identifies a network.

Texts are redacted wherever they stand (attributes, labels, outputs of cells), so nothing has to be listed and nothing new can be
forgotten. Kernel addresses of skbs and sockets become numbers: they tell the layout of the kernel's memory, and only which of
them are equal matters.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import schema
from rxlab.dataset.run import each_run, left_out_text, refuse_left_out
from rxlab.dataset.store import save
from rxlab.errors import FormatError, RxlabError
from rxlab.rundir import RUN_JSON, check_out, find_runs
from rxlab.show.redact import Redactor
from rxlab.show.report import write_report
from rxlab.show.trust import AnalysedRun

NOTEBOOK = "99_report.ipynb"
KERNEL_ADDRESSES = ("skb", "socket")
CELL_TIMEOUT = 600


def task_names(tree: xr.DataTree) -> list[str]:
    """Return the names of the tasks in a run: of readers, and of those during which perf delivered nothing."""
    names = set(json.loads(tree.attrs.get("gates") or "{}").get("blind", {}).get("tasks", {}))
    if "packets" in tree.children and "flag_meanings" in tree["packets"]["comm"].attrs:
        names |= set(schema.meanings(tree["packets"].to_dataset()["comm"]).values())
    return sorted(names, key=len, reverse=True)


def redact_tree(tree: xr.DataTree, redactor: Redactor) -> xr.DataTree:
    """Return a run's dataset with pseudonyms for addresses, MACs and host names, and numbers for kernel addresses."""
    groups = {node.path: _redact_group(node.to_dataset(inherit=False), redactor) for node in tree.subtree}
    return xr.DataTree.from_dict(groups)


def _redact_group(group: xr.Dataset, redactor: Redactor) -> xr.Dataset:
    changed: dict[str, Any] = {}
    for name, array in group.variables.items():
        values: Any = array
        if array.dtype.kind in "OUT":
            words = np.array([redactor.text(word) for word in np.ravel(array.values)], dtype=object)
            values = array.copy(data=words.reshape(array.shape))
        elif name in KERNEL_ADDRESSES and array.dtype.kind == "u":
            values = array.copy(data=_numbered(array.values))
        values = values.copy(deep=False)
        values.attrs = redactor.values(array.attrs)
        changed[str(name)] = values
    redacted = group.assign({name: values for name, values in changed.items() if name not in group.coords})
    redacted = redacted.assign_coords({name: values for name, values in changed.items() if name in group.coords})
    return redacted.assign_attrs(redactor.values(group.attrs))


def _numbered(addresses: np.ndarray) -> np.ndarray:
    """Return 1, 2, ... for addresses in order of appearance, 0 for none."""
    found, first, code = np.unique(addresses, return_index=True, return_inverse=True)
    rank = np.empty(len(found), np.uint64)
    rank[np.argsort(first, kind="stable")] = np.arange(1, len(found) + 1, dtype=np.uint64)
    return np.where(addresses == 0, np.uint64(0), rank[code.reshape(addresses.shape)])


def write_dataset(tree: xr.DataTree, path: str | os.PathLike[str], redactor: Redactor | None) -> Path:
    """Write a run's dataset to give away; as it is where `redactor` is None."""
    shared = tree if redactor is None else redact_tree(tree, redactor)
    schema.validate(shared)
    return save(shared, path)


def write_notebook(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], redactor: Redactor | None
) -> Path:
    """Execute the report notebook on runs, in a kernel of its own, and write it with its outputs.

    Parameters
    ----------
    runs : sequence of path-like
        Run directories, or folders of them.
    redactor : Redactor or None
        Of the texts of all cells and outputs, the parameters too.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(files("rxlab.show") / "templates" / NOTEBOOK))
    notebook.metadata.kernelspec.name = "python3"
    given = {"runs": [str(Path(run).resolve()) for run in runs], "out": None, "reveal": redactor is None}
    notebook = parameterize_notebook(notebook, given)
    target = Path(out)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(target.resolve().parent)}},
        extra_arguments=["--IPKernelApp.log_level=40"],  # its word about loopback being readable for root
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raise RxlabError(
            "the report notebook failed", where=NOTEBOOK, found=str(error).strip().splitlines()[-1]
        ) from None
    content = nbformat.from_dict(redactor.values(notebook)) if redactor is not None else notebook
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        nbformat.write(content, stream)
    return target


def _is_page(begin: bytes) -> bool:
    return begin.lstrip().lower().startswith(b"<!doctype html")


def report_runs(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    reveal: bool = False,
    notebook: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Path]:
    """Write a report about every run directory at or below the given paths, and where asked its executed notebook beside it.

    Parameters
    ----------
    say : callable
        Told the answer, and what was written.

    Returns
    -------
    dict of str to Path
        ``"report"``, ``"notebook"``.

    Raises
    ------
    FormatError
        After the report was written, where a damaged run is left out of it; the report says so too.
    """
    check_out(Path(out), _is_page)
    found = [run for path in paths for run in find_runs(path)]
    if not found:
        raise FormatError(
            "no run directories", where=", ".join(map(str, paths)), expected=f"a directory with {RUN_JSON}"
        )
    runs, damaged = each_run(found, AnalysedRun.of)
    redactor = None if reveal else Redactor.of_hosts([run.host for run in runs])
    left_out = left_out_text(damaged)
    page = write_report(runs, out, reveal=reveal, redactor=redactor, left_out=left_out, say=say)
    written = {"report": page}
    if notebook:
        readable = [run.path for run in runs] if damaged else paths
        written["notebook"] = write_notebook(readable, page.with_suffix(".ipynb"), redactor)
    for kind, path in written.items():
        say(f"{kind}: {path}")
    refuse_left_out(damaged, len(found), str(page))
    return written
