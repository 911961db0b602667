"""The errors: one line each, in one order, with the exit status that scripts rely on."""

from __future__ import annotations

import ast
import inspect
import signal
from pathlib import Path

import pytest

from rxlab import errors
from rxlab.dataset.run import read_events
from rxlab.errors import FormatError, RefusedError, RxlabError, TruncatedFileError, UsageError

CLASSES = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, RxlabError)]


def test_line_keeps_the_order_where_what_found_expected_do() -> None:
    error = FormatError(
        "unknown magic",
        where="perf.data, byte 0",
        found="'PERFFILE'",
        expected="'PERFILE2'",
        do="Record it again with perf 3.0 or newer.",
    )
    assert str(error) == (
        "perf.data, byte 0: unknown magic: found 'PERFFILE', expected 'PERFILE2'. Record it again with perf 3.0 or newer."
    )


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "no events"),
        ({"where": "a.pcap"}, "a.pcap: no events"),
        ({"found": "0"}, "no events: found 0"),
        ({"expected": "some"}, "no events: expected some"),
        ({"do": "Wait longer."}, "no events. Wait longer."),
    ],
)
def test_line_leaves_out_what_is_not_known(parts: dict[str, str], line: str) -> None:
    assert RxlabError("no events", **parts).line() == line


def test_line_is_one_line_whatever_a_tool_printed() -> None:
    error = RxlabError("perf failed", found="Error:\n  no permission\r\n\ttry sudo\n")
    assert str(error) == "perf failed: found Error: no permission try sudo"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_says_when_it_is_raised_and_exits_non_zero(kind: type[RxlabError]) -> None:
    assert inspect.getdoc(kind)
    assert kind.exit_code in {1, 2, 3, 128 + signal.SIGINT}
    with pytest.raises(RxlabError, match="^what$"):
        raise kind("what")


def test_exit_codes_are_those_of_the_command_line() -> None:
    assert {kind.__name__: kind.exit_code for kind in CLASSES if kind.exit_code != 1} == {
        "UsageError": 2,
        "WrongSettingError": 2,
        "RefusedError": 3,
        "StoppedError": 130,
    }
    assert (RxlabError.exit_code, UsageError.exit_code, RefusedError.exit_code) == (1, 2, 3)


def test_a_truncated_file_is_a_format_error() -> None:
    assert issubclass(TruncatedFileError, FormatError)


MOST_WORDS = 36


def test_no_error_takes_more_words_than_are_read() -> None:
    """Each raised error's own words, one more for each value in it; a list of everything wrong does not fit."""

    def words(node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
        if isinstance(node, ast.IfExp):
            return max(words(node.body), words(node.orelse), key=lambda text: len(text.split()))
        return "x"

    names, found = {kind.__name__ for kind in CLASSES}, []
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                said = " ".join(words(part) for part in (*node.args, *(keyword.value for keyword in node.keywords)))
                found.append((len(said.split()), f"{path.name}:{node.lineno}", said))
    assert len(found) > 200
    assert [error for error in found if error[0] > MOST_WORDS] == []


@pytest.mark.parametrize("length", [100_000, 1_700_000])
def test_a_cut_recording_is_said_in_thirty_words(repo: Path, tmp_path: Path, length: int) -> None:
    (tmp_path / "perf.data").write_bytes((repo / "data" / "tcp-rps-on" / "perf.data").read_bytes()[:length])
    with pytest.raises(TruncatedFileError) as refused:
        read_events(tmp_path / "perf.data")
    line = refused.value.line()
    assert line.startswith(
        f"{tmp_path}/perf.data: the recording is cut before its event formats: found data section ends"
    )
    assert f"the file at {length}. Record again" in line
    assert len(line.split()) <= 30
