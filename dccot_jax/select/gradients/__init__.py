"""The gradient kind of signals: `grand` and `less`."""
