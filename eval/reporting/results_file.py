"""Read the JSON that a report is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drpo.data.records import DataError


def read_results(file: Path, what: str, command: str) -> Any:
    """Read the results of `command`; raise DataError, naming `what` they are, when there are none or it is no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"no {what} at {file}: {error.strerror}; {command} writes one") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); {command} writes it anew") from None
