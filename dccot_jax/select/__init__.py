"""Scoring and selection: signals of the student, and pure selectors over them."""
