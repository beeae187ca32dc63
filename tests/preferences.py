"""Invented preferences of the tiny world: a faultless answer over one with known faults."""

import random
from pathlib import Path

from selfsteer.data.jsonl import dump_lines, write_atomic
from selfsteer.data.records import Preference
from selfsteer.testbed.corpus import as_query
from selfsteer.testbed.grammar import respond
from selfsteer.testbed.questions import questions


def tiny_pairs(count: int, seed: int, *, faults: int = 2) -> list[Preference]:
    """So many pairs on different questions; the rejected answer is odd in ``faults`` features."""
    rng = random.Random(seed)
    found = []
    for question in rng.sample(list(questions("train")), count):
        good = dict.fromkeys(question.features, "good")
        odd = rng.sample(sorted(good), min(faults, len(good)))
        chosen = respond(question, good, rng)
        rejected = respond(question, good | dict.fromkeys(odd, "odd"), rng)
        query = as_query(question)
        found.append(Preference(query.id, query.messages, chosen, rejected))
    return found


def write_pairs(path: Path, pairs: list[Preference]) -> Path:
    """As a JSONL file."""
    write_atomic(path, dump_lines(pairs))
    return path
