"""Regenerate the README's table and picture from a finished quickstart.

  dccot run --config=configs/quickstart.py --workdir=runs/quickstart
  python docs/figures.py runs/quickstart

Writes docs/report.png (the top of report.html, taken with headless Chromium, if one is installed) and the table between the
markers `<!-- results -->` in README.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPEN, CLOSE = "<!-- results -->", "<!-- /results -->"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars")


def table(results: dict) -> str:
    """Markdown table: one row per task, untrained and trained student side by side."""
    cells = {(cell["arm"], cell["task"]): cell for cell in results["cells"]}
    heads = ("task", "relation", "n", "untrained", "trained [95 % interval]", "mean tokens", "truncated", "no answer", "gold NLL")
    lines = ["| " + " | ".join(heads) + " |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    for group, relation in {"iid": "IID", "ood": "OOD", "cross": "cross-domain"}.items():
        for task in results["groups"].get(group, ()):
            base, trained = cells["base", task], cells["quickstart", task]
            low, high = trained["accuracy_flexible_interval"]
            row = (
                task,
                relation,
                trained["n"],
                f"{base['accuracy_flexible']:.1%}",
                f"{trained['accuracy_flexible']:.1%} [{low:.1%}, {high:.1%}]",
                f"{trained['mean_completion_tokens']:.0f}",
                f"{trained['truncation_rate']:.1%}",
                f"{trained['no_answer_rate']:.1%}",
                f"{base['gold_nll']['mean']:.2f} → {trained['gold_nll']['mean']:.2f}",
            )
            lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def main(workdir: Path) -> None:
    results = json.loads((workdir / "report" / "results.json").read_text())
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(OPEN)
    _, after = rest.split(CLOSE)
    readme.write_text(f"{before}{OPEN}\n{table(results)}\n{CLOSE}{after}")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("README.md written; no Chromium here, docs/report.png left as it was")
    with tempfile.TemporaryDirectory() as profile:
        page = (workdir / "report" / "report.html").resolve().as_uri()
        picture = ROOT / "docs" / "report.png"
        size = "--window-size=1200,1500"
        subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={profile}", f"--screenshot={picture}", size, page], check=True, capture_output=True
        )
    print(f"wrote {readme} and {picture}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "report" / "results.json").exists():
        sys.exit("usage: python docs/figures.py WORKDIR, of a finished quickstart (WORKDIR/report/results.json)")
    main(Path(sys.argv[1]))
