"""Sampling on a cluster: batches are spread over replicas of another engine, which are Ray actors.

A replica that dies, with its node or alone, is started again and its batch is answered again, with
the same seeds: nothing is lost or doubled. Only requests and answers travel; every node must be
able to read the weights itself.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from selfsteer.data.digests import digest
from selfsteer.engines.base import Advance, Completion, Request, SamplingParams, cut, no_news
from selfsteer.engines.launch import out_of_world
from selfsteer.errors import ArtifactError, ConfigError, EngineError, SelfsteerError
from selfsteer.recipe.sections import EngineConfig, EngineSettings, Loading
from selfsteer.terminal import say, warn

#: Deaths of one replica, or of whatever it answers, after which the stage stops.
RESTARTS = 10

#: Requests that a replica gets at once, at most, where its engine schedules them itself.
SHARE = 1024

#: Seconds that a node may take to say whether it can read the weights.
NODE_TIMEOUT_S = 120.0

#: Said for us where the user did not: Ray keeps quiet, and sends no statistics.
ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Model:
    """What a replica loads: see `Engines.get`."""

    settings: EngineSettings
    source: str
    model_settings: Loading
    batch_size: int
    at_hand: bool


class Replica:
    """Lives on a node and answers one batch after the other; a Ray actor."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._engine: Any = None

    def answer(self, batch: Sequence[Request], sampling: SamplingParams) -> list[Completion]:
        """All answers to a batch; the model is loaded before the first one."""
        from selfsteer.engines.load import Engines

        if self._engine is None:
            m = self.model
            self._engine = Engines(None).get(
                m.settings, m.source, m.model_settings, m.batch_size, at_hand=m.at_hand
            )
        return list(self._engine.generate(batch, sampling))


class RayEngine:
    """Answers with replicas, which live until this engine is closed.

    Where the cluster has no room for the replicas of two engines, those of the other one end when
    this one is asked.

    Args:
        settings: of kind ``ray``.
        model: what each replica loads; a folder must be there on every node.

    Raises:
        ConfigError: the cluster has no room for the replicas.
        ArtifactError: a node cannot read the weights.
        EngineError: there is no cluster at ``address``.
    """

    _with_replicas: ClassVar[list["RayEngine"]] = []

    def __init__(self, settings: EngineConfig, model: Model) -> None:
        self.settings, self.model = settings, model
        self.batch_size = model.batch_size if model.settings.kind == "transformers" else None
        self._pool: Any = None
        self._ours = connect(settings)
        try:
            check_room(settings, resources())
            check_nodes(model.source)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the replicas and leaves the cluster; one of our own ends."""
        import ray

        self._dismiss()
        if self._ours:
            ray.shutdown()

    def _dismiss(self) -> None:
        self._pool = None  # actors end when nothing refers to them
        if self in self._with_replicas:
            self._with_replicas.remove(self)

    def _replicas(self) -> Any:
        """The pool of replicas, started when they are first needed."""
        if self._pool is None:
            import ray
            from ray.util.actor_pool import ActorPool

            need, others = self.settings.resources, list(self._with_replicas)
            wanted = sum(e.settings.replicas for e in (self, *others))
            alike = all(e.settings.resources == need for e in others)
            if not alike or room(self.settings, resources()) < wanted:
                for engine in others:
                    engine._dismiss()
            replica = ray.remote(Replica).options(
                num_cpus=need.num_cpus,
                num_gpus=need.num_gpus,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
            self._pool = ActorPool(
                [replica.remote(self.model) for _ in range(self.settings.replicas)]
            )
            self._with_replicas.append(self)
        return self._pool

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        """See `Engine.generate`.

        Raises:
            SelfsteerError: what a replica could not do, or that one of them died again and again.
        """
        import ray

        share = min(SHARE, max(math.ceil(len(requests) / self.settings.replicas), 1))
        batches = cut(requests, self.batch_size or share)
        try:
            for found in self._replicas().map_unordered(
                lambda replica, batch: replica.answer.remote(batch, sampling), batches
            ):
                advance(len(found), sum(c.completion_tokens for c in found))
                yield from found
        except ray.exceptions.RayError as e:
            cause = getattr(e, "cause", None)
            if isinstance(cause, SelfsteerError):
                raise cause from None
            lines = str(e).strip().splitlines() or [type(e).__name__]
            raise EngineError(
                f"A replica on the Ray cluster failed: {lines[-1].strip()}. Finished answers are "
                "kept; fix the cause (Ray's own logs say more), then run the same command again."
            ) from e


def connect(settings: EngineConfig) -> bool:
    """Starts or joins the cluster; False where this process is in one already.

    Raises:
        EngineError: there is none at ``address``.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    start = time.monotonic()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if settings.address is None:
        options["include_dashboard"] = False
    try:
        # "local", because nothing would look for a cluster in the environment
        with hushed(), out_of_world():
            ray.init(settings.address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as e:
        raise EngineError(
            f"There is no Ray cluster at {settings.address or 'this machine'} "
            f"({' '.join(str(e).split())[:300]}). Start one with ray start --head, correct "
            "address, or leave it out to start one here."
        ) from None
    n = len(alive())
    say(f"  ray: {n} node{'s' if n > 1 else ''} after {time.monotonic() - start:.0f} s")
    return True


@contextmanager
def hushed() -> Iterator[None]:
    """Keeps what C++ code prints while it starts off the terminal; Python's errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def check_cluster(settings: EngineConfig) -> None:
    """Fails if there is no such cluster, or too little of it; see `RayEngine`."""
    if settings.address is None:
        import torch

        here = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
        check_room(settings, [here])
        return
    ours = connect(settings)
    try:
        check_room(settings, resources())
    finally:
        if ours:
            import ray

            ray.shutdown()


def alive() -> list[dict[str, Any]]:
    """The cluster's nodes that are up."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def resources() -> list[dict[str, float]]:
    """What each node has, by Ray's names."""
    return [node["Resources"] for node in alive()]


def room(settings: EngineConfig, nodes: Sequence[Mapping[str, float]]) -> float:
    """How many replicas fit on these nodes, each with its resources by Ray's names."""
    need = {"CPU": settings.resources.num_cpus, "GPU": settings.resources.num_gpus}
    if not any(need.values()):
        return math.inf
    return sum(
        min(int(node.get(name, 0) / v + 1e-6) for name, v in need.items() if v) for node in nodes
    )


def check_room(settings: EngineConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Fails if the replicas would wait for resources that the cluster does not have.

    Args:
        settings: replicas and what each takes.
        nodes: what there is on each.

    Raises:
        ConfigError: says what they need and what there is.
    """
    need, fitting = settings.resources, room(settings, nodes)
    if fitting < settings.replicas:
        cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
        raise ConfigError(
            f"The Ray cluster has room for {fitting} replicas of {need.num_cpus:g} CPUs and "
            f"{need.num_gpus:g} GPUs, and {settings.replicas} are asked for: {len(nodes)} nodes "
            f"have {cpus:g} CPUs and {gpus:g} GPUs. Lower replicas or resources."
        )
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if gpus and not need.num_gpus and settings.answering.kind != "openai":
        warn(
            f"the Ray cluster has {gpus:g} GPUs and its replicas use none: "
            "set resources.num_gpus of the engine"
        )


def weights_digest(source: str) -> str | None:
    """Names and sizes of a model folder's files, and its config; None where it is not there."""
    folder = Path(source)
    if not (folder / "config.json").is_file():
        return None
    files = sorted((p.name, p.stat().st_size) for p in folder.iterdir() if p.is_file())
    return digest([files, (folder / "config.json").read_text("utf-8")])


def check_nodes(source: str) -> None:
    """Fails if a node would not load the same weights as this one.

    Args:
        source: a folder, or a hub id, which each node fetches by itself.

    Raises:
        ArtifactError: names the node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    wanted, nodes = weights_digest(source), alive()
    if wanted is None or [n["NodeManagerHostname"] for n in nodes] == [os.uname().nodename]:
        return
    look = ray.remote(weights_digest).options(num_cpus=0)
    asked = [
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(source)
        for node in nodes
    ]
    for node, reference in zip(nodes, asked, strict=True):
        said: Any = "did not answer"
        with suppress(ray.exceptions.RayError):
            said = ray.get(reference, timeout=NODE_TIMEOUT_S)
        if said != wanted:
            found = {None: "has no such folder"}.get(said, "holds something else there")
            found = said if said == "did not answer" else found
            raise ArtifactError(
                f"Ray's node {node['NodeManagerHostname']} cannot load {source}: it {found}. Each "
                "replica loads the weights itself: keep runs_dir and the model on a file system "
                "that all nodes share, or give a hub id."
            )
