"""Causal LMs of other makes than Qwen3, untrained."""

from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

COMMON = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)  # noqa: C408
OTHERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)),
    "mistral with a window": lambda: MistralForCausalLM(
        MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=5)
    ),
    "gemma2 with soft caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=16, sliding_window=5, final_logit_softcapping=2.0)
    ),
}
