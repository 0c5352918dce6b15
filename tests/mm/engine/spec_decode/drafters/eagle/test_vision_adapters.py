"""Which draft rows stand for a prompt's visual tokens: the layouts of the papers' examples, and promises."""

import pytest
import torch

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.eagle.feature_rows import generated_features, prompt_features, visual_context
from mm.engine.spec_decode.drafters.eagle.vision_adapters import VISION_ADAPTERS, build_vision_adapter
from mm.errors import InvalidOption

WIDTH = 8


def example(tokens="ttIIIItt"):
    """[BOS, t1, I2, I3, I4, I5, t6, t7]"""
    is_visual = torch.tensor([kind == "I" for kind in tokens])
    length = len(tokens)
    torch.manual_seed(3)
    return Prompt(
        token_ids=torch.where(is_visual, 3, torch.arange(length) + 10),
        embeddings=torch.randn(length, WIDTH),
        positions=torch.arange(length).unsqueeze(0),
        next_position=length,
        is_visual=is_visual,
    )


def states(length):
    return torch.arange(length).float().unsqueeze(1).expand(-1, WIDTH).contiguous()


def seen(name, prompt, **options):
    adapter = build_vision_adapter(name, WIDTH, **options).eval()
    length = prompt.length
    return adapter, adapter.compress(visual_context(prompt, torch.arange(length), states(length)))


def test_text_rows_pair_a_state_with_the_token_behind_it():
    prompt = example()
    rows = prompt_features(prompt, torch.tensor([88]), torch.arange(8), states(8))
    assert rows.positions.tolist() == [0, 5, 6, 7], "rows of text only"
    assert rows.states[:, 0].tolist() == [0, 5, 6, 7], (
        "the first text row behind the image has the last image row's state"
    )
    assert rows.token_ids.tolist() == [11, 16, 17, 88]
    assert rows.items.tolist() == [-1, 0, 0, 0]


def test_later_rows_go_on_where_the_prompt_ended():
    rows = generated_features(example(), torch.tensor([90, 91]), torch.tensor([8, 9]), states(2), 0)
    assert rows.positions.tolist() == [8, 9]
    assert rows.token_ids.tolist() == [90, 91]


def test_where_a_reducer_dropped_the_row_before_a_token_the_nearest_one_left_stands_in():
    left = torch.tensor([0, 1, 3, 6, 7])
    rows = prompt_features(example(), torch.tensor([88]), left, states(8)[left])
    assert rows.states[:, 0].tolist() == [0, 3, 6, 7]
    assert rows.positions.tolist() == [0, 5, 6, 7]


def test_rows_of_a_cached_prefix_are_left_out():
    rows = prompt_features(example(), torch.tensor([88]), torch.tensor([6, 7]), states(2))
    assert rows.positions.tolist() == [6, 7]
    assert rows.states[:, 0].tolist() == [0, 1]


def test_text_whose_states_are_missing_in_the_middle_is_left_out():
    """As where a later turn of a chat finds the states of the question, and none of the answer."""
    known = torch.tensor([0, 1, 2, 3, 4, 7])
    rows = prompt_features(example(), torch.tensor([88]), known, states(8)[known])
    assert rows.states[:, 0].tolist() == [0, 4, 7], "row 4 stands in for visual row 5 and not for text row 6"
    assert rows.token_ids.tolist() == [11, 16, 88]


def test_pruned_tokens_leave_the_positions_of_text_as_they_were():
    full = example()
    kept = torch.tensor([0, 1, 2, 4, 6, 7])
    pruned = Prompt(
        token_ids=full.token_ids[kept],
        embeddings=full.embeddings[kept],
        positions=full.positions[:, kept],
        next_position=8,
        is_visual=full.is_visual[kept],
    )
    rows = prompt_features(pruned, torch.tensor([88]), torch.arange(6), states(6))
    assert rows.positions.tolist() == [0, 5, 6, 7]
    assert seen("msd", pruned)[1].positions.tolist() == [1, 3]
    assert seen("vispec", pruned)[1].positions.tolist() == [3]


def test_none_has_no_rows():
    _, found = seen("none", example())
    assert len(found.inputs) == 0
    assert found.global_features is None


def test_msd_has_every_embedding_one_place_early():
    prompt = example()
    _, found = seen("msd", prompt)
    assert found.positions.tolist() == [1, 2, 3, 4]
    assert torch.equal(found.inputs, prompt.embeddings[2:6])


def test_vispec_has_one_row_at_the_end_of_the_span_and_tells_text_the_rest():
    adapter, found = seen("vispec", example(), num_heads=2)
    assert found.positions.tolist() == [4]
    assert found.inputs.shape == (1, WIDTH)
    assert found.global_features.shape == (1, WIDTH)
    features = torch.randn(3, WIDTH)
    assert torch.allclose(adapter.condition(features, found.global_features.expand(3, -1)), features), (
        "at first the adapter adds nothing to text"
    )
    with torch.no_grad():
        adapter.global_projection.weight[:, WIDTH:] = torch.eye(WIDTH)
    assert torch.allclose(
        adapter.condition(features, found.global_features.expand(3, -1)), features + found.global_features, atol=1e-6
    )


def test_vispec_does_not_care_for_the_order_of_visual_tokens():
    adapter = build_vision_adapter("vispec", WIDTH, num_heads=2)
    embeddings = torch.randn(6, WIDTH)
    assert torch.allclose(adapter.pool(embeddings), adapter.pool(embeddings.flip(0)), atol=1e-6)
    assert not torch.allclose(adapter.pool(embeddings), adapter.pool(embeddings * 2), atol=1e-3)


def test_flash_gathers_hidden_states_and_leaves_out_rows_without_one():
    prompt = example()
    adapter = build_vision_adapter("flash", WIDTH, num_rows=2)
    found = adapter.compress(visual_context(prompt, torch.arange(8), states(8)))
    assert found.positions.tolist() == [3, 4]
    assert ((found.inputs > 2) & (found.inputs < 5)).all(), "means of the states 2, 3, 4 and 5"
    left = torch.tensor([0, 1, 3, 6, 7])
    one = adapter.compress(visual_context(prompt, left, states(8)[left]))
    assert torch.allclose(one.inputs, torch.full((1, WIDTH), 3.0)), "only row 3 has a state"
    assert not one.inputs.isnan().any()


@pytest.mark.parametrize(
    ("branch", "count"), [("prune", 2), ("pool", 2), ("convolve", 14), ("resample", 2), ("leave_out", 0)]
)
def test_branches_of_the_elastic_compressor(branch, count):
    prompt = example("tt" + "I" * 40 + "tt")
    _, found = seen("specvlm", prompt, branch=branch)
    assert found.inputs.shape == (count, WIDTH)
    assert found.positions.tolist() == list(range(41 - count, 41))
    if branch == "prune":
        rows = {tuple(row.tolist()) for row in prompt.embeddings[2:42]}
        assert all(tuple(row.tolist()) in rows for row in found.inputs)
    if branch == "pool":
        assert torch.allclose(found.inputs[0], prompt.embeddings[2:22].mean(0), atol=1e-6)
    if branch == "convolve":
        assert torch.allclose(found.inputs[0], prompt.embeddings[2:5].mean(0), atol=1e-6), "it starts as the average"


def test_the_gate_chooses_by_the_question():
    adapter = build_vision_adapter("specvlm", WIDTH).eval()
    with torch.no_grad():
        adapter.gate.weight.zero_()
        adapter.gate.bias.zero_()
        adapter.gate.weight[3, 0], adapter.gate.weight[4, 0] = 1, -1
    question = torch.zeros(2, WIDTH)
    question[:, 0] = 5
    assert adapter.choose_branch(question).tolist() == [0, 0, 0, 1, 0]
    assert adapter.choose_branch(-question).tolist() == [0, 0, 0, 0, 1]


def test_the_gate_learns():
    adapter = build_vision_adapter("specvlm", WIDTH, strong=2).train()
    torch.manual_seed(0)
    adapter.compress(visual_context(example("ttIIIIItt"), torch.arange(9), states(9))).inputs.sum().backward()
    assert adapter.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(VISION_ADAPTERS))
def test_every_way_takes_prompts_without_and_with_several_items(name):
    assert len(seen(name, example("tttt"))[1].inputs) == 0
    _, found = seen(name, example("tIIItIIt"))
    assert found.inputs.shape == (len(found.positions), WIDTH)
    assert (found.positions < 6).all()
    if found.global_features is not None:
        assert found.global_features.shape == (2, WIDTH)
        assert not torch.equal(found.global_features[0], found.global_features[1])


def test_unknown_ways_and_options_are_named():
    with pytest.raises(InvalidOption, match="vispec"):
        build_vision_adapter("visspec", WIDTH)
    with pytest.raises(InvalidOption, match="num_rowz"):
        build_vision_adapter("vispec", WIDTH, num_rowz=3)
    with pytest.raises(InvalidOption, match="leave_out"):
        build_vision_adapter("specvlm", WIDTH, branch="nothing")
