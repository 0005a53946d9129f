"""How a launcher starts and ends: flags out of a dataclass, errors of one line, Ctrl-C, SIGTERM.

@dataclass(frozen=True)
class Settings(launch.Settings):
    n_train: int = launch.flag(128, "training inputs", at_least=1)

def job(settings: Settings, workdir: Workdir) -> None: ...

if __name__ == "__main__":
    launch.main(Settings, job)
"""

from __future__ import annotations

import dataclasses
import math
import operator
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import psutil
from absl import app, flags, logging

from experiments.lib.workdir import Workdir
from nt_deq.cli.files import end_when_interrupted
from nt_deq.errors import InputError, NtDeqError

flags.disclaim_key_flags()  # they are the launcher's, and its `--help` shows them


def flag(default: Any, help: str, **bounds: Any) -> Any:
    """A field of `Settings`.

    Args:
      default: its value where none is given.
      help: what `--help` says.
      bounds: `at_least`, `above`, `at_most` or `below`, of every number; `one_of`, what there is to
        choose from; `different`, how many numbers a tuple has at least (1), none of them twice.
    """
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of a launcher's settings; an instance is within its bounds.

    Fields are of type `int`, `float`, `bool`, `str`, one of these or `None`, or `tuple[int, ...]`
    (on the command line: separated by commas).

    Raises:
      InputError: a value is out of bounds.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _check(f"--{field.name}={format_value(value)}", value, field.metadata)


def _check(shown: str, value: Any, bounds: Mapping[str, Any]) -> None:
    numbers = (value,)
    if isinstance(value, tuple):
        numbers, least = value, bounds.get("different", 1)
        if len(set(numbers)) < max(least, len(numbers)):
            raise InputError(f"{shown} must be at least {least} different numbers, none twice.")
    if isinstance(numbers[0], int | float):
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"{shown} is not a finite number.")
        for name, compare, number, wrong in (
            ("at_least", operator.ge, min(numbers), "small"),
            ("above", operator.gt, min(numbers), "small"),
            ("at_most", operator.le, max(numbers), "large"),
            ("below", operator.lt, max(numbers), "large"),
        ):
            if name in bounds and not compare(number, bounds[name]):
                bound = f"{name.replace('_', ' ')} {bounds[name]:.4g}"
                raise InputError(f"{shown} is too {wrong}: it must be {bound}.")
    if "one_of" in bounds and value not in bounds["one_of"]:
        raise InputError(f"{shown} is unknown: use one of {', '.join(bounds['one_of'])}.")


def format_value(value: Any) -> str:
    """A setting as one writes it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


AnySettings = TypeVar("AnySettings", bound=Settings)


def main(
    settings_type: type[AnySettings],
    job: Callable[[AnySettings, Workdir], None],
    full: Mapping[str, Any] | None = None,
) -> None:
    """Runs a launcher; ends the process with 0, 1 (an error), or 128 + the signal that ended it.

    Args:
      settings_type: its flags.
      job: what it does.
      full: settings that `--config=full` stands for, where no flag of their own is given.
    """
    flags.DEFINE_string("workdir", None, "directory for results; what is finished is kept there")
    if full:
        shown = " ".join(f"--{name}={format_value(value)}" for name, value in full.items())
        flags.DEFINE_enum("config", None, ["full"], f"full: other defaults ({shown})")
    _define_flags(settings_type)
    logging.set_verbosity(logging.WARNING)  # JAX tells of every kind of device it does not find

    def run(argv: Sequence[str]) -> int:
        try:
            if argv[1:]:
                raise InputError(f"{argv[1]!r} is not a flag; flags are written --name=value.")
            if not flags.FLAGS.workdir:
                raise InputError("--workdir is missing: name a directory for the results.")
            settings = _read_flags(settings_type, full if full and flags.FLAGS.config else {})
            workdir = _open(flags.FLAGS.workdir)
        except InputError as error:
            return _fail(error)
        end_when_interrupted(partial(_interrupt, workdir))
        try:
            job(settings, workdir)
        except (NtDeqError, MemoryError) as error:
            return _fail(error)
        return 0

    app.run(run, flags_parser=_parse)


def _interrupt(workdir: Workdir) -> str:
    """Ends the launchers that this one has started; says what is kept."""
    for child in psutil.Process().children(recursive=True):
        child.terminate()
    kept = ", ".join(workdir.kept) or "nothing yet"
    return f"Interrupted. Kept in {workdir.path}: {kept}; the same command goes on there."


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())} (--help lists the flags)")


def _open(path: str) -> Workdir:
    try:
        workdir = Workdir(path)
    except OSError as error:
        raise InputError(
            f"--workdir={path} cannot be written to ({error.strerror}): name another directory."
        ) from error
    workdir.lock()
    return workdir


_DEFINE: dict[Any, Callable[..., Any]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
    str: flags.DEFINE_string,
    tuple[int, ...]: flags.DEFINE_list,
}


def _define_flags(settings_type: type[Settings]) -> None:
    types = typing.get_type_hints(settings_type)
    for field in dataclasses.fields(settings_type):
        kind = types[field.name]
        if type(None) in typing.get_args(kind):
            (kind,) = set(typing.get_args(kind)) - {type(None)}
        default: Any = field.default
        if isinstance(default, tuple):
            default = [str(number) for number in default]
        _DEFINE[kind](field.name, default, field.metadata["help"])


def _read_flags(settings_type: type[AnySettings], config: Mapping[str, Any]) -> AnySettings:
    values = {}
    for field in dataclasses.fields(settings_type):
        given = flags.FLAGS[field.name]
        value = config.get(field.name, given.value) if not given.present else given.value
        if isinstance(value, list):
            try:
                value = tuple(int(number) for number in value)
            except ValueError:
                raise InputError(
                    f"--{field.name}={','.join(value)} must be integers separated by commas."
                ) from None
        values[field.name] = value
    return settings_type(**values)
