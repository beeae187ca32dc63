"""A run's data and models for other programs, with the cards that tell how they were made."""

import shutil
from array import array
from pathlib import Path
from typing import Any

from selfsteer.data.jsonl import (
    Records,
    Stored,
    disk_errors,
    filling,
    replacing_folder,
    write_atomic,
)
from selfsteer.data.records import Triple
from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.formats import FORMATS, Exported, export
from selfsteer.formats.cards import dataset_card, model_card, public_name
from selfsteer.formats.gguf import convert, modelfile
from selfsteer.methods import Paired, Principled
from selfsteer.recipe.sections import ContrastRanking, resolve_path
from selfsteer.run.folder import LEDGER, RunFolder
from selfsteer.run.sources import check_sources
from selfsteer.stages.filter import named_features, names_safety
from selfsteer.terminal import progress_bar, say
from selfsteer.view import RoundView


def check_outside(to: Path) -> None:
    """Refuses to export into a run folder: a run would take the files for its own.

    Raises:
        ConfigError: the folder is one, or in one.
    """
    for folder in (to.resolve(), *to.resolve().parents):
        if (folder / LEDGER).exists():
            raise ConfigError(
                f"{to} is in the run folder {folder}, and the run would take what is exported for "
                "its own. Give a folder outside of it."
            )


def export_to(
    folder: Path, of: RoundView, fmt: str, queries_license: str | None, *, trust: bool
) -> Exported:
    """`export_round` into a folder that appears whole; LLaMA-Factory's own is added to.

    Raises:
        ConfigError: as `export_round`, or the folder holds something else.
        ArtifactError: as `export_round`, or another process exports there now.
    """
    shared = fmt in FORMATS and FORMATS[fmt].entry is not None
    with (filling if shared else replacing_folder)(folder) as place:
        exported = export_round(of, fmt, place, queries_license, trust=trust)
    paths = [folder / path.relative_to(place) for path in exported.paths]
    return Exported(paths, exported.count, exported.left_out)


def export_round(
    of: RoundView,
    fmt: str,
    folder: Path,
    queries_license: str | None = None,
    *,
    trust: bool = False,
) -> Exported:
    """Writes one round's preferences, or its triples for the authors' format.

    Args:
        of: the round.
        fmt: one of `selfsteer.formats.FORMATS`, or ``reward``.
        folder: made if need be.
        queries_license: for the card of a Parquet data set.
        trust: whether the model that a reward asks may be loaded as the run folder says.

    Raises:
        ConfigError: unknown format, a licence where there is no card, or a method without pairs.
        ArtifactError: the run has not come that far.
    """
    if queries_license is not None and fmt in {*FORMATS, "reward"} - {"parquet"}:
        raise ConfigError(
            f"--queries-license goes into a data set's card, and {fmt} has none. Leave it out or "
            "take --format parquet."
        )
    records: Records[Any] = of.preferences
    if fmt == "authors":
        records = of.triples or of.samples
    elif fmt == "reward":
        records = of.principles
    if not isinstance(records, Stored):
        what = {"authors": "triples", "reward": "principles"}.get(fmt, "preferences")
        if not isinstance(of.recipe, Principled if fmt == "reward" else Paired):
            raise ConfigError(
                f"{of.folder} holds no {what}: method {of.method} makes none. Export its policy "
                "with --model."
            )
        for name in ("preferences", "samples", "filtered.jsonl"):
            of.run.own(of.folder / name)
        if fmt == "authors" and isinstance(of.preferences, Stored):
            raise ConfigError(
                f"{of.folder} holds no triples: the pairs of method {of.method} are of plain "
                "answers. Export them in another --format."
            )
        raise ArtifactError(f"{of.folder} has no {what} yet; run it first.")
    of.run.settled(records.path)
    kept, unsafe = _allowed(of, records)
    if fmt == "reward":
        return _export_reward(of, kept, folder, unsafe, trust=trust)

    def card(files: list[str], left_out: list[str]) -> str:
        return dataset_card(
            of,
            count=len(kept),
            files=files,
            left_out=[*unsafe, *left_out],
            queries_license=queries_license,
        )

    exported = export(
        kept,
        fmt,
        folder,
        _name(of, fmt),
        models=_writers(of),
        card=card if fmt == "parquet" else None,
    )
    return Exported(exported.paths, exported.count, [*unsafe, *exported.left_out])


def _name(of: RoundView, fmt: str) -> str:
    """What LLaMA-Factory calls the data set, beside others of the same run."""
    parts = [of.run.recipe.name]
    if of.is_baseline:
        parts.append(of.method)
    if of.k < of.recipe.iterations:
        parts.append(f"iteration-{of.k}")
    if fmt == "llama-factory-sharegpt":
        parts.append("sharegpt")
    return "-".join(parts)


def _export_reward(
    of: RoundView, records: Stored[Triple], folder: Path, left_out: list[str], *, trust: bool
) -> Exported:
    """Prompts with their principles, and the reward that the round's first policy gives them.

    Raises:
        ConfigError: that policy has to be made of adapters or a GGUF file, without trust.
        ArtifactError: without trust, its tokenizer is not on this machine.
    """
    from selfsteer.data.digests import ADAPTER_CONFIG
    from selfsteer.formats.reward import export_reward
    from selfsteer.models.load import load_chat, read_chat
    from selfsteer.models.sources import checkpoint

    recipe = of.recipe
    assert isinstance(recipe, Principled)
    loading = recipe.policy.loading
    loading = loading.model_copy(update={"date": loading.date or RunFolder(of.run.folder).day})
    trained = of.folder.with_name(f"iteration-{of.k - 1}") / "policy"
    if of.k == 1:
        check_sources(of.run.folder, of.run.recipe, "policy.model")
    model = str(trained) if of.k > 1 else resolve_path(recipe.policy.model)
    if trust:
        model = checkpoint(model, loading)
    elif Path(model).is_file() or (Path(model) / ADAPTER_CONFIG).exists():
        raise ConfigError(
            f"The reward asks {model}, which must first be made a plain checkpoint, and that loads "
            "a model that the run folder names. If you trust its author, add --trust."
        )
    chat = (load_chat if trust else read_chat)(model, loading)
    clip = getattr(getattr(recipe, "ranking", None), "clip", ContrastRanking().clip)
    exported = export_reward(records, folder, model=model, chat=chat, loading=loading, clip=clip)
    return Exported(exported.paths, exported.count, [*left_out, *exported.left_out])


def _allowed(of: RoundView, records: Stored[Any]) -> tuple[Stored[Any], list[str]]:
    """What the recipe lets out, and what it does not, said.

    The bad response to a query about Safety was written under a principle that asks for harm.

    Raises:
        ConfigError: the recipe keeps pairs about Safety, and some records do not say what their
            principles were about.
    """
    recipe = of.recipe
    if not isinstance(recipe, Paired) or getattr(recipe.hygiene, "export_unsafe", True):
        return records, []
    safe = array("q", (i for i, record in enumerate(records) if not names_safety(record)))
    if silent := sum(not named_features(record) for record in records):
        raise ConfigError(
            f"hygiene.export_unsafe is false, but {silent:,} of {len(records):,} records name no "
            "feature, so it is unknown whether they are about Safety. Set it to true if these "
            "texts may leave the run."
        )
    count = len(records) - len(safe)
    return records.take(safe), [
        f"{count:,} of {len(records):,} records: their principles name Safety."
    ]


def export_model(of: RoundView, folder: Path, converter: list[str] | None = None) -> Path:
    """Copies a round's policy to a folder of its own, with a card and a Modelfile beside it.

    The run's own folder stays as it is: its digest is the key of its stored log-probs.

    Args:
        of: the round.
        folder: made if need be.
        converter: the command that makes a GGUF file as well; None: no such file.

    Raises:
        ConfigError: the folder is there and not empty.
        ArtifactError: there is no such policy, the converter failed, or the disk is full.
    """
    policy = of.folder / "policy"
    if not any(policy.glob("*.safetensors")):
        raise ArtifactError(f"{of.folder} holds no policy yet; run it first.")
    of.run.check(policy)
    files = sorted(p for p in policy.iterdir() if p.is_file())
    if foreign := [p for p in files if not of.run.owns(p)]:
        raise ArtifactError(
            f"{foreign[0]} is a link that leads out of the run folder, and what it leads to may "
            "not be meant for others. Put the file itself there."
        )
    with (
        disk_errors(folder, "folder"),
        replacing_folder(folder) as partial,
        progress_bar("copy", len(files)) as bar,
    ):
        for path in files:
            shutil.copyfile(path, partial / path.name)
            bar.advance(1)
        weights = "."
        if converter is not None:
            weights = f"{of.run.recipe.name}.gguf"
            say(f"converting to {weights} with {converter[-1]}")
            convert(converter, partial, partial / weights)
        write_atomic(partial / "Modelfile", modelfile(of.recipe, weights))
        write_atomic(partial / "README.md", model_card(of))
    return folder


def _writers(of: RoundView) -> tuple[str, str]:
    """Names of the models that wrote the chosen and the rejected answers."""
    recipe = of.recipe
    own = str(Path(recipe.name, of.home, "iteration"))
    if of.has_generator:
        generator = f"{own}-{of.k}/generator"
        halves = any(s.title == "generator/plus" for s in of.stages)
        return (f"{generator}/plus", f"{generator}/minus") if halves else (generator, generator)
    policy = f"{recipe.name}/{of.start}" if of.start else public_name(recipe.policy.model)
    improver = getattr(recipe, "improver", None)
    if not (recipe.needs_answers or improver):
        return policy, policy
    given = f"given in {public_name(recipe.queries.path)}"
    if recipe.either_side:
        return f"{given} or {policy}", f"{given} or {policy}"
    return public_name(improver.model) if improver else given, policy
