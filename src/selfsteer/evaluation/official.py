"""Answers to judged sets in the input formats of the official tools, and the commands to run those.

selfsteer's own judging compares models with each other. Figures to set beside a public leaderboard
come from its own program, prompts and judge. The formats are those of tatsu-lab/alpaca_eval
(README.md), lmarena/arena-hard-auto (gen_answer.py, gen_judgment.py) and lm-sys/FastChat
(fastchat/llm_judge/common.py), read in November 2026.
"""

import json
import shlex
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsteer.data.digests import digest
from selfsteer.data.jsonl import dump_lines, filling, write_atomic
from selfsteer.evaluation.questions import Answered, Question

#: Style → file of a model's answers.
FILES = {
    "alpaca-eval": "{model}.json",
    "arena-hard": "data/arena-hard-v2.0/model_answer/{model}.jsonl",
    "mt-bench": "data/mt_bench/model_answer/{model}.jsonl",
}

_ALPACA_EVAL = """\
python -m venv alpaca-eval && alpaca-eval/bin/pip install alpaca-eval
export OPENAI_API_KEY=YOUR_KEY
for answers in {folder}/*.json; do
  alpaca-eval/bin/alpaca_eval --model_outputs "$answers" \\
    --annotators_config weighted_alpaca_eval_gpt4_turbo
done"""

_ARENA_HARD = """\
git clone https://github.com/lmarena/arena-hard-auto && cd arena-hard-auto
python -m venv .venv && .venv/bin/pip install -r requirements.txt -r requirements-optional.txt
git clone https://huggingface.co/datasets/lmarena-ai/arena-hard-auto arena-hard-data  # git-lfs
cp -r arena-hard-data/data {folder}/data .
export OPENAI_API_KEY=YOUR_KEY
.venv/bin/python -c "import yaml; path = 'config/arena-hard-v2.0.yaml'
settings = yaml.safe_load(open(path)); settings['model_list'] = '{models}'.split()
yaml.safe_dump(settings, open(path, 'w'))"
.venv/bin/python gen_judgment.py --setting-file config/arena-hard-v2.0.yaml
.venv/bin/python show_result.py --benchmark arena-hard-v2.0 --category hard_prompt"""

_MT_BENCH = """\
git clone https://github.com/lm-sys/FastChat && cd FastChat
python -m venv .venv && .venv/bin/pip install -e '.[model_worker,llm_judge]'
cd fastchat/llm_judge && cp -r {folder}/data .
export OPENAI_API_KEY=YOUR_KEY
../../.venv/bin/python gen_judgment.py --model-list {models} --parallel 2
../../.venv/bin/python show_result.py --model-list {models}"""

#: Style → shell commands, from cloning to the table.
COMMANDS = {"alpaca-eval": _ALPACA_EVAL, "arena-hard": _ARENA_HARD, "mt-bench": _MT_BENCH}


@dataclass(frozen=True)
class Official:
    """What was written, and how the official tool is run on it.

    ``left_out`` counts, by model, questions that it did not answer on every turn.
    """

    answers: int
    paths: list[Path]
    left_out: dict[str, int]
    commands: str


def write_official(
    style: str,
    questions: Sequence[Question],
    answers: Mapping[str, Mapping[str, Answered]],
    folder: Path,
) -> Official:
    """Writes each model's answers as the official tool of a style reads them.

    Args:
        style: one of `FILES`.
        questions: of the tool's own question set.
        answers: model → question id → its answers; the model's name becomes a file name.
        folder: made if need be.
    """
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    with filling(folder) as place:
        for model, found in answers.items():
            given = [q for q in questions if not found[q.id].missing]
            rows = [_row(style, model, q, found[q.id]) for q in given]
            if len(rows) < len(questions):
                left_out[model] = len(questions) - len(rows)
            name = FILES[style].format(model=model)
            text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
            write_atomic(place / name, text if name.endswith(".json") else dump_lines(rows))
            paths.append(folder / name)
    commands = COMMANDS[style].format(
        folder=shlex.quote(str(folder.absolute())), models=" ".join(answers)
    )
    written = len(questions) * len(answers) - left_out.total()
    return Official(written, paths, dict(left_out), commands)


def _row(style: str, model: str, question: Question, answer: Answered) -> dict[str, Any]:
    first, identity = answer.responses[0], digest([model, question.id, answer.responses])
    if style == "alpaca-eval":
        return {"instruction": question.start[-1].content, "output": first, "generator": model}
    if style == "arena-hard":
        asked = [m.to_dict() for m in question.start]
        return {
            "uid": question.id,
            "ans_id": identity,
            "model": model,
            "messages": [*asked, {"role": "assistant", "content": {"answer": first}}],
            "tstamp": time.time(),
            "metadata": {},
        }
    return {
        # FastChat joins by a number
        "question_id": int(question.id) if question.id.isdecimal() else question.id,
        "answer_id": identity,
        "model_id": model,
        "choices": [{"index": 0, "turns": list(answer.responses)}],
        "tstamp": time.time(),
    }
