"""`selfsteer chat`: the run's models answer one question in all three contexts."""

from types import SimpleNamespace
from typing import Any

from rich.markup import escape
from rich.table import Table

from selfsteer.data.records import Message
from selfsteer.engines.base import SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.models.load import load_model
from selfsteer.principles import writer
from selfsteer.principles.contexts import CONTEXTS, context_messages
from selfsteer.recipe.sections import PrinciplesConfig, resolve_path
from selfsteer.terminal import out


class Chat:
    """Base, generator and policy of a run, loaded once.

    Args:
        found: the run as `selfsteer.report.summary.load` gives it.
        features: what the principles name; none: as `writer.specimen` chooses.
        seed: of the sampling; counts up by question.
    """

    def __init__(self, found: dict[str, Any], features: tuple[str, ...], seed: int) -> None:
        recipe = found["recipe"]
        made = PrinciplesConfig.model_validate(recipe["principles"])
        self.principles = writer.specimen(made, features)
        self.seed = seed
        settings: Any = SimpleNamespace(**recipe["policy"])
        sampling = recipe["sampling"]
        self.params = SamplingParams(
            sampling["temperature"], sampling["top_p"], sampling["max_new_tokens"]
        )
        self.engines = {
            name: TransformersEngine(load_model(resolve_path(source), settings, inference=True))
            for name, source in found["models"].items()
            if name != "reward"
        }

    def answers(self, question: str) -> dict[str, dict[str, str]]:
        """Model → context → what it says."""
        messages = (Message("user", question),)
        prompts = [context_messages(messages, self.principles, c) for c in CONTEXTS]
        found = {
            name: engine.generate(prompts, self.params, self.seed)
            for name, engine in self.engines.items()
        }
        self.seed += 1
        return {
            name: {c: a.text for c, a in zip(CONTEXTS, said, strict=True)}
            for name, said in found.items()
        }

    def ask(self, question: str) -> None:
        """Prints one table: a row per model, a column per context."""
        table = Table(show_lines=True)
        table.add_column("")
        for context in CONTEXTS:
            table.add_column(context, ratio=1)
        for name, said in self.answers(question).items():
            table.add_row(name, *map(escape, said.values()))
        out.print(table)
