"""The file of a benchmark's records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def written(records: Iterable[dict[str, Any]], output: Path) -> Iterator[dict[str, Any]]:
    """Write each record as soon as it is measured; the first one replaces an existing file.

    Args:
        records: measures each record when it is asked for.
        output: path of the JSONL file, unchanged if the first measurement fails.

    Returns:
        The records, each after it is written.
    """
    mode = "w"
    for record in records:
        with output.open(mode, encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        mode = "a"
        yield record
