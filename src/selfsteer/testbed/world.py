"""The tiny world: questions, responses of a wanted quality, training examples, one fingerprint.

Small enough to be understood whole, rich enough for the method: a good principle makes answers
better, a bad one makes them worse *and odd*, and odd answers are rare in plain ones. That is the
off-policy problem that SSO is about.
"""

import hashlib
import json
import random
from dataclasses import asdict
from functools import cache
from pathlib import Path

from selfsteer.principles import catalogue, writer
from selfsteer.testbed import corpus as corpus_module
from selfsteer.testbed import knowledge, oracle
from selfsteer.testbed.corpus import Example, as_query, choosable, corpus
from selfsteer.testbed.grammar import respond
from selfsteer.testbed.questions import SPLITS, Question, question, questions

__all__ = [
    "CHECKPOINT",
    "QUERIES",
    "SPLITS",
    "Example",
    "Question",
    "corpus",
    "fingerprint",
    "question",
    "questions",
    "respond",
]

#: The model that the package ships, made by `testbed.build`.
CHECKPOINT = Path(__file__).parent / "checkpoint"

#: Split: the query file that the package ships.
QUERIES = {
    split: Path(__file__).parent / "queries" / f"{split}.jsonl"
    for split in SPLITS
    if split != "train"
}


@cache
def fingerprint() -> str:
    """A hash over everything that the testbed model and the oracle depend on.

    Covers what is said, not how the code is written: the data, all questions with their splits,
    the odds of the training examples, the catalogue, the writer's prompts and answers, and sample
    responses of every task and level with the oracle's scores of them.
    """
    content = {
        "knowledge": _constants(knowledge),
        "odds": _constants(corpus_module),
        "questions": [(asdict(q), q.split, q.features) for q in questions()],
        "catalogue": [
            f.model_dump(exclude={"weight", "checks"}) for f in catalogue.BUILT_IN.features
        ],
        "closing": catalogue.BUILT_IN.closing,
        "samples": [_sample(task) for task in knowledge.TASK_FEATURES],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _constants(module: object) -> dict[str, object]:
    found = {name: value for name, value in vars(module).items() if name.isupper()}
    return {name: value for name, value in found.items() if not name.startswith(("_", "UNEVEN_"))}


def _sample(task: str) -> list[object]:
    """The first question of a task: what is asked of the writer, and answers with their scores."""
    asked = next(q for q in questions() if q.task == task)
    features = choosable(asked)[:2]
    principles = writer.picked(features)
    prompts = (
        writer.feature_prompt(as_query(asked), 2),
        writer.principle_prompt(as_query(asked), features),
    )
    out: list[object] = [
        *prompts,
        writer.feature_answer(features),
        writer.principle_answer(principles.good, principles.bad),
        principles.to_dict(),
    ]
    for level in knowledge.LEVELS:
        response = respond(asked, dict.fromkeys(asked.features, level), random.Random(0))
        out += [response, asdict(oracle.score(asked.text, response))]
    return out
