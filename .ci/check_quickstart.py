"""Fail unless a quickstart's results hold what the README promises.

Usage: python .ci/check_quickstart.py WORKDIR
"""

import json
import sys
from pathlib import Path

results = json.loads((Path(sys.argv[1]) / "report" / "results.json").read_text())
cells = {(cell["arm"], cell["task"]): cell for cell in results["cells"]}
trained, base = cells["quickstart", "synth_arithmetic"], cells["base", "synth_arithmetic"]
for name, cell in (("trained", trained), ("untrained", base)):
    print(f"{name}: {cell['accuracy_flexible']:.3f} of {cell['n']}, no answer {cell['no_answer_rate']:.3f}")
if not (trained["n"] == base["n"] == 500 and trained["accuracy_flexible"] >= 0.95 and base["accuracy_flexible"] <= 0.05):
    sys.exit("the quickstart's student does not reach 0.95 on 500 IID questions, or the untrained one is above 0.05")
missing = [f"{cell['arm']}/{cell['task']}" for cell in results["cells"] if cell["n"] < 200 and not cell.get("small_n")]
if missing:
    sys.exit(f"cells with n < 200 that do not say why: {', '.join(missing)}")
