"""`python -m minidiff` is the command `minidiff`."""

import sys

from minidiff.cli import main

sys.exit(main())
