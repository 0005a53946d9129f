"""Every exception of the package: messages name the argument, its value, bound and remedy."""

from __future__ import annotations


class NtDeqError(Exception):
    """What the package itself raises, about what its caller can change."""


class ArgumentError(NtDeqError, ValueError):
    """An argument cannot be right."""


class InputError(NtDeqError, ValueError):
    """A flag or a file of a command cannot be right."""


class NoEquilibriumError(NtDeqError, ValueError):
    """The network has no stable equilibrium: `W_std² E[φ'(z*)²] >= 1` for some input."""


class NotConvergedError(NtDeqError, RuntimeError):
    """The equilibrium may exist, but `max_steps` steps of the solver did not reach it."""


class NotPositiveDefiniteError(NtDeqError, RuntimeError):
    """The kernel matrix, with what is added to its diagonal, is not positive definite."""


class StoreError(NtDeqError, RuntimeError):
    """A store cannot be used or written; what is in it stays as it is."""


class ModelError(NtDeqError, RuntimeError):
    """A saved model cannot be used or written; what is there stays as it is."""


class LostProcessError(NtDeqError, RuntimeError):
    """Another process of a mesh did not answer: start all of them again."""
