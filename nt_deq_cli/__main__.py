"""`python -m nt_deq_cli` is `nt-deq`."""

import sys

from nt_deq_cli import main

sys.exit(main())
