"""python -m attnpatch."""

from __future__ import annotations

import sys

from attnpatch.cli import main

sys.exit(main())
