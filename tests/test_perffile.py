"""The container: attributes, names, feature bits, the scan."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from perf_builder import Builder

from rxlab.errors import FormatError
from rxlab.read import perfattr, perffile
from rxlab.read.perfattr import PERF_EVENT_ATTR, Attr, build_event_table, parse_attr, positions, trailer_positions
from rxlab.read.perffeatures import describe_features, parse_event_desc
from rxlab.read.perffile import feature_numbers, open_perffile


def attr(kind: int, config: int, flags: int = 1 << 20) -> Attr:
    return Attr(kind, config, 0x10587, 0, flags, None)


@pytest.mark.parametrize(
    ("kind", "config", "flags", "name"),
    [
        (0, 0, 1 << 20, "cycles"),
        (0, 1, 1 << 5 | 1 << 6, "instructions:u"),  # exclude_kernel, exclude_hv
        (0, 0, 2 << 15, "cycles:pp"),
        (1, 9, 0, "dummy:HG"),
        (2, 33, 0, ""),  # a tracepoint's name is in its format
        (4, 0x1A8, 1 << 20, "raw 0x1a8"),
        (77, 5, 1 << 20, "type 77 config 0x5"),
    ],
)
def test_names_of_events_without_one(kind: int, config: int, flags: int, name: str) -> None:
    assert perfattr.default_name(attr(kind, config, flags)) == name


def test_attribute_flags_are_bit_fields_of_the_other_end_on_big_endian() -> None:
    little, big = (parse_attr(Builder(order).attr(), big=order == ">") for order in "<>")
    assert little == big
    assert little.clockid == 1
    assert little.flags & perfattr.SAMPLE_ID_ALL


def test_layout_positions() -> None:
    # perf_event.h: IDENTIFIER, IP, TID, TIME, ADDR, ID, STREAM_ID, CPU, PERIOD
    everything = (1 << 16) | (1 << 0) | (1 << 1) | (1 << 2) | (1 << 3) | (1 << 6) | (1 << 9) | (1 << 7) | (1 << 8)
    assert list(positions(everything).values()) == [8, 16, 24, 32, 40, 48, 56, 64, 72, 80]
    assert trailer_positions(1 << 1 | 1 << 2 | 1 << 7 | 1 << 16) == {
        "tid": -32,
        "time": -24,
        "id": 0,
        "stream_id": 0,
        "cpu": -16,
        "identifier": -8,
    }


def test_structs_have_the_kernels_sizes() -> None:
    assert PERF_EVENT_ATTR.itemsize == 136
    assert PERF_EVENT_ATTR.fields is not None
    offsets = {name: entry[1] for name, entry in PERF_EVENT_ATTR.fields.items()}
    # perf_event.h: PERF_ATTR_SIZE_VER0 64 ends before config2; VER1 72, VER2 80, VER3 96, VER4 104, VER5 112, VER6 120, VER7 128
    ends = {64: "config2", 72: "branch_sample_type", 80: "sample_regs_user", 96: "sample_regs_intr"}
    ends |= {104: "aux_watermark", 112: "aux_sample_size", 120: "sig_data", 128: "config3"}
    assert {size: offsets[name] for size, name in ends.items()} == {size: size for size in ends}
    assert perffile.PERF_FILE_HEADER.itemsize == 104


def test_events_of_one_name_are_one_when_they_are_laid_out_alike() -> None:
    one = Attr(2, 5, 0x587, 0, 0, None, (1,), "a:b")
    table = build_event_table(
        [one, one.with_ids((2,)), Attr(2, 5, 0x583, 0, 0, None, (3,), "a:b"), one.named("c:d").with_ids((4,))]
    )
    assert table.names == ["a:b", "a:b#2", "c:d"]
    assert table.ids == {1: 0, 2: 0, 3: 1, 4: 2}


def test_feature_bitmap_of_a_32_bit_big_endian_machine() -> None:
    bits = 1 << 3 | 1 << 12 | 1 << 29
    assert feature_numbers(np.array([bits, 0, 0, 0], np.uint64), False) == [3, 12, 29]
    assert feature_numbers(np.array([bits, 0, 0, 0], np.uint64), True) == [3, 12, 29]
    assert feature_numbers(np.array([bits << 32, 0, 0, 0], np.uint64), True) == [3, 12, 29]


def test_event_desc_with_attributes_of_another_size() -> None:
    builder = Builder(attr_size=200)
    assert parse_event_desc(builder.features()[12], big=False) == [("rx:packet", [11, 12])]
    for cut in range(len(builder.features()[12])):
        parse_event_desc(builder.features()[12][:cut], big=False)


def test_features_cut_anywhere_give_what_is_left() -> None:
    sections = Builder().features()
    for cut in range(80):
        described = describe_features({number: content[:cut] for number, content in sections.items()}, big=False)
        assert isinstance(described.get("cmdline", []), list)


def test_damaged_tables_are_refused_with_one_line(tmp_path: Path) -> None:
    content = bytearray(Builder().sample(1, time=1).file())
    content[16:24] = struct.pack("<Q", 0)  # attr_size
    (tmp_path / "perf.data").write_bytes(content)
    with pytest.raises(FormatError, match="damaged attribute table"):
        open_perffile(tmp_path / "perf.data")


def test_event_update_names_an_event_of_a_pipe(tmp_path: Path) -> None:
    builder = Builder().sample(1, time=1)
    builder.add(78, builder.pack("QQ", 2, 12) + b"my:name\0")
    (tmp_path / "perf.data").write_bytes(builder.pipe())
    assert open_perffile(tmp_path / "perf.data").events.names == ["my:name"]


def test_event_type_record_of_old_perf(tmp_path: Path) -> None:
    builder = Builder()
    builder.add(65, builder.pack("Q", 777) + b"old:name".ljust(64, b"\0")).sample(1, time=1)
    (tmp_path / "perf.data").write_bytes(builder.pipe())
    assert open_perffile(tmp_path / "perf.data").events.names == ["old:name"]
