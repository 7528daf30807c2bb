"""MinHash: drop traces that nearly repeat another one word for word.

Source: Broder 1997, On the Resemblance and Containment of Documents; the usual first step of data pipelines.
Cost: no model pass.
Keeps: what shares less than 70 % of its 5-grams with every kept trace, the first by id of each family.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_minhash"
    c.select.steps = ({"name": "minhash", "text": "target", "ngram": 5, "threshold": 0.7},)
    return c
