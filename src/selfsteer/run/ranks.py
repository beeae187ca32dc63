"""Ranks: one command that several processes carry out together.

Every rank enters the pipeline with the same arguments. The first one does everything: it samples,
judges and writes the ledger. The others wait for its word, and work where a stage is a training::

    rank 0   principles ─► triples ─► generator ─► samples ─► policy ─► evaluation
    rank 1…  ............wait.......► generator ─► ..wait..► policy ─► ..wait....

They wait at a key-value store, not in a collective, so that no timeout ends a night of sampling.
Whoever starts the ranks (`launch`, torchrun, accelerate) ends them all when one dies.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from selfsteer import stopping
from selfsteer.errors import ConfigError, EngineError, short
from selfsteer.terminal import is_main_process

#: Set by `launch` for its ranks: the process id of the one that started them.
LAUNCHER = "SELFSTEER_LAUNCHER"

#: How long a collective waits for the slowest rank: it may have the longest responses.
PATIENCE = timedelta(hours=1)

#: A rank that lost its peers says nothing for so long: the launcher knows who died, and ends it.
GRACE_S = 60.0

#: Variables by which launchers tell a process that it is one of many, without making a world.
_WORLDLESS = {
    "SLURM_STEP_NUM_TASKS": "srun started {} tasks; start torchrun with it, one task per node, or",
    "OMPI_COMM_WORLD_SIZE": "mpirun started {} processes;",
    "PMI_SIZE": "mpiexec started {} processes;",
}


def size() -> int:
    """How many ranks there are; 1 where none were launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", "0"))


def in_world() -> bool:
    """Whether this process is one of several ranks, even where the several are one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_world(asked: int | None) -> None:
    """Refuses a world that is not the one that was asked for.

    Args:
        asked: ``--nproc``; None where it was not given.

    Raises:
        ConfigError: fewer or more ranks than asked, or a launcher that made no world.
    """
    if in_world():
        if asked is not None and asked != size():
            raise ConfigError(
                f"--nproc {asked} was asked for, but the launcher made a world of {size()}. Leave "
                "--nproc out under torchrun or accelerate launch, or leave the launcher out."
            )
        efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
        if efficient and sharding() == "fsdp":
            raise ConfigError(
                "fsdp_cpu_ram_efficient_loading gives every rank but the first an empty model, and "
                "each rank scores its share of the reference. Set it to false in accelerate's "
                "configuration."
            )
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision != "no":
            raise ConfigError(
                f"accelerate's configuration says mixed_precision: {precision}, which would change "
                "what the recipe's dtype computes in. Set it to 'no' there."
            )
        return
    use_ours = "use selfsteer's own --nproc N."
    # accelerate launch sets both for whatever it starts, and says nowhere how many were asked for
    if {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"} <= os.environ.keys():
        raise ConfigError(
            "accelerate launch started a single process without a world, as it does with --cpu or "
            "--num_processes 1, whatever was asked for. Leave it out, and for several ranks "
            f"{use_ours}"
        )
    for variable, said in _WORLDLESS.items():
        if os.environ.get(variable, "1") not in ("", "1"):
            raise ConfigError(
                f"{said.format(os.environ[variable])} {use_ours} Each of them would be alone, as "
                "RANK and WORLD_SIZE are not set, and they would work on the same thing."
            )


def sharding() -> str:
    """How weights and optimiser are spread: ``none``, ``fsdp``, ``zero2`` or ``zero3``.

    As accelerate's launcher, or `launch` with a profile, left it in the environment.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "none"


# -- starting ranks ------------------------------------------------------------------------------


def launch(ranks: int, profile: str | None = None) -> NoReturn:
    """Starts this very command as ``ranks`` processes on this machine, through torchrun, and waits.

    Never returns. Where a rank fails, the others are ended and its error is this command's.
    A signal ends the ranks, and then this command like one that works alone.

    Args:
        ranks: how many; each drives the GPU of its number, if there are any.
        profile: a shipped profile's name, or a file of accelerate's; None is DDP.
    """
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ |= environment_of(profile, ranks) if profile else {}
    os.environ[LAUNCHER] = str(os.getpid())
    # threads that spin while they wait made a busy machine many times slower
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // ranks, 1)))
    logging.disable()  # each module of torch's launcher has a logger with a level of its own
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-m", "selfsteer", *sys.argv[1:])
    except SignalException as e:
        stopping.end(e.sigval)
    except ChildFailedError as e:
        text, code = verdict({rank: _failure(f) for rank, f in e.failures.items()})
        print(f"selfsteer: {text}", file=sys.stderr)
        raise SystemExit(code) from None
    raise SystemExit(0)


def environment_of(profile: str, ranks: int) -> dict[str, str]:
    """What ``accelerate launch --config_file PROFILE`` would add to the ranks' environment.

    Raises:
        ConfigError: no such profile, not one of accelerate's, or DeepSpeed is missing.
    """
    from importlib.util import find_spec

    from accelerate.commands.config.config_args import load_config_from_file

    path = profile_path(profile)
    try:
        config = load_config_from_file(str(path))
        kind = str(config.distributed_type).rpartition(".")[2]
    except Exception as e:
        raise ConfigError(f"{path} is not an accelerate configuration: {e}") from e
    if config.num_machines > 1:
        raise ConfigError(
            f"{path} is for {config.num_machines} machines; --nproc starts ranks on this one. Set "
            "num_machines: 1, or start the ranks by torchrun or accelerate launch."
        )
    if kind == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise ConfigError(
            f"The profile {profile} needs DeepSpeed, which is not installed: pip install deepspeed."
        )
    if kind not in ("MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED"):
        raise ConfigError(
            f"{path} is for {kind}; ranks are started for MULTI_GPU, FSDP and DEEPSPEED."
        )
    return _accelerate_environment(path, kind, ranks)


def _accelerate_environment(path: Path, kind: str, ranks: int) -> dict[str, str]:
    from accelerate.commands import launch as command
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parser = command.launch_command_parser()
    words = ["--config_file", str(path), "--num_processes", str(ranks)]
    # accelerate's own port, which is not used here; it would warn where another program has it
    words += ["--main_process_port", "0"]
    args = parser.parse_args([*words, "-m", "selfsteer"])
    args, defaults, _ = command._validate_launch_command(args)
    if kind == "DEEPSPEED":
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, found = prepare_deepspeed_cmd_env(args)
    else:
        found = prepare_multi_gpu_env(args)
    return {
        k: v
        for k, v in found.items()
        if k.startswith(("ACCELERATE_", "FSDP_")) and os.environ.get(k) != v
    }


def profile_path(profile: str) -> Path:
    """The file of a shipped profile, or the file itself.

    Raises:
        ConfigError: neither.
    """
    folder = Path(__file__).parents[1] / "profiles"
    shipped = folder / f"{profile}.yaml"
    if shipped.is_file():
        return shipped
    if Path(profile).is_file():
        return Path(profile)
    names = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
    raise ConfigError(f"There is no profile {short(profile)}; shipped are {names}, or give a file.")


def _failure(failure: Any) -> dict[str, Any]:
    """What a rank left behind: exit code, and what it said of its end."""
    said = failure.error_file_data
    known = isinstance(said.get("message"), str) and "exit_code" in said
    return {"exit_code": failure.exitcode, **(said if known else {"message": None})}


def verdict(failures: dict[int, dict[str, Any]]) -> tuple[str, int]:
    """The error that ended a world, as one paragraph, and the exit code.

    A rank that fails takes its peers with it, so the one counts that did not merely lose them.

    Args:
        failures: rank → ``message``, ``exit_code`` and whether it only ``lost`` the others.

    >>> verdict({0: {"message": "gone", "exit_code": 3, "lost": True},
    ...          1: {"message": "The disk is full.", "exit_code": 3}})
    ('rank 1: The disk is full.', 3)
    """

    def weight(rank: int) -> tuple[bool, bool, int]:
        found = failures[rank]
        ended = found["exit_code"] == -signal.SIGTERM  # by the launcher, for another's sake
        return bool(found.get("lost")), ended, rank

    rank = min(failures, key=weight)
    found = failures[rank]
    if found["message"] is not None:
        return f"rank {rank}: {found['message']}", found["exit_code"]
    code = found["exit_code"]
    if code >= 0:
        return f"rank {rank} ended with exit code {code}; its own words are above.", max(code, 1)
    name = {s.value: s.name for s in signal.Signals}.get(-code, str(-code))
    hint = ""
    if name == "SIGKILL":
        hint = " That is how systems end what takes too much memory."
    return (
        f"rank {rank} was killed by signal {name}, and the others were ended.{hint} What is "
        "finished is kept; the same command resumes from there."
    ), 3


# -- being a rank --------------------------------------------------------------------------------


def enter() -> None:
    """First thing a rank does: from now on it ends when its launcher does."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or not in_world():
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(0.5)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def report_exit(text: str, code: int, *, lost: bool = False) -> bool:
    """Leaves this rank's last words to its launcher; whether there is one who will say them."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not in_world() or path is None:
        return False
    if lost:
        # the launcher ends this rank as soon as it sees whose death it was
        time.sleep(GRACE_S)
    words = {"message": text, "timestamp": int(time.time()), "exit_code": code, "lost": lost}
    Path(path).write_text(json.dumps(words), "utf-8")
    return LAUNCHER in os.environ


def is_loss(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if not in_world() or "torch" not in sys.modules:
        return False
    import torch

    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


LOST = (
    "another rank is gone, and this one cannot work without it. What is finished is kept; the same "
    "command resumes from there."
)


@cache
def _store() -> Any:
    """The key-value store of all ranks, at the address that the launcher left."""
    import torch
    from torch.distributed import PrefixStore, rendezvous

    found, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    assert torch.distributed.is_available()
    return PrefixStore("selfsteer", found)


def join(device: str) -> None:
    """Makes this process a member of the world's process group, once; alone it does nothing.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    if size() == 1:
        return
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
            store=distributed.PrefixStore("group", _store()),
            rank=number(),
            world_size=size(),
            timeout=PATIENCE,
        )


_turns: dict[str, Iterator[int]] = defaultdict(count)


def _next_key(kind: str) -> str:
    return f"{kind}-{next(_turns[kind])}"


def _wait(key: str) -> Any:
    """A value of the store, however long it takes: only the launcher's end is an end."""
    pause = 0.01
    # not the store's own wait, whose time-outs are warnings on everyone's terminal
    while not _store().check([key]):
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    return json.loads(_store().get(key))


def broadcast(value: Any) -> Any:
    """The first rank's value on all of them; they wait for it, however long it takes.

    Args:
        value: any JSON; ignored on other ranks. All ranks must call this in the same order.
    """
    if size() == 1:
        return value
    key = _next_key("broadcast")
    if is_main_process():
        _store().set(key, json.dumps(value))
        return value
    return _wait(key)


def barrier() -> None:
    """Returns when every rank has come here, however long the slowest one takes."""
    if size() == 1:
        return
    key = _next_key("barrier")
    _store().set(f"{key}-{number()}", "true")
    for other in range(size()):
        _wait(f"{key}-{other}")


@contextmanager
def leading() -> Iterator[Callable[[str, str], None]]:
    """On the first rank: yields what calls the others to a stage, and lets them go in the end.

    The call takes the stage's name and fingerprint.
    """
    if size() == 1:
        yield lambda name, fingerprint: None
        return
    _store()  # where no launcher hosts it, this rank does, and the others look for it now
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # there is work to end now
    yield lambda name, fingerprint: _store().set(
        _next_key("stage"), json.dumps([name, fingerprint])
    )
    # where it fails they are ended by the launcher
    _store().set(_next_key("stage"), json.dumps(None))
    shutdown()


def shutdown() -> None:
    """Last thing that ranks do together: the first one, maybe the store's host, leaves last."""
    if size() > 1 and not is_main_process():
        _store().set(f"left-{number()}", "true")
        return
    for other in range(1, size()):
        _wait(f"left-{other}")


def following() -> Iterator[tuple[str, str]]:
    """On the other ranks: name and fingerprint of each stage they are called to."""
    while (call := _wait(_next_key("stage"))) is not None:
        yield call[0], call[1]
    shutdown()


def refuse_stage(name: str) -> NoReturn:
    """Ends a rank that was called to a stage which it would do otherwise.

    Raises:
        EngineError: always.
    """
    raise EngineError(
        f"rank {number()} sees other settings, files or versions than the first one: its stage "
        f"{name} would not be the same. All machines need the same recipe, models and run folder."
    )
