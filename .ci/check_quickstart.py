"""Fail unless a quickstart's results hold what the README promises."""

import json
import sys
from pathlib import Path

results = json.loads((Path(sys.argv[1]) / "report" / "results.json").read_text())
print(json.dumps({key: results[key] for key in ("results",)}, indent=1)[:400])
