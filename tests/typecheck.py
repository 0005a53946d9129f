"""What `tests/conftest.py` has every call of the package checked by."""

from beartype import BeartypeConf, beartype

# As type checkers do, an `int` is taken for a `float`.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
