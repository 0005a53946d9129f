"""`python -m nt_deq.cli` is `nt-deq`."""

import sys

from nt_deq.cli import main

sys.exit(main())
