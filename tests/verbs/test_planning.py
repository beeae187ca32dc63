"""`selfsteer plan` against numbers that were worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsteer.data.digests import ADAPTER_CONFIG
from selfsteer.errors import ArtifactError, ConfigError, SelfsteerError
from selfsteer.models.load import load_model
from selfsteer.objectives import Objective
from selfsteer.recipe.sections import Loading, resolve_path
from selfsteer.run.cost import Scale
from selfsteer.verbs import planning
from selfsteer.verbs.planning import Lengths, Machine, Shape, forward_flops, shape_of, tokens_of
from tests.make import make_adapter, make_gguf, smoke

SIZES = {
    **{"num_hidden_layers": 2, "hidden_size": 8, "vocab_size": 16},
    **{"num_attention_heads": 2, "intermediate_size": 16},
}

LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
TINY = Shape(parameters=1000, layers=2, hidden=10, vocabulary=20, attention=12, body=600)


def shape_from(folder: Path, **config: Any) -> Shape:
    (folder / "config.json").write_text(json.dumps(config))
    return shape_of(str(folder))


# -- sizes -----------------------------------------------------------------------------------------


def test_the_size_of_llama_3_8b(tmp_path: Path) -> None:
    """Its card says 8,030,261,248 parameters."""
    found = shape_from(tmp_path, **LLAMA)
    assert found.parameters == 8_030_261_248
    assert found.body == found.parameters - 2 * 128256 * 4096
    assert (found.layers, found.hidden, found.attention) == (32, 4096, 4096)
    tied = shape_from(tmp_path, **{**LLAMA, "tie_word_embeddings": True})
    assert tied.parameters == found.parameters - 128256 * 4096
    assert tied.body == found.body


def test_parameters_are_counted_in_the_files(checkpoints: dict[str, Path], family: str) -> None:
    folder = checkpoints[family]
    model = load_model(str(folder), Loading(device="cpu")).model
    assert shape_of(str(folder)).parameters == sum(p.numel() for p in model.parameters())


def test_adapters_and_gguf_files_are_read_and_nothing_is_made_of_them(
    tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFSTEER_CACHE", str(tmp_path / "cache"))
    llama = checkpoints["llama"]
    known = shape_of(str(llama))
    assert shape_of(str(make_adapter(tmp_path / "adapter", llama))) == known
    found = shape_of(str(make_gguf(tmp_path / "tiny.gguf", llama)))
    assert (found.layers, found.hidden, found.body) == (known.layers, known.hidden, known.body)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / ADAPTER_CONFIG).write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "loop")})
    )
    with pytest.raises(ConfigError, match="is not known here"):
        shape_of(str(tmp_path / "loop"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "config",
    [
        "[1]",
        "{",
        "null",
        *(
            json.dumps({**SIZES, name: value})
            for name in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
            for value in (0, -1, "x", 1.5, [1], True)
        ),
        json.dumps({**SIZES, "intermediate_size": [1, 2]}),
        json.dumps({**SIZES, "head_dim": "x"}),
        json.dumps({"text_config": "x"}),
    ],
)
def test_a_config_that_is_none_is_an_error_in_words(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    assert shape_of(str(tmp_path)).layers == 2
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SelfsteerError, match=r"config\.json"):
        shape_of(str(tmp_path))


def test_a_size_that_nobody_knows_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"some-lab/absent .*--params, --layers, --hidden"):
        shape_of("some-lab/absent")
    with pytest.raises(ConfigError, match=r"Give --layers, --vocabulary"):
        shape_of("some-lab/absent", params=1e9, hidden=100)
    given = shape_of("some-lab/absent", params=1e6, layers=2, hidden=100, vocabulary=1000)
    assert given == Shape(1_000_000, 2, 100, 1000, 100, 800_000)
    with pytest.raises(ConfigError, match="not that of a dense decoder"):
        shape_from(tmp_path, **LLAMA, num_local_experts=8)
    with pytest.raises(ConfigError, match="has no hidden_size"):
        shape_from(tmp_path, num_hidden_layers=2)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ArtifactError, match=r"model.safetensors is not a complete"):
        shape_from(tmp_path, **LLAMA)


# -- operations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "tokens", "tera"),
    [("sso-online", 2834, 126.5), ("sso", 2056, 91.6), ("pbaa", 778, 35.0)],
)
def test_operations_of_a_step_are_those_of_the_scaling_page(
    tmp_path: Path, objective: str, tokens: int, tera: float
) -> None:
    """docs/scaling.md works them out for one query: three forwards."""
    sequences = Objective.named(objective).sequences
    counted = tokens_of(sequences, Lengths(), shared=True)
    assert counted[0] == tokens
    flops = 3 * forward_flops(shape_from(tmp_path, **LLAMA), *counted)
    assert flops / 1e12 == pytest.approx(tera, abs=0.1), "and the norms"


def test_tokens_and_operations_by_hand() -> None:
    """Prompts of 2 and 5 tokens, responses of 4: three new tokens each."""
    lengths = Lengths(query=2, principles=3, response=4)
    assert tokens_of(("plain/good",), lengths, shared=True) == (5, 3 + 12, 4)
    # good: 5 + 3 + 3 tokens; the prompt sees 15 keys, each answer 3·5 + 6
    assert tokens_of(("good/good", "good/bad"), lengths, shared=True) == (11, 15 + 2 * 21, 8)
    assert tokens_of(("good/good", "good/bad"), lengths, shared=False) == (16, 2 * (15 + 21), 8)
    assert forward_flops(TINY, 5, 15, 4) == 2 * 600 * 5 + 4 * 2 * 12 * 15 + 2 * 10 * 20 * 4


# -- a whole recipe --------------------------------------------------------------------------------


def planned(tmp_path: Path, *more: str, queries: int = 100, machine: Machine) -> dict[str, Any]:
    given = ("policy.model=none/such", "evaluation=null", "judge=null", "baseline=null")
    recipe = smoke(tmp_path, *given, *more)
    return planning.plan(recipe, Scale(queries), TINY, Lengths(2, 3, 4), machine)


def test_the_stages_of_the_generator_way_by_hand(tmp_path: Path) -> None:
    """100 queries, triples for 40; principles are picked at random: nobody is asked for them."""
    picked = "principles={mode: picked, features: random}"
    found = planned(tmp_path, picked, "generator.queries=40", machine=Machine("a100", 2))
    rows = {r["stage"].rpartition("/")[2]: r for r in found["stages"]}
    assert {name: r["records"] for name, r in rows.items()} == {
        "queries": 100,
        "principles": 100,
        "triples": 40,
        "filter": 40,
        "generator": 40,
        "samples": 100,
        "preferences": 100,
        "quality": 100,
        "policy": 100,
    }
    sampled = {name: r["sampled_tokens"] for name, r in rows.items() if r["sampled_tokens"]}
    assert sampled == {"triples": 3 * 40 * 4, "samples": 2 * 100 * 4}
    # a step of the policy: 2 + 3 + 3 tokens, 3 + 2·(6 + 6) keys, 8 responses; three forwards
    step = 3 * (2 * 600 * 8 + 4 * 2 * 12 * 27 + 2 * 10 * 20 * 8)
    assert rows["policy"]["flops"]["training"] == 100 * step
    # its reference is scored before, by the quality report: the same sequences
    assert rows["policy"]["flops"]["scoring"] == 0
    assert rows["policy"]["hours"] == pytest.approx(100 * step / (0.4 * 2 * 312e12) / 3600)
    assert rows["samples"]["flops"]["sampling"] == 2 * 100 * (
        2 * 600 * 9 + 4 * 2 * 12 * 9**2 / 2 + 2 * 10 * 20 * 4
    )
    assert found["totals"]["sampled_tokens"] == 1280
    assert found["totals"]["hours"] == pytest.approx(sum(r["hours"] for r in rows.values()))
    assert found["not_counted"] == []


def test_memory_by_hand(tmp_path: Path) -> None:
    row = "training.row_tokens=50"
    memory = planned(tmp_path, row, machine=Machine("h100", 4))["memory_per_rank"]
    assert memory["ddp"] == {
        "weights": 4000,
        "gradients": 4000,
        "optimiser": 8000,
        "bfloat16 copies": 1200,
        "activations": 60 * 10 * 2 * 50,
        "logits": 50 * 4 / 5 * 20 * 4,
        "buckets": 4000,
        "start, to compare with": 2000,
    }
    sharded = memory["sharded"]
    assert (sharded["weights"], sharded["optimiser"]) == (1000, 2000)
    assert sharded["bfloat16 copies"] == 600, "of one layer of two"
    assert "buckets" not in sharded
    saved = ("training.gradient_checkpointing=true", "training.selection.points=0", row)
    memory = planned(tmp_path, *saved, machine=Machine())["memory_per_rank"]["ddp"]
    assert memory["activations"] == (4 * 2 + 60) * 10 * 50
    assert "start, to compare with" not in memory
    assert "buckets" not in memory, "one rank has nobody to send gradients to"


def test_adapters_are_trained_alone(tmp_path: Path) -> None:
    """Rank 2 of every layer: four products 10 by 12, three 10 by -6: no room for them here."""
    lora = ("policy.lora.rank=2", "training.learning_rate=1e-4")
    memory = planned(tmp_path, *lora, machine=Machine())["memory_per_rank"]["ddp"]
    adapters = 2 * 2 * (4 * (10 + 12) + 3 * 10)
    assert (memory["weights"], memory["gradients"]) == (4000, 4 * adapters)
    assert memory["optimiser"] == 8 * adapters
    model = {**LLAMA, "num_key_value_heads": 32}
    shape = shape_from(tmp_path, **model)
    exact = 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 14336))
    assert planning._adapters(shape, 16) == pytest.approx(exact, rel=0.001)


def test_a_response_is_never_longer_than_its_budget(tmp_path: Path) -> None:
    recipe = smoke(tmp_path, "sampling.max_new_tokens=50")
    shape = shape_of(resolve_path(recipe.policy.model))
    found = planning.plan(recipe, Scale(10, 5), shape, Lengths(), Machine())
    assert found["assumptions"]["response_tokens"] == 50


def test_what_a_judge_at_a_server_is_asked_is_in_the_estimate(tmp_path: Path) -> None:
    """By hand: 2 orders of 10 pairs of preferences, 10 of triples and 2·5 of the evaluation."""
    price = "price: {input: 1000000, output: 10000000}"
    recipe = smoke(tmp_path, "baseline=null", "iterations=1")
    pairs = {s.name: s.cost(Scale(10, 5)).judged for s in recipe.plan()}
    pairs = {name: n for name, n in pairs.items() if n}
    assert sum(pairs.values()) > 20
    for more, share in (("", 1.0), (", batch: true", 0.5)):
        engine = f"{{kind: openai, base_url: 'http://h/v1', {price}{more}}}"
        judge = f"judge={{kind: chat, model: m, max_new_tokens: 50, engine: {engine}}}"
        judged = smoke(tmp_path, "baseline=null", "iterations=1", judge)
        found = planning.plan(judged, Scale(10, 5), TINY, Lengths(2, 3, 4), Machine())
        read, written = planning.QUESTION + 2 + 2 * 4, 50
        by_stage = {r["stage"]: r["judge"] for r in found["stages"] if r["judge"]}
        assert by_stage == {
            name: {
                "requests": 2 * n,
                "prompt_tokens": 2 * n * read,
                "completion_tokens": 2 * n * written,
                "cost": share * 2 * n * (read + 10 * written),
            }
            for name, n in pairs.items()
        }
        assert found["totals"]["judge"]["requests"] == 2 * sum(pairs.values())
        assert found["totals"]["cost"] == sum(j["cost"] for j in by_stage.values())
    found = planning.plan(recipe, Scale(10, 5), TINY, Lengths(2, 3, 4), Machine())
    assert found["totals"]["judge"] is None


def test_servers_with_a_price_are_in_the_estimate(tmp_path: Path) -> None:
    """By hand: 10 queries, each with one answer of 20 tokens on features and one on principles."""
    price = "price: {input: 1000000, output: 10000000}"
    writer = f"principles.writer={{kind: openai, base_url: 'http://h/v1', model: m, {price}}}"
    recipe = smoke(tmp_path, writer, "principles.mode=generated", "principles.features=model")
    found = planning.plan(recipe, Scale(10, 5), TINY, Lengths(2, 3, 4), Machine())
    costs = {r["stage"]: r["cost"] for r in found["stages"] if r["cost"]}
    (stage,) = (s for s in recipe.plan() if s.title == "principles")
    answers = stage.cost(Scale(10, 5)).answers
    assert answers["features"] == 10
    read = sum(answers.values()) * (planning.INSTRUCTION + 2)
    written = 10 * planning.FEATURE_ANSWER + answers["principles"] * 3
    assert costs == {"iteration-1/principles": read + 10 * written}
    assert found["totals"]["cost"] == read + 10 * written
    assert (
        planning.plan(smoke(tmp_path), Scale(10), TINY, Lengths(), Machine())["totals"]["cost"]
        is None
    )
