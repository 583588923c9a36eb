"""What only a GPU can show: flex attention by its kernel, and captured steps; skipped without one.

The same on a CPU, by other means: test_model.py and test_generate.py.
"""

from contextlib import nullcontext

import pytest
import torch

import generate as generate_module
from generate import generate
from model import LanguageModel, ModelConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def model_on_gpu(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=512, d_model=256, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=512, max_seq_len=512,
                 tie_embeddings=False)
    model = LanguageModel(ModelConfig(**{**shape, **changes})).cuda()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0 if weight.ndim == 2 else 1.0)           # what is small hides faults
    return model


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("length", [512, 300])
def test_packed_rows_compiled_are_those_with_a_dense_mask(length, dtype, tolerance):
    model = model_on_gpu(qk_norm=True)
    ids, targets = torch.randint(512, (2, 4, length), device="cuda")
    doc_ids = (torch.rand(4, length, device="cuda") < 0.02).cumsum(1)
    found = []
    for forward in (model, torch.compile(model)):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            total, _ = forward(ids, targets, doc_ids)
        found.append([total.detach(), *torch.autograd.grad(total, list(model.parameters()))])
    for want, got in zip(*found):
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_are_the_same_ones_not_captured(dtype, monkeypatch):
    """While rows end and leave, with weights that autocast casts."""
    model, options = model_on_gpu(), dict(seeds=list(range(9)), stop_ids=range(8), compile=True)
    prompts = [torch.randint(512, (n,)).tolist() for n in range(1, 10)]
    with torch.autocast("cuda", dtype) if dtype != torch.float32 else nullcontext():
        got = generate(model, prompts, 200, **options)
        monkeypatch.setattr(generate_module, "capture", lambda function, argument: function)
        assert generate(model, prompts, 200, **options) == got
    assert len({len(row) for row in got}) > 2, "rows end together: dropping is not tried"
