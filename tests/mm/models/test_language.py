"""Language models in parts: what no checkpoint stores is right after loading, whatever kind of module holds it."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig

from mm.models.checkpoint import BadCheckpoint, load_module, without_weights


class Scaled(nn.Module):
    """A buffer of each kind that no checkpoint holds, and one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)
        self.register_buffer("places", torch.arange(4), persistent=False)
        self.register_buffer("count", torch.tensor(0))


def test_buffers_are_computed_and_weights_take_no_memory(tmp_path):
    with without_weights():
        module = Scaled()
    assert module.linear.weight.is_meta
    tensors = {"linear.weight": torch.ones(2, 3), "linear.bias": torch.zeros(2), "count": torch.tensor(7)}
    load_module(module, tensors, dtype=torch.bfloat16, device="cpu", folder=tmp_path)
    assert module.linear.weight.dtype is torch.bfloat16
    assert float(module.scale) == 3
    assert module.places.tolist() == [0, 1, 2, 3]
    assert module.count.dtype is torch.int64
    assert not nn.Linear(1, 1).weight.is_meta


def test_a_value_that_stays_without_memory_is_refused_by_name(tmp_path):
    with torch.device("meta"):
        module = Scaled()
    tensors = {"linear.weight": torch.ones(2, 3), "linear.bias": torch.zeros(2), "count": torch.tensor(7)}
    with pytest.raises(BadCheckpoint, match="scale"):
        load_module(module, tensors, dtype=torch.float32, device="cpu", folder=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_the_gemma_kind_are_scaled_as_transformers_does(tmp_path, dtype):
    from transformers import AutoConfig, AutoModel

    from mm.models.language import LanguageModel

    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    theirs = AutoModel.from_config(config)
    theirs.save_pretrained(tmp_path, state_dict={f"model.{k}": v for k, v in theirs.state_dict().items()})
    ours = LanguageModel(tmp_path, AutoConfig.from_pretrained(tmp_path), "cpu", dtype)
    seen = {}
    theirs = theirs.to(dtype)
    theirs.layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.update(hidden=args[0]), with_kwargs=True)
    ids = torch.arange(20)
    with torch.no_grad():
        theirs(ids.unsqueeze(0))
    assert torch.equal(ours.embed(ids), seen["hidden"][0])
