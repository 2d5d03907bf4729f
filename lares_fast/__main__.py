"""Run the command ``lares-fast`` as ``python -m lares_fast``."""

import sys

from lares_fast.cli import main

sys.exit(main())
