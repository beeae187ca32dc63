"""A run's data for other trainers."""

from pathlib import Path

from selfsteer.errors import ArtifactError, ConfigError
from selfsteer.formats import Exported, export, export_triples
from selfsteer.stages.plan import stored_preferences, stored_triples


def export_run(
    run: Path, iteration: int, fmt: str, folder: Path, *, baseline: bool, name: str
) -> Exported:
    """Writes one iteration's preferences, or its triples for the authors' format.

    Raises:
        ConfigError: unknown format.
        ArtifactError: the run has not come that far.
    """
    source = (run / "baseline" if baseline else run) / f"iteration-{iteration}"
    if fmt == "authors":
        for triples in (source / "filtered.jsonl", source / "samples"):
            if triples.exists():
                return export_triples(stored_triples(triples), folder)
        raise ArtifactError(f"{source} has no triples yet; run it first.")
    if fmt not in ("trl", "llama-factory"):
        raise ConfigError(f"Unknown format {fmt!r}; choose trl, llama-factory or authors.")
    if not any((source / "preferences").glob("shard-*.jsonl")):
        raise ArtifactError(f"{source} has no preferences yet; run it first.")
    return export(stored_preferences(source / "preferences"), fmt, folder, name)
