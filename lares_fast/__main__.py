"""``python -m lares_fast`` is ``lares-fast``."""

import sys

from lares_fast.cli import main

sys.exit(main())
