"""``python -m mla_numba``: see `mla_numba.demo`."""

import sys

from .demo import main

sys.exit(main())
