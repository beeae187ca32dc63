"""From a recipe's settings to an engine: who answers for which model."""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack, closing
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.data.digests import digest
from selfsteer.engines.base import Engine
from selfsteer.engines.launch import LaunchedServer, check_command
from selfsteer.engines.usage import Usage, as_stored
from selfsteer.errors import ConfigError
from selfsteer.recipe import secrets
from selfsteer.recipe.sections import EngineConfig, EngineSettings, Loading
from selfsteer.terminal import say, warn

if TYPE_CHECKING:
    from selfsteer.engines.openai import OpenAIEngine
    from selfsteer.models.load import LoadedModel


class Engines(ExitStack):
    """The engines of one stage, each made when it is first needed; a block that ends them.

    Args:
        home: folder for counts of requests (``usage/``), for what is asked in batches
            (``batches/``) and for logs of servers that failed (``logs/``); None: counts are
            forgotten, nothing is asked in batches, logs are in a temporary folder.
    """

    def __init__(self, home: Path | None) -> None:
        super().__init__()
        self.home = home
        self._made: dict[str, Engine] = {}
        self._usage: dict[str, tuple[str, Usage]] = {}
        self.callback(self._report)
        self.callback(self._made.clear)  # a model in process leaves memory: a judge's may come next

    def _report(self) -> None:
        for label, counts in self.asked.items():
            retried = f" ({counts['retried']:,} retried)" if counts["retried"] else ""
            cost = f", cost {counts['cost']:,.4g}" if "cost" in counts else ""
            say(
                f"  {label}: {counts['requests']:,} requests{retried}, "
                f"{counts['prompt_tokens']:,} tokens in, {counts['completion_tokens']:,} out{cost}"
            )

    @property
    def asked(self) -> dict[str, dict[str, Any]]:
        """Server → what this block asked of it, of all its models together."""
        found: defaultdict[str, Counter[str]] = defaultdict(Counter)
        prices = {}
        for label, usage in self._usage.values():
            found[label] += usage.here
            prices[label] = usage.price
        asked = {label: counts for label, counts in found.items() if counts["requests"]}
        return {label: as_stored(counts, prices[label]) for label, counts in asked.items()}

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
        loading: Loading,
        batch_size: int,
        *,
        at_hand: bool = False,
    ) -> Engine:
        """The engine of a model; equal arguments give the same one.

        Args:
            settings: who answers.
            source: folder or hub id; with ``base_url`` the name that the settings give counts.
            loading: how a model in process is loaded.
            batch_size: of an engine in process.
            at_hand: whether ``source`` can be read here even if a server answers.
        """
        asked = [settings.kind, settings.identity, settings.batch, loading.chat_template_kwargs]
        key = digest([*asked, source, batch_size])
        if key in self._made:
            return self._made[key]
        check_installed(settings)
        if settings.kind == "vllm" or settings.launch is not None:
            from selfsteer.models.sources import folder_of

            source = folder_of(source, loading)  # they know no adapters, GGUF files or revisions
        engine: Any
        if settings.kind == "transformers":
            from selfsteer.engines.transformers import TransformersEngine
            from selfsteer.models.load import load_model

            engine = TransformersEngine(load_model(source, loading, inference=True), batch_size)
        elif settings.kind == "vllm":
            from selfsteer.engines.vllm import VllmEngine

            engine = VllmEngine(settings, source, loading)
        elif isinstance(settings, EngineConfig) and settings.kind == "ray":
            from selfsteer.engines.ray import RayEngine

            make = partial(make_engine, *sorted(secrets.KEYS))
            engine = RayEngine(settings, source, loading, batch_size, at_hand=at_hand, make=make)
        else:
            engine = self._server(settings, source, loading, at_hand=at_hand)
        if settings.kind != "transformers":
            self.callback(engine.close)
        return self._made.setdefault(key, engine)

    def _server(
        self, settings: EngineSettings, source: str, loading: Loading, *, at_hand: bool
    ) -> "OpenAIEngine":
        """Asks a server; its prompts are checked here where the model can be loaded."""
        from selfsteer.engines.batch import BatchEngine, kept_in
        from selfsteer.engines.openai import OpenAIEngine

        name = digest(settings.identity)
        label = settings.base_url or str(settings.launch).split()[0]
        path = self.home / "usage" / f"{name}.json" if self.home else None
        _, usage = self._usage.setdefault(name, (label, Usage(path, settings.price)))
        model, base_url = settings.model or "", settings.base_url or ""
        local: dict[str, Any] = {"template": loading.chat_template_kwargs}
        if settings.launch is not None:
            logs = self.home / "logs" if self.home else Path(tempfile.mkdtemp(prefix="selfsteer-"))
            log = logs / f"server-{name}-{len(self._made)}.log"
            server = LaunchedServer(settings.launch, source, log)
            self.enter_context(server).wait(settings.launch_timeout)
            model, base_url, local["server"] = source, server.base_url, server
        if at_hand:
            from selfsteer.models.load import load_chat, load_context_length

            local["chat"] = load_chat(source, loading)
            local["context_length"] = load_context_length(source, loading)
        if self.home:
            folder = self.home / "batches" / name
            if settings.batch:
                return BatchEngine(folder, settings, model, base_url, usage, **local)
            if left := [b.id or b.mark for b in kept_in(folder) if b.mark not in usage.batches]:
                warn(
                    f"{label} may go on with {', '.join(left)} and charge for it; without batch, "
                    "nothing waits for those answers, and what they would answer is asked and paid "
                    "for again. To use them, stop and set batch: true until they are there"
                )
        engine = OpenAIEngine(settings, model, base_url, usage, **local)
        if adapter := adapter_of(settings, source, self.home):
            engine.take_adapter(adapter)
        return engine


def adapter_of(settings: EngineSettings, source: str, home: Path | None) -> Path | None:
    """What a server loads of a model that was trained in this run folder; None: it has the model.

    Where ``policy.model`` has adapters beside it, they are of an earlier run, and of another base.
    """
    from selfsteer.models.save import ADAPTER

    takes = isinstance(settings, EngineConfig) and settings.adapters
    trained = home is not None and Path(source).is_relative_to(home)
    return Path(source) / ADAPTER if takes and trained else None


def check_served(settings: EngineConfig, sources: Iterable[str], home: Path) -> None:
    """Fails if one server, which holds one model, would answer for several.

    Args:
        settings: ``sampling.engine`` of a recipe.
        sources: the models that are to answer.
        home: as of `Engines`.

    Raises:
        ConfigError: names them.
    """
    held = sorted({s for s in sources if adapter_of(settings, s, home) is None})
    if settings.base_url is not None and len(held) > 1:
        raise ConfigError(
            f"sampling.engine asks one server that serves {settings.model}, but answers of "
            f"{len(held)} models are wanted: {', '.join(held)}. Set sampling.engine=transformers, "
            "or give sampling.engine.launch, so that each model is served in its turn."
        )


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
        EngineError: the engine does not answer.
    """
    check_installed(settings)
    if isinstance(settings, EngineConfig) and settings.kind == "ray":
        from selfsteer.engines.ray import check_cluster

        check_cluster(settings)
        if settings.address is None:  # replicas of a cluster have what is installed there
            check_engine(settings.answering)
    elif settings.launch is not None:
        check_command(settings.launch)
    elif settings.base_url is not None:
        from selfsteer.engines.batch import BatchEngine
        from selfsteer.engines.openai import OpenAIEngine

        make = partial(BatchEngine, Path()) if settings.batch else OpenAIEngine
        engine = make(settings, settings.model or "", settings.base_url, Usage())
        with closing(engine):
            engine.check()
            if isinstance(settings, EngineConfig) and settings.adapters:
                engine.check_adapters()


def make_engine(*keys: str, **model: Any) -> Engine:
    """The engine of a replica, which keeps no counts.

    Args:
        keys: variables with keys, which another process has read in a recipe.
        model: arguments of `Engines.get`.
    """
    secrets.KEYS.update(keys)
    return Engines(None).get(**model)
