"""Rules to a catalogue: a model writes the bad counterpart of each rule."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from selfsteer.data.digests import derive_seed
from selfsteer.data.jsonl import write_atomic
from selfsteer.data.records import Dropped
from selfsteer.engines.answers import answers
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.load import Engines
from selfsteer.errors import DataError
from selfsteer.principles.catalogue import Feature
from selfsteer.principles.constitution import catalogue_yaml, read_feature, read_rules, rule_prompt
from selfsteer.principles.lint import lint
from selfsteer.recipe.sections import EngineConfig, RulesConfig
from selfsteer.run.cost import Cost, Scale
from selfsteer.run.folder import RunFolder, StageResult
from selfsteer.run.stage import Artifact, Stage
from selfsteer.stages.sample import check_writer, who_answers
from selfsteer.terminal import progress_bar


@dataclass(frozen=True)
class OpposeRules(Stage):
    """A catalogue with a feature for each rule of a file.

    The writer is asked ``tries`` times for each rule, and the first answer that makes a feature is
    used. A rule without one is dropped for the reason of its first answer. The notes hold the
    outcomes of all answers and what `lint` finds.

    Args:
        rules: the file.
        settings: who writes, and how.
    """

    rules: Artifact
    settings: RulesConfig

    title = "catalogue"
    makes = ("{name}.yaml",)
    leaves = ("{name}.answers.jsonl",)

    @override
    def cost(self, scale: Scale) -> Cost:
        return Cost(unknown=(self.name,))

    @override
    def check(self) -> Iterator[str]:
        read_rules(Path(self.rules.path))
        budget = {"rules.max_new_tokens": self.settings.max_new_tokens}
        yield from check_writer(self.settings.writer, self.loading, budget)

    @override
    def run(self, run: RunFolder) -> StageResult:
        rules, dropped = read_rules(Path(self.rules.path))
        n_in, s = len(rules) + len(dropped), self.settings
        outcomes: Counter[str] = Counter()
        features: list[Feature] = []
        requests = [
            Request(f"{i}/{k}", tuple(rule_prompt(rule)), derive_seed(self.seed, "rules", i, k))
            for i, rule in enumerate(rules)
            for k in range(s.tries)
        ]
        with Engines(run.path) as engines, progress_bar("rules", len(requests)) as bar:
            engine = who_answers(engines, EngineConfig(), "", self.loading, 32, s.writer)
            said = answers(
                engine,
                requests,
                SamplingParams(s.temperature, s.top_p, s.max_new_tokens),
                store=run / self.leaves[0].format(name=self.name),
                advance=bar.advance,
            )
        for i, rule in enumerate(rules):
            found = []
            for k in range(s.tries):
                c = said[f"{i}/{k}"]
                found.append(read_feature(rule, c.text, c.missing or c.finish_reason))
            outcomes.update(f if isinstance(f, str) else "ok" for f in found)
            made = next((f for f in found if isinstance(f, Feature)), None)
            if made is None:
                dropped.append(Dropped(rule.where, str(found[0]), rule))
            else:
                features.append(made)
        counts = run.drop(self.name, dropped)
        if not features:
            way = "a stronger model as --model"
            if set(outcomes) == {"prompt_too_long"}:
                way = "a model with a longer context as --model, or lower rules.max_new_tokens"
            raise DataError(
                f"No answer of the writer made a feature of any of the {len(rules)} rules "
                f"({', '.join(f'{n} {why}' for why, n in outcomes.most_common())}). Give "
                f"{way}, or write the catalogue by hand: selfsteer principles "
                "list --yaml."
            )
        text = catalogue_yaml(features, self.rules.path.name, s.domain)
        write_atomic(run / self.outputs[0], text)
        notes = {"outcomes": dict(outcomes), "findings": [str(f) for f in lint(text)]}
        return StageResult(n_in, len(features), counts, notes=notes)
