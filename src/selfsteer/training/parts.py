"""Models to train and to score, on all ranks together: under FSDP2 in parts from the first byte.

No rank needs memory for a whole model. A forward then takes all ranks (`in_step`), or whole weights
on each (`sharding.whole`).
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, distributed
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from selfsteer.data.digests import hub_commit, is_hub_id, split_revision
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.save import stored
from selfsteer.models.score import batch_logps, pack
from selfsteer.models.sources import check_code, check_finite, pretrained
from selfsteer.recipe.sections import Loading, Lora
from selfsteer.run import ranks
from selfsteer.terminal import say
from selfsteer.training.sharding import accelerator_of, own_part

#: Of each tensor of a checkpoint: its file and its shape.
Tensors = dict[str, tuple[str, list[int]]]


def load_to_train(source: str, settings: Loading, lora: Lora | None = None) -> LoadedModel:
    """`load_model` on all ranks together: under FSDP2 each reads and holds its part alone.

    Until the Trainer shards it, a model is whole on every rank under adapters, which peft adds to
    plain weights, and if the tensors of its checkpoint are not those of the model one by one.
    """
    if ranks.sharding() != "fsdp" or lora:
        return load_model(source, settings, bits=lora.bits if lora else None)
    return load_model(source, settings, build=_in_parts)


def _in_parts(source: str, settings: Loading, device: torch.device) -> Any:
    """A model with this rank's part of each weight; None: it cannot be read like that."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    check_code(source, settings)
    config = pretrained(AutoConfig, "config", source, settings)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=settings.trust_remote_code
        )
    model.tie_weights()  # what was tied above was taken apart as it became empty
    tensors = _tensors(source)
    places = _places(model, tensors)
    ranks.join(device.type)
    accelerator = accelerator_of(device)
    plugin = accelerator.state.fsdp_plugin
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    if places is None or plugin.fsdp_version != 2 or offloads:
        say("  every rank loads all weights: they cannot be read in parts (docs/scaling.md)")
        return None
    name, where = _where(source)
    with suppress(OSError):  # not every checkpoint has one
        model.generation_config = GenerationConfig.from_pretrained(name, **where)
    model = fsdp2_prepare_model(accelerator, model)
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    check_finite(_filled(model, places, tensors), source)
    return model


def _where(source: str) -> tuple[str, dict[str, Any]]:
    """Folder or repository of a plain checkpoint, and the revision that transformers is given."""
    if not is_hub_id(source):
        return source, {}
    name, revision = split_revision(source)
    return name, {"revision": hub_commit(source) or revision or "main"}


def _tensors(source: str) -> Tensors:
    """What lies in the safetensors files of a checkpoint; nothing where they cannot be read."""
    name, where = _where(source)
    where["_raise_exceptions_for_missing_entries"] = False
    found: Tensors = {}
    with suppress(Exception):  # whatever loads it whole says what is wrong
        if alone := cached_file(name, SAFE_WEIGHTS_NAME, **where):
            files = [alone]
        else:
            index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **where)
            parts = json.loads(Path(str(index)).read_text("utf-8"))["weight_map"].values()
            files = [str(cached_file(name, part, **where)) for part in sorted(set(parts))]
        for path in files:
            with safe_open(path, "pt") as file:
                names = file.keys()
                found |= {n: (path, file.get_slice(n).get_shape()) for n in names}
    return found


def _places(model: Any, tensors: Tensors) -> dict[str, str] | None:
    """Which tensor each weight of a model is read from; None if there is not one for each."""
    names, shapes = defaultdict[int, list[str]](list), dict[int, list[int]]()
    for name, value in stored(model):
        names[id(value)].append(name)  # tied weights have several
        shapes[id(value)] = list(value.shape)
    found = {}
    for key, mine in names.items():
        there = [name for name in mine if name in tensors]
        if len(there) != 1 or tensors[there[0]][1] != shapes[key]:
            return None
        found[mine[0]] = there[0]
    return found if tensors.keys() == set(found.values()) else None


@torch.no_grad()
def _filled(model: Any, places: dict[str, str], tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    """Reads this rank's part of each weight, and gives it back with its name."""
    held = dict(stored(model))
    by_file = defaultdict[str, list[tuple[str, str]]](list)
    for name, place in places.items():
        by_file[tensors[place][0]].append((name, place))
    for path, chosen in by_file.items():
        with safe_open(path, "pt") as file:
            for name, place in chosen:
                value, part = held[name], own_part(held[name])
                if isinstance(value, DTensor):
                    assert value.placements == (Shard(0),)
                    rows = -(-len(value) // value.device_mesh.size())  # of each rank but the last
                    first = min(value.device_mesh.get_local_rank() * rows, len(value))
                    part.copy_(file.get_slice(place)[first : first + len(part)])
                else:
                    part.copy_(file.get_tensor(place))
                yield name, part


@contextmanager
def in_step(loaded: LoadedModel) -> Iterator[None]:
    """Lets each rank make as many forwards as it has work for; all ranks must enter together.

    Ranks that hold a model in parts can compute only together. So each forward is announced to the
    others, and a rank that is done goes along with a sequence of two tokens until all are.
    """
    if not isinstance(loaded.model, FSDPModule):
        yield
        return
    model: Any = loaded.model

    def anyone(works: bool) -> bool:
        found = torch.tensor(int(works))
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return bool(found)

    def announce(*_: Any) -> None:
        anyone(True)

    hook = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    nothing = pack([EncodedSequence((0,), (0,))], loaded.layout, 0).to(loaded.device)
    with torch.no_grad(), loaded.evaluating():
        while anyone(False):
            batch_logps(model, nothing)
