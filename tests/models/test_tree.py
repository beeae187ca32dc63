"""The tree layout gives the numbers of the padded one, for every family of attention."""

import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from selfsteer.data.records import Message, Principles, Triple
from selfsteer.errors import ConfigError
from selfsteer.models import head, tree
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.head import head_scores
from selfsteer.models.load import LoadedModel
from selfsteer.models.save import add_lora, disable_dropout, save_model
from selfsteer.models.score import (
    batch_logps,
    batches,
    pad,
    score_records,
    score_sequences,
    settle_layout,
    tree_difference,
)
from selfsteer.recipe.sections import Lora

VOCABULARY = 97
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = {**SHARED, "num_key_value_heads": 2}
WINDOW: dict[str, Any] = {**GROUPED, "head_dim": 8, "sliding_window": 5}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=5),
    # softcaps low enough to bend these small scores
    "gemma2": lambda: hf.Gemma2Config(
        **WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(**WINDOW, query_pre_attn_scalar=8),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SHARED),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    ),
    "granite": lambda: hf.GraniteConfig(**GROUPED, logits_scaling=4.0),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


def forest(seed: int = 0, queries: int = 3) -> list[EncodedSequence]:
    """Prompts of 3 to 12 tokens with 1 to 3 responses of 1 to 9, one of them twice."""
    rng = random.Random(seed)
    out = []
    for _ in range(queries):
        prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(3, 12)))
        for _ in range(rng.randint(1, 3)):
            answer = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(2, 9)))
            out.append(EncodedSequence(prompt, answer))
    out.append(out[-1])
    out.append(EncodedSequence(out[0].prompt_ids, (7,)))
    return out


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def weights(sequences: list[EncodedSequence], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    count = sum(len(s.response_ids) for s in sequences)
    return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)) for n in a)


def test_values_and_gradients_equal_the_models_own_padded_forward(model: Any) -> None:
    sequences = forest()
    g = weights(sequences)
    expected = batch_logps(model, pad(sequences, 0))
    theirs = gradients(model, (expected * g).sum())
    tree.install(model)
    found = batch_logps(model, tree.plant(sequences))
    ours = gradients(model, (found * g).sum())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert relative(theirs, ours) < 1e-4


class PlainNorm(torch.nn.Module):
    """An RMS norm that keeps its input's precision, with the weights of another."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
        self.eps = float(eps or 1e-6)
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * (self.weight + self.offset)


def keep_precision(model: Any) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, PlainNorm(child))


def test_in_float64_shared_and_lone_sequences_agree_to_rounding(model: Any) -> None:
    """Loss and every gradient to 1e-12, on a model none of whose parts works in float32.

    The other side is each sequence alone in its own row: no sharing, no neighbours.
    """
    keep_precision(model)
    model.double()
    tree.install(model)
    sequences = forest(1)
    g = weights(sequences, torch.float64)
    alone = torch.cat([batch_logps(model, tree.plant([s])) for s in sequences])
    theirs = gradients(model, (alone * g).sum())
    found = batch_logps(model, tree.plant(sequences))
    ours = gradients(model, (found * g).sum())
    assert found.dtype == torch.float64
    assert float(((found - alone) / alone).detach().abs().max()) < 1e-12
    # a gradient that is zero by symmetry (a key's bias) has only rounding to compare
    for name in theirs:
        gap = float((theirs[name] - ours[name]).norm())
        assert gap < 1e-12 * max(float(theirs[name].norm()), 1.0), name


def test_float64_rows_equal_the_padded_forward(model: Any) -> None:
    """Against the model's own attention, where that keeps float64 (Gemma 2's eager does not)."""
    keep_precision(model)
    model.double()
    sequences = forest(2)

    def logits(s: EncodedSequence) -> Tensor:
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
        out = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        at = torch.arange(len(s.prompt_ids) - 1, len(s) - 1)
        return out[at, torch.tensor(s.response_ids)]

    expected = torch.cat([logits(s) for s in sequences]).detach()
    tree.install(model)
    found = batch_logps(model, tree.plant(sequences)).detach()
    bound = 1e-5 if model.config.model_type == "gemma2" else 1e-12
    assert float(((found - expected) / expected).abs().max()) < bound


def test_order_neighbours_and_row_size_change_nothing(model: Any) -> None:
    keep_precision(model)
    model.double()
    tree.install(model)
    sequences = forest(4, queries=5)
    whole = score_sequences(model, sequences, layout="tree", batch_size=100)
    small = score_sequences(model, sequences, layout="tree", batch_size=1)
    shuffled = list(range(len(sequences)))
    random.Random(0).shuffle(shuffled)
    mixed = score_sequences(model, [sequences[i] for i in shuffled], layout="tree", batch_size=4)
    for i, piece in enumerate(whole):
        torch.testing.assert_close(small[i], piece, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(mixed[shuffled.index(i)], piece, rtol=1e-11, atol=1e-12)


def test_a_response_does_not_see_its_siblings(model: Any) -> None:
    """Changing one branch leaves the others bit for bit what they were."""
    tree.install(model)
    prompt = (5, 6, 7, 8)
    first, other = EncodedSequence(prompt, (9, 10, 11)), EncodedSequence(prompt, (12, 13))
    changed = EncodedSequence(prompt, (40, 41))
    with torch.no_grad():
        a = batch_logps(model, tree.plant([other, first]))[2:]
        b = batch_logps(model, tree.plant([changed, first]))[2:]
    assert torch.equal(a, b)


def test_gradient_checkpointing_gives_the_same_gradients(model: Any) -> None:
    sequences = forest(5)
    g = weights(sequences)
    tree.install(model)
    model.train()
    plain = gradients(model, (batch_logps(model, tree.plant(sequences)) * g).sum())
    model.activation_checkpointing_enable()
    again = gradients(model, (batch_logps(model, tree.plant(sequences)) * g).sum())
    assert relative(plain, again) < 1e-5


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft speaks of GPT-2's Conv1D
def test_lora_sees_the_tree_too(model: Any) -> None:
    lora = add_lora(model, Lora(rank=2))
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    sequences = forest(6)
    g = weights(sequences)
    expected = batch_logps(lora, pad(sequences, 0))
    theirs = gradients(lora, (expected * g).sum())
    tree.install(model)
    found = batch_logps(lora, tree.plant(sequences))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert relative(theirs, gradients(lora, (found * g).sum())) < 1e-4


def test_bfloat16_autocast_stays_near_float32(model: Any) -> None:
    sequences = forest(7)
    tree.install(model)
    with torch.no_grad():
        exact = batch_logps(model, tree.plant(sequences))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = batch_logps(model, tree.plant(sequences))
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().mean()) < 0.1


def test_uninstalling_gives_the_model_back_as_it_was(model: Any) -> None:
    sequences = forest()
    before = batch_logps(model, pad(sequences, 0)).detach()
    config = json.loads(model.config.to_json_string())
    name = model.config._attn_implementation
    tree.install(model)
    own = batch_logps(model, pad(sequences, 0)).detach()  # not a tree: its own attention
    tree.uninstall(model)
    assert model.config._attn_implementation == name
    assert json.loads(model.config.to_json_string()) == config
    assert torch.equal(batch_logps(model, pad(sequences, 0)).detach(), before)
    torch.testing.assert_close(own, before, rtol=1e-5, atol=1e-6)


def test_a_row_shares_prompts_and_holds_no_padding() -> None:
    sequences = [
        EncodedSequence((1, 2, 3), (4, 5)),
        EncodedSequence((9,), (8, 7, 6)),
        EncodedSequence((1, 2, 3), (5,)),
        EncodedSequence((1, 2, 3), (6, 4, 2)),
    ]
    row = tree.plant(sequences)
    assert row.input_ids_1T.tolist() == [[1, 2, 3, 4, 6, 4, 9, 8, 7]]
    assert row.position_ids_1T.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 2]]
    assert row.trees == ((0, 3, (1, 0, 2)), (6, 1, (2,)))
    assert row.row.tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert row.position.tolist() == [2, 3, 6, 7, 8, 2, 2, 4, 5]
    assert row.target.tolist() == [4, 5, 8, 7, 6, 5, 6, 4, 2]


def test_batches_keep_trees_together_and_lose_nothing() -> None:
    sequences = forest(8, queries=6)
    for layout, size in (("tree", 4), ("padded", 4), ("tree", 1)):
        found = list(batches(sequences, layout, size))
        assert sorted(i for batch in found for i in batch) == list(range(len(sequences)))
        if layout == "tree":
            prompts = [{sequences[i].prompt_ids for i in batch} for batch in found]
            assert sum(len(p) for p in prompts) == len(set().union(*prompts))
        else:
            assert max(map(len, found)) <= size


def test_a_batch_too_large_for_memory_is_scored_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    sequences = forest(2, queries=5)
    expected = score_sequences(model, sequences, batch_size=8)
    own, sizes = model.forward, []

    def forward(input_ids: Tensor, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(input_ids=input_ids, **kwargs)

    monkeypatch.setattr("selfsteer.models.score.keeps_part", lambda model: False)
    model.forward = forward
    found = score_sequences(model, sequences, batch_size=8)
    assert max(sizes) == 8
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Head(torch.nn.Module):
    """What `head_scores` asks of a model."""

    def __init__(self, bias: bool, **config: Any) -> None:
        super().__init__()
        self.out = torch.nn.Linear(6, 11, bias=bias, dtype=torch.float64)
        self.config = hf.LlamaConfig(**config)

    def get_output_embeddings(self) -> Any:
        return self.out


@pytest.mark.parametrize("keep", [0, 3, 1000])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize(
    ("bias", "config"),
    [
        (False, {}),
        (True, {}),
        (True, {"final_logit_softcapping": 1.5}),
        (True, {"logit_scale": 0.3}),
        (True, {"logits_scaling": 4.0, "final_logit_softcapping": 0.7}),
    ],
)
def test_the_head_equals_a_plain_log_softmax_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch, rows: int, keep: int, bias: bool, config: dict[str, Any]
) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 1)
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": rows * 11 * 8, "cuda": 0})
    monkeypatch.setattr(head, "KEEP_BYTES", {"cpu": keep * 11 * 8, "cuda": 0})
    torch.manual_seed(0)
    model = Head(bias, **config)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (7,))
    g = torch.randn(7, dtype=torch.float64)

    logits = model.out(hidden)
    logits = logits * config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    cap = config.get("final_logit_softcapping")
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1)
    wanted = torch.autograd.grad((expected * g).sum(), [hidden, *model.out.parameters()])

    found = head_scores(model, hidden, target).logps
    got = torch.autograd.grad((found * g).sum(), [hidden, *model.out.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 8, 10])
def test_chunks_do_not_move_the_sampled_tokens(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """One token of every eight, wherever chunks begin and end."""
    monkeypatch.setattr(head, "CHUNK_ROWS", 1)
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": rows * 11 * 8, "cuda": 0})
    torch.manual_seed(0)
    model, hidden = Head(bias=False), torch.randn(21, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (21,))
    table = model.out(hidden).log_softmax(-1)[[4, 9]].detach()
    hits = int((table.argmax(-1) == target[[4, 9]]).sum())
    sampled = head_scores(model, hidden, target).sampled
    assert sampled is not None
    assert sampled.tolist() == pytest.approx([-float((table.exp() * table).sum()), hits, 2])


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_kept_for_backward_only(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    monkeypatch.setattr(head, "CHUNK_ROWS", 1)
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 2 * 11 * 8, "cuda": 0})
    made: list[Any] = []
    plain = head._logits

    def logits(*args: Any) -> Tensor:
        alive.append(sum(r() is not None for r in made))
        out = plain(*args)
        made.append(weakref.ref(out))
        return out

    alive: list[int] = []
    monkeypatch.setattr(head, "_logits", logits)
    model, hidden = Head(bias=False), torch.randn(12, 6, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        head_scores(model, hidden.requires_grad_(training), torch.zeros(12, dtype=torch.long))
    assert alive == [0, 1, 2, 3, 4, 5] if training else max(alive) == 1


def test_the_head_refuses_a_second_backward() -> None:
    model = Head(bias=False)
    hidden = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    logps = head_scores(model, hidden, torch.tensor([1, 2, 3])).logps.sum()
    logps.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        logps.backward()


def test_a_state_space_model_gets_padded_and_refuses_tree() -> None:
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    mamba = hf.AutoModelForCausalLM.from_config(config).eval()
    assert settle_layout(mamba, "auto", forest()) == "padded"
    with pytest.raises(ConfigError, match="cannot be used with MambaForCausalLM"):
        settle_layout(mamba, "tree", forest())


def test_auto_falls_back_with_figures_when_trees_do_not_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    llama = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    assert tree_difference(llama, forest()) < 1e-4
    whole = tree._attend
    monkeypatch.setattr(tree, "_attend", lambda q, k, v, *a: whole(q, k, v, None, 2, None))
    assert settle_layout(llama, "auto", forest()) == "padded"
    assert "nats (tolerance 0.001)" in capsys.readouterr().err
    assert not tree.is_installed(llama)
    with pytest.raises(ConfigError, match=r"moves log-probs of Llama.* its numbers would be wrong"):
        settle_layout(llama, "tree", forest())


def test_trees_that_drop_an_architectures_own_softmax_are_refused() -> None:
    """GPT-OSS hands a sink per head to its attention, which no segment knows of."""
    torch.manual_seed(0)
    config = hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.ones_(p)
    assert settle_layout(model, "auto", forest()) == "padded"
    with pytest.raises(ConfigError, match="its numbers would be wrong"):
        settle_layout(model, "tree", forest())


def test_the_proof_projects_responses_only() -> None:
    """Also where prompts are of unlike lengths: a span over all would be most of a long prompt."""
    llama = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    positions: list[int] = []
    llama.lm_head.register_forward_hook(
        lambda m, i, out: positions.append(out.shape[1]) if torch.is_tensor(out) else None
    )
    probe = [EncodedSequence((5,) * n, (1, 2, 3)) for n in (3, 100)]
    assert tree_difference(llama, probe) < 1e-4
    assert max(positions) == 3


def test_no_sequences_prove_nothing() -> None:
    llama = hf.AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    assert settle_layout(llama, "auto", []) == "padded"
    assert not tree.is_installed(llama)


def test_measuring_the_difference_leaves_trees_installed(loaded: LoadedModel) -> None:
    tree.install(loaded.model)
    tree_difference(loaded.model, forest(queries=1))
    assert tree.is_installed(loaded.model)


class OnGpu(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_a_full_gpu_does_not_speak_against_flex_attention(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*args: Any) -> None:
        raise error("no")

    monkeypatch.setattr(tree, "flex_tree_attention", fail)
    monkeypatch.setattr(tree, "_flex_errors", [])
    row = tree.plant([EncodedSequence((1, 2), (3, 4, 5))])
    query = torch.randn(1, 1, 4, 8).as_subclass(OnGpu)
    if error is torch.OutOfMemoryError:
        with pytest.raises(torch.OutOfMemoryError):
            tree.tree_attention(None, query, query, query, None, trees=row.trees)
    else:
        tree.tree_attention(None, query, query, query, None, trees=row.trees)
    assert bool(tree._flex_errors) == (error is not torch.OutOfMemoryError)


def test_dropout_in_attention_is_not_ignored() -> None:
    row = tree.plant([EncodedSequence((1, 2), (3, 4, 5))])
    query = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError, match="no dropout in attention"):
        tree.tree_attention(None, query, query, query, None, 0.1, trees=row.trees)


def test_every_kind_of_dropout_is_switched_off() -> None:
    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    model = hf.AutoModelForCausalLM.from_config(config)
    sequences = forest()
    expected = batch_logps(model.eval(), pad(sequences, 0))
    disable_dropout(model)
    model.train()
    torch.testing.assert_close(batch_logps(model, pad(sequences, 0)), expected)
    tree.install(model)
    torch.testing.assert_close(batch_logps(model, tree.plant(sequences)), expected)


def test_unknown_layouts_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="layouts are auto, tree and padded"):
        settle_layout(loaded.model, "packed", forest())


def test_score_records_agrees_across_layouts_and_leaves_the_model_alone(
    loaded: LoadedModel,
) -> None:
    triples = [
        Triple(
            f"t{i}",
            (Message("user", f"What is {i}?"),),
            Principles("Be good.", "Be bad."),
            {"plain": f"It is {i}.", "good": f"It is {i}, friend.", "bad": "No."},
            {"bad": "length"},
        )
        for i in range(4)
    ]
    names = ("plain/good", "plain/bad", "good/good", "good/bad", "bad/plain", "bad/good")
    tokenizer = loaded.chat.tokenizer
    padded = score_records(loaded.model, tokenizer, triples, names, layout="padded")
    for layout in ("tree", "auto"):
        found = score_records(loaded.model, tokenizer, triples, names, layout=layout, batch_size=3)
        for name in names:
            torch.testing.assert_close(found[name][0], padded[name][0], rtol=1e-5, atol=1e-4)
            assert torch.equal(found[name][1], padded[name][1])
    assert not tree.is_installed(loaded.model)


def test_a_saved_model_knows_nothing_of_trees(loaded: LoadedModel, tmp_path: Path) -> None:
    tree.install(loaded.model)
    save_model(loaded.model, loaded.chat, tmp_path, torch.float32)
    assert "selfsteer" not in (tmp_path / "config.json").read_text()
    hf.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_one_flex_call_equals_the_segments(window: int | None, softcap: float | None) -> None:
    """What a GPU runs, uncompiled; its gradient needs one."""
    row = tree.plant(forest(queries=4))
    size = row.input_ids_1T.shape[1]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, size, 16, generator=generator)
    key, value = (torch.randn(1, 2, size, 16, generator=generator) for _ in range(2))
    expected, _ = tree.tree_attention(
        None, query, key, value, None, 0.0, 0.3, window, softcap, row.trees
    )
    found = tree.flex_tree_attention(
        query, key, value, row.trees, 0.3, window, softcap, lambda f: f
    )
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_no_segment_sees_another() -> None:
    """Changing one response's keys moves only that response; changing a prompt's, only its tree."""
    row = tree.plant([EncodedSequence((1, 2), (3, 4, 5)), EncodedSequence((1, 2), (6, 7)),
                      EncodedSequence((8,), (9, 9, 9))])  # fmt: skip
    size = row.input_ids_1T.shape[1]
    assert row.trees == ((0, 2, (2, 1)), (5, 1, (2,)))
    query, key, value = torch.randn(3, 1, 1, size, 8).unbind(0)
    for moved, sees in (((2, 3), {2, 3}), ((4,), {4}), ((0,), {0, 1, 2, 3, 4}), ((5,), {5, 6, 7})):
        other = value.clone()
        other[:, :, list(moved)] += 1
        for attend in (
            lambda v: tree.tree_attention(None, query, key, v, None, trees=row.trees)[0][0],
            lambda v: tree.flex_tree_attention(
                query, key, v, row.trees, None, None, None, lambda f: f
            )[0].transpose(0, 1),
        ):
            changed = (attend(other) - attend(value)).abs().amax(dim=(1, 2)) > 1e-7
            assert set(changed.nonzero().flatten().tolist()) == sees
