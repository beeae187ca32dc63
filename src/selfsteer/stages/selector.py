"""Measures a model while it is trained, and keeps the weights of the step that the rule chooses.

The rule is `training.selection.choose`. What is measured and what it costs: docs/selection.md.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfsteer.data.artifacts import read_json
from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import replacing, write_atomic
from selfsteer.data.records import Triple
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.collapse import Said, collapsed, growing, signs
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.judges.base import Judge, Pair
from selfsteer.judges.quality import (
    GAP_SEQUENCES,
    PLAIN_SEQUENCES,
    on_policyness,
    steering_gap,
    steering_gaps,
)
from selfsteer.judges.stats import known_interval, worths
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.load import LoadedModel
from selfsteer.models.score import score_sequences
from selfsteer.principles.contexts import context_messages
from selfsteer.recipe.sections import Selection
from selfsteer.run import ranks
from selfsteer.terminal import interval, is_main_process, progress_bar, warn
from selfsteer.training.select import (
    Candidate,
    Drift,
    beats,
    candidate_steps,
    choose,
    excess,
    within,
)
from selfsteer.training.sharding import parted, whole

#: What the wins of a candidate are called: see `Selector.measure`.
Measure = Literal["accuracy", "steering accuracy", "win rate"]


def repeated_4grams(answers: Sequence[Sequence[int]]) -> float:
    """Share of all 4-grams that stood in the same answer before; 0 where answers are shorter.

    >>> repeated_4grams([[1, 2, 1, 2, 1, 2, 1], [1, 2, 3, 4]])
    0.4
    """
    every = distinct = 0
    for ids in answers:
        grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
        every += len(grams)
        distinct += len(set(grams))
    return 1 - distinct / every if every else 0.0


class Selector:
    """Measures a model at its candidate steps and keeps the best one's weights.

    Everything it knows lies in the training's work folder: ``candidate-STEP.json`` once a step is
    measured, ``kept-STEP.safetensors``. A resumed training reads them and measures nothing twice.
    On several ranks the first one measures and the others wait.

    Args:
        settings: points, bounds.
        loaded: the model that is trained; measured as it is when a step ends.
        held_out: records to answer; with principles where contexts are good or bad.
        load_start: loads the starting model, for log-probs; never called with LoRA, whose adapters
            are switched off instead.
        contexts: in which the trained model will answer: ("good", "bad") for a generator, one of
            them for half a generator, ("plain",) for a policy.
        sampling: how it will be sampled.
        batch_size: conversations decoded together.
        judge: None: accuracy is replaced by steering accuracy, the win rate by nothing.
        seed: of the sampling, the same for every candidate.
        label: what the progress bar calls it.
    """

    def __init__(
        self,
        settings: Selection,
        loaded: LoadedModel,
        held_out: Sequence[Triple],
        *,
        load_start: Callable[[], LoadedModel],
        contexts: tuple[str, ...],
        sampling: SamplingParams,
        batch_size: int,
        judge: Judge | None,
        seed: int,
        label: str,
    ) -> None:
        self.settings, self.loaded, self.load_start = settings, loaded, load_start
        self.held_out, self.contexts = list(held_out), contexts
        self.sampling, self.batch_size, self.judge = sampling, batch_size, judge
        self.seed, self.label = seed, label
        #: Whether the model answers users; a generator only writes data.
        self.is_policy = contexts == ("plain",)
        #: What wins are called; steering accuracy is a proxy, by log-probs of the start alone.
        self.measure: Measure | None = "accuracy" if judge else "steering accuracy"
        if self.is_policy:
            self.measure = "win rate" if judge else None
        self.seconds = 0.0
        #: The step at which drift ended the training early.
        self.stopped: int | None = None
        self._records: dict[int, dict[str, Any]] = {}
        self._warned = False

    # -- OnStep ----------------------------------------------------------------------------------

    def begin(self, model: Any, work: Path, steps: int) -> None:
        """Measures the start; see `OnStep`."""
        self.model, self.work, self.steps = model, work, steps
        with whole(model):
            if is_main_process():
                self._resume()
            ranks.barrier()
        self.stopped = ranks.broadcast(self._drifted(max(self._records, default=0)))

    def _resume(self) -> None:
        """Reads what was measured before, and measures the start if that was not."""
        found = [read_json(dict[str, Any], p) for p in self.work.glob("candidate-*.json")]
        self._records = {record["step"]: record for record in found}
        begun = 0 in self._records
        if not begun or (self.candidates and not self._weights(self.chosen.step).exists()):
            # an earlier try was killed while it cleaned up; its checkpoints are gone as well
            self._records.clear()
        self._record(0)

    def visit(self, step: int) -> bool:
        """Measures candidates; see `OnStep`. True: drift is beyond bounds."""
        if not self._is_candidate(step):
            return False
        with whole(self.model):
            if is_main_process():
                self._record(step)
            self.stopped = ranks.broadcast(self._drifted(step))
        return self.stopped is not None

    def is_due(self, step: int) -> bool:
        """On the first rank: whether a candidate is not measured; see `OnStep`."""
        return self._is_candidate(step) and step not in self._records

    def restore(self) -> None:
        """Puts the chosen candidate's weights into the model; see `OnStep`."""
        step = ranks.broadcast(self.chosen.step if is_main_process() else None)
        with safe_open(self._weights(step), "pt") as kept, torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(parted(kept.get_tensor(name), parameter))

    # -- what it knows ------------------------------------------------------------------------

    @property
    def start(self) -> Candidate:
        """The model before the first step."""
        return self._candidate(0)

    @property
    def candidates(self) -> list[Candidate]:
        """Those measured so far."""
        return [self._candidate(step) for step in sorted(self._records) if step]

    @property
    def chosen(self) -> Candidate:
        """The best so far."""
        return choose(self.start, self.candidates, self.settings)

    def report(self) -> dict[str, Any]:
        """Everything measured, without the answers: what ``selection.json`` holds."""
        rng = np.random.default_rng(self.seed)
        return {
            "chosen": self.chosen.step,
            "steps": self.steps,
            "stopped": self.stopped,
            "wins": self.measure,
            "held_out": [t.id for t in self.held_out],
            "settings": self.settings.model_dump(),
            "candidates": [
                {
                    **{k: v for k, v in record.items() if k != "answers"},
                    "wins_mean": known_interval(record["wins"].values(), rng),
                    "excess": excess(self._candidate(step), self.start, self.settings),
                }
                for step, record in sorted(self._records.items())
            ],
        }

    def sentence(self) -> str:
        """``step 11 of 14 kept (win rate 0.81 [0.74, 0.87]; step 14: KL 1.6 times its bound)``."""
        chosen, parts = self.chosen, []
        won = known_interval(chosen.wins.values(), np.random.default_rng(self.seed))
        if won and self.measure:
            parts.append(f"{self.measure} {interval(won, '.2f')}")
        if chosen.on_policyness is not None:
            parts.append(f"on-policyness {chosen.on_policyness:.3f}")
        for c in self.candidates:
            over = [(n, v) for n, v in excess(c, self.start, self.settings).items() if v > 1]
            parts += [f"step {c.step}: {name} {v:.1f} times its bound" for name, v in over[:1]]
        if self.stopped is not None:
            parts.append(f"stopped at step {self.stopped}")
        return f"step {chosen.step} of {self.steps} kept ({'; '.join(parts)})"

    def warnings(self) -> list[str]:
        """What a person should not miss about the choice."""
        chosen, start = self.chosen, self.start
        faults = {
            f"every candidate drifted beyond its bounds; step {chosen.step}, the earliest, is kept "
            "and is likely broken. Lower the learning rate, train shorter, or look at its answers "
            "before you use it": not within(chosen, start, self.settings),
            "the judge gave no verdict, so drift alone decided": (
                self.judge is not None and not chosen.wins
            ),
            "the kept step loses against the policy it started from": (
                self.is_policy and beats(dict.fromkeys(chosen.wins, 0.5), chosen.wins)
            ),
            "its data is less accurate than the starting policy's own; lower the learning rate, or "
            "see what method pbaa gives": not self.is_policy and beats(start.wins, chosen.wins),
        }
        return [text for text, applies in faults.items() if applies][:1]

    def collapse(self) -> str:
        """How the answers of a step say less than the start's; empty where those of none do.

        A fault that the start has as well is no news of the training.
        """
        records = [record for _, record in sorted(self._records.items())]
        if collapsed(self._signs(records[0])):
            return ""
        for record in records[1:]:
            if text := collapsed(self._signs(record)):
                return f"step {record['step']}: {text}"
        for context in self.contexts:
            if text := growing([r["drift"][context]["tokens"] for r in records]):
                return f"{context} {text}"
        return ""

    def _signs(self, record: Mapping[str, Any]) -> Counter[str]:
        found = Counter[str]()
        for context in self.contexts:
            said = ([Said(a["text"], a["reason"] == "length")] for a in record["answers"][context])
            found.update(signs(context, said))
        return found

    def _candidate(self, step: int) -> Candidate:
        record = self._records[step]
        policyness = record["on_policyness"]
        return Candidate(
            step,
            {context: Drift(**figures) for context, figures in record["drift"].items()},
            record["wins"],
            policyness and policyness["rejected" if "bad" in self.contexts else "chosen"],
        )

    def _drifted(self, step: int) -> int | None:
        """The step, if its drift should end the training; only the first rank knows."""
        if step not in self._records or step in (0, self.steps):
            return None
        worst = max(excess(self._candidate(step), self.start, self.settings).values())
        return step if worst > self.settings.stop else None

    # -- measuring ----------------------------------------------------------------------------

    def _is_candidate(self, step: int) -> bool:
        return step in candidate_steps(self.steps, self.settings.points)

    def _trained(self) -> Iterator[tuple[str, Any]]:
        return ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)

    def _weights(self, step: int) -> Path:
        return self.work / f"kept-{step:06d}.safetensors"

    def _record(self, step: int) -> None:
        """Measures the model as it is; on disk when it returns, weights first."""
        if step in self._records:
            return
        begin = time.monotonic()
        # half a generator's responses are judged beside the start's own of the other half
        contexts = self.contexts if step or self.is_policy else ("good", "bad")
        # neither sampling nor scoring draws from the global generator: training does not notice
        with self.loaded.evaluating():
            answers = self._answers(contexts)
            record = {"step": step, "answers": answers, **self._figures(step, answers)}
        record["seconds"] = round(time.monotonic() - begin, 3)
        self.seconds += record["seconds"]
        self._records[step] = record
        if not self._warned and (text := self.collapse()):
            self._warned = True
            warn(f"{self.label}: {text}")
        keep = self._weights(self.chosen.step) if step else None
        if keep == self._weights(step):
            # a whole model is saved in its computing precision anyway, adapters are merged before
            dtype = torch.float32 if self._adapters else self.loaded.dtype
            state = {n: p.detach().to("cpu", dtype).contiguous() for n, p in self._trained()}
            with replacing(keep) as partial:
                save_file(state, partial)
        write_atomic(
            self.work / f"candidate-{step:06d}.json", json.dumps(record, ensure_ascii=False) + "\n"
        )
        for old in self.work.glob("kept-*.safetensors"):
            if old != keep:
                old.unlink()

    @property
    def _adapters(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    def _answers(self, contexts: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
        engine = TransformersEngine(self.loaded, self.batch_size)
        out = {}
        with progress_bar(f"{self.label}: held out", len(self.held_out) * len(contexts)) as bar:
            for context in contexts:
                asked = [
                    Request(
                        t.id,
                        tuple(context_messages(t.messages, t.principles, context)),
                        derive_seed(self.seed, t.id, context),
                    )
                    for t in self.held_out
                ]
                found = answers(engine, asked, self.sampling, advance=bar.advance)
                out[context] = [
                    {"text": c.text, "reason": c.finish_reason, "tokens": c.completion_tokens}
                    for c in found.values()
                ]
        return out

    def _figures(self, step: int, answers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        first = self._records[0]["answers"] if step else answers
        everyone = first | answers
        records = [
            replace(
                t,
                responses={context: found[i]["text"] for context, found in everyone.items()},
                finish_reasons={context: found[i]["reason"] for context, found in everyone.items()},
                reasoning={},  # the record's belongs to other responses of these names
            )
            for i, t in enumerate(self.held_out)
        ]
        pairs = [] if self.is_policy else [t for t in records if all(map(t.finished, everyone))]
        sequence = self.loaded.chat.sequence
        own: dict[str, dict[tuple[str, str], EncodedSequence]] = {}
        encoded: dict[tuple[str, str], EncodedSequence] = {}
        for context in self.contexts:
            name = f"{context}/{context}"
            answered = [t for t in records if t.responses[context] or t.finished(context)]
            own[context] = {(t.id, name): sequence(t, name) for t in answered}
            encoded |= own[context]
        mine = self._scores(self.loaded, encoded)
        for name in (*PLAIN_SEQUENCES, *GAP_SEQUENCES):
            encoded |= {(t.id, name): sequence(t, name) for t in pairs}
        with self._starting_model(step) as start:
            theirs = self._scores(start, encoded)
        drift = {}
        for context, asked in own.items():
            logps, before = (sum(float(s[k].double().sum()) for k in asked) for s in (mine, theirs))
            tokens = max(sum(len(mine[k]) for k in asked), 1)
            drift[context] = {
                "tokens": float(np.mean([c["tokens"] for c in answers[context]])),
                "repeated": repeated_4grams([s.response_ids for s in asked.values()]),
                "unfinished": float(np.mean([c["reason"] != "stop" for c in answers[context]])),
                "kl": (logps - before) / tokens,
                "entropy": -logps / tokens,
            }
        if not self.is_policy:
            return {"drift": drift, **self._data_figures(pairs, theirs)}
        compared = [
            Pair(
                t.query,
                t.responses["plain"],
                b["text"],
                (t.finished("plain"), b["reason"] == "stop"),
            )
            for t, b in zip(records, first["plain"], strict=True)
        ]
        wins = self._wins(compared) if step else {}
        return {"drift": drift, "wins": wins, "on_policyness": None}

    def _data_figures(
        self, pairs: Sequence[Triple], scores: Mapping[tuple[str, str], Tensor]
    ) -> dict[str, Any]:
        """Of the pairs that a generator wrote, as the quality report has them."""
        if not pairs:
            nothing = {"chosen": 0.0, "rejected": 0.0}
            return {"pairs": 0, "wins": {}, "on_policyness": nothing, "steering_gap": None}
        means = {
            name: np.array([float(scores[t.id, name].double().mean()) for t in pairs])
            for name in (*PLAIN_SEQUENCES, *GAP_SEQUENCES)
        }
        wins = self._wins(list(map(Pair.of, pairs)))
        if self.judge is None:
            steered = np.all([gaps > 0 for gaps in steering_gaps(means).values()], axis=0)
            wins = {t.id: float(w) for t, w in zip(pairs, steered, strict=True)}
        return {
            "pairs": len(pairs),
            "wins": wins,
            "on_policyness": {
                "chosen": on_policyness(means["plain/good"]),
                "rejected": on_policyness(means["plain/bad"]),
            },
            "steering_gap": steering_gap(means),
        }

    def _wins(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """What the judge's verdict is worth to the first response; nothing if unparseable."""
        if self.judge is None:
            return {}
        found = zip(pairs, worths(self.judge, pairs), strict=True)
        return {pair.query.id: win for pair, win in found if win is not None}

    def _scores(
        self, loaded: LoadedModel, sequences: Mapping[tuple[str, str], EncodedSequence]
    ) -> dict[tuple[str, str], Tensor]:
        with loaded.precision():
            found = score_sequences(
                loaded.model, list(sequences.values()), layout=loaded.layout, batch_size=32
            )
        return dict(zip(sequences, found, strict=True))

    @contextmanager
    def _starting_model(self, step: int) -> Iterator[LoadedModel]:
        if step == 0:
            yield self.loaded
        elif self._adapters:
            with self.model.disable_adapter():
                yield self.loaded
        else:
            start = self.load_start()
            start.layout = self.loaded.layout  # proved once
            start.settle(())
            yield start
