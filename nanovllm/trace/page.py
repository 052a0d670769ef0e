"""A page that shows the records of a run."""

from __future__ import annotations

import json
from pathlib import Path


def write_page(records: list[dict[str, object]], path: Path) -> None:
    text = json.dumps(records).replace("<", "\\u003c")
    path.write_text(f"<script type='application/json'>{text}</script>", encoding="utf-8")
