"""How sure a loss is, and the difference between two: ends of 95 % intervals over rows of text.

The rows of a whole split are too many to be drawn anew, so these are intervals by Student's t. They
are None for fewer than FEWEST_ROWS rows.
"""

import math

from gptlite.core.evaluate import Measured, variance_of_sum
from gptlite.measure.intervals import mean_bounds


def loss_bounds(of: Measured) -> list[float] | None:
    return mean_bounds(of.loss, standard_error(of), count_rows(of))


def difference_on_rows(one: Measured, other: Measured) -> list[float] | None:
    """Of two losses on the same rows, which are compared in pairs: what makes a row hard for both
    does not count."""
    targets = one.by_row[1]
    variance = variance_of_sum(one.by_row[0] - other.by_row[0], targets)
    error = math.sqrt(variance) / one.targets
    return mean_bounds(one.loss - other.loss, error, count_rows(one))


def difference_of_rows(one: Measured, other: Measured) -> list[float] | None:
    """Of two losses, each on rows of its own."""
    error = math.hypot(standard_error(one), standard_error(other))
    return mean_bounds(one.loss - other.loss, error, min(count_rows(one), count_rows(other)))


def standard_error(of: Measured) -> float:
    return math.sqrt(of.nats_variance) / of.targets


def count_rows(of: Measured) -> int:
    """The rows that have a target."""
    return int((of.by_row[1] > 0).sum())
