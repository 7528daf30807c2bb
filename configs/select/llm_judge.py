"""LLM-as-a-judge: keep what a teacher grades well.

Source: the judge selection of DC-CoT (arXiv 2505.18759) with its criteria coherence, correctness and clarity, after I-SHEEP (arXiv
2408.08072). Prompt, scale and threshold are not public: here 1 to 10, the mean of the criteria, kept from 8 on (sweep 6 to 9 with
`select.steps`). Two judges, so that the report shows Cohen's kappa; the scripted ones stand in for language models.
Cost: no model pass; one request per row and judge, and up to two more where a reply is no verdict.
Keeps: rows whose mean grade over criteria and judges is at least 8.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_llm_judge"
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "noisy"})
    c.score.signals = ("judge", "judge_clarity", "judge_coherence", "judge_correctness")
    c.score.judge.judges = ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "noisy"})
    c.select.steps = ({"name": "threshold", "signal": "judge", "min": 8},)
    return c
