"""Kernel regression where the kernel does not fit into memory, or onto one machine."""

from nt_deq.large.cg import NotPositiveDefiniteError, Solution
from nt_deq.large.plan import Plan
from nt_deq.large.regression import KernelRegression
from nt_deq.large.store import StoreError

__all__ = ["KernelRegression", "NotPositiveDefiniteError", "Plan", "Solution", "StoreError"]
