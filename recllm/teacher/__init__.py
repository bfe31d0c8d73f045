"""Who writes text: templates (offline), any OpenAI-compatible server, or a local vLLM; cached, resumable, estimated."""

from recllm.teacher.cache import cached_write
from recllm.teacher.config import TeacherConfig
from recllm.teacher.estimate import Estimate, estimate
from recllm.teacher.openai_server import OpenAITeacher
from recllm.teacher.request import OfflineTeacher, Request, Sampling, Teacher
from recllm.teacher.vllm_batch import VLLMTeacher

__all__ = [
    "Estimate", "OfflineTeacher", "OpenAITeacher", "Request", "Sampling", "Teacher", "TeacherConfig", "VLLMTeacher",
    "cached_write", "estimate",
]  # fmt: skip
