"""Sampling on a cluster: Ray Data deals shards out to replicas of another engine.

A replica that dies, with its node or alone, is started again and its shards are answered again,
with the same seeds and in the same batches: nothing is lost or doubled. Only conversations and
answers travel; every node must be able to read the weights itself.
"""

import logging
import os
import pickle
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsteer.data.digests import digest
from selfsteer.data.records import Message
from selfsteer.engines.base import Advance, Completion, SamplingParams, no_news
from selfsteer.engines.shards import Ask
from selfsteer.errors import ArtifactError, ConfigError, EngineError, SelfsteerError
from selfsteer.recipe.sections import EngineConfig, EngineSettings, Loading
from selfsteer.run.ranks import out_of_world
from selfsteer.terminal import say, warn

if TYPE_CHECKING:
    import pyarrow as pa

#: Deaths of one replica, or of whatever it answers, after which the stage stops.
RESTARTS = 10

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
    """Lives on a node and answers one shard after the other; an actor of Ray Data."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._engine: Any = None

    def __call__(self, batch: "pa.Table") -> "pa.Table":
        """(place, ask) → (place, answers or the error that a person should read)."""
        import pyarrow as pa

        made = []
        for packed in batch.column("ask").to_pylist():
            try:
                found: Any = self._answer(*pickle.loads(packed))
            except SelfsteerError as e:
                found = e
            made.append(pickle.dumps(found))
        return pa.table({"place": batch.column("place"), "answers": pa.array(made, pa.binary())})

    def _answer(self, *ask: Any) -> list[Completion]:
        from selfsteer.engines.load import Engines

        if self._engine is None:
            m = self.model
            self._engine = Engines(None).get(
                m.settings, m.source, m.model_settings, m.batch_size, at_hand=m.at_hand
            )
        answers: list[Completion] = self._engine.generate(*ask)
        return answers


class RayEngine:
    """Answers many shards at once with replicas that live as long as the shards last.

    Args:
        settings: of kind ``ray``.
        model: what each replica loads; a folder must be there on every node.

    Raises:
        ConfigError: the cluster has no room for the replicas.
        ArtifactError: a node cannot read the weights.
        EngineError: there is no cluster at ``address``.
    """

    def __init__(self, settings: EngineConfig, model: Model) -> None:
        self.settings, self.model = settings, model
        self._ours = connect(settings)
        try:
            check_room(settings, resources())
            check_nodes(model.source)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves the cluster; one of our own ends."""
        import ray

        if self._ours:
            ray.shutdown()

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: SamplingParams,
        seed: int,
        advance: Advance = no_news,
    ) -> list[Completion]:
        """See `Engine.generate`; one replica answers."""
        ask = Ask(self, conversations, sampling, seed, advance)
        ((_, answers),) = self.generate_shards([ask])
        return answers

    def generate_shards(self, asks: Sequence[Ask]) -> Iterator[tuple[int, list[Completion]]]:
        """See `ShardEngine.generate_shards`.

        Raises:
            SelfsteerError: what a replica could not do, or that one of them died again and again.
        """
        import ray
        import ray.data

        settings, waiting = self.settings, set(range(len(asks)))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the stage has its own
        context.execution_no_progress_timeout_s = -1  # a shard may take hours
        packed = [
            {"place": i, "ask": pickle.dumps((a.conversations, a.sampling, a.seed))}
            for i, a in enumerate(asks)
        ]
        with warnings.catch_warnings():
            # 2026-11: Ray 2.60 deprecates this and names no other way to bound restarts
            warnings.simplefilter("ignore")
            answered = ray.data.from_items(packed, override_num_blocks=len(packed)).map_batches(
                Replica,
                fn_constructor_args=(self.model,),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=min(settings.replicas, len(asks))),
                num_cpus=settings.resources.num_cpus,
                num_gpus=settings.resources.num_gpus,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
        try:
            for row in answered.iter_rows():
                found = pickle.loads(row["answers"])
                if isinstance(found, SelfsteerError):
                    raise found
                place = int(row["place"])
                if place not in waiting:
                    continue
                waiting.remove(place)
                asks[place].advance(len(found), sum(c.completion_tokens for c in found))
                yield place, found
        except (ray.exceptions.RayError, ray.data.exceptions.UserCodeException) as e:
            lines = str(e.__cause__ or e).strip().splitlines() or [type(e).__name__]
            raise EngineError(
                f"A replica on the Ray cluster failed: {lines[-1].strip()}. Finished shards are "
                "kept; see to it (Ray's own logs say more), then run the same command again."
            ) from e
        if waiting:
            raise EngineError(
                f"Ray ended with {len(waiting)} of {len(asks)} shards unanswered. Finished shards "
                "are kept; run the same command again."
            )


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
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":  # the other one writes Ray's own files
            handler.setLevel(logging.CRITICAL)
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


def check_room(settings: EngineConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Fails if the replicas would wait for resources that the cluster does not have.

    Args:
        settings: replicas and what each takes.
        nodes: what there is on each.

    Raises:
        ConfigError: says what they need and what there is.
    """
    need = settings.resources.model_dump()
    there = {"num_cpus": "CPU", "num_gpus": "GPU"}
    fitting = sum(
        min((int(node.get(there[n], 0) / v + 1e-6) for n, v in need.items() if v), default=1)
        for node in nodes
    )
    if any(need.values()) and fitting < settings.replicas:
        have = {name: sum(node.get(name, 0) for node in nodes) for name in there.values()}
        raise ConfigError(
            f"The Ray cluster has room for {fitting} replicas of {need['num_cpus']:g} CPUs and "
            f"{need['num_gpus']:g} GPUs, and {settings.replicas} are asked for: {len(nodes)} nodes "
            f"have {have['CPU']:g} CPUs and {have['GPU']:g} GPUs. Lower replicas or resources."
        )
    gpus = sum(node.get("GPU", 0) for node in nodes)
    if gpus and not need["num_gpus"] and settings.answering.kind != "openai":
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
