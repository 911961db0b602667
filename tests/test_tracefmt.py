"""Tracepoint formats: declarations as kernels of all ages wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rxlab.errors import FormatError
from rxlab.read import tracefmt
from rxlab.read.tracefmt import Field, parse_format, parse_tracing_data, read_local_formats

HEAD = "name: x\nID: 7\nformat:\n"


def field(declaration: str, *, size: int, offset: int = 8, signed: str = " signed:0;", long_size: int = 8) -> Field:
    text = f'{HEAD}\tfield:{declaration};\toffset:{offset};\tsize:{size};{signed}\n\nprint fmt: ""\n'
    (parsed,) = parse_format(text, long_size=long_size).fields
    return parsed


@pytest.mark.parametrize(
    ("declaration", "size", "kind", "dtype", "count"),
    [
        ("void * skbaddr", 8, "scalar", "u8", 1),
        ("const void *skbaddr", 8, "scalar", "u8", 1),
        ("unsigned short common_type", 2, "scalar", "u2", 1),
        ("enum skb_drop_reason reason", 4, "scalar", "u4", 1),
        ("char comm[16]", 16, "text", "S16", 16),
        ("char comm[TASK_COMM_LEN]", 16, "text", "S16", 16),
        ("__u8 saddr[28]", 28, "array", "u1", 28),
        ("__u8 saddr[sizeof(struct sockaddr_in6)]", 28, "array", "u1", 28),
        ("unsigned char addr[6]", 6, "array", "u1", 6),
        ("unsigned long args[6]", 48, "array", "u8", 6),
        ("__u16 ports[N]", 8, "array", "u2", 4),
        ("__data_loc char[] name", 4, "loc", "i4", 1),
        ("__rel_loc char[] name", 4, "rel_loc", "i4", 1),
        ("__data_loc unsigned long[] mask", 4, "loc", "i4", 1),
        ("char buf[]", 0, "rest", "i4", 1),
        ("struct in6_addr addr", 16, "array", "u1", 16),
        ("unsigned int flags : 3", 4, "scalar", "u4", 1),
    ],
)
def test_declarations(declaration: str, size: int, kind: str, dtype: str, count: int) -> None:
    parsed = field(declaration, size=size)
    assert (parsed.kind, parsed.dtype, parsed.count) == (kind, np.dtype(dtype), count)
    assert parsed.offset == 8


def test_signs() -> None:
    assert field("pid_t pid", size=4, signed=" signed:1;").dtype == np.int32
    # Kernels before 2.6.32 did not say.
    assert field("int pid", size=4, signed="").dtype == np.int32
    assert field("unsigned int len", size=4, signed="").dtype == np.uint32
    assert field("u64 when", size=8, signed="").dtype == np.uint64
    assert field("void * p", size=8, signed="").dtype == np.uint64


def test_elements_of_variable_fields() -> None:
    assert field("__data_loc char[] name", size=4).is_text
    assert field("__data_loc unsigned long[] mask", size=4).itemsize == 8
    assert field("__data_loc unsigned long[] mask", size=4, long_size=4).itemsize == 4
    assert field("__data_loc __u8[] bytes", size=4).itemsize == 1
    assert not field("__data_loc __u8[] bytes", size=4).is_text
    assert field("__data_loc u64[] addrs", size=4).itemsize == 8


def test_a_field_named_like_a_column_of_the_sample() -> None:
    assert field("pid_t pid", size=4).column == "field_pid"
    assert field("int prev_pid", size=4).column == "prev_pid"


def test_symbols() -> None:
    text = (
        HEAD
        + 'print fmt: "%s", __print_symbolic(REC->reason, { 2, "NOT_SPECIFIED" }, { 0x10, "SIXTEEN" }, { -1, "NONE" })'
    )
    assert parse_format(text).symbols == {"reason": {2: "NOT_SPECIFIED", 16: "SIXTEEN", -1: "NONE"}}


def test_damaged_constants_are_no_symbols() -> None:
    pairs = '{ 0810, "NEITHER" }, { 010u, "OCTAL" }, { %s, "LONG" }, { 7UL, "SEVEN" }' % ("9" * 5000)
    text = HEAD + f'print fmt: "%s", __print_symbolic(REC->reason, {pairs})'
    assert parse_format(text).symbols == {"reason": {8: "OCTAL", 7: "SEVEN"}}


@pytest.mark.parametrize("text", ["", "name: x\n", "ID: 3\n", "name: x\nID: many\n"])
def test_what_is_no_format(text: str) -> None:
    with pytest.raises(FormatError, match="not a tracepoint format"):
        parse_format(text, where="events/x/format")


def test_absurd_sizes_are_left_out() -> None:
    text = (
        HEAD
        + "\tfield:char a[99999999];\toffset:8;\tsize:99999999;\tsigned:0;\n\tfield:int b;\toffset:65534;\tsize:4;\tsigned:1;\n"
    )
    assert parse_format(text).fields == ()


def test_tracing_data_that_ends_early_keeps_the_formats_before() -> None:
    from perf_builder import Builder

    section = Builder().tracing()
    whole = parse_tracing_data(section)
    assert [event.full_name for event in whole.formats.values()] == ["rx:packet"]
    assert not whole.truncated
    assert (whole.version, whole.page_size, whole.long_size) == ("0.6", 4096, 8)
    for cut in range(len(tracefmt.TRACING_MAGIC), len(section)):
        assert parse_tracing_data(section[:cut]).truncated
    with pytest.raises(FormatError, match="damaged tracing data"):
        parse_tracing_data(b"\x17\x08\x44trucing" + section)


def test_local_formats(tmp_path: Path) -> None:
    folder = tmp_path / "net" / "netif_rx"
    folder.mkdir(parents=True)
    (folder / "id").write_text("7\n")
    (folder / "format").write_text(HEAD + "\tfield:int a;\toffset:8;\tsize:4;\tsigned:1;\n")
    assert read_local_formats({7}, tmp_path)[7].full_name == "net:x"
    assert read_local_formats({8}, tmp_path) == {}
