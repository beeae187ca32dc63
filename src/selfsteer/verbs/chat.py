"""``selfsteer chat``: the models of a run answer one question in all three contexts."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from selfsteer import stopping
from selfsteer.errors import ConfigError, DataError, listed
from selfsteer.terminal import CONTROL, err, out
from selfsteer.verbs.common import AsJson, Trust, aligning, check_trust, emit

if TYPE_CHECKING:
    from selfsteer.engines.base import Completion
    from selfsteer.view import RunView


def chat(
    run: Annotated[Path, typer.Argument(help="run folder")],
    question: Annotated[str | None, typer.Option(help="ask one question, then exit")] = None,
    features: Annotated[
        str,
        typer.Option(
            help="features of the good and the bad principle, comma-separated; default: "
            "Helpfulness,Accuracy, the first two of the run's own catalogue, or its fixed "
            "texts"
        ),
    ] = "",
    contrast: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="one more column: the good answer, its logits pushed R times as far from the "
            "bad context (as sampling.contrast)",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="in the plain context alone: an answer per model")
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the sampling")] = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Ask base, generator and policy the same question; plain, good and bad side by side."""
    from selfsteer.recipe.read import validate
    from selfsteer.recipe.sections import PrincipledSampling
    from selfsteer.view import RunView

    if as_json and question is None:
        raise ConfigError("--json prints one answer; give the question with --question.")
    if contrast is not None:
        validate(PrincipledSampling, {"contrast": contrast}, "--contrast")
    if plain and (features or contrast is not None):
        raise ConfigError("--plain asks without principles; leave out --features and --contrast.")
    named = tuple(f.strip() for f in features.split(",") if f.strip())
    stopping.keeps = False
    opened = RunView.open(run)
    check_trust(run, opened.recipe.policy, trust)
    talk = Chat(opened, named, seed=seed, contrast=contrast, plain=plain)
    if question is not None:
        said = talk.answers(question)
        result = {"question": question, "principles": talk.principles.to_dict()}
        parts = {"answers": "text", "reasoning": "reasoning", "finish_reasons": "finish_reason"}
        for key, part in parts.items():
            result[key] = {
                n: {c: getattr(a, part) for c, a in of.items()} for n, of in said.items()
            }
        emit(result, as_json, lambda _: print_answers(said))
        return
    err.print(talk.hint, style="dim", markup=False)
    while True:
        if sys.stdin.isatty():
            err.print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line or line in ("/exit", "/quit"):
            return
        if line in ("/help", "/?"):
            err.print(talk.hint, style="dim", markup=False)
            continue
        try:
            print_answers(talk.answers(line))
        except DataError as e:
            err.print(str(e), markup=False)


class Chat:
    """Base, generator and policy of a run, loaded once.

    Args:
        run: whose models answer.
        features: what the principles name; none: as `writer.specimen` chooses.
        seed: of the sampling; counts up by question.
        contrast: r of a further answer, good pushed away from bad; None: no such answer.
        plain: asks in the plain context alone.
    """

    def __init__(
        self,
        run: "RunView",
        features: tuple[str, ...],
        *,
        seed: int,
        contrast: float | None = None,
        plain: bool = False,
    ) -> None:
        from selfsteer.engines.base import SamplingParams
        from selfsteer.engines.transformers import TransformersEngine
        from selfsteer.methods import Principled
        from selfsteer.models.load import load_model
        from selfsteer.principles import writer
        from selfsteer.principles.contexts import CONTEXTS
        from selfsteer.recipe.sections import PrinciplesConfig, resolve_path
        from selfsteer.run.sources import check_sources
        from selfsteer.stages.principles import kept_system

        recipe = aligning(run.recipe)
        check_sources(run.folder, recipe, "principles.", refuse=False)
        sampling = recipe.sampling
        own = recipe.principles if isinstance(recipe, Principled) else PrinciplesConfig()
        loading = run.loading
        models = run.checked_models
        base = resolve_path(models["base"])
        system = kept_system(own, base, loading)
        self.principles = replace(writer.specimen(own, features), system=system)
        self.seed, self.contrast = seed, contrast
        self.contexts = ("plain",) if plain else CONTEXTS
        self.params = SamplingParams(sampling.temperature, sampling.top_p, sampling.max_new_tokens)
        self.engines = {
            name: TransformersEngine(load_model(resolve_path(source), loading, inference=True))
            for name, source in models.items()
            if name != "reward"
        }

    @property
    def hint(self) -> str:
        """Who will answer, and how to leave."""
        under = ""
        if len(self.contexts) > 1:
            named = ", ".join(self.principles.features) or "the run's fixed texts"
            under = f", under principles of {named} (--features) and without (alone: --plain)"
        return (
            f"{listed([*self.engines])} answer{under}, each question on its own. An empty line or "
            "Ctrl-D leaves."
        )

    def answers(self, question: str) -> dict[str, dict[str, "Completion"]]:
        """Model → context, or ``contrast`` → what it says.

        Raises:
            DataError: the question is too long for the model in every context.
        """
        from selfsteer.data.digests import derive_seed
        from selfsteer.data.records import Message
        from selfsteer.engines.answers import answers
        from selfsteer.engines.base import PROMPT_TOO_LONG, Contrast, Request
        from selfsteer.principles.contexts import context_messages

        messages = (Message("user", question),)
        said = {c: tuple(context_messages(messages, self.principles, c)) for c in self.contexts}
        asked = [Request(c, said[c], derive_seed(self.seed, "chat", c)) for c in self.contexts]
        if self.contrast is not None:
            pushed = Contrast(said["bad"], self.contrast)
            seed = derive_seed(self.seed, "chat", "contrast")
            asked.append(Request("contrast", said["good"], seed, pushed))
        self.seed += 1
        found = {n: answers(engine, asked, self.params) for n, engine in self.engines.items()}
        every = [answer for of in found.values() for answer in of.values()]
        if all(answer.finish_reason == PROMPT_TOO_LONG for answer in every):
            raise DataError(
                f"The question is too long: it has {min(a.prompt_tokens for a in every):,} tokens, "
                f"the run's sampling.max_new_tokens {self.params.max_new_tokens:,} come after it, "
                "and both must fit into the model's context. Ask something shorter."
            )
        return found


def print_answers(answers: Mapping[str, Mapping[str, "Completion"]]) -> None:
    """A row per model, a column per context; thoughts are dimmed, as is what an answer lacks."""
    table = Table(show_lines=True)
    table.add_column("")
    for context in next(iter(answers.values())):
        table.add_column(context, ratio=1)
    for name, said in answers.items():
        cells = (
            Text.assemble(
                (a.reasoning.translate(CONTROL), "dim"), a.text.translate(CONTROL), lacks(a)
            )
            for a in said.values()
        )
        table.add_row(name, *cells)
    out.print(table)


def lacks(answer: "Completion") -> tuple[str, str]:
    """Why there is no answer, or that it has no end; dimmed."""
    if answer.missing:
        return f"({answer.missing})", "dim"
    cut = answer.finish_reason == "length"
    return f" … (cut off after {answer.completion_tokens:,} tokens)" if cut else "", "dim"
