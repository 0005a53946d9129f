"""Marks that many tests share."""

from collections.abc import Collection, Iterable

import pytest


def slow_except(quick: Collection, values: Iterable) -> list:
    """Values for `parametrize`, or tuples of them, of which `quick` alone run in `make test`."""

    def slow(v):
        return pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow)

    return [v if v in quick else slow(v) for v in values]
