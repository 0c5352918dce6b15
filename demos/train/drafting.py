"""What a drafter learns from: answers of the frozen target with its hidden states, and the losses on them.

A `Sample` is one answer: the tokens that the engine would give to a drafter for it, in serving as in training. `unroll`
runs the drafter over all tokens of an answer at once, and the drafter reads its own outputs as it will when it drafts
(EAGLE-3's training-time test, arXiv:2503.01840, section 3.2). Step s at row t reads the token x_{t+1+s} and its own
output of step s - 1 in place of the target's state. It is compared with the target's distribution after x_{t+1+s}.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.engine.spec_decode.drafters.eagle.feature_rows import TextFeatures
from mm.engine.spec_decode.drafters.eagle.head import DraftHead, rotary
from mm.engine.spec_decode.drafters.eagle.vision_adapters import VisualContext
from mm.models.attention import rotate

DECAY = 0.8  # of the loss per step
FEATURE_WEIGHT = 1.0  # of the distance to the target's states, in the first part of the training


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer of the target. R text rows, the last A of them the answer's; see the `head` module of
    `mm.engine.spec_decode.drafters.eagle` for rows.

    Attributes:
        context: The prompt's visual tokens.
        rows: Of the prompt's text and the answer.
        answer_states: (A, D), last hidden states of the answer's rows: row 0 gave the answer's first token.
        greedy: Whether the answer is the most probable one, token by token.
        task: What was asked for.
    """

    context: VisualContext
    rows: TextFeatures
    answer_states: Tensor
    greedy: bool
    task: str

    @property
    def answer_ids(self) -> Tensor:
        """(A,): the answer's tokens."""
        return self.rows.token_ids[len(self.rows.token_ids) - len(self.answer_states) :]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Samples of a batch. M rows in all (visual, then text) of which A are answer rows.

    Attributes:
        inputs, positions: (B, M, D) and (B, M), rows as the draft layer gets them.
        seen: (B, A, M) bool, rows that each answer row attends to.
        answer_at: (B, A) int64, its index among the M.
        token_ids, is_row: (B, A), the token after each answer row, and whether there is a row.
        global_feature: (B, A, D), the last item's global feature for the answer rows; zeros without one.
        states: (B, A, D), the target's last hidden states, of the row's own first token on.
    """

    inputs: Tensor
    positions: Tensor
    seen: Tensor
    answer_at: Tensor
    token_ids: Tensor
    is_row: Tensor
    global_feature: Tensor
    states: Tensor


def pack(network: DraftHead, samples: Sequence[Sample]) -> Packed:
    """Rows of several samples, padded. Differentiable in the vision adapter and in what makes the rows."""
    rows = [draft_rows(network, sample) for sample in samples]
    inputs = _pad([row[0] for row in rows])
    positions = _pad([row[1] for row in rows])
    counts = [len(sample.answer_states) for sample in samples]
    lengths = torch.tensor([len(row[0]) for row in rows])
    most = max(counts)
    steps = torch.arange(most)
    first = lengths - torch.tensor(counts)
    answer_at = (first[:, None] + steps).clamp(max=inputs.shape[1] - 1)
    answer_at = answer_at.to(inputs.device)
    seen = torch.arange(inputs.shape[1], device=inputs.device) <= answer_at.unsqueeze(-1)
    return Packed(
        inputs=inputs,
        positions=positions,
        seen=seen,
        answer_at=answer_at,
        token_ids=_pad([sample.answer_ids for sample in samples]),
        is_row=(steps < torch.tensor(counts)[:, None]).to(inputs.device),
        global_feature=torch.stack([row[2] for row in rows])[:, None].expand(-1, most, -1),
        states=_pad([sample.answer_states for sample in samples]),
    )


def draft_rows(network: DraftHead, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (n, D) and positions (n,) of all rows of a sample, and the global feature of its last item (D,)."""
    visual = network.vision_adapter.compress(sample.context)
    rows, features = sample.rows, network.features(sample.rows.states)
    global_feature = None
    if visual.global_features is not None:
        before = torch.cat([torch.zeros_like(visual.global_features[:1]), visual.global_features])
        global_feature = before[rows.items + 1]
    text = network.inputs(network.vision_adapter.condition(features, global_feature), rows.token_ids)
    last = features.new_zeros(features.shape[-1]) if global_feature is None else global_feature[-1]
    return torch.cat([visual.inputs, text]), torch.cat([visual.positions, rows.positions]), last


def unroll(network: DraftHead, packed: Packed, num_steps: int) -> list[Tensor]:
    """Estimated states (B, A, D) of each step; with a drafter of several tokens per forward, those of one forward.

    Entry s of answer row t estimates the target's state t + 1 + s.
    """
    config = network.config
    num_heads, kv_heads = config.num_heads, config.num_kv_heads
    cos, sin = rotary(packed.positions, config.head_dim, config.rope_theta)
    rows = network.project(packed.inputs)
    query, key, value = rows.split([num_heads, kv_heads, kv_heads], dim=-2)
    batch = torch.arange(len(query), device=query.device)[:, None]
    at = packed.answer_at
    query = _turn(query[batch, at], cos[batch, at], sin[batch, at])
    key = _turn(key, cos, sin)
    inputs, keys, values = packed.inputs[batch, at], [], []
    guesses: list[Tensor] = []
    for step in range(num_steps):
        output = network.finish(inputs, attend(query, key, value, packed.seen, keys, values))
        if config.num_ahead > 1:
            return list(network.next_states(output).unbind(-2))
        guesses.append(output)
        features = network.vision_adapter.condition(output, packed.global_feature)
        inputs = network.inputs(features, packed.token_ids.roll(-step - 1, dims=1))
        own = network.project(inputs)
        positions = packed.positions[batch, at] + step + 1
        turned = rotary(positions, config.head_dim, config.rope_theta)
        query, own_key, own_value = own.split([num_heads, kv_heads, kv_heads], dim=-2)
        query = _turn(query, *turned)
        keys.append(_turn(own_key, *turned))
        values.append(own_value)
    return guesses


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, own_keys: list[Tensor], own_values: list[Tensor]
) -> Tensor:
    """What each answer row attends to (B, A, H * d): true rows up to its own, and its own guesses after them.

    Args:
        query: (B, A, H, d).
        key, value: (B, M, H_kv, d).
        seen: (B, A, M).
        own_keys, own_values: Per earlier step, (B, A, H_kv, d).
    """
    group = query.shape[2] // key.shape[2]
    grouped = query.unflatten(2, (key.shape[2], group)) * query.shape[-1] ** -0.5
    scores = torch.einsum("bakgd,bmkd->bkgam", grouped, key).masked_fill(~seen[:, None, None], -torch.inf)
    own = [torch.einsum("bakgd,bakd->bkga", grouped, k) for k in own_keys]
    weights = torch.cat([scores, *(s.unsqueeze(-1) for s in own)], dim=-1).softmax(-1)
    num_rows = key.shape[1]
    mixed = torch.einsum("bkgam,bmkd->bakgd", weights[..., :num_rows], value)
    for i, own_value in enumerate(own_values):
        mixed = mixed + weights[..., num_rows + i].permute(0, 3, 1, 2).unsqueeze(-1) * own_value.unsqueeze(3)
    return mixed.flatten(2)


def losses(
    network: DraftHead, guesses: Sequence[Tensor], packed: Packed, head: Tensor, feature_weight: float
) -> tuple[Tensor, list[float]]:
    """Loss of all steps, and for each step the share of rows in which the drafter's and the target's token agree."""
    total, agreed = packed.inputs.new_zeros(()), []
    for step, guess in enumerate(guesses):
        if step + 1 >= packed.states.shape[1]:
            break
        valid = packed.is_row.roll(-step - 1, dims=1) & packed.is_row
        valid[:, -step - 1 :] = False
        if not valid.any():
            break
        target = packed.states.roll(-step - 1, dims=1)[valid]
        with torch.no_grad():
            target_logits = F.linear(target, head)
            wanted = target_logits.argmax(-1)
        logits = network.logits(guess[valid])
        drafted = network.token_ids(logits.argmax(-1))
        if network.vocab_ids is not None:
            known = torch.isin(wanted, network.vocab_ids)
            target_logits = target_logits[:, network.vocab_ids]
        else:
            known = torch.ones_like(wanted, dtype=torch.bool)
        crossed = -(target_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        step_loss = (crossed * known).sum() / known.sum().clamp(min=1)
        if feature_weight and network.out_norm is None:
            step_loss = step_loss + feature_weight * F.smooth_l1_loss(guess[valid], target)
        total = total + DECAY**step * step_loss
        agreed.append((drafted == wanted).float().mean().item())
    return total, agreed


@torch.no_grad()
def ranks(network: DraftHead, guesses: Sequence[Tensor], packed: Packed) -> Tensor:
    """(B, A, steps) int64: how many tokens the drafter finds more likely than the answer's own, after each answer row.

    1 << 30 where the answer has ended, or where the drafter's vocabulary lacks the token.
    """
    found = torch.full((*packed.is_row.shape, len(guesses)), 1 << 30)
    for step, guess in enumerate(guesses):
        logits = network.logits(guess)
        wanted = packed.token_ids.roll(-step - 1, dims=1)
        valid = packed.is_row.roll(-step - 1, dims=1) & packed.is_row
        valid[:, -step - 1 :] = False
        if network.vocab_ids is not None:
            place = torch.searchsorted(network.vocab_ids, wanted).clamp(max=len(network.vocab_ids) - 1)
            valid &= network.vocab_ids[place] == wanted
            wanted = place
        above = (logits > logits.gather(-1, wanted.unsqueeze(-1))).sum(-1)
        found[..., step] = torch.where(valid, above, found[..., step].to(above.device)).cpu()
    return found


STATIC_TREE = {
    (): 4, (0,): 3, (1,): 2, (2,): 2, (3,): 1, (0, 0): 3, (0, 1): 2, (0, 2): 2, (1, 0): 1, (0, 0, 0): 3, (0, 0, 0, 0): 2
}  # fmt: skip
"""Children by path of ranks: EAGLE-1's tree of 25 drafts."""


def accepted(path: Sequence[int], tree: dict[tuple[int, ...], int] | int) -> int:
    """How many tokens of one draft are accepted.

    Args:
        path: Ranks of the answer's tokens in the drafter's distributions along the answer.
        tree: Children by path of ranks, or the length of a chain.
    """
    if isinstance(tree, int):
        wrong = [i for i, rank in enumerate(path[:tree]) if rank]
        return wrong[0] if wrong else min(tree, len(path))
    depth = 0
    while depth < len(path) and path[depth] < tree.get(tuple(path[:depth]), 0):
        depth += 1
    return depth


def accepted_length(found: Tensor, num_rows: Sequence[int], tree: dict[tuple[int, ...], int] | int) -> tuple[int, int]:
    """(tokens, drafts) of answers drafted again and again, the bonus token included.

    The answer's first token comes from the prompt. A draft at row t knows the token t and proposes those after it.

    Args:
        found: (B, A, steps), of `ranks`.
        num_rows: Tokens of each answer.
    """
    tokens = rounds = 0
    for row, count in zip(found.tolist(), num_rows, strict=True):
        at = 0
        while at + 1 < count:
            gained = min(accepted(row[at], tree) + 1, count - 1 - at)
            at, tokens, rounds = at + gained, tokens + gained, rounds + 1
    return tokens, rounds


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, n, heads, d)."""
    shape = states.shape
    turned = rotate(states.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))
    return turned.view(shape)


def _pad(parts: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
