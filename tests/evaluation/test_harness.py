"""What tasks of lm-evaluation-harness see of a model that thinks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from selfsteer.evaluation.harness import _harness_model
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.recipe.sections import Benchmarks, HarnessTask, Policy
from tests.make import make_checkpoint

pytest.importorskip("lm_eval")


def loaded(folder: Path) -> LoadedModel:
    """A tiny model whose prompts leave a block of thoughts open."""
    made = make_checkpoint(folder, "qwen2")
    template = made / "chat_template.jinja"
    text = template.read_text().replace("assistant\\n'", "assistant\\n<think>\\n'")
    template.write_text(text + "{#- knows </think> -#}")
    return load_model(str(made), Policy(model=str(made), device="cpu"), inference=True)


def settings(**more: Any) -> Benchmarks:
    return Benchmarks(tasks=(HarnessTask(name="task"),), batch_size=1, **more)


@pytest.mark.parametrize("chat_template", [True, False])
def test_a_task_sees_the_answer_and_its_stops_wait_for_it(
    chat_template: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    model = loaded(tmp_path)
    stops: list[Any] = []
    said = iter(["So.\nHoney?\n</think>\n\nNectar.\nHoney.<|im_end|>", "So.\nHoney"])

    def generate(self: Any, context: torch.Tensor, stop: list[str], **more: Any) -> torch.Tensor:
        stops.append(stop)
        rows = [[*row, *self.tok_encode(next(said))] for row in context.tolist()]
        return torch.tensor(rows)

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    lm = _harness_model(model, settings(chat_template=chat_template), "task")
    asked = [SimpleNamespace(args=(q, {"until": ["\n"], "max_gen_toks": 9})) for q in ("Hi", "H")]
    found = lm.generate_until(asked)
    if chat_template:
        assert (found, lm.unfinished) == (["Nectar.", ""], 1)
        assert stops == [["<|im_end|>"]] * 2
    else:
        assert (found, lm.unfinished) == (["So.", "So."], 0)
        assert stops == [["\n", "<|im_end|>"]] * 2


def test_choices_are_scored_as_answers(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    lm = _harness_model(model, settings(), "task")
    prompt = lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<think>\n")
    context, choice = lm._encode_pair(prompt, "Nectar.")
    text = model.chat.tokenizer.decode([*context, *choice])
    assert text == f"{prompt}\n</think>\n\nNectar."
