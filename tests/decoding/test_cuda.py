"""The same on a GPU: `make test-gpu`."""

import pytest
import torch
from reference import LEVELS, SIZES, some_codes, some_model, some_prompts

from recllm.decoding import Decoder
from recllm.trie import SemanticIdTrie

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("normaliser", ["full", "level", "children"])
@pytest.mark.parametrize("seed", range(5))
def test_the_ranking_of_the_cpu(seed, normaliser):
    codes, prompts = some_codes(seed), some_prompts(seed)
    trie = SemanticIdTrie.from_codes(codes, SIZES)
    expected = Decoder(some_model(seed), LEVELS, trie, normaliser=normaliser).beams(prompts, 20)
    found = Decoder(some_model(seed).cuda(), LEVELS, trie, normaliser=normaliser).beams(prompts, 20)
    torch.testing.assert_close(found.scores, expected.scores, atol=2e-3, rtol=0)
    assert (found.rows == expected.rows).double().mean() > 0.95  # near ties may swap


def test_bf16_and_samples_run():
    decoder = Decoder(some_model().cuda().bfloat16(), LEVELS, SemanticIdTrie.from_codes(some_codes(), SIZES))
    assert (decoder.beams(some_prompts(0), 20).rows >= 0).all()
    for replacement in (True, False):
        found = decoder.samples(some_prompts(0), 8, replacement=replacement, exclude=[[0], [1, 2], []])
        assert (found.rows >= 0).all()
        assert not (found.rows[0] == 0).any()
