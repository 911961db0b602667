"""The as-of primitive against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxlab.follow.asof import AsOf, pick, places

ROWS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(-2, 3), st.integers(0, 2)), max_size=30, unique_by=lambda r: r[0]
)


def loop(rank: int, group: list[int], rows: list[list[int]], inclusive: bool) -> tuple[int, int]:
    """Return the last row before a rank and the first after it in a group."""
    same = [(row[0], i) for i, row in enumerate(rows) if row[1:] == group]
    earlier = [(r, i) for r, i in same if r < rank or (inclusive and r == rank)]
    later = [(r, i) for r, i in same if r > rank or (inclusive and r == rank)]
    return max(earlier)[1] if earlier else -1, min(later)[1] if later else -1


@given(rows=ROWS, wanted=ROWS, inclusive=st.booleans(), spread=st.sampled_from([1, 40, 10**12]))
def test_agrees_with_a_loop(
    rows: list[tuple[int, int, int]], wanted: list[tuple[int, int, int]], inclusive: bool, spread: int
) -> None:
    # Groups that lie close together are counted in a table; others, and many pairs, are hashed.
    table = np.array(rows, np.int64).reshape(-1, 3) * [1, spread, spread]
    look = np.array(wanted, np.int64).reshape(-1, 3) * [1, spread, spread]
    index = AsOf(table[:, 0], table[:, 1], table[:, 2])
    before = index.last_before(look[:, 0], look[:, 1], look[:, 2], inclusive=inclusive)
    after = index.first_after(look[:, 0], look[:, 1], look[:, 2], inclusive=inclusive)
    expected = [loop(rank, group, table.tolist(), inclusive) for rank, *group in look.tolist()]
    assert list(zip(before.tolist(), after.tolist(), strict=True)) == expected


@given(
    rows=ROWS, wanted=ROWS, inclusive=st.booleans(), is_one=st.booleans(), in_order=st.booleans(),
    dtypes=st.tuples(*[st.sampled_from([np.int16, np.int32, np.int64])] * 2),
)  # fmt: skip
def test_one_number_agrees_with_a_loop(
    rows: list[tuple[int, int, int]], wanted: list[tuple[int, int, int]], inclusive: bool, is_one: bool, in_order: bool, dtypes: tuple[type, type],
) -> None:  # fmt: skip
    """Rows by one number of any width; where all have the same, and are in order, nothing is laid out."""
    table = [[rank, 2 if is_one else group] for rank, group, _ in (sorted(rows) if in_order else rows)]
    look = [[rank, group] for rank, group, _ in wanted]
    ranks, groups = (np.array([row[at] for row in table], np.int64) for at in (0, 1))
    wanted_ranks, wanted_groups = (np.array([row[at] for row in look], np.int64) for at in (0, 1))
    index, of = AsOf(ranks, groups.astype(dtypes[0])), wanted_groups.astype(dtypes[1])
    before, after = (
        index.last_before(wanted_ranks, of, inclusive=inclusive),
        index.first_after(wanted_ranks, of, inclusive=inclusive),
    )
    expected = [loop(rank, group, table, inclusive) for rank, *group in look]
    assert list(zip(before.tolist(), after.tolist(), strict=True)) == expected
    for group in range(-3, 5):
        mine = sorted((rank, i) for i, (rank, one) in enumerate(table) if one == group)
        assert index.rows_of(np.array([group])).tolist() == [i for _, i in mine]
        assert index.ranks_of(np.array([group])).tolist() == [rank for rank, _ in mine]


def test_many_groups_in_any_order_agree_with_a_sorted_search() -> None:
    """More groups than the first hash table holds, rows and look-ups shuffled: each search may go far either way."""
    rng = np.random.default_rng(1)
    rank, group = rng.permutation(20_000), rng.integers(0, 3_000, 20_000) * 2**40
    wanted, of = rng.integers(0, 20_000, 5_000), rng.integers(0, 3_001, 5_000) * 2**40
    order = np.lexsort((rank, group))
    key = group[order] // 2**40 * 20_000 + rank[order]
    at = np.searchsorted(key, of // 2**40 * 20_000 + wanted) - 1
    expected = np.where((at >= 0) & (group[order[at]] == of), order[at], -1)
    assert AsOf(rank, group).last_before(wanted, of).tolist() == expected.tolist()


def test_negative_rank_finds_nothing() -> None:
    index = AsOf(np.array([3, 5]), np.array([1, 1]))
    assert index.first_after(np.array([-1]), np.array([1])).tolist() == [-1]


def test_groups_of_kernel_addresses_stay_exact() -> None:
    """Addresses that differ in their last bit only, beyond what float64 can tell apart."""
    base = np.uint64(0xFFFF888100000001)
    address = np.array([base, base + np.uint64(1)], np.uint64)
    index = AsOf(np.array([1, 2]), address)
    assert index.last_before(np.array([9, 9]), address).tolist() == [0, 1]


def test_pick_gives_missing() -> None:
    assert pick(np.array([7, 8], np.int16), np.array([1, -1]), -1).tolist() == [8, -1]
    assert pick(np.empty(0, np.int64), np.array([-1]), 4).tolist() == [4]


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "i8", "u8", "?"])
def test_pick_keeps_every_integer_dtype(dtype: str) -> None:
    values = np.array([0, 1, 1], dtype)[::-1]
    picked = pick(values, np.array([2, -1, 0]), 1)
    assert picked.dtype == values.dtype
    assert picked.tolist() == [0, 1, 1]


def test_pick_refuses_a_row_beyond_the_last() -> None:
    with pytest.raises(IndexError):
        pick(np.array([7, 8]), np.array([2]), 0)


@given(st.lists(st.integers(0, 40)), st.lists(st.integers(-3, 45)), st.booleans())
def test_places_are_those_of_searchsorted(keys: list[int], wanted: list[int], inclusive: bool) -> None:
    expected = np.searchsorted(sorted(keys), wanted, side="right" if inclusive else "left")
    found = places(np.sort(np.array(keys, np.int64)), np.array(wanted, np.int64), inclusive=inclusive)
    assert found.tolist() == expected.tolist()
