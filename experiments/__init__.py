"""Experiments: `python -m experiments.claims.NAME --workdir=DIR`, `experiments.train.NAME`.

`experiments.all` runs every claim and puts what they found on one page.
"""

import nt_deq  # noqa: F401  # before neural-tangents, which it makes importable
