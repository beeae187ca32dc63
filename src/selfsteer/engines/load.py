"""From a recipe's settings to an engine: who answers for which model."""

import tempfile
from collections import Counter
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from selfsteer.data.digests import digest
from selfsteer.engines.base import Engine
from selfsteer.engines.launch import LaunchedServer, check_command
from selfsteer.engines.openai import OpenAIEngine, Usage
from selfsteer.errors import ConfigError
from selfsteer.recipe.sections import EngineConfig, EngineSettings, Loading, resolve_path
from selfsteer.terminal import say

if TYPE_CHECKING:
    from selfsteer.models.load import LoadedModel


class Engines:
    """The engines of one stage, each made when it is first needed; a block that ends them.

    Args:
        home: folder for counts of requests (``usage/``) and for logs of servers that failed
            (``logs/``); None: counts are forgotten, logs lie in a temporary folder.
    """

    def __init__(self, home: Path | None) -> None:
        self.home = home
        self._usage: dict[str, Usage] = {}
        self._labels: dict[str, str] = {}
        self._made: dict[str, Engine] = {}
        self._servers: list[LaunchedServer] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.failed |= kind is not None
        self.close()

    def close(self) -> None:
        """Ends what was started, says what was asked; logs of servers that served well go."""
        self._made.clear()  # a model in process leaves memory: a judge's may come next
        self._stack.close()
        for server in self._servers:
            if not server.failed:
                server.log.unlink(missing_ok=True)
                if self.home is None:
                    server.log.parent.rmdir()
        for label, counts in self.asked.items():
            retried = f" ({counts['retried']:,} retried)" if counts["retried"] else ""
            say(
                f"  {label}: {counts['requests']:,} requests{retried}, "
                f"{counts['prompt_tokens']:,} tokens in, {counts['completion_tokens']:,} out"
            )

    @property
    def asked(self) -> dict[str, dict[str, Any]]:
        """Server → what this block asked of it, of all its models together."""
        found: dict[str, dict[str, Any]] = {}
        for key, usage in self._usage.items():
            counts, label = usage.here(), self._labels[key]
            if not counts["requests"]:
                continue
            if before := found.get(label):
                failed = Counter(before["failed"]) + Counter(counts["failed"])
                counts = {n: v + before[n] for n, v in counts.items() if n != "failed"}
                counts["failed"] = dict(sorted(failed.items()))
            found[label] = counts
        return found

    @property
    def notes(self) -> dict[str, Any]:
        """For the ledger; nothing where only models in process were asked."""
        return {"asked": self.asked} if self.asked else {}

    def sampler(
        self,
        settings: EngineConfig,
        source: str,
        loading: Loading,
        batch_size: int,
        loaded: "LoadedModel | None" = None,
    ) -> Engine:
        """Who answers for the policy, or for a model trained from it.

        Args:
            settings: ``sampling.engine`` of a recipe.
            source: folder or hub id of the model, readable here whoever answers.
            loading: how a model in process is loaded.
            batch_size: of an engine in process.
            loaded: the model, if it is in memory already.
        """
        if settings.kind == "transformers" and loaded is not None:
            from selfsteer.engines.transformers import TransformersEngine

            return TransformersEngine(loaded, batch_size)
        return self.get(settings, source, loading, batch_size, at_hand=True)

    def get(
        self,
        settings: EngineSettings,
        source: str,
        model_settings: Loading,
        batch_size: int,
        *,
        at_hand: bool = False,
    ) -> Engine:
        """The engine of a model; equal arguments give the same one.

        Args:
            settings: who answers.
            source: folder or hub id; with ``base_url`` the name that the settings give counts.
            model_settings: how a model in process is loaded.
            batch_size: of an engine in process.
            at_hand: whether ``source`` can be read here even if a server answers.
        """
        key = digest([settings.kind, settings.identity, source, batch_size])
        if key not in self._made:
            self._made[key] = self._make(settings, source, model_settings, batch_size, at_hand)
        return self._made[key]

    def _make(
        self,
        settings: EngineSettings,
        source: str,
        model_settings: Loading,
        batch_size: int,
        at_hand: bool,
    ) -> Engine:
        check_installed(settings)
        if settings.kind == "transformers":
            from selfsteer.engines.transformers import TransformersEngine
            from selfsteer.models.load import load_model

            loaded = load_model(source, model_settings, inference=True)
            return TransformersEngine(loaded, batch_size)
        if settings.kind == "vllm":
            from selfsteer.engines.vllm import VllmEngine

            here = VllmEngine(settings, source, model_settings)
            self._stack.callback(here.close)
            return here
        if isinstance(settings, EngineConfig) and settings.kind == "ray":
            from selfsteer.engines.ray import Model, RayEngine

            if Path(source).is_dir():  # replicas work elsewhere
                source = str(Path(source).absolute())
            model = Model(settings.answering, source, model_settings, batch_size, at_hand)
            there = RayEngine(settings, model)
            self._stack.callback(there.close)
            return there
        local = {}
        if at_hand:
            from selfsteer.models.load import load_chat, load_context_length

            local = {
                "chat": load_chat(source, model_settings),
                "context_length": load_context_length(source, model_settings),
            }
        return self._server(settings, source, local)

    def _server(self, settings: EngineSettings, source: str, local: dict[str, Any]) -> OpenAIEngine:
        name = digest(settings.identity)
        if name not in self._usage:
            path = self.home / "usage" / f"{name}.json" if self.home else None
            self._usage[name] = Usage(path)
            self._labels[name] = settings.base_url or str(settings.launch).split()[0]
        usage, server = self._usage[name], None
        model, base_url = settings.model, settings.base_url
        if settings.launch is not None:
            folder = (
                self.home / "logs" if self.home else Path(tempfile.mkdtemp(prefix="selfsteer-"))
            )
            log = folder / f"server-{name}-{len(self._servers)}.log"
            server = LaunchedServer(settings.launch, source, log, hidden=settings.api_key_env)
            self._servers.append(server)
            model, base_url = source, server.base_url
            self._stack.callback(server.close)
            server.wait(settings.launch_timeout)
        assert model is not None
        assert base_url is not None
        engine = OpenAIEngine(settings, model, base_url, usage, server=server, **local)
        self._stack.callback(engine.close)
        return engine


def check_installed(settings: EngineSettings) -> None:
    """Fails if the package of an engine is missing.

    Raises:
        ConfigError: says how to install it.
    """
    if settings.kind in ("vllm", "ray") and find_spec(settings.kind) is None:
        raise ConfigError(
            f"The engine {settings.kind} needs a package that is not installed here. Install it "
            f"with: pip install 'selfsteer[{settings.kind}]'"
        )


def check_engine(settings: EngineSettings) -> None:
    """Fails now, not in a stage, if an engine cannot be asked.

    Raises:
        ConfigError: a package or program is missing, a server serves other models, a cluster has
            no room for the replicas.
        EngineError: nobody answers.
    """
    check_installed(settings)
    if isinstance(settings, EngineConfig) and settings.kind == "ray":
        from selfsteer.engines.ray import check_cluster

        check_cluster(settings)
        if settings.address is None:  # replicas of a cluster have what is installed there
            check_engine(settings.answering)
        return
    if settings.kind in ("transformers", "vllm"):
        return
    if settings.launch is not None:
        check_command(settings.launch)
        return
    assert settings.base_url is not None
    engine = OpenAIEngine(settings, settings.model or "", settings.base_url, Usage())
    try:
        engine.check()
    finally:
        engine.close()


def writer_source(writer: EngineConfig) -> str:
    """Folder, hub id or server's name of the model that writes."""
    assert writer.model is not None
    return writer.model if writer.base_url else resolve_path(writer.model)
