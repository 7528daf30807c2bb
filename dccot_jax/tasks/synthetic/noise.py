"""When the noisy teacher errs: a systematic misreading of one wording, fixed here and never fitted to a result.

  P(feature)          = 0.48   `family.P_FEATURE`, by construction of the questions
  P(wrong | feature)  = 0.75   `P_WRONG_GIVEN_FEATURE`
  P(wrong | no feature) = 0
  P(wrong)            = 0.36

Which questions with the feature are misread follows from a hash of the skeleton, which a student cannot learn: a greedy
student of all noisy traces imitates the majority and errs wherever the feature occurs. Among the correct noisy traces
the feature still occurs in 0.48 * 0.25 / 0.64 = 19 %, so a student of these can learn to read it properly.

The features: arithmetic, an accident ("drops 4") is read as a gain; objects, a closing trade is read as no change;
calendar, a week is taken for 5 days. A misread answer is never accidentally right.
"""

from __future__ import annotations

from typing import Any

from dccot_jax.tasks.synthetic.family import Family, unit_hash

P_WRONG_GIVEN_FEATURE = 0.75


def is_misread(family: Family[Any, Any], problem: Any, draw: tuple[int, int] | None = None) -> bool:
    """Whether the noisy teacher misreads `problem`.

    `draw` is (seed, sample_index) of a repeated sample: each draw decides anew, with the same probability. None, the
    first sample, depends on the skeleton alone, so a rephrased question is misread exactly when its original is.
    """
    if not family.has_feature(problem):
        return False
    return unit_hash("misread/1", family.name, family.skeleton(problem), list(draw or ())) < P_WRONG_GIVEN_FEATURE
