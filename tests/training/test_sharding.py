"""Weights in parts, on a group of one gloo rank: loaded, saved and put back without being whole."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from selfsteer.data.records import Message
from selfsteer.engines.base import Request, SamplingParams
from selfsteer.engines.transformers import TransformersEngine
from selfsteer.errors import ArtifactError
from selfsteer.models import load as loading
from selfsteer.models.chat import EncodedSequence
from selfsteer.models.load import LoadedModel, load_model
from selfsteer.models.save import save_model
from selfsteer.models.score import score_sequences
from selfsteer.recipe.sections import Policy
from selfsteer.run.ranks import environment_of
from selfsteer.training.parts import load_to_train
from selfsteer.training.sharding import own_part, parted, reshard, whole
from tests.make import make_checkpoint


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


@pytest.fixture
def sharded(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A rank of the profile fsdp2."""
    for name, value in environment_of("fsdp2", 1).items():
        monkeypatch.setenv(name, value)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_parts(folder: Path) -> LoadedModel:
    return load_to_train(str(folder), Policy(model=str(folder), device="cpu", dtype="float32"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_loaded_in_parts_as_it_is_whole(
    family: str, tied: bool, sharded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_checkpoint(tmp_path / "one", family, tie_word_embeddings=tied)
    settings = Policy(model=str(one), device="cpu", dtype="float32")
    whole = load_model(str(one), settings)
    several = tmp_path / "several"
    whole.model.save_pretrained(several, max_shard_size="100KB")
    whole.chat.tokenizer.save_pretrained(several)
    assert len(list(several.glob("*.safetensors"))) > 1

    def load_whole(*args: object, **more: object) -> None:
        raise AssertionError("the whole model")

    monkeypatch.setattr(loading, "load_whole", load_whole)
    sequences = [EncodedSequence((5, 6), (7, 8, 9)), EncodedSequence((5, 6), (10, 11))]
    expected = score_sequences(whole.model, sequences)
    for folder in (several, one):
        parts = load_to_train(str(folder), settings)
        assert parts.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
        for mine, theirs in zip(score_sequences(parts.model, sequences), expected, strict=True):
            torch.testing.assert_close(mine, theirs)
        reshard(parts.model)
        values = dict(parts.model.named_parameters())
        assert values.keys() == dict(whole.model.named_parameters()).keys()
        assert all(isinstance(v, DTensor) for v in values.values())
        for name, weight in whole.model.named_parameters():
            assert torch.equal(own_part(values[name]), weight), name
    assert parts.digest == whole.digest


def test_parts_answer_when_they_are_made_whole_and_are_parts_again(
    checkpoints: dict[str, Path], sharded: None, load: Callable[..., LoadedModel]
) -> None:
    """As a selection has them answer, before any forward has gone through them."""
    asked = [Request("q", (Message("user", "What does the bee eat?"),), 7)]
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=8)
    (expected,) = TransformersEngine(load("llama"), 1).generate(asked, sampling)
    parts = in_parts(checkpoints["llama"])
    with whole(parts.model):
        assert not any(isinstance(p, DTensor) for p in parts.model.parameters())
        (found,) = TransformersEngine(parts, 1).generate(asked, sampling)
        assert not any(isinstance(p, DTensor) for p in parts.model.parameters())
    assert all(isinstance(p, DTensor) for p in parts.model.parameters())
    assert found == expected


def test_a_damaged_checkpoint_is_refused_in_parts_as_it_is_whole(
    checkpoints: dict[str, Path], sharded: None, tmp_path: Path
) -> None:
    def damaged(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        folder = shutil.copytree(checkpoints["llama"], tmp_path / "model", dirs_exist_ok=True)
        weights = load_file(checkpoints["llama"] / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    norm = "model.norm.weight"
    with pytest.raises(ArtifactError, match=f"1 of the 32 weights in {norm} are NaN"):
        in_parts(damaged(lambda weights: weights[norm][0].fill_(torch.nan)))
    with pytest.raises(ArtifactError, match=f"lacks the weights {norm}"):
        in_parts(damaged(lambda weights: weights.pop(norm)))
    with pytest.raises(ArtifactError, match="holds the weights more, for which"):
        in_parts(damaged(lambda weights: weights.update(more=torch.ones(2))))
    with pytest.raises(ArtifactError, match="in another shape"):
        in_parts(damaged(lambda weights: weights.update({norm: torch.ones(2)})))
    folder = damaged(lambda weights: None)
    (folder / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        in_parts(folder)


def test_other_names_than_the_models_are_left_to_transformers(
    checkpoints: dict[str, Path],
    sharded: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A checkpoint saved of the body alone, whose names lack a prefix, has to be converted."""
    folder = shutil.copytree(checkpoints["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    loaded = in_parts(folder)
    assert not isinstance(loaded.model, FSDPModule)
    assert "every rank loads all weights" in capsys.readouterr().err
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, weights[name])
