"""Experiments, one launcher a claim: `python -m experiments.NAME --workdir=DIR`.

Shared by the launchers: `launch` (flags, errors, Ctrl-C), `workdir` (what is kept in DIR), `data`
(images and labels), `report` (tables, fits, figures).
"""

import nt_deq  # noqa: F401  # before neural-tangents, which it makes importable
