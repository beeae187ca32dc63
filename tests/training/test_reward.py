import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfsteer.data.records import Message, Preference, Query
from selfsteer.errors import ArtifactError, ConfigError, DataError
from selfsteer.judges.reward import RewardJudge
from selfsteer.methods import recipe_of
from selfsteer.models.chat import ChatFormat
from selfsteer.models.load import LoadedModel, load_chat, load_reward, load_reward_start
from selfsteer.recipe.read import validate
from selfsteer.recipe.sections import JudgeConfig, Lora, Policy, Reward
from selfsteer.run.folder import RunFolder
from selfsteer.stages.fit_reward import (
    by_weight,
    encode_pairs,
    held_out,
    read_pairs,
    score_pairs,
)
from selfsteer.stages.inputs import preferences_of
from selfsteer.training.reward import RewardPair, RewardTask
from selfsteer.training.trainer import Metrics, RowBudget, merge_metrics, train, work_folder
from tests.fakes import ScoringFake
from tests.make import make_checkpoint

WORDS = ("nectar", "honey", "fish", "milk", "mice", "tea", "water", "France")


def preference(number: int, chosen: str = "The bee eats nectar.", **extra: Any) -> Preference:
    prompt = (Message("user", f"What does the bee eat? {number}"),)
    return Preference(f"q{number}", prompt, chosen, "The cat eats tea.", extra=extra)


def preferences(count: int) -> list[Preference]:
    return [preference(i, f"The bee eats {WORDS[i % 8]}.") for i in range(count)]


def policy(source: Path | str, **more: Any) -> Policy:
    return Policy(model=str(source), device="cpu", dtype="float32", **more)


def start(source: Path, seed: int = 0) -> LoadedModel:
    return load_reward_start(str(source), policy(source), seed)


def encoded(
    chat: ChatFormat, found: list[Preference], margin: str | None = None
) -> list[RewardPair]:
    return [pair for _, pair in encode_pairs(chat, "own", found, margin, 512)[0]]


def settings(**more: Any) -> Reward:
    values = {"batch_size": 4, "forward_pairs": 2, "learning_rate": 1e-3, "save_every_steps": 2}
    return validate(Reward, {**values, **more}, "settings")


Log = list[dict[str, float]]


def trained(
    source: Path, folder: Path, found: list[Preference], **more: Any
) -> tuple[Path, dict[str, float], Log]:
    lora, logs = more.pop("lora", None), []
    stop = more.pop("stop", None)
    chosen = settings(**more)

    def log(line: dict[str, float]) -> None:
        if stop is not None and line["step"] == stop:
            raise KeyboardInterrupt
        logs.append(line)

    loaded = start(source)
    pairs = encoded(loaded.chat, found, chosen.margin)
    last = train(
        loaded,
        RewardTask(loaded, pairs, chosen.center),
        chosen,
        output=folder,
        budget=RowBudget(chosen.batch_size, 10_000, chosen.forward_pairs),
        label="test",
        seed=5,
        lora=lora,
        on_log=log,
    )
    return work_folder(folder) / "model", last, logs


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("reward") / "llama", "llama")


# -- the trainer -----------------------------------------------------------------------------------


def test_the_loss_of_the_first_step_is_bradley_terrys(llama: Path, tmp_path: Path) -> None:
    """−log σ(d − margin), averaged over the four pairs, of the model as it starts."""
    found = [preference(i, f"The bee eats {WORDS[i]}.", gap=0.5 * i) for i in range(4)]
    loaded = start(llama)
    with torch.no_grad():
        scores = [
            float(loaded.model(torch.tensor([ids])).logits)
            for pair in encoded(loaded.chat, found)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
    differences = [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    for name, margins in ((None, [0.0] * 4), ("gap", [0.0, 0.5, 1.0, 1.5])):
        folder = tmp_path / str(name)
        _, last, logs = trained(llama, folder, found, margin=name, warmup=0.0)
        expected = [
            math.log1p(math.exp(-(d - m))) for d, m in zip(differences, margins, strict=True)
        ]
        assert logs[0]["loss"] == pytest.approx(sum(expected) / 4, rel=1e-4)
        assert last["step"] == 1
        assert logs[0]["accuracy"] == sum(d > 0 for d in differences) / 4
        assert logs[0]["margin"] == pytest.approx(sum(differences) / 4, abs=1e-5)
    _, _, logs = trained(llama, tmp_path / "centred", found, center=0.5, warmup=0.0)
    expected = [
        math.log1p(math.exp(b - a)) + 0.5 * (a + b) ** 2
        for a, b in zip(scores[::2], scores[1::2], strict=True)
    ]
    assert logs[0]["loss"] == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_the_range_of_the_scores_is_that_of_the_step(llama: Path, tmp_path: Path) -> None:
    """However the four pairs are spread over rows."""
    found, loaded = preferences(4), start(llama)
    with torch.no_grad():
        scores = [
            float(loaded.model(torch.tensor([ids])).logits)
            for pair in encoded(loaded.chat, found)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
    for together in (1, 2, 4):
        _, _, logs = trained(llama, tmp_path / str(together), found, forward_pairs=together)
        assert logs[0]["min_reward"] == pytest.approx(min(scores), abs=1e-5)
        assert logs[0]["max_reward"] == pytest.approx(max(scores), abs=1e-5)
        assert logs[0]["mean_reward"] == pytest.approx(sum(scores) / 8, abs=1e-5)


def test_a_rank_without_work_adds_nothing_to_the_range() -> None:
    into: Metrics = {}
    one = {"min_reward": (torch.tensor(-1.0), 1), "margin": (torch.tensor(4.0), 2)}
    merge_metrics(into, {"min_reward": (torch.tensor(-9.0), 1), "margin": (9.0, 9)}, 0.0)
    assert into == {"min_reward": (math.inf, 1), "margin": (0.0, 0.0)}
    merge_metrics(into, one)
    merge_metrics(into, {"min_reward": (torch.tensor(3.0), 1), "margin": (1.0, 2)})
    assert into == {"min_reward": (-1.0, 1), "margin": (5.0, 4)}


def test_a_killed_training_ends_as_an_uninterrupted_one(llama: Path, tmp_path: Path) -> None:
    found = preferences(20)
    whole, last, _ = trained(llama, tmp_path / "whole", found)
    with pytest.raises(KeyboardInterrupt):
        trained(llama, tmp_path / "cut", found, stop=4)
    assert (tmp_path / "cut.partial" / "checkpoint-2" / "complete").exists()
    again, last_again, logs = trained(llama, tmp_path / "cut", found)
    assert [line["step"] for line in logs] == [3, 4, 5]
    assert last == last_again
    one, other = (load_file(f / "model.safetensors") for f in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    # a third try, killed after the last step, trains nothing and says the same
    _, last_third, logs = trained(llama, tmp_path / "cut", found)
    assert (last_third, logs) == (last, [])


def test_adapters_and_head_are_trained_and_merged(llama: Path, tmp_path: Path) -> None:
    made, _, logs = trained(llama, tmp_path, preferences(16), lora=Lora(rank=4), epochs=3)
    assert logs[-1]["loss"] < logs[0]["loss"]
    before, after = start(llama).model.state_dict(), load_file(made / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert "score.weight" in changed
    assert any("q_proj" in k for k in changed)
    assert not any("embed" in k for k in changed)


def test_what_is_saved_loads_everywhere_and_scores_alike(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import pipeline

    source = checkpoints[family]
    made, _, _ = trained(source, tmp_path, preferences(4))
    config = json.loads((made / "config.json").read_text())
    assert list(config["id2label"]) == ["0"]
    chat = load_chat(str(made), policy(made))
    assert (
        chat.tokenizer.chat_template
        == load_chat(str(source), policy(source)).tokenizer.chat_template
    )
    assert chat.tokenizer.pad_token_id == config["pad_token_id"]
    loaded = load_reward(str(made), policy(made))
    answers = ["Nectar.", "The bee eats nectar and honey and fish."]
    query = Query("q", (Message("user", "What does the bee eat?"),))
    alone = []
    for answer in answers:
        ids = torch.tensor([chat.exchange_ids(query.messages, answer)])
        with torch.no_grad():
            alone.append(float(loaded.model(ids).logits))
    judge = RewardJudge(JudgeConfig(kind="reward", model=str(made), device="cpu"), None)
    assert judge.score_all([(query, a) for a in answers]) == pytest.approx(alone, abs=1e-5)
    texts = [
        chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": query.text}, {"role": "assistant", "content": a}],
            tokenize=False,
        )
        for a in answers
    ]
    pipe = pipeline("text-classification", str(made), device="cpu")
    found = pipe(texts, function_to_apply="none", batch_size=2, add_special_tokens=False)
    assert [f["score"] for f in found] == pytest.approx(alone, abs=1e-4)


def test_a_tokenizer_without_padding_gets_another_token_than_ends_a_turn(
    llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    bare = make_checkpoint(tmp_path / "bare", "llama")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    loaded = start(bare)
    pad = loaded.chat.tokenizer.pad_token_id
    assert pad is not None
    assert pad != loaded.chat.end_of_turn
    assert loaded.model.config.pad_token_id == pad


def test_the_head_is_drawn_from_the_seed(llama: Path) -> None:
    heads = [start(llama, seed).model.score.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


# -- the mixture -----------------------------------------------------------------------------------


def test_weights_repeat_pairs_and_take_seeded_parts() -> None:
    pairs = [RewardPair(f"q{i}", "a", (1,), (2,)) for i in range(10)]
    assert by_weight(pairs, 1.0, 0) == pairs
    half = by_weight(pairs, 0.5, 0)
    assert len({p.id for p in half}) == len(half) == 5
    assert {p.id for p in by_weight(pairs[::-1], 0.5, 0)} == {p.id for p in half}
    assert {p.id for p in by_weight(pairs, 0.5, 1)} != {p.id for p in half}
    more = Counter(p.id for p in by_weight(pairs, 2.3, 0))
    assert sorted(more.values()) == [2] * 7 + [3] * 3


def test_a_query_is_held_out_in_every_set() -> None:
    found = preferences(400)
    out = [p.id for p in found if held_out(p, 0.25, 0)]
    assert 60 < len(out) < 140
    for p in found[:20]:
        twin = Preference("other id", p.prompt, "Another.", "Pair.")
        assert held_out(twin, 0.25, 0) == held_out(p, 0.25, 0)
    assert not any(held_out(p, 0.0, 0) for p in found)


def test_pairs_that_teach_nothing_are_counted(llama: Path) -> None:
    found = [
        preference(0, gap=1),
        preference(1),
        preference(2, "The cat eats tea."),
        preference(3, "nectar " * 600),
        preference(4, gap="wide"),
        preference(5, gap=math.inf),
        preference(6, gap=True),
        preference(7, gap=10**400),
    ]
    kept, dropped = encode_pairs(start(llama).chat, "own", found, "gap", 512)
    assert [(p.id, pair.margin) for p, pair in kept] == [("q0", 1.0), ("q1", 0.0)]
    bad = [(f"q{i}", "bad_margin") for i in (4, 5, 6, 7)]
    assert [d[:2] for d in dropped] == [("q2", "equal"), ("q3", "too_long"), *bad]


def test_sets_of_several_shapes_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [
        {"prompt": "a?", "chosen": "Yes.", "rejected": "No.", "gap": 2},
        {"prompt": "b?", "chosen": "Yes."},
    ]
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    pairs, dropped = read_pairs(file)
    assert [p.extra["gap"] for p in pairs] == [2]
    assert dropped.total() == 1
    triple = {
        "messages": [{"role": "user", "content": "a?"}],
        "responses": {"good": "Yes.", "bad": "No.", "plain": "Eh."},
    }
    half = {**triple, "responses": {"good": "Yes."}}
    triple["finish_reasons"] = {"good": "stop", "bad": "length", "plain": "length"}
    file.write_text(json.dumps(triple) + "\n" + json.dumps(half) + "\n")
    pairs, dropped = read_pairs(file)
    assert [(p.chosen, p.rejected) for p in pairs] == [("Yes.", "No.")]
    assert pairs[0].finish_reasons == {"chosen": "stop", "rejected": "length"}
    assert dropped == {"no_pair": 1}
    table = tmp_path / "a.csv"
    table.write_text("prompt,chosen,rejected\na?,Yes.,No.\n")
    assert [(p.chosen, p.rejected) for p in read_pairs(table)[0]] == [("Yes.", "No.")]
    file.write_text('{"prompt": "a?"}\n')
    with pytest.raises(DataError, match="no pair"):
        read_pairs(file)


def test_lengths_are_those_of_what_was_said(llama: Path) -> None:
    chat = load_chat(str(llama), policy(llama))
    cut_off = replace(preference(0), finish_reasons={"rejected": "length"})
    ((found, pair),) = encode_pairs(chat, "own", [cut_off], None, 512)[0]
    (scored,) = score_pairs(ScoringFake(), chat, [(found, pair)])
    # the score is read at the end that the template writes, and what is scored has one
    assert pair.rejected_ids == chat.exchange_ids(cut_off.prompt, cut_off.rejected)
    whole = chat.response_lengths([(cut_off.chosen, True), (cut_off.rejected, True)])
    assert [scored.chosen_tokens, scored.rejected_tokens] == [whole[0], whole[1] - 1]


def test_a_run_folder_stands_for_its_last_preferences(tmp_path: Path) -> None:
    run = tmp_path / "run"
    last = run / "iteration-2" / "preferences"
    last.mkdir(parents=True)
    (run / "resolved.json").write_text('{"iterations": 2, "method": "pbaa"}')
    entry: dict[str, Any] = {
        "stage": "iteration-2/preferences",
        "event": "begin",
        "kind": "WritePairs",
        "fingerprint": "f",
    }
    entry |= {"method": "pbaa", "round": 2, "outputs": ["iteration-2/preferences"]}
    RunFolder(run).append("ledger.jsonl", entry)
    with pytest.raises(ArtifactError, match="not finished"):
        preferences_of(str(run))
    RunFolder(run).append("ledger.jsonl", {**entry, "event": "finish"})
    assert preferences_of(str(run)) == last
    with pytest.raises(ConfigError, match="no preferences at"):
        preferences_of(str(tmp_path / "nowhere"))


# -- the recipe ------------------------------------------------------------------------------------


def recipe(**more: Any) -> Any:
    return recipe_of({"name": "rm", "policy": {"model": "m"}, **more}, "recipe")


def test_data_may_be_a_path_or_paths_or_sections() -> None:
    one = recipe(method="reward", reward={"data": "a.jsonl"}).reward
    several = recipe(
        method="reward",
        reward={"data": ["runs/mine", {"path": "b.jsonl", "weight": 0.5, "name": "sky"}]},
    ).reward
    assert one is not None
    assert several is not None
    assert [(d.label, d.weight) for d in one.data] == [("a.jsonl", 1.0)]
    assert [(d.label, d.weight) for d in several.data] == [("mine", 1.0), ("sky", 0.5)]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"method": "reward", "reward": {"data": {"path": "a", "weight": float("inf")}}},
            "finite number",
        ),
        ({"method": "reward"}, "reward is missing"),
        ({"method": "reward", "reward": {"data": None}}, r"needs reward\.data"),
        (
            {"method": "reward", "reward": {"data": "a"}, "queries": {"path": "q"}},
            "queries has no effect with method reward",
        ),
        (
            {"method": "reward", "reward": {"data": "a"}, "judge": "oracle"},
            "judge has no effect with method reward",
        ),
        (
            {"method": "reward", "reward": {"data": "a", "own_weight": 2}},
            "own_weight has no effect",
        ),
        (
            {
                "method": "reward",
                "reward": {"data": "a"},
                "policy": {"model": "m", "layout": "padded"},
            },
            "layout has no effect",
        ),
        ({"method": "reward", "reward": {"data": ["x/a", "y/a"]}}, "two sets of data are called"),
        ({"queries": {"path": "q"}, "reward": {"data": "x/sso"}}, "as the run's own"),
        ({"queries": {"path": "q"}, "reward": {"forward_pairs": 3}}, "does not divide"),
        ({}, "queries is missing"),
    ],
)
def test_recipes_that_cannot_be_honoured(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        recipe(**values)


def test_the_default_of_other_methods_trains_no_reward_model() -> None:
    assert recipe(queries={"path": "q"}).reward is None
    found = recipe(queries={"path": "q"}, reward={}).reward
    assert found is not None
    assert (found.own_weight, found.data) == (1.0, ())
