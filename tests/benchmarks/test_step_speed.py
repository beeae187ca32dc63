"""The benchmark's floor against a counter of operations, its guard, and docs/scaling.md's bytes."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from selfsteer.errors import DataError, NumericsError
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.score import batch_logps, pack, settle_layout

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_speed.py"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("step_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def llama(layers: int = 2, hidden: int = 64) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=hidden,
            intermediate_size=hidden * 7 // 2,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )


def sequences() -> list[EncodedSequence]:
    prompt = tuple(range(1, 12))
    return [EncodedSequence(prompt, (3,) * 7), EncodedSequence(prompt, (4,) * 5)]


def test_the_floor_counts_what_the_tree_step_multiplies(bench: Any) -> None:
    model = llama()
    settle_layout(model, "tree", [])
    counter = FlopCounterMode(display=False)
    with counter:
        batch_logps(model, pack(sequences(), "tree", 0)).sum().backward()
    products = ("aten.mm", "aten.addmm")
    counted = sum(v for op, v in counter.get_flop_counts()["Global"].items() if str(op) in products)
    body, head = bench.floor_flops(model.config, sequences())
    # 11 prompt tokens and 6 + 4 inner tokens; each sees what is before it and itself
    keys = 11 * 12 // 2 + (6 * 11 + 6 * 7 // 2) + (4 * 11 + 4 * 5 // 2)
    attention = 3 * 2 * 4 * 64 * keys
    assert head == 3 * 2 * 64 * 50 * 12
    assert body + head - attention == counted


@pytest.mark.parametrize("name", ["sso-online", "sso", "pbaa"])
def test_rows_agree_in_loss_and_gradient(bench: Any, name: str, tmp_path: Path) -> None:
    words = (
        f"--hidden 32 --layers 1 --queries 2 --draws 2 --scale 16 --repeats 2 --output {tmp_path}"
    )
    args = bench.arguments(words.split())
    ours = tuple(row for row in bench.ROWS if not row.startswith("TRL"))
    objective = bench.Objective.named(name)
    model, draws, steps = bench.build(objective, 64, args, ours)
    assert len(draws) == 2
    for d in range(2):
        seen: dict[str, float] = {}
        for row, step in steps.items():
            model.zero_grad()
            loss = step(d)
            grads = [p.grad for p in model.parameters()]
            norm = float(torch.nn.utils.get_total_norm(grads))
            bench.check_equal(name, row, loss, norm, seen)
        with pytest.raises(NumericsError, match="do not compute the same"):
            bench.check_equal(name, "ours", loss * 1.001, norm, seen)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls transformers by old names
def test_a_model_of_yours_beside_trl(bench: Any, tmp_path: Path) -> None:
    """Ours and TRL's step agree in loss and gradient, or `real_case` would refuse them."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {i}?", "chosen": "A number. " * (1 + i % 3), "rejected": "Nothing."}
        for i in range(5)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--model package:selfsteer.testbed/checkpoint --pairs {pairs} --draws 2 --repeats 2"
    args = bench.arguments([*words.split(), "--memory-vocabulary", "0"])
    result = bench.real_case(args)
    assert list(result["rows"]) == list(bench.REAL_ROWS)
    assert all(row["ours_faster_seconds"] > 0 for row in result["rows"].values())
    tokens = [run["tokens"] for run in result["rows"][bench.OURS]["runs"]]
    assert len(set(tokens)) == 2
    assert "| TRL, reference precomputed |" in bench.real_table(result)
    with pytest.raises(DataError, match="5 pairs of at most 384 tokens, and 3 draws of 2 need 6"):
        bench.real_case(bench.arguments([*words.split(), "--draws", "3"]))


def test_cases_on_file_are_not_measured_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def case(name: str, vocabulary: int, args: Any) -> dict[str, Any]:
        asked.append((name, vocabulary))
        row = {
            "seconds": 1.0,
            "faster": 1.0,
            "faster_min": 1.0,
            "faster_max": 1.0,
            "times": [1.0],
            "processor_times": [1.0],
        }
        rows = dict.fromkeys(bench.rows_of(name, vocabulary), row)
        floor = {"share": 0.5}
        return {"objective": name, "vocabulary": vocabulary, "rows": rows, "floor": floor,
                "optimiser_seconds": 0.1}  # fmt: skip

    def run(*words: str) -> list[tuple[str, int]]:
        asked.clear()
        common = ["step_speed.py", "--output", str(tmp_path), "--memory-vocabulary", "0"]
        monkeypatch.setattr(sys, "argv", [*common, *words])
        bench.main()
        return list(asked)

    monkeypatch.setattr(bench, "case", case)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert run("--vocabularies", "4096", "--only", "pbaa") == [("pbaa", 4096)]
    assert run("--vocabularies", "4096", "--only", "sso", "pbaa") == [("sso", 4096)]
    stored = json.loads((tmp_path / "step_speed.json").read_text())
    assert [c["objective"] for c in stored["cases"]] == ["sso", "pbaa"]
    assert "| ours against TRL compact | 1.00× | 1.00× |" in capsys.readouterr().out
    assert run("--vocabularies", "4096", "--only", "pbaa", "--repeats", "7") == [("pbaa", 4096)]


@pytest.mark.parametrize(("checkpointing", "low", "high"), [(False, 55, 70), (True, 4, 4)])
def test_bytes_per_token_that_scaling_states(checkpointing: bool, low: float, high: float) -> None:
    """Saved for backward by two more layers of an 8B model's proportions, in units of D."""

    def saved(layers: int) -> int:
        model = llama(layers, hidden=512)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        settle_layout(model, "tree", [])
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in weights:
                kept[x.untyped_storage().data_ptr()] = x
            return x

        prompt = (1,) * 370
        batch = pack([EncodedSequence(prompt, (t,) * 330) for t in (2, 3)], "tree", 0)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            batch_logps(model, batch)
        copies = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
        return sum(x.untyped_storage().nbytes() for x in kept.values() if x.shape not in copies)

    tokens = 370 + 2 * 329
    assert low <= (saved(3) - saved(1)) / 2 / tokens / 512 <= high
