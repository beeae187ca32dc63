"""What hostile models, templates, data, servers and run folders cannot do: docs/security.md."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import selfsteer
from selfsteer.data.files import read_rows
from selfsteer.data.jsonl import dump_lines
from selfsteer.data.records import Message
from selfsteer.engines.launch import LaunchedServer
from selfsteer.engines.openai import Fault, OpenAIEngine, read_reply
from selfsteer.engines.usage import Usage
from selfsteer.errors import ArtifactError, ConfigError, DataError, EngineError, SelfsteerError
from selfsteer.formats.export import export
from selfsteer.formats.hub import plan_upload
from selfsteer.models.chat import ChatFormat, _environment
from selfsteer.models.store import ScoreStore, read_chunk
from selfsteer.principles import catalogue
from selfsteer.recipe.read import read_yaml
from selfsteer.recipe.sections import EngineConfig, Sampling
from selfsteer.report import live, summary
from selfsteer.report.document import write_report
from selfsteer.run.folder import RunFolder
from selfsteer.stages.queries import ReadQueries
from selfsteer.verbs.exporting import export_model, export_round
from selfsteer.verbs.judge import judge
from selfsteer.view import RunView
from tests.e2e.support import environment
from tests.make import entry, recipe, tiny_pairs
from tests.reliability.fuzz import TURN, TURNS, run_files, tokenizer

SOURCES = [
    path
    for folder in (Path(selfsteer.__file__).parent, Path(__file__).parents[2] / "benchmarks")
    for path in sorted(folder.rglob("*.py"))
]


class Bomb:
    """What runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


@pytest.fixture(autouse=True)
def unpickled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A `Bomb` that goes off leaves a folder; none may."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("unpickled").exists()


# -- the sources -----------------------------------------------------------------------------------


#: Without one of these words a source need not be looked at.
RISKY = re.compile(
    "pickle|load|eval|exec|shell|remote_code|verify|popen|system|marshal|joblib|dill"
)


def risky(tree: ast.AST) -> Iterator[str]:
    """Calls that run code, or start a shell, by what they are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            if {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"} & set(names):
                yield f"line {node.lineno} imports {names}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "os.system", "os.popen", "yaml.unsafe_load"):
            yield f"line {node.lineno} calls {called}"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield f"line {node.lineno} unpickles"
        if called == "yaml.load" and given.get("Loader") not in ("Loader", "yaml.SafeLoader"):
            yield f"line {node.lineno} loads YAML by another loader"
        for name in ("shell", "allow_pickle", "trust_remote_code"):
            if given.get(name, "False") not in ("False", f"settings.{name}", f"loading.{name}"):
                yield f"line {node.lineno}: {name}={given[name]}"
        if given.get("verify") == "False":
            yield f"line {node.lineno} checks no certificate"


def test_no_source_unpickles_or_starts_a_shell() -> None:
    found = {
        str(path): faults
        for path in SOURCES
        if RISKY.search(text := path.read_text("utf-8"))
        and (faults := list(risky(ast.parse(text))))
    }
    allowed = {"verbs/merge.py", "verbs/rewardbench.py"}  # options of that name, off by default
    assert not {p for p in found if not p.endswith(tuple(allowed))}, found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run('x', shell=True)",
        "yaml.load(t, Loader=yaml.Loader)",
        "eval(text)",
        "kind.from_pretrained(name, trust_remote_code=True)",
        "client(verify=False)",
    ],
)
def test_a_risky_source_is_found(source: str) -> None:
    assert list(risky(ast.parse(source)))


# -- models ----------------------------------------------------------------------------------------


def test_stored_log_probs_are_not_unpickled(tmp_path: Path) -> None:
    path, bomb = tmp_path / "scores-00000-0.npz", np.array([Bomb()], dtype=object)
    np.savez(path, keys=bomb, lengths=bomb, values=bomb)
    with pytest.raises(ValueError, match="is not whole"):
        read_chunk(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is not whole"):
        read_chunk(path)


def npy(values: Any, shape: tuple[int, ...] | None = None) -> bytes:
    """An array as numpy writes it, under a header with this shape."""
    array, buffer = np.asarray(values), BytesIO()
    about = {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue() + array.tobytes()


def pack(path: Path, values: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """A file of log-probs of one sequence, with these bytes as its values."""
    with zipfile.ZipFile(path, "w", compression) as made:
        made.writestr("keys.npy", npy(np.zeros((1, 16), np.uint8)))
        made.writestr("lengths.npy", npy(np.array([4])))
        made.writestr("values.npy", values)


def test_no_file_of_log_probs_takes_more_memory_than_it_is_long(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    four = np.arange(4, dtype=np.float32)
    pack(folder / "scores-00003-0.npz", npy(four))
    assert len(ScoreStore(tmp_path, "m")) == 1  # so the others are refused for what they are
    for number, compression in enumerate((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2), 4):
        pack(folder / f"scores-{number:05d}-0.npz", npy(np.zeros(10**7, np.float32)), compression)
    claims = {6: (10**13,), 7: (3,), 8: (-4,), 9: (2**62, 4)}
    for number, shape in claims.items():
        pack(folder / f"scores-{number:05d}-0.npz", npy(four, shape))
    tracemalloc.start()
    for path in sorted(folder.glob("scores-*.npz"))[1:]:
        with pytest.raises(ValueError, match="is not whole"):
            read_chunk(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_files_that_are_no_log_probs_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "scores-abc.npz").write_bytes(b"")
    (folder / "scores-00004-0 (copy).npz").write_bytes(b"")
    (folder / "scores-00005-0.npz").write_bytes(npy(np.zeros(4, np.float32)))
    pack(folder / "scores-00006-0.npz", b"\x93NUMPY\x01\x00\x0a\x00{((((((((")
    pack(folder / "scores-00007-0.npz", npy(np.arange(4, dtype=np.float64)))
    assert len(ScoreStore(tmp_path, "m")) == 0


def test_nothing_of_a_model_runs_unless_it_is_asked_for() -> None:
    policy = recipe().policy
    assert not policy.trust_remote_code
    assert not policy.allow_pickle
    assert recipe(judge={"kind": "reward", "model": "a/b"}).judge.trust_remote_code is False


@pytest.mark.parametrize(
    ("engine", "reached"),
    [
        ({"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m"}, set()),
        ({"kind": "openai", "base_url": "http://a.example/v1", "model": "m"}, {"base_url"}),
        (
            {
                **{"kind": "openai", "base_url": "http://localhost/v1", "model": "m"},
                "api_key_env": "AWS_SECRET_ACCESS_KEY",
            },
            {"api_key_env"},
        ),
        ({"kind": "ray"}, set()),
        ({"kind": "ray", "address": "auto"}, set()),
        ({"kind": "ray", "address": "ray://a.example:10001"}, {"address"}),
        ({"kind": "ray", "address": "10.0.0.1:6379"}, {"address"}),
        ({"kind": "ray", "address": "ray://[x"}, {"address"}),
        ({"kind": "ray", "replica": {"kind": "openai", "launch": "x {model} {port}"}}, {"launch"}),
        ({"kind": "vllm", "engine_args": {"worker_cls": "a.B"}}, {"engine_args"}),
    ],
)
def test_what_a_recipe_reaches_is_known(engine: dict[str, Any], reached: set[str]) -> None:
    assert Sampling(engine=EngineConfig(**engine)).reaches == reached


def test_the_ledger_says_what_a_model_was_allowed(tmp_path: Path) -> None:
    queries = tmp_path / "q.jsonl"
    queries.write_text('{"prompt": "Why?"}\n')
    for name, policy in (("bold", {"trust_remote_code": True}), ("safe", {})):
        made = recipe(queries={"path": str(queries)}, policy={"model": "m", **policy})
        stage = next(s for s in made.plan() if isinstance(s, ReadQueries))
        run = RunFolder(tmp_path / name)
        with run.locked():
            run.execute(stage)
        begin = json.loads((run / "ledger.jsonl").read_text().splitlines()[0])
        assert begin.get("permits", []) == list(policy)
    own = recipe(judge={"kind": "reward", "model": "a/b", "allow_pickle": True})
    assert {"allow_pickle"} in [s.permits for s in own.plan()]


# -- chat templates --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('unpickled') }}",
        "{{ messages.append(1) }}",
        "{{ self._TemplateReference__context }}{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_reaches_nothing_of_the_program(text: str) -> None:
    names = tokenizer()
    names.chat_template = TURNS[0] + text
    with pytest.raises(ArtifactError, match="chat template of the model"):
        _ = ChatFormat(names).end_of_turn


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** 999999999 }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 999999999 }}",
        "{{ 999999999 * 'a' }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%.999999999f' % 1 }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 1.5|round(9999999999, 'floor') }}",
        "{% set n = messages|length * 9999999999 %}{{ 1.5|round(n, method='floor') }}",
        "{{ 1.5|round(precision=9999999999, method='floor') }}",
        "{{ [1.5]|map('round', 9999999999, 'floor')|list }}",
        "{{ [1]|slice(1000000000)|join }}",
        "{{ [1]|batch(1000000000, 'x')|first|join }}",
        "{{ '%9999999999s'|format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ '{a:999999999}'.format_map({'a': 1}) }}",
        "{{ ('f' * 1000000)|int(0, 16) }}",
        "{{ ('f' * 1000000)|int(base=16) }}",
        "{{ (1).from_bytes(('a' * 1000000).encode(), 'big') }}",
        "{{ (1).to_bytes(999999999, 'big') }}",
        "{{ 'a'|center(999999999) }}{{ 'a'.zfill(999999999) }}",
        "{{ ('\\n' * 100000)|indent(100000) }}",
        "{{ ('a' * 1000000)|list|map('string')|join('b' * 1000000) }}",
        "{{ ('b' * 1000000).join(('a' * 1000000)|list) }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
        "{{ {'a': [1]}|tojson(indent=999999999) }}",
    ],
)
def test_a_template_that_works_without_an_end_is_stopped(text: str) -> None:
    names = tokenizer()
    names.chat_template = TURNS[0] + text
    with pytest.raises(ArtifactError, match="chat template of the model"):
        ChatFormat(names)


def test_a_template_of_long_steps_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfsteer.models.chat.SECONDS", 0.2)
    names = tokenizer()
    names.chat_template = TURNS[0] + (
        "{% for i in range(99999) %}{% set y = range(99999)|sum %}{% endfor %}"
    )
    with pytest.raises(ArtifactError, match=r"has not ended after 0\.2 seconds"):
        ChatFormat(names)


def test_nothing_of_a_template_is_computed_while_it_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed: list[int] = []
    monkeypatch.setitem(_environment().filters, "abs", computed.append)
    names = tokenizer()
    names.chat_template = TURNS[0] + "{% if nothing %}{{ 1|abs }}{% set x = 2|abs %}{% endif %}"
    ChatFormat(names)
    assert not computed
    names.chat_template = TURNS[0] + "{% autoescape 3|abs %}{% endautoescape %}"
    with pytest.raises(ArtifactError, match="autoescape takes true or false"):
        ChatFormat(names)
    assert not computed


def test_a_template_may_calculate() -> None:
    names = tokenizer()
    names.chat_template = (
        TURNS[0] + "{{ '%-3s|%5.1f' % ('a', 2) }}{{ '=' * 3 }}{{ 2 * 3 ** 2 % 5 }}"
        "{{ 1234567.126|round(2) }}{{ '7'|int }}{{ 123456789|tojson }}{{ 'a'.rjust(2) }}"
        "{{ '{:>3}{}'.format(1, 123456789) }}{{ messages|map(attribute='role')|join(', ') }}"
        "{{ (messages[0].content * 999).replace('H', 'h' * 99)|length }}{{ 'a\\nb'|indent(2) }}"
    )
    said = ChatFormat(names).prompt_text([Message("user", "Hi")])
    assert said.endswith("a  |  2.0===31234567.137123456789 a  1123456789user99900a\n  b")


# -- data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [unpickled]",
        "a: !!python/name:os.system",
        "!!python/module:os",
        "a: !include /etc/passwd",
    ],
)
def test_yaml_makes_plain_values_only(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)
    found, findings, _ = catalogue.read(text)
    assert found is None
    assert findings


def test_an_archive_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"PK\x03\x04../../rows.jsonl")
    with pytest.raises(DataError, match=r"is a zip archive\. Unpack it"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", "..", "dataset_info"])
def test_an_export_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        export(tiny_pairs(2, 0, faults=0), "llama-factory", tmp_path / "out", name)
    assert not list(tmp_path.rglob("*.json"))


# -- servers ---------------------------------------------------------------------------------------

#: What looks like a token of the hub.
LOOKS = "hf_" + "aB3d" * 9


@pytest.mark.parametrize(
    "engine",
    [
        {"base_url": "http://me@host/v1", "model": "m"},
        {"base_url": "http://me:sk-secret@host/v1", "model": "m"},
        {"base_url": "http://host/v1?key=sk-secret", "model": "m"},
        {"base_url": "http://host/v1", "model": "m", "extra_body": {"api_key": "sk-secret"}},
        {"base_url": "http://host/v1", "model": "m", "extra_body": {"Authorization": "sk-secret"}},
        {"launch": "vllm serve {model} --port {port} --api-key sk-secret"},
        {"launch": "env HF_TOKEN=sk-secret vllm serve {model} --port {port}"},
        {"launch": "env WANDB_API_KEY=sk-secret vllm serve {model} --port {port}"},
        {"launch": f"env X={LOOKS} vllm serve {{model}} --port {{port}}"},
        {"base_url": "http://host/v1#sk-secret", "model": "m"},
        {"base_url": "http://host/v1", "model": "m", "api_key_env": "sk-secret"},
        {"base_url": "http://host/v1", "model": "m", "api_key_env": LOOKS},
        *(
            {"base_url": "http://host/v1", "model": "m", "extra_body": body}
            for body in (
                {"x-api-key": "sk-secret"},
                {"headers": {"Authorization": "Bearer sk-secret"}},
                {"tools": [{"url": "u", "password": "sk-secret"}]},
                {"metadata": {"note": [f"mine is {LOOKS}"]}},
            )
        ),
        {"kind": "vllm", "engine_args": {"hf_token": "sk-secret"}},
    ],
)
def test_a_recipe_that_holds_a_secret_is_refused_and_not_quoted(engine: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must hold no secret") as caught:
        recipe(sampling={"engine": {"kind": "openai", **engine}})
    assert not [told for told in ("sk-secret", LOOKS) if told in str(caught.value)]


def test_no_other_section_of_a_recipe_holds_one() -> None:
    template = {"chat_template_kwargs": {"access_token": "sk-secret"}}
    policy = {"policy": {"model": "m", **template}}
    judge = {"judge": {"kind": "reward", "model": "m", **template}}
    writer = {"principles": {"writer": {"model": "m", **template}}}
    for given in (policy, judge, writer):
        with pytest.raises(ConfigError, match="access_token must hold no secret") as caught:
            recipe(**given)
        assert "sk-secret" not in str(caught.value)


def test_what_is_no_secret_is_none() -> None:
    body = {"top_k": 5, "max_thinking_tokens": 64, "tokenizer": "x", "keys": 1}
    body |= {"eos_token": "</s>", "stop": ["hf_", "sk-"], "model_path": "runs/hf_checkpoints/a"}
    body["guided_json"] = {"properties": {"password": {"type": "string"}}, "required": ["password"]}
    launch = "env HOTKEY=1 MAX_TOKENS=8 vllm serve {model} --port {port} --tokenizer=x"
    launch += " --max-num-batched-tokens 8 --download-dir /data/hf_models/sk-tuned"
    assert recipe(sampling={"engine": {"kind": "openai", "launch": launch, "extra_body": body}})


#: What a server prints of its environment, and a key that it found elsewhere, in two pieces.
SHOWS = """
import os, sys, time
print(os.environ, flush=True)
sys.stdout.write("found hosted-se")
sys.stdout.flush()
time.sleep(0.5)
sys.exit("cret and hub-secret")
"""


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Secrets in the environment; a recipe's judge names the third."""
    found = {
        "OPENAI_API_KEY": "openai-secret",
        "HF_TOKEN": "hub-secret",
        "MY_AUTH": "hosted-secret",
        "OPENAI_CUSTOM_HEADERS": "X-Gateway: Bearer gateway-secret",
    }
    for name, value in {**found, "OTHER": "passed on"}.items():
        monkeypatch.setenv(name, value)
    judge = {"kind": "openai", "base_url": "http://host/v1", "api_key_env": "MY_AUTH"}
    recipe(judge={"kind": "chat", "model": "m", "engine": judge})
    return list(found.values())


def test_a_launched_server_gets_no_key(tmp_path: Path, keys: list[str]) -> None:
    (tmp_path / "shows.py").write_text(
        "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[2], 'w'))"
    )
    EngineConfig(kind="openai", base_url="http://h/v1", model="m", api_key_env="HF_TOKEN")
    shows, seen = f"{sys.executable} -S {tmp_path}/shows.py {{port}} {{model}}", tmp_path / "env"
    with LaunchedServer(shows, str(seen), tmp_path / "log") as server:
        server._process.wait(30)
    given = json.loads(seen.read_text())
    assert given["OTHER"] == "passed on"
    assert given["HF_TOKEN"] == "hub-secret", "it may have to fetch the model"
    assert not {"OPENAI_API_KEY", "OPENAI_CUSTOM_HEADERS", "MY_AUTH"} & given.keys()


def test_what_a_launched_server_prints_shows_no_key(tmp_path: Path, keys: list[str]) -> None:
    (tmp_path / "shows.py").write_text(SHOWS)
    shows = f"{sys.executable} -S {tmp_path}/shows.py {{model}} {{port}}"
    with (
        LaunchedServer(shows, "m", tmp_path / "log") as server,
        pytest.raises(EngineError, match=r"found \[key\] and \[key\]") as caught,
    ):
        server.wait(30)
    shown = (tmp_path / "log").read_text() + str(caught.value)
    assert "passed on" in shown
    assert [key for key in keys if key in shown] == []


def test_a_launched_server_answers_no_key(keys: list[str]) -> None:
    """The hub's token, which it may have, is in none of its faults."""
    settings = EngineConfig(kind="openai", launch="serve {model} {port}")
    launched: Any = object()
    engine = OpenAIEngine(settings, "m", "http://127.0.0.1:1/v1", Usage(), server=launched)
    engine.close()
    assert engine._hidden("no access with hub-secret, hosted-secret") == (
        "no access with [key], [key]"
    )


def test_a_reply_holds_no_half_characters() -> None:
    with pytest.raises(Fault):
        read_reply(b'{"choices": [{"message": {"content": "\\ud800"}}]}')


# -- run folders -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "iteration-1" / "policy").mkdir(parents=True)
    given = recipe()
    (folder / "resolved.json").write_text(given.model_dump_json())
    (folder / "iteration-1" / "policy" / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_model_with_a_link_out_of_the_run_is_not_exported(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("sk-secret")
    (run / "iteration-1" / "policy" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match=r"notes\.txt is a link that leads out"):
        export_model(RunView.open(run).round(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_link_out_of_it_is_not_pushed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("sk-secret")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "train.jsonl").write_text("{}\n")
    assert plan_upload(folder, "me/data", private=True).files == [("train.jsonl", 3)]
    (folder / "own.jsonl").symlink_to("train.jsonl")
    assert len(plan_upload(folder, "me/data", private=True).files) == 2
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"notes\.txt is a link that leads out"):
        plan_upload(folder, "me/data", private=True)


@pytest.mark.parametrize("output", ["../elsewhere", "{tmp}/elsewhere", "link/elsewhere"])
def test_a_ledger_moves_nothing_outside_of_its_run(run: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / "link").symlink_to(tmp_path)
    named = entry("finish", "queries", "ReadQueries", outputs=[output.format(tmp=tmp_path)])
    with pytest.raises(ArtifactError, match="which is not in the run folder"):
        RunFolder(run).supersede([named])
    assert (tmp_path / "elsewhere").is_dir()


DROPPED = "iteration-1/filter.dropped.jsonl"

#: What a reader of the run would see of each of its files.
TELLING: dict[str, Any] = {
    "resolved.json": {"policy": {"model": "SECRET/model"}},
    "metrics.jsonl": {"loss/SECRET": 0.5},
    "progress.json": {"stage": "SECRET"},
    "evaluation.json": {"judge": "SECRET"},
    "evaluation/exhibit.json": {
        "query": "SECRET",
        "principles": {"good": "g", "bad": "b"},
        "responses": {"policy": {"plain": "p", "good": "g", "bad": "b"}},
    },
    "benchmarks.json": {"models": {"SECRET": "m"}, "limit": 1, "benchmarks": [], "differences": []},
    "reward.json": {
        "sources": {"SECRET": {"read": 1, "weight": 1, "trained": 1, "dropped": {}}},
        "held_out": {"pairs": 0},
    },
    "iteration-1/quality.json": {"judge": "SECRET"},
    "iteration-1/policy.selection.json": {
        **{"chosen": 1, "steps": 2, "wins": "SECRET"},
        "candidates": [{"step": 1, "wins_mean": [0.5, 0.4, 0.6]}],
    },
    "iteration-1/triples/shard-00000.jsonl": {"responses": {"good": "SECRET", "bad": "b"}},
    DROPPED: {"id": "a", "reason": "SECRET", "record": None},
    "iteration-1/filtered.jsonl": {
        **{"id": "a", "messages": [TURN]},
        "responses": {"good": "SECRET", "bad": "b"},
    },
    "iteration-1/preferences/shard-00000.jsonl": {
        **{"id": "a", "prompt": [TURN], "rejected": [{"role": "assistant", "content": "b"}]},
        "chosen": [{"role": "assistant", "content": "SECRET"}],
    },
    "evaluation/answers-base.jsonl": {
        **{"id": "a", "messages": [TURN], "response": "SECRET"},
        **{"completion_tokens": 1, "finish_reason": "stop"},
    },
}


def write_run(folder: Path, *telling: str) -> Path:
    """A run folder of every kind of file, of which some tell their secrets."""
    whole = run_files()
    for number, name in enumerate({**TELLING, **whole}):
        told = TELLING.get(name, {}) if name in telling else {}
        rows = whole[name] if name in whole else TELLING[name]
        text = dump_lines([{**row, **told} for row in (rows if isinstance(rows, list) else [rows])])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text.replace("SECRET", f"secret{number}" if told else "x"))
    if DROPPED not in telling:  # it says that nothing was kept
        (folder / DROPPED).unlink()
    return folder


def seen(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """All that looking at a run shows; what is refused shows nothing."""
    page = folder.with_name("page.html")
    looks: list[Callable[[], Any]] = [
        lambda: (
            write_report(folder, page) and page.read_text() + page.with_suffix(".md").read_text()
        ),
        lambda: json.dumps(RunView.open(folder).to_json()),
        lambda: json.dumps(live.now(folder)),
        lambda: json.dumps(live.compare({"a": folder})),
        lambda: summary.print_show(RunView.open(folder)),
        lambda: [a.text for a in RunView.open(folder).answers("base").values()],
    ]
    told = []
    for look in looks:
        try:
            told.append(str(look()))
        except SelfsteerError as e:
            told.append(str(e))
    return "".join([*told, *capsys.readouterr()])


def test_what_is_in_a_run_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = seen(write_run(tmp_path / "a", *TELLING), capsys)
    shown += seen(write_run(tmp_path / "b", *(TELLING.keys() - {DROPPED})), capsys)
    assert [n for i, n in enumerate(TELLING) if f"secret{i}" not in shown] == []


@pytest.mark.parametrize("name", TELLING)
def test_no_file_outside_of_a_run_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = write_run(tmp_path / "run", name)
    outside = (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(outside)
    assert "secret" in outside.read_text()
    assert "secret" not in seen(folder, capsys)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("preferences", "trl"), ("preferences", "parquet"), ("samples", "authors")],
)
def test_no_shard_from_outside_is_read_with_the_others(tmp_path: Path, name: str, fmt: str) -> None:
    folder, told = write_run(tmp_path / "run"), tmp_path / "outside.jsonl"
    first = folder / "iteration-1" / name / "shard-00000.jsonl"
    first.parent.mkdir(exist_ok=True)
    own = TELLING[f"iteration-1/{'filtered' if name == 'samples' else f'{name}/shard-00000'}.jsonl"]
    first.write_text(dump_lines([own]).replace("SECRET", "x"))
    (folder / "iteration-1/filtered.jsonl").unlink()
    assert export_round(RunView.open(folder).round(), fmt, tmp_path / "own").count == 1
    told.write_text(dump_lines([{**own, "id": "b"}]))
    first.with_name("shard-00001.jsonl").symlink_to(told)
    with pytest.raises(ArtifactError, match=r"shard-00001\.jsonl is a link that leads out"):
        export_round(RunView.open(folder).round(), fmt, tmp_path / "out")
    if name == "preferences":
        with pytest.raises(ArtifactError, match=r"shard-00001\.jsonl is a link that leads out"):
            judge(folder, label_sheet=tmp_path / "labels.jsonl")


@pytest.mark.parametrize(
    "changed",
    [
        {"outputs": ["{tmp}/private.jsonl"]},
        {"outputs": ["../private.jsonl"]},
        {"outputs": []},
        {"outputs": ["a\0b"]},
        {"stage": "../private"},
        {"stage": "a\0b"},
        {"seconds": 1e308},
        {"time": float("inf")},
        {"n_in": 10**400},
        {"dropped": {"empty": -1}},
    ],
)
def test_a_ledger_names_and_counts_what_a_run_can_have(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = write_run(tmp_path / "run")
    assert RunView.open(folder).stages
    text = json.dumps(changed).replace("{tmp}", str(tmp_path))
    stages = [{**e, **json.loads(text)} for e in run_files()["ledger.jsonl"]]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in stages))
    with pytest.raises(ArtifactError, match="does not say what"):
        RunView.open(folder)


# -- the page of what holds ------------------------------------------------------------------------


def test_every_line_of_the_page_names_a_test_that_is_there() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "security.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| (can|cannot) ", line)]
    assert len(rows) > 20
    for row in rows:
        name, file = re.search(r"`(test_\w+)` \(`(\w+)`\)", row).groups()  # type: ignore[union-attr]
        files = list((root / "tests").rglob(f"{file}.py"))
        assert any(f"def {name}(" in path.read_text("utf-8") for path in files), row


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no answer from http://me:pass%20w@h:9/x", "no answer from http://[secret]@h:9/x"),
        ("see https://h/v1?a=1&api_key=abc&b=2", "see https://h/v1?a=1&api_key=[secret]&b=2"),
        ("http://me:pa@ss/wo#rd@h/v1 is none", "http://[secret]@h/v1 is none"),
        ("https://h/a?X-Amz-Signature=abc, twice", "https://h/a?X-Amz-Signature=[secret] twice"),
        ("http://h/v1 of me@h.org", "http://h/v1 of me@h.org"),
        ("write to me@h.org; is it ?token", "write to me@h.org; is it ?token"),
    ],
)
def test_no_error_holds_a_password_of_an_address(said: str, told: str) -> None:
    assert str(ConfigError(said)) == told


def test_a_mirror_that_wants_a_password_is_not_told_of(tmp_path: Path) -> None:
    given = {**environment(), "HF_ENDPOINT": "http://me:passw0rd@127.0.0.1:9/x"}
    asked = ("run", "smoke", f"runs_dir={tmp_path}", "policy.model=org/some-model")
    ended = subprocess.run(
        [sys.executable, "-m", "selfsteer", *asked], capture_output=True, text=True, env=given
    )
    assert ended.returncode == 3
    kept = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert "passw0rd" not in ended.stderr + ended.stdout + kept
