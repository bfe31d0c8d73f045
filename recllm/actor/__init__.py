"""Log-probabilities of answers with gradient, each prompt computed once for its answers."""

from recllm.actor.layouts import Layout
from recllm.actor.rows import AnswerRows
from recllm.actor.scorer import AnswerScorer

__all__ = ["AnswerRows", "AnswerScorer", "Layout"]
