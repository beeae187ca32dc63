"""Sampling on a cluster: batches are spread over replicas of another engine, which are Ray actors.

Where a replica dies, with its node or alone, the next one that is free answers its batch, with the
same seeds: nothing is lost or doubled. Another one is started in its place, as soon as there is
room for it. Only requests and answers travel; every node must be able to read the weights itself.
"""

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from selfsteer.data.digests import digest
from selfsteer.engines.base import (
    Advance,
    Completion,
    Engine,
    Request,
    SamplingParams,
    cut,
    no_news,
)
from selfsteer.engines.launch import out_of_world
from selfsteer.errors import ArtifactError, ConfigError, EngineError, SelfsteerError
from selfsteer.models.chat import today
from selfsteer.recipe.sections import EngineConfig, Loading
from selfsteer.terminal import say, warn

#: Replicas that may die of one batch, or before their first one, until the stage stops.
DEATHS = 10

#: What Ray raises in place of the answers of a replica that is gone, or of its node.
LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.OutOfMemoryError,
)

#: Requests that a replica gets at once, at most, where its engine schedules them itself.
SHARE = 1024

#: Seconds that a node may take to say whether it can read the weights.
NODE_TIMEOUT_S = 120.0


class Replica:
    """Lives on a node and answers one batch after the other; a Ray actor.

    Args:
        make: makes its engine.
        model: of these arguments.
    """

    def __init__(self, make: Callable[..., Engine], model: Mapping[str, Any]) -> None:
        self._make, self._model = make, model

    @cached_property
    def _engine(self) -> Engine:
        return self._make(**self._model)

    def up(self) -> None:
        """Returns as soon as there is a process."""

    def answer(self, batch: Sequence[Request], sampling: SamplingParams) -> list[Completion]:
        """All answers to a batch; the model is loaded before the first one."""
        return list(self._engine.generate(batch, sampling))


class RayEngine:
    """Answers with replicas, which live until this engine is closed.

    Where the cluster has no room for the replicas of two engines, those of the other one end when
    this one is asked.

    Args:
        settings: of kind ``ray``.
        source: folder or hub id; a folder must be there on every node.
        loading: how each replica loads it.
        batch_size: of replicas in process.
        at_hand: whether ``source`` can be read even if the replicas launch servers.
        make: makes the engine of a replica, in its process.

    Raises:
        ConfigError: the cluster has no room for the replicas.
        ArtifactError: a node cannot read the weights.
        EngineError: there is no cluster at ``address``.
    """

    _with_replicas: ClassVar[list["RayEngine"]] = []

    def __init__(
        self,
        settings: EngineConfig,
        source: str,
        loading: Loading,
        batch_size: int,
        *,
        at_hand: bool,
        make: Callable[..., Engine],
    ) -> None:
        self._make = make
        self.settings, answering = settings, settings.answering
        self.batch_size = batch_size if answering.kind == "transformers" else None
        source = str(Path(source).absolute()) if Path(source).exists() else source
        # a cluster's processes have an environment of their own, without the day of the run
        loading = loading.model_copy(update={"date": loading.date or today()})
        self.model = {"settings": answering, "source": source, "loading": loading}
        self.model |= {"batch_size": batch_size, "at_hand": at_hand}
        self._replicas: list[Any] = []
        with ExitStack() as stack:
            check_room(settings, stack.enter_context(joined(settings)))
            check_nodes(source)
            self._leave = stack.pop_all()

    def close(self) -> None:
        """Ends the replicas and leaves the cluster; one of our own ends."""
        self._dismiss()
        self._leave.close()

    def _dismiss(self) -> None:
        self._replicas = []  # actors end when nothing refers to them
        with suppress(ValueError):
            self._with_replicas.remove(self)

    def _start(self) -> Any:
        """A replica; where there is no room for it, it waits for some."""
        need = self.settings.resources
        replica = ray.remote(Replica).options(num_cpus=need.num_cpus, num_gpus=need.num_gpus)
        return replica.remote(self._make, self.model)

    def replicas(self) -> list[Any]:
        """The replicas, started when they are first needed."""
        if not self._replicas:
            need, others = self.settings.resources, list(self._with_replicas)
            wanted = sum(e.settings.replicas for e in (self, *others))
            fitting = room(self.settings, resources())
            if fitting < wanted or any(e.settings.resources != need for e in others):
                for engine in others:
                    engine._dismiss()
            self._replicas = [self._start() for _ in range(self.settings.replicas)]
            self._with_replicas.append(self)
        return self._replicas

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        advance: Advance = no_news,
    ) -> Iterator[Completion]:
        """See `Engine.generate`.

        Raises:
            SelfsteerError: what a replica could not do, or that they died again and again.
        """
        share = min(SHARE, max(math.ceil(len(requests) / self.settings.replicas), 1))
        try:
            for found in self._spread(cut(requests, self.batch_size or share), sampling):
                advance(len(found), sum(c.completion_tokens for c in found))
                yield from found
        except ray.exceptions.RayError as e:
            cause = getattr(e, "cause", None)
            if isinstance(cause, SelfsteerError):
                raise cause from None
            last = (str(e).strip() or type(e).__name__).splitlines()[-1].strip()
            raise EngineError(
                f"A replica on the Ray cluster failed: {last}. Finished answers are kept; fix the "
                "cause (Ray's own logs say more), then run the same command again."
            ) from e

    def _spread(
        self, batches: Sequence[Sequence[Request]], sampling: SamplingParams
    ) -> Iterator[list[Completion]]:
        """The answers to each batch, as they come; only a replica that is up is given any."""
        replicas, todo = self.replicas(), deque(range(len(batches)))
        free, missing, deaths = list[int](), len(batches), Counter[int | None]()
        #: what replicas are at → which one, and its batch; None: it is starting
        under_way: dict[Any, tuple[int, int | None]] = {
            replica.up.remote(): (k, None) for k, replica in enumerate(replicas)
        }
        while missing:
            while todo and free:
                k, number = free.pop(), todo.popleft()
                under_way[replicas[k].answer.remote(batches[number], sampling)] = k, number
            (ended,), _ = ray.wait(list(under_way))
            k, done = under_way.pop(ended)
            try:
                found = ray.get(ended)
            except LOST:
                deaths[done] += 1
                if deaths[done] > DEATHS:
                    raise
                if done is not None:
                    todo.appendleft(done)
                replicas[k] = self._start()
                under_way[replicas[k].up.remote()] = k, None
                warn(
                    "a replica on the Ray cluster was lost, alone or with its node; another one "
                    "answers its batch, and one starts in its place as soon as there is room"
                )
                continue
            free.append(k)
            if done is not None:
                missing -= 1
                yield found


@contextmanager
def joined(settings: EngineConfig) -> Iterator[list[dict[str, float]]]:
    """The resources of each node of the cluster, which is started or joined for this block.

    Raises:
        EngineError: there is none at ``address``.
    """
    if ray.is_initialized():
        yield resources()
        return
    here: dict[str, Any] = {} if settings.address else {"include_dashboard": False}
    start = time.monotonic()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with out_of_world():
            ray.init(
                settings.address or "local",  # no address would look for one in the environment
                log_to_driver=False,
                logging_level=logging.ERROR,
                **here,
            )
    except (ConnectionError, ValueError, RuntimeError, OSError) as e:
        raise EngineError(
            f"There is no Ray cluster at {settings.address or 'this machine'} "
            f"({' '.join(str(e).split())[:300]}). Start one with ray start --head, correct "
            "address, or leave it out to start one here."
        ) from None
    nodes = resources()
    seconds = time.monotonic() - start
    say(f"  ray: {len(nodes)} node{'s' if len(nodes) > 1 else ''} after {seconds:.0f} s")
    try:
        yield nodes
    finally:
        ray.shutdown()


def check_cluster(settings: EngineConfig) -> None:
    """Fails if there is no such cluster, or too little of it; see `RayEngine`."""
    if settings.address is None:
        import torch

        check_room(settings, [{"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}])
    else:
        with joined(settings) as nodes:
            check_room(settings, nodes)


def resources() -> list[dict[str, float]]:
    """What each node that is up has, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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
    wanted, nodes = weights_digest(source), [n for n in ray.nodes() if n["Alive"]]
    if wanted is None or [n["NodeManagerHostname"] for n in nodes] == [os.uname().nodename]:
        return
    look = ray.remote(weights_digest)
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        try:
            asked = look.options(num_cpus=0, scheduling_strategy=there).remote(source)
            found = ray.get(asked, timeout=NODE_TIMEOUT_S)
            fault = "holds something else there" if found else "has no such folder"
        except ray.exceptions.RayError:
            found, fault = None, "did not answer"
        if found != wanted:
            raise ArtifactError(
                f"Ray's node {node['NodeManagerHostname']} cannot load {source}: it {fault}. Each "
                "replica loads the weights itself: keep runs_dir and the model on a file system "
                "that all nodes share, or give a hub id."
            )
