"""The same on a GPU: `make test-gpu`."""

import pytest
import torch
from answers import gradient, mixed_rows, scored, short_rows, slow_scores
from decoding.reference import some_model

from recllm.actor import AnswerRows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(rows: AnswerRows) -> AnswerRows:
    parts = (getattr(rows, name) for name in AnswerRows.__dataclass_fields__)
    return AnswerRows(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in parts))


@pytest.mark.parametrize("layout", ["row", "cache", "padded", "auto"])
@pytest.mark.parametrize("make", [mixed_rows, short_rows])
def test_values_and_slopes_of_the_cpu(make, layout):
    plain, model = some_model(), some_model().cuda()
    wanted = slow_scores(plain, make(), "children")
    logps, entropies, scorer = scored(model, on_gpu(make()), layout=layout)
    torch.testing.assert_close(logps.cpu(), wanted[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(entropies.cpu(), wanted[1], atol=1e-3, rtol=1e-3)
    weights = torch.linspace(-1, 2, logps.numel()).view_as(logps)
    (logps * weights.cuda() + entropies * weights.cuda()).sum().backward()
    ours = torch.cat([parameter.grad.flatten().double().cpu() for parameter in model.parameters()])
    theirs = gradient(plain, *wanted)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    assert layout in (scorer.layout_run, "auto")


@pytest.mark.parametrize("layout", ["row", "cache", "padded"])
def test_bf16_runs_and_stays_near(layout):
    wanted = slow_scores(some_model(), mixed_rows(), "children")[0]
    found = scored(some_model().cuda().bfloat16(), on_gpu(mixed_rows()), layout=layout)[0]
    torch.testing.assert_close(found.cpu(), wanted, atol=0.2, rtol=0)
    found.sum().backward()
