"""The highest curve below a cloud of points: a line by the convex hull, a piecewise line by linear programming.

What makes the curve worth its bends is a price on unrest, so that a floor that shifts for some seconds is not followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rxlab.errors import ClockError
from rxlab.read.compiler import njit

# To a lesser share than its changes (see `curve_below`) the bend itself has a price.
BEND_SHARE = 0.1


@njit(cache=True, nogil=True)
def _hull_vertices(x, y, edges):
    """Indices of the lower convex hull of the points of each interval; x ascending, edges are positions in it."""
    result = np.empty(len(x), np.int64)
    n = 0
    for part in range(len(edges) - 1):
        base = n
        for i in range(edges[part], edges[part + 1]):
            while n - base >= 2:
                a, b = result[n - 2], result[n - 1]
                if (x[b] - x[a]) * (y[i] - y[a]) - (y[b] - y[a]) * (x[i] - x[a]) > 0:
                    break
                n -= 1
            result[n] = i
            n += 1
    return result[:n]


def curve_below(x: np.ndarray, y: np.ndarray, knots: np.ndarray, penalty: float) -> np.ndarray:
    """Return the values at the knots of the highest curve below all points, less a price for its bends.

    A linear programme: maximise the mean of the curve at the minima of windows; the constraints at each interval's hull
    vertices imply all others.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, eye_array, hstack, vstack

    n = len(knots)
    edges = np.searchsorted(x, knots, side="left")
    edges[0], edges[-1] = 0, len(x)
    vertices = _hull_vertices(x, y, edges)
    if n == 2:
        return _line_below(x[vertices], y[vertices], float(x.mean()), knots)

    def weights(at: np.ndarray) -> coo_array:
        left = np.clip(np.searchsorted(knots, at, side="right") - 1, 0, n - 2)
        share = (at - knots[left]) / (knots[left + 1] - knots[left])
        rows = np.arange(len(at))
        return coo_array(
            (np.concatenate([1 - share, share]), (np.tile(rows, 2), np.concatenate([left, left + 1]))),
            shape=(len(at), n),
        )

    where = window_minima(x, y, max(4, 4 * (n - 1)))
    gain = np.asarray(weights(x[where]).sum(axis=0)).ravel() / len(where)
    below = weights(x[vertices])
    prices = [(_differences(knots, 2), penalty * BEND_SHARE / (n - 2))]
    if n > 3:
        prices.append((_differences(knots, 3), penalty / (n - 3)))
    unrest = vstack([rows for rows, _ in prices])
    price = np.concatenate([np.full(rows.shape[0], each) for rows, each in prices])
    unit = eye_array(len(price))
    nothing = coo_array((len(vertices), len(price)))
    matrix = vstack([hstack([below, nothing]), hstack([unrest, -unit]), hstack([-unrest, -unit])]).tocsr()
    limit = np.concatenate([y[vertices], np.zeros(2 * len(price))])
    cost = np.concatenate([-gain, price])
    bounds = [(None, None)] * n + [(0, None)] * len(price)
    # Seen once in thousands: the simplex method gave up on a programme that the other one solves.
    for method in ("highs", "highs-ipm"):
        found = linprog(cost, A_ub=matrix, b_ub=limit, bounds=bounds, method=method)
        if found.success:
            break
    else:
        raise ClockError("the envelope of two clocks has no solution", found=str(found.message))
    return np.asarray(found.x[:n])


def _differences(knots: np.ndarray, order: int) -> Any:
    """Return the matrix from values at equidistant knots to changes of slope in ppb (order 2), or to their changes (3)."""
    from scipy.sparse import coo_array

    coefficients = {2: (1.0, -2.0, 1.0), 3: (-1.0, 3.0, -3.0, 1.0)}[order]
    rows = np.arange(len(knots) - order)
    per_second = 1e9 / (knots[1] - knots[0])
    return coo_array(
        (
            np.repeat(coefficients, len(rows)) * per_second,
            (np.tile(rows, order + 1), np.concatenate([rows + at for at in range(order + 1)])),
        ),
        shape=(len(rows), len(knots)),
    )


def _line_below(x: np.ndarray, y: np.ndarray, middle: float, knots: np.ndarray) -> np.ndarray:
    """Return the line through the hull's edge below the middle of the packets: the highest line below them all."""
    if len(x) == 1:
        return np.full(len(knots), y[0])
    edge = int(np.clip(np.searchsorted(x, middle, side="right") - 1, 0, len(x) - 2))
    return y[edge] + (knots - x[edge]) * (y[edge + 1] - y[edge]) / (x[edge + 1] - x[edge])


def window_minima(x: np.ndarray, y: np.ndarray, n_windows: int) -> np.ndarray:
    """Return the index of the lowest point of each of equally long windows that has any."""
    window = np.minimum((x * (n_windows / x[-1])).astype(np.int64), n_windows - 1)
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    lowest = np.repeat(np.minimum.reduceat(y, starts), np.diff(starts, append=len(y)))
    at = np.flatnonzero(y == lowest)
    return at[np.diff(window[at], prepend=-1) > 0]
