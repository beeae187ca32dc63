"""Weights in parts, on a group of one gloo rank: saved and put back without being whole at once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from selfsteer.models.load import LoadedModel
from selfsteer.models.save import save_model
from selfsteer.training.sharding import own_part, parted


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_sharded_model_is_saved_weight_by_weight(
    load: Callable[..., LoadedModel],
    mesh: DeviceMesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = load("llama")
    save_model(loaded.model, loaded.chat, tmp_path / "whole", torch.float32)
    for layer in loaded.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(loaded.model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in loaded.model.parameters())

    def unshard(*args: object) -> None:
        raise AssertionError("a whole layer, or more")

    monkeypatch.setattr(FSDPModule, "unshard", unshard)
    save_model(loaded.model, loaded.chat, tmp_path / "other", torch.float32, writes=False)
    assert not (tmp_path / "other").exists()
    save_model(loaded.model, loaded.chat, tmp_path / "parts", torch.float32)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    # what a selection puts back
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            kept = torch.full(parameter.shape, 0.25, dtype=torch.bfloat16)
            parameter.copy_(parted(kept, parameter))
            assert bool((own_part(parameter) == 0.25).all())
