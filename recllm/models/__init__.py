"""Models that recllm makes itself."""
