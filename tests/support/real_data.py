"""Where real TL;DR and HH files are, for the tests that are skipped without them."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(os.environ.get("DRPO_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
