"""Ranks: which world is refused, whose error counts, what a profile says."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from selfsteer.engines import launch
from selfsteer.errors import ConfigError
from selfsteer.run import ranks

PROFILES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher of the machine that the tests run on."""
    for name in launch.plain_environment().keys() ^ os.environ.keys():
        monkeypatch.delenv(name)
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


def world(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


@pytest.mark.parametrize("asked", [None, 1, 4])
def test_without_a_launcher_any_number_may_be_asked_for(asked: int | None) -> None:
    ranks.check_world(asked)
    assert (ranks.size(), ranks.number(), ranks.in_world()) == (1, 0, False)


def test_a_world_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world(monkeypatch, 0, 2)
    ranks.check_world(2)
    ranks.check_world(None)
    with pytest.raises(ConfigError, match=r"--nproc 4 was asked for.*world of 2"):
        ranks.check_world(4)


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("SLURM_STEP_NUM_TASKS", "srun started 4 tasks"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun started 4 processes"),
        ("PMI_SIZE", "mpiexec started 4 processes"),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ConfigError, match=said):
        ranks.check_world(None)
    world(monkeypatch, 0, 4)  # as torchrun under srun makes one
    ranks.check_world(None)
    monkeypatch.setenv(variable, "1")
    monkeypatch.delenv("RANK")
    ranks.check_world(None)


def test_empty_models_on_other_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world(monkeypatch, 1, 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ConfigError, match="fsdp_cpu_ram_efficient_loading"):
        ranks.check_world(None)


def test_a_server_does_not_inherit_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PASSWORD_FILE", "x")  # someone's own, outside of any world
    assert launch.plain_environment() == dict(os.environ)
    monkeypatch.delenv("MASTER_PASSWORD_FILE")
    before = dict(os.environ)
    world(monkeypatch, 0, 2)
    for name in ("MASTER_ADDR", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP"):
        monkeypatch.setenv(name, "1")
    assert launch.plain_environment() == before
    everything = dict(os.environ)
    with launch.out_of_world():
        assert dict(os.environ) == before
        assert not ranks.in_world()
    assert dict(os.environ) == everything


def test_a_precision_beside_the_recipes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world(monkeypatch, 0, 2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    ranks.check_world(None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="mixed_precision: bf16"):
        ranks.check_world(None)


def test_a_world_that_accelerate_did_not_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing."""
    args = launch_command_parser().parse_args(["--cpu", "--num_processes", "2", "-m", "selfsteer"])
    _, left = prepare_simple_launcher_cmd_env(_validate_launch_command(args)[0])
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="started a single process without a world"):
        ranks.check_world(None)


RANK = """
import sys, time
from pathlib import Path
from selfsteer.run import ranks

met = Path(sys.argv[1])
if ranks.number() == 0:
    with ranks.leading() as call:
        while not met.exists():  # what it does before the first training
            time.sleep(0.01)
        call("policy", "abc")
else:
    ranks._store()
    met.touch()
    print(list(ranks.following()))
"""


def test_ranks_without_a_launcher_find_each_other_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first one hosts the store before it does anything else; the others give up in time."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    started = []
    for rank in range(2):
        world(monkeypatch, rank, 2)
        words = [sys.executable, "-c", RANK, str(tmp_path / "met")]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0, 0]
    assert said == ["", "[('policy', 'abc')]\n"]


# -- whose error counts ---------------------------------------------------------------------------

NAN = {"message": "The loss became nan.", "exit_code": 3}
GONE = {"message": "another rank is gone", "exit_code": 3, "lost": True}


@pytest.mark.parametrize(
    ("failures", "text", "code"),
    [
        ({0: GONE, 1: NAN}, "rank 1: The loss became nan.", 3),
        ({0: NAN, 1: NAN}, "rank 0: The loss became nan.", 3),
        (
            {0: GONE, 1: {"message": None, "exit_code": -signal.SIGKILL}},
            "rank 1 was killed by signal SIGKILL",
            3,
        ),
        (
            {0: {"message": None, "exit_code": -signal.SIGTERM}, 1: NAN},
            "rank 1: The loss became nan.",
            3,
        ),
        ({1: {"message": None, "exit_code": 1}}, "rank 1 ended with exit code 1", 1),
        ({0: {"message": "No such file.", "exit_code": 2}}, "rank 0: No such file.", 2),
    ],
)
def test_the_rank_counts_that_did_not_merely_lose_the_others(
    failures: dict[int, dict[str, object]], text: str, code: int
) -> None:
    said, exit_code = ranks.verdict(failures)
    assert said.startswith(text)
    assert exit_code == code


# -- profiles -------------------------------------------------------------------------------------


def test_all_shipped_profiles_are_known_here() -> None:
    found = (Path(ranks.__file__).parents[1] / "profiles").glob("*.yaml")
    assert {p.stem for p in found} == set(PROFILES)


@pytest.mark.parametrize(("name", "kind"), PROFILES.items())
def test_accelerate_reads_every_profile(name: str, kind: str) -> None:
    config = load_config_from_file(str(ranks.profile_path(name)))
    assert str(config.distributed_type).endswith(kind)
    assert config.mixed_precision == "no"


def test_the_fsdp2_profile_is_fsdp2_for_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ranks.environment_of("fsdp2", 2)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert ranks.sharding() == "fsdp"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading


def test_the_ddp_profile_shards_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ranks.environment_of("ddp", 2).items():
        monkeypatch.setenv(name, value)
    assert ranks.sharding() == "none"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_profiles_say_which_stage(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    path = ranks.profile_path(f"zero{stage}")
    for name, value in ranks._accelerate_environment(path, "DEEPSPEED", 2).items():
        monkeypatch.setenv(name, value)
    assert ranks.sharding() == f"zero{stage}"


@pytest.mark.parametrize(("profile", "kind"), [("fsdp2", "FSDP"), ("zero3", "DEEPSPEED")])
def test_a_second_launch_on_a_machine_says_nothing_of_ports(profile: str, kind: str) -> None:
    with socket.socket() as other:
        with suppress(OSError):  # in use already is as good
            other.bind(("127.0.0.1", 29500))
            other.listen()
        assert ranks._accelerate_environment(ranks.profile_path(profile), kind, 2)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_zero_without_deepspeed_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        ranks.environment_of("zero2", 2)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ddp, fsdp2, zero2, zero3"):
        ranks.profile_path("fsdp")
    other = tmp_path / "mine.yaml"
    other.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="not an accelerate configuration"):
        ranks.environment_of(str(other), 2)
    text = ranks.profile_path("ddp").read_text().replace("MULTI_GPU", "MEGATRON_LM")
    other.write_text(text)
    with pytest.raises(ConfigError, match="is for MEGATRON_LM"):
        ranks.environment_of(str(other), 2)
    text = ranks.profile_path("ddp").read_text().replace("num_machines: 1", "num_machines: 4")
    other.write_text(text)
    with pytest.raises(ConfigError, match="is for 4 machines"):
        ranks.environment_of(str(other), 2)
