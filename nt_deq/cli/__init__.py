"""The command `nt-deq`: kernels of infinite depth, and what they predict, without writing Python.

A package of its own, because importing any part of `nt_deq` imports JAX and neural-tangents, and
`nt-deq --help` should not take their seconds: the commands import them when they run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from nt_deq.cli.files import end_when_interrupted
from nt_deq.errors import (
    LostProcessError,
    NoEquilibriumError,
    NotConvergedError,
    NotPositiveDefiniteError,
    NtDeqError,
)

COMMANDS = "kernel", "predict", "compare", "phase", "info"  # a module each
NO_RESULT, BAD_INPUT, OUR_MISTAKE = 1, 2, 3

_EPILOG = """\
examples:
  nt-deq kernel X.npy --out K.npy                    the kernel of the inputs in X.npy, (n, d)
  nt-deq predict X.npy y.npy X_test.npy --out p.npy  regression, or classification of integers
  nt-deq predict X.csv y.csv X_test.csv --out p.csv  the same of tables
  nt-deq compare                                     finite networks beside the infinite one
  nt-deq phase --activation tanh                     for which W_std there is an equilibrium
  nt-deq info                                        versions and devices, for a bug report

exit codes: 0 done; 1 there is no result (no equilibrium, not converged, not enough memory);
2 a flag or a file cannot be right; 3 a mistake of nt-deq's; 130 interrupted by Ctrl-C, 143 by
SIGTERM: files are as they were. An error is one line on stderr; --debug shows where it was raised.

`nt-deq COMMAND --help` tells about a command and its flags.
"""


class _Parser(argparse.ArgumentParser):
    """Tells an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        _tell(f"{message} ({self.prog} --help lists the flags)")
        raise SystemExit(BAD_INPUT)


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(
        prog="nt-deq",
        description="Infinitely wide deep equilibrium models, z* = W φ(z*) + U x + b: their NNGP "
        "kernels\nand NTKs, what they predict, and finite networks to compare with.",
        epilog=_EPILOG,
        **options,
    )
    version = f"nt-deq {importlib.metadata.version('nt-deq')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"nt_deq.cli.{name}")
        description, _, examples = f"{module.__doc__}".partition("\nExamples:\n")
        summary = description.partition(".\n")[0]
        command = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=description,
            epilog=f"examples:\n{examples}",
            **options,
        )
        command.add_argument("--debug", action="store_true", help="show where an error was raised")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _error(message: object) -> str:
    return f"nt-deq: error: {' '.join(str(message).split())}"


def _tell(message: object) -> None:
    print(_error(message), file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: words of the command line; `None` is that of the process, which signals then end.

    Returns:
      The exit code. Words that cannot be parsed, `--help` and `--version` raise `SystemExit`.
    """
    if argv is None:
        end_when_interrupted(lambda: _error("interrupted; files are as they were."))
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        code = _exit_code(error)
        _tell(error if code != OUR_MISTAKE else _report(error))
        return code
    return 0


def _exit_code(error: Exception) -> int:
    """Whether there is no result, or what was asked for cannot be right, or it is our mistake."""
    no_result = NoEquilibriumError, NotConvergedError, NotPositiveDefiniteError, LostProcessError
    if isinstance(error, (*no_result, MemoryError)):
        return NO_RESULT
    return BAD_INPUT if isinstance(error, NtDeqError | OSError) else OUR_MISTAKE


def _report(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {error} This is a mistake of nt-deq's: please report it, with "
        "what --debug and `nt-deq info` show."
    )
