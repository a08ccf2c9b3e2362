"""Task evaluation through lm-eval: its tasks and metrics, this project's models.

lm-eval asks three things of a language model: how probable a continuation of a context is, how probable a
text is, and what the model would write. The first two are the ``Scorer``, the third is ``generation``; what
is between them and lm-eval is here. Only ``adapter``, ``catalog`` and ``harness`` import lm-eval, which takes
seconds.

Invariant: texts become ids, and ids answers, as in lm-eval's own model ``hf``, so that a model's scores are
the same through both, to float rounding.
"""
