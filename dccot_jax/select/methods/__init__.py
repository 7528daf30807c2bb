"""One file per published selection method, or per family of simple ones; `select/selectors.py` lists them by name."""
