"""Tasks: where questions come from, how they are asked, and how answers are judged."""
