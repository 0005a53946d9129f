"""Marks that many tests share."""

from collections.abc import Collection, Iterable

import pytest


def slow_except(quick: Collection, values: Iterable) -> list:
    """Values for `parametrize`, of which `quick` alone run in `make test`."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]
