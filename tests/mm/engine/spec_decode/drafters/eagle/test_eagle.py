"""The trained drafters' sessions: caches, chains, trees, and that serving computes what training did."""

import pytest
import torch

from demos.train.drafting import Sample, pack, unroll
from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.eagle.drafter import Eagle
from mm.engine.spec_decode.drafters.eagle.feature_rows import prompt_features, visual_context
from mm.engine.spec_decode.drafters.eagle.head import (
    DraftConfig,
    DraftHead,
    default_feature_layers,
    fingerprint,
    load_draft_head,
    read_draft_config,
)
from mm.engine.spec_decode.drafters.eagle.vision_adapters import VISION_ADAPTERS
from mm.errors import InvalidOption
from mm.models.checkpoint import BadCheckpoint
from mm.plugins.drafter import DraftBudget, DraftTarget, Observation

WIDTH, VOCAB = 32, 40
torch.manual_seed(5)
EMBEDDING, HEAD = torch.randn(VOCAB, WIDTH) * 0.3, torch.randn(VOCAB, WIDTH) * 0.1
OPTIONS = {"vispec": {"num_heads": 2}, "flash": {"num_rows": 3}, "specvlm": {"strong": 4}}
ANSWER = [7, 8, 9, 10, 11, 12, 13, 14]


def config(vision_adapter="none", **more):
    sizes = {"width": WIDTH, "vocab_size": VOCAB, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return DraftConfig(
        **sizes,
        intermediate_size=48,
        vision_adapter=vision_adapter,
        vision_adapter_options=OPTIONS.get(vision_adapter, {}),
        target=fingerprint(HEAD),
        **more,
    )


def network(seed=0, **options):
    """Weights far from where they start, so that everything matters."""
    torch.manual_seed(seed)
    made = DraftHead(config(**options), EMBEDDING, HEAD)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return made.eval()


def loaded(folder, made, **options):
    made.save(folder, dtype=torch.float32)
    target = DraftTarget(
        name="tiny",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
        embed=lambda ids: torch.nn.functional.embedding(ids, EMBEDDING),
        head_weight=lambda: HEAD,
        placeholder_ids=frozenset({3}),
    )
    return Eagle(weights=str(folder), **{"stop_below": 0.0, **options}).load(target)


def prompt(seed=1, length=12, pictures=True):
    generator = torch.Generator().manual_seed(seed)
    is_visual = torch.zeros(length, dtype=torch.bool)
    is_visual[2:8] = pictures
    return Prompt(
        token_ids=torch.where(is_visual, 3, torch.randint(10, VOCAB, (length,), generator=generator)),
        embeddings=torch.randn(length, WIDTH, generator=generator),
        positions=torch.arange(length).unsqueeze(0),
        next_position=length,
        is_visual=is_visual,
    )


def hidden_states(count, feature_layers=(), seed=2):
    names = ["last_hidden", *(f"hidden:{layer}" for layer in feature_layers)]
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, WIDTH, generator=generator) for name in names}


def observations(asked, states, answer=ANSWER, steps=(1, 1, 3, 1)):
    """What an engine tells of an answer: the prompt with the first token, then so many tokens at a time."""
    seen = [
        Observation(
            token_ids=(answer[0],),
            token_indices=torch.arange(asked.length),
            hidden={name: state[: asked.length] for name, state in states.items()},
            is_prompt=True,
        )
    ]
    at = 1
    for count in steps[1:]:
        rows = torch.arange(asked.length + at - 1, asked.length + at - 1 + count)
        hidden = {name: state[rows] for name, state in states.items()}
        seen.append(Observation(token_ids=tuple(answer[at : at + count]), token_indices=rows, hidden=hidden))
        at += count
    return seen


def budget(tokens=5, depth=5, **more):
    return DraftBudget(max_tokens=tokens, max_depth=depth, **more)


def observed(drafter, asked, seen):
    session = drafter.open(asked)
    for observation in seen:
        drafter.observe([session], [observation])
    return session


@pytest.mark.parametrize("feature_layers", [(), (2, 4, 5)])
@pytest.mark.parametrize("vision_adapter", sorted(VISION_ADAPTERS))
def test_serving_drafts_what_training_computed(tmp_path, vision_adapter, feature_layers):
    """A chain in serving is a row of `unroll`, when the answer goes on as drafted."""
    made, asked = network(vision_adapter=vision_adapter, feature_layers=feature_layers), prompt()
    states = hidden_states(asked.length + 20, feature_layers)
    drafter = loaded(tmp_path, made, depth=4)
    session = observed(drafter, asked, observations(asked, states))
    draft = drafter.propose([session], [budget(4)])[0]
    known = sum((1, 1, 3, 1))
    answer = ANSWER[:known] + list(draft.token_ids)
    last = states["last_hidden"][: asked.length + len(answer) - 1]
    fused = [states[f"hidden:{layer}"][: len(last)] for layer in feature_layers]
    tapped = torch.cat(fused, dim=-1) if fused else last
    every = torch.arange(len(last))
    sample = Sample(
        context=visual_context(asked, every[: asked.length], last[: asked.length]),
        rows=prompt_features(asked, torch.tensor(answer), every, tapped),
        answer_states=last[asked.length - 1 :],
        greedy=True,
        task="",
    )
    with torch.no_grad():
        guesses = unroll(made, pack(made, [sample]), 4)
        logits = [made.logits(guess[0, known - 1]) for guess in guesses]
    assert draft.num_tokens == 4
    assert list(draft.token_ids) == [int(row.argmax()) for row in logits]
    probs = torch.stack([row.softmax(-1).max() for row in logits]).cumprod(0)
    assert list(draft.path_scores) == pytest.approx(probs.tolist(), rel=1e-4)


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("vision_adapter", sorted(VISION_ADAPTERS))
@pytest.mark.parametrize("width", [1, 3])
def test_a_refreshed_cache_equals_a_fresh_one(tmp_path, vision_adapter, ahead, width):
    """Drafting between the observations leaves no trace: the guesses' rows go, true states come."""
    asked = prompt()
    states = hidden_states(asked.length + 20)
    drafter = loaded(tmp_path, network(vision_adapter=vision_adapter, num_ahead=ahead), width=width)
    eager, lazy = drafter.open(asked), drafter.open(asked)
    for observation in observations(asked, states):
        drafter.observe([eager], [observation])
        between = drafter.propose([eager], [budget()])[0]
        drafter.observe([lazy], [observation])
    assert drafter.propose([eager], [budget()])[0] == between, "asking again changes nothing"
    after = drafter.propose([lazy], [budget()])[0]
    assert after.token_ids == between.token_ids
    assert after.parents == between.parents
    assert after.path_scores == pytest.approx(between.path_scores, rel=1e-4)
    assert drafter._layer.length(eager.seq_index) == drafter._layer.length(lazy.seq_index)


@pytest.mark.parametrize(("ahead", "width"), [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_together_as_alone(tmp_path, ahead, width):
    drafter = loaded(tmp_path, network(vision_adapter="vispec", num_ahead=ahead), width=width)
    alone, sessions, budgets = [], [], []
    for i in range(4):
        asked = prompt(seed=i, length=10 + i, pictures=i != 3)
        states = hidden_states(asked.length + 20, seed=i)
        seen = observations(asked, states, steps=(1, 1 + i))
        limits = budget(tokens=4 + i, depth=2 + i % 3)
        single = observed(drafter, asked, seen)
        alone.append(drafter.propose([single], [limits])[0])
        drafter.close(single)
        sessions.append(observed(drafter, asked, seen))
        budgets.append(limits)
    together = drafter.propose(sessions, budgets)
    for one, other, limits in zip(alone, together, budgets, strict=True):
        assert one.token_ids == other.token_ids
        assert one.parents == other.parents
        assert one.path_scores == pytest.approx(other.path_scores, rel=1e-4)
        other.check(VOCAB, limits)
    assert len({draft.token_ids for draft in together}) > 1


def test_a_node_of_a_tree_is_what_a_chain_along_its_path_gives(tmp_path):
    """Each level of the tree passes through the layer at once; its laws are those of the paths one by one."""
    made, asked = network(vision_adapter="msd"), prompt()
    states = hidden_states(asked.length + 20)
    drafter = loaded(tmp_path, made, width=3, depth=4)
    session = observed(drafter, asked, observations(asked, states))
    tree = drafter.propose([session], [budget(tokens=40, depth=4)])[0]
    assert max(tree.depths) == 4
    assert not tree.is_chain
    layer = drafter._layer
    stable = layer.length(session.seq_index)
    paths = {0: ()}
    for row, (token, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True), start=1):
        paths[row] = (*paths[parent], token)
    for row, path in paths.items():
        if not row:
            continue
        output, score = session.output.unsqueeze(0), 1.0
        for level, token in enumerate(path):
            score *= float(made.logits(output).softmax(-1)[0, token])
            layer.append_slots(session.seq_index, 1)
            output = drafter._builder._next(output, [session], [token], level)
        layer.truncate(session.seq_index, stable)
        assert tree.path_scores[row - 1] == pytest.approx(score, rel=1e-3), path


def test_placeholders_are_never_drafted(tmp_path):
    made = network()
    head = HEAD.clone()
    drafter = loaded(tmp_path, made, width=3)
    asked = prompt()
    session = observed(drafter, asked, observations(asked, hidden_states(30)))
    likely = drafter.propose([session], [budget()])[0].token_ids[0]
    drafter._builder._excluded = frozenset({likely})
    assert likely not in drafter.propose([session], [budget()])[0].token_ids
    assert torch.equal(head, HEAD)


def test_paths_that_are_improbable_are_not_drafted(tmp_path):
    asked, states = prompt(), hidden_states(40)
    for width in (1, 3):
        drafter = loaded(tmp_path, network(), width=width)
        session = observed(drafter, asked, observations(asked, states))
        scores = drafter.propose([session], [budget()])[0].path_scores
        bound = sorted(scores)[len(scores) // 2]
        picky = loaded(tmp_path, network(), width=width, stop_below=bound)
        session = observed(picky, asked, observations(asked, states))
        kept = picky.propose([session], [budget()])[0].path_scores
        assert kept == pytest.approx([score for score in scores if score >= bound])
        assert 0 < len(kept) < len(scores)


@pytest.mark.parametrize("ahead", [1, 4])
def test_at_a_temperature_drafts_are_drawn_with_the_given_noise(tmp_path, ahead):
    """Near zero they are the greedy ones, each level from a law of its own."""
    drafter, asked = loaded(tmp_path, network(num_ahead=ahead)), prompt()
    session = observed(drafter, asked, observations(asked, hidden_states(40)))
    greedy = drafter.propose([session], [budget()])[0]
    drawn = [drafter.propose([session], [budget(temperature=1.0, key=(s, 0, 4))])[0].token_ids for s in range(12)]
    again = drafter.propose([session], [budget(temperature=1.0, key=(5, 0, 4))])[0]
    assert again.token_ids == drawn[5]
    assert len(set(drawn)) > 6
    cold = drafter.propose([session], [budget(temperature=1e-4, key=(5, 0, 4))])[0]
    assert cold.token_ids == greedy.token_ids


def test_slots_are_given_back_and_a_full_house_is_silent(tmp_path):
    drafter, asked = loaded(tmp_path, network(), max_sessions=2), prompt()
    seen = observations(asked, hidden_states(40))
    free = drafter._layer.cache.num_free_blocks
    sessions = [observed(drafter, asked, seen) for _ in range(3)]
    drafts = drafter.propose(sessions, [budget()] * 3)
    assert [draft.num_tokens > 0 for draft in drafts] == [True, True, False]
    assert drafter.num_sessions == 2
    for session in sessions:
        drafter.close(session)
    assert drafter.num_sessions == 0
    assert drafter._layer.cache.num_free_blocks == free


def test_a_full_cache_silences_and_never_fails(tmp_path):
    token_bytes = 2 * 2 * 8 * 4
    drafter, asked = (
        loaded(tmp_path, network(vision_adapter="msd"), cache_mb=16 * token_bytes / 2**20, depth=9),
        prompt(length=14),
    )
    session = observed(drafter, asked, observations(asked, hidden_states(40), steps=(1,)))
    assert 0 < drafter.propose([session], [budget(tokens=9, depth=9)])[0].num_tokens < 9, (
        "16 rows, of which 13 are the prompt's"
    )
    drafter.observe([session], observations(asked, hidden_states(40), steps=(1, 7))[1:])
    assert drafter.propose([session], [budget()])[0].num_tokens == 0
    assert drafter.num_sessions == 0
    drafter.close(session)


def test_an_answer_that_is_never_drafted_for_is_forgotten(tmp_path):
    drafter, asked = loaded(tmp_path, network()), prompt()
    session = observed(drafter, asked, observations(asked, hidden_states(40)))
    later = observations(asked, hidden_states(40), steps=(1, 1))[1]
    for _ in range(300):
        drafter.observe([session], [later])
    assert not session.pending
    assert drafter.propose([session], [budget()])[0].num_tokens == 0


def test_save_and_load(tmp_path):
    made = network(vision_adapter="vispec", feature_layers=(1, 2, 3), draft_vocab_size=12)
    made.take_vocabulary(torch.tensor([5, 3, 39, *range(10, 19)]))
    made.save(tmp_path)
    again = load_draft_head(tmp_path, EMBEDDING, HEAD)
    assert again.config == made.config
    for (name, one), (_, other) in zip(made.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(
            one.to(torch.bfloat16) if one.is_floating_point() else one,
            other.to(torch.bfloat16) if one.is_floating_point() else other,
        ), name
    assert again.token_ids(torch.tensor([0, 1, 2, 11])).tolist() == [3, 5, 10, 39]
    assert "_shared" not in "".join(made.state_dict()), "embedding and head belong to the target"


def test_a_small_vocabulary_proposes_only_its_own(tmp_path):
    made = network(draft_vocab_size=6)
    ids = torch.tensor([4, 9, 11, 20, 33, 38])
    made.take_vocabulary(ids)
    drafter, asked = loaded(tmp_path, made, width=4), prompt()
    session = observed(drafter, asked, observations(asked, hidden_states(40)))
    for limits in (budget(tokens=20), budget(temperature=1.0)):
        found = drafter.propose([session], [limits])[0].token_ids
        assert found
        assert set(found) <= set(ids.tolist())


def test_a_draft_vocabulary_counts_its_own_tokens():
    """EAGLE-3's table d2t holds, for each of them, how far the target's id lies ahead."""
    made = network(draft_vocab_size=4)
    made.take_vocabulary(torch.tensor([7, 1, 5, 2]))
    at = torch.arange(4)
    assert made.token_ids(at).tolist() == [1, 2, 5, 7]
    assert (made.token_ids(at) - at).tolist() == [1, 1, 3, 4]


def test_a_folder_of_another_target_is_refused(tmp_path):
    network().save(tmp_path)
    with pytest.raises(BadCheckpoint, match="another target"):
        load_draft_head(tmp_path, EMBEDDING, HEAD + 1)
    (tmp_path / "config.json").write_text('{"width": 3, "colour": 1}')
    with pytest.raises(BadCheckpoint, match="colour"):
        read_draft_config(tmp_path)
    target = loaded(tmp_path / "x", network())._target
    with pytest.raises(InvalidOption, match="train_drafter"):
        Eagle(weights="nowhere").load(target)


def test_taps_are_distinct_layers():
    assert default_feature_layers(32) == (2, 16, 29)
    assert default_feature_layers(4) == (1, 2, 3)
    for depth in range(4, 40):
        feature_layers = default_feature_layers(depth)
        assert len(set(feature_layers)) == 3
        assert min(feature_layers) > 0
        assert max(feature_layers) < depth
