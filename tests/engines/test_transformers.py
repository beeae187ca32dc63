from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
)

from selfsteer.data.digests import derive_seed
from selfsteer.data.records import Message
from selfsteer.engines.answers import answers
from selfsteer.engines.base import (
    Advance,
    Completion,
    Contrast,
    Request,
    SamplingParams,
    no_news,
)
from selfsteer.engines.cache import can_share, roomy_cache, token_bytes
from selfsteer.engines.transformers import (
    FEW_TOKENS,
    TransformersEngine,
    alike,
    common,
    contrast_step,
    draw,
    streams,
)
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.recipe.sections import Policy
from tests.make import FAMILIES, make_checkpoint, make_tokenizer

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, max_new_tokens=24)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.8, max_new_tokens=16)

QUESTIONS = (
    "Hi",
    "What does the bear eat?",
    "Paris is the capital of France; what is it?",
    "Wait",
    "What does the cat eat? " * 6,
    "Add the tea. " * 3,
    "né",
    "Do not reveal guidelines, please.",
    "honey",
    "First boil the water, then wait for three minutes.",
)
CONVERSATIONS = [[Message("user", q)] for q in QUESTIONS]


def asked(seed: int) -> list[Request]:
    return [Request(f"q{i}", tuple(c), derive_seed(seed, i)) for i, c in enumerate(CONVERSATIONS)]


def ask(
    engine: TransformersEngine, sampling: SamplingParams, seed: int = 0, advance: Advance = no_news
) -> list[Completion]:
    """The answers in the order of the conversations."""
    return list(answers(engine, asked(seed), sampling, advance=advance).values())


def said(completion: Completion) -> Completion:
    """The answer, without what its text would make of its tokens."""
    return replace(completion, retokenised=None, special_tokens=False)


def favour_stopping(loaded: LoadedModel, strength: float) -> None:
    """Makes the end of the turn likely where another token is likely too, so rows end apart.

    The end-of-turn token's output weights become a multiple of an ordinary token's.
    """
    with torch.no_grad():
        weight = loaded.model.lm_head.weight
        weight[loaded.chat.end_of_turn] = strength * weight[70]


def one_by_one(loaded: LoadedModel, sampling: SamplingParams) -> list[tuple[list[int], str]]:
    """generate() of transformers, each prompt alone: the ids and how the answer ended."""
    stops = set(TransformersEngine(loaded).stop_ids)
    answers = []
    for conversation in CONVERSATIONS:
        ids = torch.tensor([loaded.chat.prompt_ids(conversation)])
        full = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(stops),
        )
        new = full[0, ids.shape[1] :].tolist()
        answers.append((new, "stop" if new[-1] in stops else "length"))
    return answers


def check_greedy(loaded: LoadedModel, batch_size: int) -> None:
    expected = one_by_one(loaded, GREEDY)
    lengths = {len(ids) for ids, reason in expected if reason == "stop"}
    assert len(lengths) >= 3, "too few rows end apart, the test would show nothing"
    assert any(reason == "length" for _, reason in expected)
    found = ask(TransformersEngine(loaded, batch_size), GREEDY)
    decode = loaded.chat.tokenizer.decode
    for completion, conversation, (ids, reason) in zip(found, CONVERSATIONS, expected, strict=True):
        text = decode(ids[:-1] if reason == "stop" else ids, skip_special_tokens=True).strip()
        prompt = len(loaded.chat.prompt_ids(conversation))
        assert said(completion) == Completion(completion.id, text, reason, prompt, len(ids))


#: With these weights, half of the answers or more end early, at different steps.
STRENGTH = 1.8


@pytest.mark.parametrize("batch_size", [4, 32])
def test_greedy_equals_generate_of_transformers(loaded: LoadedModel, batch_size: int) -> None:
    favour_stopping(loaded, STRENGTH)
    check_greedy(loaded, batch_size)


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_greedy_with_prompts_longer_than_the_attention_window(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / name, name, sliding_window=8)
    loaded = load_model(str(folder), Policy(model=str(folder), device="cpu"))
    favour_stopping(loaded, STRENGTH)
    check_greedy(loaded, 32)


def test_greedy_with_learned_positions(tmp_path: Path) -> None:
    """Rotary positions forgive an offset, learned ones show whether padding counts as text."""
    tokenizer = make_tokenizer("qwen2")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), Policy(model="x", device="cpu"))
    favour_stopping(loaded, STRENGTH)
    check_greedy(loaded, 32)


def test_stops_are_the_end_of_turn_and_the_configured_ones(
    loaded: LoadedModel, family: str
) -> None:
    ids = loaded.chat.tokenizer.convert_tokens_to_ids
    wanted = {ids(FAMILIES[family].end_of_turn), ids(FAMILIES[family].eos)}
    assert set(TransformersEngine(loaded).stop_ids) == wanted


def texts(loaded: LoadedModel, seed: int, sampling: SamplingParams = SAMPLED) -> list[str]:
    return [c.text for c in ask(TransformersEngine(loaded, 4), sampling, seed)]


def test_equal_seeds_give_equal_texts_and_others_differ(loaded: LoadedModel) -> None:
    first = texts(loaded, 1)
    torch.manual_seed(99)  # the global generator has no say
    torch.rand(3)
    assert texts(loaded, 1) == first
    second = texts(loaded, 2)
    assert sum(a != b for a, b in zip(first, second, strict=True)) >= 8


def test_sampling_leaves_the_global_generator_alone(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts(loaded, 1)
    assert torch.equal(torch.rand(3), expected)


def test_greedy_ignores_the_seed(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    assert texts(loaded, 1, GREEDY) == texts(loaded, 2, GREEDY)


@pytest.mark.parametrize("sampling", [SAMPLED, SamplingParams(1.3, 1.0, 16)])
def test_an_answer_depends_on_its_request_alone(
    loaded: LoadedModel, sampling: SamplingParams
) -> None:
    """Whatever the batches, the order and the company."""
    favour_stopping(loaded, STRENGTH)
    requests = asked(7)
    expected = answers(TransformersEngine(loaded, 4), requests, sampling)
    assert len({c.text for c in expected.values()}) > 5
    for size, some in ((1, requests), (10, requests), (3, requests[::-1]), (4, requests[5:])):
        found = answers(TransformersEngine(loaded, size), some, sampling)
        assert found == {r.id: expected[r.id] for r in some}


def test_equal_requests_with_other_seeds_differ(load: Callable[..., LoadedModel]) -> None:
    twice = [Request(f"r{seed}", tuple(CONVERSATIONS[1]), seed) for seed in range(6)]
    found = answers(TransformersEngine(load("llama")), twice, SAMPLED)
    assert len({c.text for c in found.values()}) == 6


def test_models_with_states_draw_from_the_same_streams(tmp_path: Path) -> None:
    """Mamba cannot give up rows, so transformers' own loop decodes it."""
    tokenizer = make_tokenizer("qwen2")
    config = MambaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), Policy(model="x", device="cpu"))
    alone = answers(TransformersEngine(loaded, 1), asked(3), SAMPLED)
    torch.manual_seed(9)
    assert answers(TransformersEngine(loaded, 4), asked(3), SAMPLED) == alone
    contrasted = answers(TransformersEngine(loaded, 1), pushed(3), SAMPLED)
    assert answers(TransformersEngine(loaded, 4), pushed(3), SAMPLED) == contrasted
    assert sum(contrasted[i] != c for i, c in alone.items()) > 3
    assert len({c.text for c in alone.values()}) > 5
    greedy = answers(TransformersEngine(loaded, 4), asked(3), GREEDY)
    assert greedy == answers(TransformersEngine(loaded, 4), asked(4), GREEDY)


def test_counts_are_reported_to_advance(load: Callable[..., LoadedModel]) -> None:
    loaded = load("mistral")
    favour_stopping(loaded, STRENGTH)
    told: list[tuple[int, int]] = []
    engine = TransformersEngine(loaded, 4)
    found = ask(engine, GREEDY, advance=lambda items, tokens: told.append((items, tokens)))
    assert sum(items for items, _ in told) == len(found)
    assert sum(tokens for _, tokens in told) == sum(c.completion_tokens for c in found)
    # tokens are reported as they are drawn, answers with their batch
    assert max(tokens for _, tokens in told) <= 4 < max(c.completion_tokens for c in found)
    assert [items for items, _ in told if items] == [4, 4, 2]


def test_a_batch_too_large_for_the_memory_is_decoded_in_parts(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("llama")
    whole = answers(TransformersEngine(loaded, 10), asked(3), SAMPLED)
    decoded: list[int] = []
    decode = TransformersEngine._decode

    def watched(self: Any, prompts: Any, others: Any, part: Any, *rest: Any) -> Any:
        decoded.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError
        return decode(self, prompts, others, part, *rest)

    monkeypatch.setattr(TransformersEngine, "_decode", watched)
    most = 3  # as on a GPU: halves until they fit
    told: list[tuple[int, int]] = []
    halves = answers(
        TransformersEngine(loaded, 10), asked(3), SAMPLED, advance=lambda *n: told.append(n)
    )
    assert halves == whole
    assert decoded == [10, 5, 2, 3, 5, 2, 3]
    assert sum(items for items, _ in told) == len(whole)
    assert sum(tokens for _, tokens in told) == sum(c.completion_tokens for c in whole.values())
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        answers(TransformersEngine(loaded, 10), asked(3), SAMPLED)

    # as on a CPU: a quarter of its memory holds so many rows of the longest prompt and answer
    most = 10
    longest = max(c.prompt_tokens for c in whole.values()) + SAMPLED.max_new_tokens
    token = token_bytes(loaded.model.config, torch.float32)
    config = loaded.model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert token == 4 * values
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(total=4 * 4 * longest * token)
    )
    decoded.clear()
    assert answers(TransformersEngine(loaded, 10), asked(3), SAMPLED) == whole
    assert decoded[0] == 4
    assert len(decoded) < 4
    assert sum(decoded) == 10
    decoded.clear()
    answers(TransformersEngine(loaded, 10), pushed(3), SAMPLED)
    assert decoded[0] < 4, "the other context of a contrast takes room too"
    decoded.clear()
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=1))
    assert answers(TransformersEngine(loaded, 10), asked(3), SAMPLED) == whole
    assert decoded == [1] * 10


def force(loaded: LoadedModel, token: int) -> None:
    """Makes the model answer ``token`` whatever was said."""

    def forced(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = torch.full_like(out.logits, -30.0)
        out.logits[..., token] = 30.0
        return out

    plain = loaded.model.forward
    loaded.model.forward = forced


def test_finish_reason_and_token_counts(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    (bee,) = set(loaded.chat.tokenizer("b", add_special_tokens=False)["input_ids"])
    budget = SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=5)
    prompts = [len(loaded.chat.prompt_ids(c)) for c in CONVERSATIONS]
    force(loaded, bee)
    endless = ask(TransformersEngine(loaded), budget)
    assert list(map(said, endless)) == [
        Completion(f"q{i}", "bbbbb", "length", p, 5) for i, p in enumerate(prompts)
    ]
    for name in ("<|eot_id|>", "<|end_of_text|>"):
        loaded = load("llama")
        force(loaded, loaded.chat.tokenizer.convert_tokens_to_ids(name))
        found = ask(TransformersEngine(loaded), budget)
        expected = [Completion(f"q{i}", "", "stop", p, 1) for i, p in enumerate(prompts)]
        assert list(map(said, found)) == expected


def test_a_turn_that_ends_with_the_last_token_of_the_budget_is_finished(
    load: Callable[..., LoadedModel],
) -> None:
    loaded = load("llama")
    favour_stopping(loaded, STRENGTH)
    longer = one_by_one(loaded, GREEDY)
    i, ids = next((i, ids) for i, (ids, reason) in enumerate(longer) if reason == "stop")
    exact = SamplingParams(temperature=0.0, max_new_tokens=len(ids))
    (found,) = TransformersEngine(loaded).generate([asked(0)[i]], exact)
    assert (found.finish_reason, found.completion_tokens) == ("stop", len(ids))
    if len(ids) > 1:
        shorter = SamplingParams(temperature=0.0, max_new_tokens=len(ids) - 1)
        (found,) = TransformersEngine(loaded).generate([asked(0)[i]], shorter)
        assert (found.finish_reason, found.completion_tokens) == ("length", len(ids) - 1)


def test_a_prompt_without_room_is_not_answered_and_says_why(
    load: Callable[..., LoadedModel],
) -> None:
    loaded = load("gemma")
    longest = max(len(loaded.chat.prompt_ids(c)) for c in CONVERSATIONS)
    over = SamplingParams(temperature=0.0, max_new_tokens=1024 - longest + 1)
    found = ask(TransformersEngine(loaded), over)
    for conversation, completion in zip(CONVERSATIONS, found, strict=True):
        too_long = len(loaded.chat.prompt_ids(conversation)) == longest
        assert (completion.finish_reason == "prompt_too_long") == too_long
        assert (completion.completion_tokens == 0) == too_long


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(load: Callable[..., LoadedModel], training: bool) -> None:
    loaded = load("llama")
    loaded.model.train(training)
    texts(loaded, 0)
    assert loaded.model.training is training


def test_no_conversations_give_no_answers(load: Callable[..., LoadedModel]) -> None:
    assert list(TransformersEngine(load("llama")).generate([], SAMPLED)) == []


# -- prompts --------------------------------------------------------------------------------------


def test_what_prompts_share_is_computed_once(
    load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts, one of them asked four times: their common start, then each one's own part."""
    loaded = load("llama")
    rules = Message("system", "Answer in one short sentence, please. " * 5)
    requests = [Request(q, (rules, Message("user", q)), 0) for q in QUESTIONS[:3]]
    requests += [Request(f"again{i}", requests[1].messages, i) for i in range(3)]
    ids = {loaded.chat.prompt_ids(r.messages) for r in requests}
    shared = next(n for n in range(999) if len({p[: n + 1] for p in ids}) > 1)
    shapes: list[tuple[int, ...]] = []
    forward = loaded.model.forward

    def seen(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", seen)
    list(TransformersEngine(loaded).generate(requests, SamplingParams(0.7, 0.8, 1)))
    assert 2 * shared > FEW_TOKENS
    # the last token of each prompt is the first step's
    own = max(map(len, ids)) - 1 - shared
    assert shapes == [(1, shared), (3, own), (6, 1)]
    shapes.clear()
    list(TransformersEngine(loaded).generate(asked(0)[:3], SamplingParams(0.7, 0.8, 1)))
    assert [rows for rows, _ in shapes] == [3, 3], "too few tokens are saved to be worth a forward"


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_answers_to_prompts_with_a_long_common_start_depend_on_each_alone(
    load: Callable[..., LoadedModel], name: str
) -> None:
    loaded = load(name)
    favour_stopping(loaded, STRENGTH)
    rules = Message("system", "Answer in one short sentence, please. " * 5)
    requests = [Request(q, (rules, Message("user", q)), i) for i, q in enumerate(QUESTIONS)]
    expected = answers(TransformersEngine(loaded, 1), requests, SAMPLED)
    assert len({c.text for c in expected.values()}) > 5
    for size in (4, 10):
        assert answers(TransformersEngine(loaded, size), requests, SAMPLED) == expected


def test_the_common_start_of_prompts() -> None:
    assert common([(1, 2, 3), (1, 2, 4, 5), (1, 2)]) == (1, 2)
    assert common([(2,), (1, 2)]) == ()
    assert common([(7, 8)]) == (7, 8)
    assert common([(), (1,)]) == ()


def test_prompts_of_unlike_lengths_are_computed_apart_once_they_are_many() -> None:
    prompts = [(0,) * n for n in (300, 240, 239, 90, 80, 2)]
    # 240 is 0.8 of 300; 239 tokens alone are too few to be a group
    assert [[len(p) for p in g] for g in alike(prompts, 0)] == [[300, 240], [239, 90], [80, 2]]
    assert [[len(p) for p in g] for g in alike(prompts[3:], 0)] == [[90, 80, 2]]
    # 239 tokens of each are shared: the others' own 61, 1 and 0
    assert [[len(p) for p in g] for g in alike(prompts[:3], 239)] == [[300, 240, 239]]


def test_caches_with_more_than_keys_and_values_are_left_to_transformers() -> None:
    assert roomy_cache(Qwen3NextConfig(num_hidden_layers=4)) is None
    assert len(roomy_cache(LlamaConfig(num_hidden_layers=4)).layers) == 4


def test_rotary_angles_that_depend_on_the_length_keep_prompts_whole() -> None:
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert can_share(LlamaConfig())
    assert can_share(GPT2Config())
    assert not can_share(LlamaConfig(rope_parameters=scaled))


# -- two contexts ---------------------------------------------------------------------------------


def pushed(seed: int) -> list[Request]:
    """Every third request is answered in its own context alone; the others are pushed, or mixed."""
    ratios = [None, 2.0, -0.5]
    requests = []
    for i, request in enumerate(asked(seed)):
        ratio = ratios[i % 3]
        other = (Message("system", "Be brief, please."), *request.messages)
        contrast = None if ratio is None else Contrast(other, ratio)
        requests.append(replace(request, contrast=contrast))
    return requests


def pushed_ids(loaded: LoadedModel, request: Request, sampling: SamplingParams) -> list[int]:
    """One request, greedily, without a cache: both contexts are computed anew at every token."""
    contrast = request.contrast or Contrast(request.messages, 0.0)
    prompts = [loaded.chat.prompt_ids(m) for m in (request.messages, contrast.messages)]
    stops, said = TransformersEngine(loaded).stop_ids, list[int]()
    while len(said) < sampling.max_new_tokens and not (said and said[-1] in stops):
        here, there = (
            loaded.model(torch.tensor([[*p, *said]])).logits[0, -1].float() for p in prompts
        )
        probs, order = here.softmax(0).sort(descending=True)
        nucleus = order[probs.cumsum(0) - probs < sampling.top_p]
        z = (1 + contrast.ratio) * here - contrast.ratio * there
        said.append(int(nucleus[z[nucleus].argmax()]))
    return said


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_answers_pushed_from_another_context_equal_those_computed_one_by_one(
    load: Callable[..., LoadedModel], name: str
) -> None:
    """Beside plain requests, in batches that shrink."""
    loaded, greedy = load(name), SamplingParams(0.0, 0.8, 16)
    favour_stopping(loaded, STRENGTH)
    requests, stops = pushed(0), set(TransformersEngine(loaded).stop_ids)
    expected = [pushed_ids(loaded, r, greedy) for r in requests]
    plain = [pushed_ids(loaded, replace(r, contrast=None), greedy) for r in requests]
    changed = [r.contrast for r, a, b in zip(requests, expected, plain, strict=True) if a != b]
    assert len(changed) > 3, "contrast would show nothing"
    assert len({len(ids) for ids in expected if ids[-1] in stops}) > 2, "rows must end apart"
    for size in (1, 4, 32):
        found = answers(TransformersEngine(loaded, size), requests, greedy)
        for request, ids in zip(requests, expected, strict=True):
            whole = ids[:-1] if ids[-1] in stops else ids
            text = loaded.chat.tokenizer.decode(whole, skip_special_tokens=True).strip()
            answer = found[request.id]
            assert (answer.text, answer.completion_tokens) == (text, len(ids))
            assert answer.prompt_tokens == len(loaded.chat.prompt_ids(request.messages))


def test_a_pushed_answer_depends_on_its_request_alone(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    favour_stopping(loaded, STRENGTH)
    requests = pushed(7)
    expected = answers(TransformersEngine(loaded, 4), requests, SAMPLED)
    alone = answers(TransformersEngine(loaded, 4), asked(7), SAMPLED)
    assert {i for i, c in expected.items() if alone[i] != c} <= {
        r.id for r in requests if r.contrast
    }
    assert sum(alone[i] != c for i, c in expected.items()) > 3
    for size, some in ((1, requests), (10, requests), (3, requests[::-1]), (4, requests[5:])):
        found = answers(TransformersEngine(loaded, size), some, SAMPLED)
        assert found == {r.id: expected[r.id] for r in some}


def test_another_context_without_room_is_not_answered(load: Callable[..., LoadedModel]) -> None:
    loaded = load("llama")
    longest = max(len(loaded.chat.prompt_ids(r.messages)) for r in asked(0))
    limit = SamplingParams(0.0, 1.0, int(loaded.context_length or 0) - longest)
    rules = (Message("system", "Be brief. " * longest), *CONVERSATIONS[0])
    request = Request("q", tuple(CONVERSATIONS[0]), 0, Contrast(rules, 1.0))
    (found,) = TransformersEngine(loaded).generate([request], limit)
    short = len(loaded.chat.prompt_ids(CONVERSATIONS[0]))
    assert found == Completion("q", "", "prompt_too_long", short, 0)


@pytest.mark.parametrize(
    ("ratio", "temperature", "top_p", "expected"),
    [
        # here² / there: .25/.2 and .09/.3; the third is outside the nucleus .5 + .3
        (1.0, 1.0, 0.75, [1.25 / 1.55, 0.3 / 1.55, 0]),
        # all of them: .04/.5 beside them
        (1.0, 1.0, 1.0, [1.25 / 1.63, 0.3 / 1.63, 0.08 / 1.63]),
        # the geometric mean of both contexts: √.1, √.09, √.1
        (-0.5, 1.0, 1.0, [0.3391, 0.3217, 0.3391]),
        (0.0, 1.0, 0.75, [0.625, 0.375, 0]),
        # the nucleus is that of the tempered distribution: .25/.38 > .6
        (1.0, 0.5, 0.6, [1, 0, 0]),
        # there³ / here²: .032 and .3; greedily, the nucleus is that of temperature 1
        (-3.0, 0.0, 0.75, [0, 1, 0]),
    ],
)
def test_a_step_between_two_contexts_by_hand(
    ratio: float, temperature: float, top_p: float, expected: list[float]
) -> None:
    here, there = (torch.tensor([p]).log() + 2.0 for p in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]))
    sampling = SamplingParams(temperature, top_p)
    z = contrast_step(here, there, torch.tensor([[ratio]]), sampling)
    found = (z / (temperature or 1e-3)).softmax(-1)[0].tolist()
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_nucleus_of_a_step_may_need_more_of_the_vocabulary_than_is_tried_first() -> None:
    here = torch.zeros(2, 1000)
    here[0, 100:140] = 9.0
    z = contrast_step(here, here, torch.ones(2, 1), SamplingParams(1.0, 0.8))
    # equal tokens are in the nucleus together
    assert [int(row.isfinite().sum()) for row in z] == [40, 1000]


# -- one draw -------------------------------------------------------------------------------------

DRAWS = 20_000


def frequencies(probabilities: list[float], sampling: SamplingParams) -> list[float]:
    logits = torch.tensor(probabilities).log().repeat(DRAWS, 1) + 3.0
    tokens = draw(logits, sampling, streams(range(DRAWS), 1)[:, 0])
    counts = torch.bincount(tokens, minlength=len(probabilities))
    assert int(counts.sum()) == DRAWS
    return counts.tolist()


def chi_square(counts: list[float], probabilities: list[float]) -> float:
    return sum(
        (c - DRAWS * p) ** 2 / (DRAWS * p)
        for c, p in zip(counts, probabilities, strict=True)
        if p > 0
    )


#: The 99.9 % point of χ² with 3 degrees of freedom; with fewer it is lower still.
BOUND = 16.27


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.1, 0.4, 0.3, 0.2]),
        # squared and normalised by 0.01 + 0.16 + 0.09 + 0.04 = 0.3
        (0.5, 1.0, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        # 0.4 + 0.3 reach 0.65, the rest is cut
        (1.0, 0.65, [0, 4 / 7, 3 / 7, 0]),
        # 0.4 + 0.3 fall short of 0.75, the third is needed
        (1.0, 0.75, [0, 4 / 9, 3 / 9, 2 / 9]),
        # the nucleus is that of the tempered distribution: 16/30 > 0.5
        (0.5, 0.5, [0, 1, 0, 0]),
        (1.0, 0.01, [0, 1, 0, 0]),
        (0.0, 1.0, [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_tempered_nucleus(
    temperature: float, top_p: float, expected: list[float]
) -> None:
    counts = frequencies([0.1, 0.4, 0.3, 0.2], SamplingParams(temperature, top_p))
    assert [c for c, p in zip(counts, expected, strict=True) if p == 0] == [0] * expected.count(0)
    assert chi_square(counts, expected) < BOUND


def test_rows_are_drawn_from_their_own_distributions() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 0, 0, 9.0], [0, 9.0, 0, 0]])
    for step in range(9):
        drawn = draw(logits, SamplingParams(0.5, 0.9), streams(range(3), 9)[:, step])
        assert drawn.tolist() == [0, 3, 1]


def test_a_row_is_drawn_alike_beside_rows_that_need_more_of_the_vocabulary() -> None:
    """One nucleus fits the tokens tried first, the other needs a sort of all of them; ties too."""
    sharp = torch.zeros(1000)
    sharp[100:140] = 9.0
    flat = torch.zeros(1000)
    sampling, u = SamplingParams(1.0, 0.8), streams(range(64), 1)[:, 0]
    alone = draw(sharp.repeat(64, 1), sampling, u)
    both = draw(torch.stack([sharp, flat]).repeat(64, 1), sampling, u.repeat_interleave(2))
    assert both[::2].tolist() == alone.tolist()
    assert len(set(alone.tolist())) > 15
    assert len(set(both[1::2].tolist())) > 40


@pytest.mark.parametrize(("top_p", "wide"), [(0.5, 50), (0.9, 500), (0.99, 2_500)])
def test_a_wide_nucleus_is_drawn_by_the_inverse_of_its_distribution(
    top_p: float, wide: int
) -> None:
    """Against a sort of everything in float64, where the first tokens tried fall short, or not."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * 2.0
    probs, index = logits[0].double().softmax(0).sort(descending=True)
    probs = probs.where(probs.cumsum(0) - probs < top_p, 0.0)
    assert int((probs > 0).sum()) > wide
    u = streams(range(200), 1)[:, 0]
    expected = index[torch.searchsorted(probs.cumsum(0), u * probs.sum(), right=True)]
    found = draw(logits.repeat(200, 1), SamplingParams(1.0, top_p), u)
    # rounding may move a number across the border of two tokens
    assert int((found == expected).sum()) >= 198


def test_without_a_nucleus_tokens_are_drawn_by_the_inverse_in_their_own_order() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * 2.0
    logits[0, 640:] = -torch.inf  # whole blocks that must never be drawn
    mass = logits[0].double().softmax(0).cumsum(0)
    u = torch.cat([streams(range(500), 1)[:, 0], streams([0], 1)[0] * 0])
    u = torch.cat([u, torch.tensor([(1 - 2.0**-53) * (1 - 2.0**-52)], dtype=torch.float64)])
    found = draw(logits.repeat(len(u), 1), SamplingParams(1.0, 1.0), u)
    assert int((found == torch.searchsorted(mass, u * mass[-1], right=True)).sum()) >= len(u) - 2
    assert int(found.max()) < 640


def test_the_ends_of_a_stream_stay_within_the_nucleus() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    last = torch.tensor([(1 - 2.0**-53) * (1 - 2.0**-52)], dtype=torch.float64)
    for top_p, ends in ((1.0, (0, 3)), (0.65, (1, 2))):
        found = [int(draw(logits, SamplingParams(1.0, top_p), u)) for u in (last * 0, last)]
        assert tuple(found) == ends


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1e-300, 0.8), (1e-38, 1.0), (5e-324, 0.8), (1.0, 1e-300)]
)
def test_the_coldest_temperature_and_the_smallest_nucleus_leave_the_likeliest_token(
    temperature: float, top_p: float
) -> None:
    """As floats of 32 bits they would be 0, and every logit beside them without an end."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * 20
    sampling = SamplingParams(temperature, top_p)
    numbers = streams(range(3), 1)[:, 0]
    assert draw(logits, sampling, numbers).tolist() == logits.argmax(dim=-1).tolist()
    pushed = contrast_step(logits, -logits, torch.full((3, 1), 2.0), sampling)
    assert pushed.argmax(dim=-1).tolist() == logits.argmax(dim=-1).tolist()


def test_a_stream_belongs_to_its_seed() -> None:
    numbers = streams([3, 2**63 - 1, 3], 4)
    assert numbers.dtype == torch.float64
    assert torch.equal(numbers[0], numbers[2])
    assert not torch.equal(numbers[0], numbers[1])
    assert torch.equal(streams([3], 9)[0, :4], numbers[0]), "whatever the budget"
    assert float(numbers.max()) < 1
