"""The tree layout on a GPU; skipped without one, a failure under SELFSTEER_REQUIRE_GPU=1."""

import os
import random
from typing import Any

import pytest
import torch
import transformers as hf

from selfsteer.models import tree
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.score import batch_logps, pad

if not torch.cuda.is_available():
    if os.environ.get("SELFSTEER_REQUIRE_GPU") == "1":
        raise RuntimeError("SELFSTEER_REQUIRE_GPU=1, but torch sees no GPU")
    pytest.skip("torch sees no GPU", allow_module_level=True)

COMMON: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**COMMON),
    "mistral": lambda: hf.MistralConfig(**COMMON, sliding_window=64),
    "gemma2": lambda: hf.Gemma2Config(**COMMON, sliding_window=64, attn_logit_softcapping=20.0),
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_values_and_gradients_equal_padded(family: str, autocast: bool) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).cuda()
    forest = []
    for _ in range(6):
        prompt = tuple(rng.randrange(1000) for _ in range(rng.randint(20, 150)))
        forest += [
            EncodedSequence(prompt, tuple(rng.randrange(1000) for _ in range(rng.randint(1, 200))))
            for _ in range(3)
        ]
    grads = []
    device = torch.device("cuda")
    for batch, prepare in ((pad(forest, 0), tree.uninstall), (tree.plant(forest), tree.install)):
        prepare(model)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logps = batch_logps(model, batch.to(device))
        logps.mean().backward()
        grads.append((logps.detach(), [p.grad.clone() for p in model.parameters()]))
    assert not tree._flex_errors
    tolerance = 0.1 if autocast else 1e-4
    assert float((grads[0][0] - grads[1][0]).abs().max()) < tolerance
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert float((a - b).norm() / a.norm().clamp(min=1e-12)) < (0.05 if autocast else 1e-3)
