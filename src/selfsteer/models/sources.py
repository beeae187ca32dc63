"""What may be named as a model, and the plain checkpoint that it comes to.

==========================  ======================================================
a folder                    as it is
``org/name[@REVISION]``     from the hub, at the commit that the revision stands for
a folder of LoRA adapters   added to their base: once, into the cache
``FILE.gguf``               dequantised: once, into the cache
==========================  ======================================================
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import find_adapter_config_file, is_kernels_available
from transformers.utils.logging import disable_progress_bar

from selfsteer.data.digests import (
    ADAPTER_CONFIG,
    digest,
    hub_commit,
    is_hub_id,
    model_digest,
    split_revision,
)
from selfsteer.data.files import cache_home
from selfsteer.data.jsonl import disk_errors, write_atomic
from selfsteer.errors import ArtifactError, ConfigError, short
from selfsteer.models.finite import broken_weight
from selfsteer.models.save import as_umask, save_tokenizer
from selfsteer.recipe.sections import Loading
from selfsteer.recipe.texts import ENDLESS, is_endless
from selfsteer.terminal import say

#: Bytes that most file systems allow in a name.
NAME_MAX = 255

#: Quantised formats under which adapters can be trained, and the package that each needs.
BACKENDS = {"bitsandbytes": "bitsandbytes", "gptq": "gptqmodel", "awq": "gptqmodel"}

#: What computes attention and experts without code from elsewhere. For other names, such as
#: flash_attention_2, transformers has the package kernels fetch code from the hub.
BUILT_IN = {"", "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm"}

# a bar per checkpoint shard says nothing beside the stage's own
disable_progress_bar()


def check_source(source: str) -> None:
    """Refuses early what cannot be a model.

    Raises:
        ArtifactError: no folder with a config or adapters, no GGUF file, and not shaped like a hub
            id either.
    """
    path = Path(source)
    if any(len(os.fsencode(part)) > NAME_MAX for part in path.parts):
        raise ArtifactError(f"{source[:60]}… is too long for the name of a model or a file.")
    if is_endless(path):
        raise ArtifactError(f"{source} {ENDLESS}.")
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.json", ADAPTER_CONFIG)):
            raise ArtifactError(
                f"{source} is a folder but not a model: it has neither config.json nor "
                f"{ADAPTER_CONFIG}. Give the folder that save_pretrained wrote, or a GGUF file."
            )
    elif path.is_file():
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ArtifactError(
                    f"{source} is a file, and not in GGUF format; give a GGUF file or the folder "
                    "of a Hugging Face checkpoint."
                )
    elif source.lower().endswith(".gguf"):
        raise ArtifactError(f"There is no file {short(source, 200)}.")
    elif not is_hub_id(source):
        raise ArtifactError(
            f"There is no model folder {short(source, 200)}, and it is not a hub id."
        )


def checkpoint(source: str, settings: Loading) -> str:
    """The plain checkpoint of a model: a folder or a hub id that ``from_pretrained`` takes.

    A GGUF file is dequantised, and adapters are added to their base, into a folder of the cache
    that ``source.json`` says the origin of: ``$SELFSTEER_CACHE``, or ``selfsteer`` in the user's
    cache folder. That happens once; the same content finds the same folder.

    Raises:
        ArtifactError: it cannot be a model, or what it is made from cannot be read.
    """
    check_source(source)
    path = Path(source)
    if path.is_file():
        return _once(source, "dequantising", lambda folder: _from_gguf(path, folder, settings))
    if is_hub_id(source):
        commit = hub_commit(source)
        repo, revision = split_revision(source)
        try:
            adapters = find_adapter_config_file(repo, revision=commit or revision or "main")
        except Exception as e:
            raise _unreadable("model", source, e) from e
        return checkpoint(_snapshot(source, settings), settings) if adapters else source
    if (path / ADAPTER_CONFIG).is_file():
        from selfsteer.models.merge import merge_adapter  # which asks for checkpoints of bases

        def merge(folder: Path) -> dict[str, Any]:
            own = settings.loading.model_copy(update={"dtype": "auto"})
            return {"base": merge_adapter(path, folder, own, None)}

        return _once(source, "adding the adapters to their base", merge)
    return source


def folder_of(source: str, settings: Loading) -> str:
    """`checkpoint`, for programs that know no revisions: those of the hub are fetched to a folder.

    Raises:
        ArtifactError: as `checkpoint`, or the hub does not give it.
    """
    found = checkpoint(source, settings)
    return _snapshot(found, settings) if is_hub_id(found) and "@" in found else found


def _snapshot(hub_id: str, settings: Loading) -> str:
    """The folder of a model of the hub, fetched if it is not there."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    wanted += ["*.bin"] * settings.allow_pickle + ["*.py"] * settings.trust_remote_code
    repo, revision = split_revision(hub_id)
    try:
        return snapshot_download(
            repo, revision=hub_commit(hub_id) or revision, allow_patterns=wanted
        )
    except Exception as e:
        raise _unreadable("model", hub_id, e) from e


def _once(source: str, what: str, make: Callable[[Path], dict[str, Any]]) -> str:
    """The cached folder of a source, made if it is not there; other processes wait for it."""
    content = model_digest(source)
    folder = cache_home() / "models" / digest([what, content])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            say(f"{what}, once: {source} -> {folder}")
            with (
                disk_errors(folder),
                TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as partial,
            ):
                made = Path(partial) / "model"
                origin = {"source": source, "digest": content, **make(made)}
                write_atomic(made / "source.json", json.dumps(origin, indent=1) + "\n")
                made.rename(folder)
    return str(folder)


def _from_gguf(file: Path, folder: Path, settings: Loading) -> dict[str, Any]:
    """Writes a GGUF file as a plain checkpoint; returns its types of tensors and their counts.

    In float32: of SmolLM2's Q4_1 bfloat16 holds a fifth of the values exactly, float16 three
    fifths, and rounding to bfloat16 changed the most likely token at 7 of 1,000 positions.
    """
    from gguf import GGUFReader

    source = str(file)
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=None)  # a bar on terminals only
    model = load_whole(AutoModelForCausalLM, "model", source, settings, dtype=torch.float32)
    tokenizer = pretrained(AutoTokenizer, "tokenizer", source, settings)
    settled = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settled.pop(key, None)
    # transformers saves no model that is marked as quantised
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(settled))
    plain.generation_config = model.generation_config
    plain.generation_config.do_sample = True  # as `save_model`
    plain.save_pretrained(folder, state_dict=model.state_dict())
    as_umask(folder)
    save_tokenizer(tokenizer, folder)
    # transformers adds a token to vocabularies without <|endoftext|>, which the model cannot embed
    core = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    rows = model.get_input_embeddings().num_embeddings
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < rows]
    write_atomic(folder / "tokenizer.json", json.dumps(core, ensure_ascii=False))
    return {"tensors": dict(Counter(t.tensor_type.name for t in GGUFReader(file).tensors))}


def pretrained(kind: Any, what: str, source: str, settings: Loading, **more: Any) -> Any:
    """``kind.from_pretrained`` within the permissions of the settings.

    Args:
        kind: a class of transformers.
        what: it is, for the error.
        source: folder, GGUF file, or hub id with or without revision.
        settings: permissions.
        more: of its arguments.

    Raises:
        ArtifactError: it cannot be read; says why, and what would help.
    """
    if "dtype" in more:  # weights, not a tokenizer or a config
        more["use_safetensors"] = None if settings.allow_pickle else True
    name = source
    if is_hub_id(source):
        name, revision = split_revision(source)
        commit = None if more.get("local_files_only") else hub_commit(source)
        if revision := commit or revision:
            more["revision"] = revision
    try:
        with ExitStack() as stack:
            if Path(source).is_file():  # alone, as files beside it would be read for its own
                name = stack.enter_context(TemporaryDirectory())
                Path(name, "model.gguf").symlink_to(Path(source).absolute())
                more["gguf_file"] = "model.gguf"
            return kind.from_pretrained(name, trust_remote_code=settings.trust_remote_code, **more)
    except Exception as e:
        raise _unreadable(what, source, e) from e


def _unreadable(what: str, source: str, error: Exception) -> ArtifactError:
    """Why something cannot be loaded, and what would help."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    said, causes, cause = str(error).strip() or type(error).__name__, list[Any](), error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]

    def of(kind: type[Exception]) -> bool:
        return any(isinstance(c, kind) for c in causes)

    repo, revision = split_revision(source)
    page = f"{constants.ENDPOINT}/{repo}"
    first = said.splitlines()[0]
    if of(GatedRepoError):
        first = (
            f"its authors ask for an agreement. Accept their terms at {page}, then log in with: "
            "hf auth login"
        )
    elif of(RepositoryNotFoundError):
        first = (
            f"the hub has no such model, or does not show it to you ({page}). Check the name; if "
            "it is private, log in with: hf auth login"
        )
    elif of(RevisionNotFoundError):
        first = f"it has no revision {revision}; {page}/commits lists them"
    elif "trust_remote_code" in said:
        first += " If you trust its author, set trust_remote_code: true."
    elif "safetensors" in said:
        first += " If you trust its author, set allow_pickle: true."
    return ArtifactError(f"The {what} {source} cannot be loaded: {first}")


def load_whole(
    kind: Any, what: str, source: str, settings: Loading, *, headless: bool = False, **more: Any
) -> Any:
    """A model all of whose weights come from its checkpoint, and none of them is left over.

    Args:
        kind: a class of transformers.
        what: it is, for the error.
        source: as of `pretrained`.
        settings: permissions.
        headless: whether what is not of the base model may be missing, and starts at random.
        more: arguments of ``from_pretrained``.

    Raises:
        ArtifactError: it cannot be read; a tensor is missing, left over, of another shape, or holds
            values that are not finite; each is named.
    """
    check_code(source, settings)
    more |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = pretrained(kind, what, source, settings, **more)
    body = f"{model.base_model_prefix}."
    other = {
        name: f" ({list(there)}, not {list(here)})"
        for name, there, here in found["mismatched_keys"]
    }
    missing = {n for n in found["missing_keys"] if not headless or n.startswith(body)} - set(other)
    # what a chat model answers with, and a reward model made of one does not need
    classifies = "SequenceClassification" in type(model).__name__
    extra = {n for n in found["unexpected_keys"] if not (classifies and n.startswith("lm_head."))}
    faults = {
        "lacks the weights {}, which would start at random": missing,
        "holds the weights {}, for which the model has no place": extra,
        "holds the weights {} in another shape": [n + shape for n, shape in other.items()],
    }
    wrong = [text.format(_few(names)) for text, names in faults.items() if names]
    if wrong:
        raise ArtifactError(
            f"The {what} {source} {'; it '.join(wrong)}. It was not saved whole, or not as a "
            f"{type(model).__name__}. Fetch it again, or export it again."
        )
    check_finite(model.named_parameters(), source)
    return model


def check_code(source: str, settings: Loading) -> None:
    """Refuses a checkpoint whose config names code of the hub, unless its author is trusted.

    Raises:
        ArtifactError: it does; says where.
    """
    if settings.trust_remote_code or Path(source).is_file():
        return
    for name, code in _implementations(pretrained(AutoConfig, "config", source, settings)):
        if "/" in code or (code not in BUILT_IN and is_kernels_available()):
            raise ArtifactError(
                f"The config of {source} sets {name} to {short(code)}, which may be code from "
                "the hub. Remove it from its config.json or, if you trust its author, set "
                "trust_remote_code: true."
            )


def _implementations(config: Any) -> Iterator[tuple[str, str]]:
    """What computes attention and experts by a config, for itself, its parts and its layers."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else ()
    for part in filter(None, [*parts, *layers]):
        yield from _implementations(part)
    for name in ("attn_implementation", "experts_implementation"):
        with suppress(RuntimeError):  # the layers differ in it, and nothing reads it of the whole
            yield name, str(getattr(config, f"_{name}", None) or "")


def _few(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    shown = [first, *rest[:2]]
    more = len(rest) + 1 - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def check_finite(weights: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Refuses weights that are not numbers: every answer would be noise, or an error far away.

    Raises:
        ArtifactError: names the first tensor that holds NaN or an infinity.
    """
    if broken := broken_weight(weights):
        raise ArtifactError(
            f"{source}: {broken} are NaN or infinite. The checkpoint is damaged, or its training "
            "diverged; use another."
        )


def load_config(source: str, settings: Loading) -> Any:
    """The config of a checkpoint.

    Raises:
        ArtifactError: it cannot be read.
    """
    return pretrained(AutoConfig, "config", checkpoint(source, settings), settings)


def quantisation(source: str, settings: Loading) -> str | None:
    """How the weights of a checkpoint are quantised, by its config; None: they are not.

    Raises:
        ArtifactError: the config cannot be read.
    """
    found = getattr(load_config(source, settings), "quantization_config", None)
    if not found:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    of_old = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & values.keys() else "unknown"
    method = values.get("quant_method") or of_old
    return str(getattr(method, "value", method))


def check_quantised(source: str, settings: Loading, device: torch.device) -> str | None:
    """Refuses a checkpoint that is quantised in a way that cannot be used here.

    Returns:
        How it is quantised; None: it is not.

    Raises:
        ArtifactError: adapters cannot be trained on this format.
        ConfigError: no GPU, or the format's package is missing; names it.
    """
    method = quantisation(source, settings)
    if method is None:
        return None
    if method not in BACKENDS:
        raise ArtifactError(
            f"The weights of {source} are quantised as {method}. selfsteer can train adapters on "
            f"{', '.join(BACKENDS)} and nothing on other quantised formats. Give the checkpoint "
            "that it was made from."
        )
    if find_spec(BACKENDS[method]) is None:
        raise ConfigError(
            f"The weights of {source} are quantised as {method}, which needs a package that is not "
            f"installed: pip install {BACKENDS[method]}. Or give the checkpoint that it was made "
            "from."
        )
    if device.type == "cpu":
        raise ConfigError(
            f"The weights of {source} are quantised as {method}, which needs a GPU; torch sees "
            "none. Give the checkpoint that it was made from."
        )
    return method
