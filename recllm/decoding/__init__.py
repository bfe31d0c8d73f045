"""The engine for short structured answers: constrained beams and samples over a prompt computed once."""

from recllm.decoding.decoder import Answers, Decoder, beam_search
from recllm.decoding.head import Normaliser
from recllm.decoding.prompts import common_prefix

__all__ = ["Answers", "Decoder", "Normaliser", "beam_search", "common_prefix"]
