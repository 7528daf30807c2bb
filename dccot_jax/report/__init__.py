"""The report: results.json, samples, a terminal table and one self-contained HTML page."""
