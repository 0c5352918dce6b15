"""The next token from logits, for a batch of answers.

Sampling is by Gumbel noise: argmax(law + g), where g is a function of (seed, choice, position) alone. So an answer
depends on its seed and not on what else runs, on the batch, or on whether a drafter guessed ahead.

    samplers = factory.make(request.sampling, prompt)      # one per answer; see mm.engine.sampling.sampler_factory
    chosen = choose(logits, samplers, positions)           # changes nothing
    sampler.observe(token_id)                              # each token that becomes part of the answer, in order

A preempted answer goes on with its sampler; a new sampler that observed the same tokens is its equal.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mm.data.sampling_params import MAX_TOP_LOGPROBS
from mm.engine.sampling.logits_processors import Penalty, Warp, add_biases, penalise, warp
from mm.engine.sampling.noise import gumbel, keys_of, noise_key, uniform
from mm.engine.sampling.structured_output import Matcher
from mm.errors import EngineError

NUM_CACHED_LOGITS = 2**16
"""Rows of this many numbers, in float32 and float64, fit a core's second-level cache."""


@dataclass(frozen=True, kw_only=True)
class ResolvedSamplingParams:
    """How the tokens of one request are chosen, with every default filled in.

    Attributes:
        temperature: 0 is greedy.
        top_k, top_p, min_p: Truncation; 0, 1 and 0 are none.
        presence_penalty, frequency_penalty, repetition_penalty: 0, 0 and 1 are none.
        logit_bias: (token id, value) pairs.
        seed: Key of the noise.
        min_tokens: Before this many, `ending_token_ids` cannot be chosen.
        ending_token_ids: Tokens that end an answer.
        num_logprobs: How many of the most probable tokens to tell beside the chosen one; None tells nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    min_tokens: int = 0
    ending_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None

    @property
    def penalises(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1

    @property
    def warp(self) -> Warp:
        return Warp(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token.

    Attributes:
        logprob: Under the model's own law, the log-softmax of its untouched logits; None when not asked for.
        top: (token id, log-probability) of the most probable tokens under that law, the most probable first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """One answer's rule and what it has to remember of the tokens so far.

    Args:
        choice: Index of the answer among the request's n.
        prompt_token_ids: The prompt's text, for the repetition penalty; no visual placeholders.
        matcher: Where the answer stands in its grammar; this sampler's own.
    """

    def __init__(
        self,
        rule: ResolvedSamplingParams,
        choice: int = 0,
        *,
        prompt_token_ids: Iterable[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.rule, self.choice, self.matcher = rule, choice, matcher
        # Greedy with nothing around it. What min_tokens adds ends by itself, so that is asked per position.
        self._is_plain = not (
            rule.temperature or rule.logit_bias or rule.penalises or matcher or rule.num_logprobs is not None
        )
        self._held_until = rule.min_tokens if rule.ending_token_ids else 0
        self._biases = _columns(rule.logit_bias)
        self._seen = _Seen(prompt_token_ids if rule.repetition_penalty != 1 else ()) if rule.penalises else None

    def observe(self, token_id: int) -> None:
        """Take note of a token that has become part of the answer."""
        if self._seen is not None:
            self._seen.add(token_id)
        if self.matcher is not None:
            self.matcher.consume(token_id)

    def ends(self, token_id: int) -> bool:
        """Whether this token ends the answer."""
        return token_id in self.rule.ending_token_ids

    @property
    def is_complete(self) -> bool:
        """Whether the answer's grammar leaves nothing to add, so that it ends without another token."""
        return self.matcher is not None and self.matcher.is_stopped

    def is_plain(self, position: int) -> bool:
        """Whether the token at this position is the argmax of the logits as they are."""
        return self._is_plain and position >= self._held_until

    def holds_endings(self, position: int) -> bool:
        return position < self._held_until

    @property
    def biases(self) -> tuple[np.ndarray, np.ndarray] | None:
        return self._biases

    @property
    def penalty(self) -> Penalty | None:
        """What the tokens so far cost; None when nothing."""
        if self._seen is None or not self._seen.num_tokens:
            return None
        rule = self.rule
        token_ids, counts = self._seen.columns
        return Penalty(
            token_ids=token_ids,
            counts=counts,
            repetition=rule.repetition_penalty,
            frequency=rule.frequency_penalty,
            presence=rule.presence_penalty,
        )

    @torch.no_grad()
    def law(self, logits: Tensor, position: int) -> Tensor:
        """Log-probabilities (vocab,) float32 from which the token at `position` is drawn; greedy is a one-hot law.

        Args:
            logits: (vocab,) the model's own, left as they are.

        Raises:
            EngineError: The logits are not numbers, or nothing may be chosen.
        """
        rows = logits.unsqueeze(0).to(torch.float32, copy=True)
        errors = _check_finite(rows) | _adjust(rows, [self], [position])
        for error in errors.values():
            raise error
        if self.rule.temperature:
            return warp(rows, [self.rule.warp])[0]
        return torch.full_like(rows[0], -torch.inf).index_fill_(0, rows.argmax(-1), 0.0)

    def noise(self, position: int, vocab: int, device: torch.device | str = "cpu") -> Tensor:
        """Gumbel noise (vocab,) float64: the token at `position` is argmax(law + noise)."""
        device = torch.device(device)
        return gumbel(keys_of([self._key(position)], device), torch.arange(vocab, device=device))[0]

    def uniforms(self, position: int, count: int) -> list[float]:
        """Numbers in [0, 1) that decide which drafted tokens stay at `position`; other ones than `noise` is made of."""
        key = torch.tensor(noise_key(*self._key(position), purpose="accept"))
        return uniform(key, torch.arange(count)).tolist()

    def _key(self, position: int) -> tuple[int, int, int]:
        return self.rule.seed, self.choice, position


class _Seen:
    """Distinct tokens and how often the answer holds each, growing in place."""

    def __init__(self, prompt_token_ids: Iterable[int]) -> None:
        distinct = sorted(set(prompt_token_ids))
        self._slots = {token_id: i for i, token_id in enumerate(distinct)}
        self._token_ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    @property
    def num_tokens(self) -> int:
        return len(self._slots)

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        return self._token_ids[: self.num_tokens], self._counts[: self.num_tokens]

    def add(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, self.num_tokens)
        if slot == len(self._token_ids):
            room = len(self._token_ids) + 64
            self._token_ids = np.concatenate([self._token_ids, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        self._token_ids[slot] = token_id
        self._counts[slot] += 1


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray] | None:
    if not pairs:
        return None
    token_ids, values = zip(*pairs, strict=True)
    return np.array(token_ids, dtype=np.int64), np.array(values, dtype=np.float32)


@torch.inference_mode()
def choose(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> list[SampledToken | EngineError]:
    """Each row's next token, or why that row has none. No row depends on another; nothing is changed.

    Args:
        logits: (B, vocab), any float dtype and device.
        samplers: (B,).
        positions: (B,) how many tokens of its text each answer already has.
    """
    careful = [i for i, sampler in enumerate(samplers) if not sampler.is_plain(positions[i])]
    if not careful:
        return greedy(logits)
    plain = sorted(set(range(len(samplers))) - set(careful))
    found: dict[int, SampledToken | EngineError] = {}
    if plain:
        found |= zip(plain, greedy(logits[plain]), strict=True)
    # Some rows at a time on a CPU, so that they stay in its caches.
    step = len(careful) if logits.is_cuda else max(1, NUM_CACHED_LOGITS // logits.shape[1])
    for start in range(0, len(careful), step):
        rows = careful[start : start + step]
        part = logits[rows].float()
        found |= zip(rows, _careful(part, [samplers[i] for i in rows], [positions[i] for i in rows]), strict=True)
    return [found[i] for i in range(len(samplers))]


@torch.inference_mode()
def greedy(logits: Tensor) -> list[SampledToken | EngineError]:
    """The largest of each row, the first of equals; one pass, one copy to the host."""
    if logits.is_cuda:
        values, token_ids = logits.max(-1)
        top, ids = torch.stack([values.double(), token_ids.double()]).tolist()
    else:  # numpy's argmax is 5 to 10 times faster than torch's on a CPU
        rows = logits.float().numpy()
        indices = rows.argmax(-1)
        top, ids = rows[np.arange(len(rows)), indices].tolist(), indices.tolist()
    return [SampledToken(int(i)) if _is_finite(value) else _not_numbers() for value, i in zip(top, ids, strict=True)]


def _careful(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> list[SampledToken | EngineError]:
    """As `choose`, with everything that may surround it; `logits` (B, vocab) float32 is used up."""
    errors = _check_finite(logits)
    told = _Told.of(logits, [i for i, sampler in enumerate(samplers) if sampler.rule.num_logprobs is not None])
    errors |= _adjust(logits, samplers, positions)
    hot = [i for i, sampler in enumerate(samplers) if sampler.rule.temperature and i not in errors]
    token_ids = logits.argmax(-1)
    if hot:
        law = warp(logits[hot], [samplers[i].rule.warp for i in hot])
        token_ids[hot] = _draw(law, [samplers[i]._key(positions[i]) for i in hot])
    ids = token_ids.tolist()
    logprobs = told.tell(token_ids, [sampler.rule.num_logprobs for sampler in samplers]) if told else {}
    return [errors[i] if i in errors else logprobs.get(i) or SampledToken(ids[i]) for i in range(len(samplers))]


def _draw(law: Tensor, keys: Sequence[tuple[int, int, int]]) -> Tensor:
    """(B,) token ids: argmax(law + noise), the noise computed only where the law has mass."""
    row_keys = keys_of(keys, law.device)
    possible = law > -torch.inf
    if possible.sum() * 4 > law.numel():
        return (law + gumbel(row_keys, torch.arange(law.shape[1], device=law.device))).argmax(-1)
    rows, columns = possible.nonzero(as_tuple=True)
    scores = torch.full(law.shape, -torch.inf, dtype=torch.float64, device=law.device)
    scores[rows, columns] = law[rows, columns] + gumbel(row_keys[rows, 0], columns)
    return scores.argmax(-1)


def _adjust(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> dict[int, EngineError]:
    """Apply biases, penalties and what is not allowed, in place. The errors of rows that cannot go on."""
    biased = {i: biases for i, sampler in enumerate(samplers) if (biases := sampler.biases)}
    if biased:
        add_biases(logits, list(biased), list(biased.values()))
    penalised = {i: penalty for i, sampler in enumerate(samplers) if (penalty := sampler.penalty)}
    if penalised:
        penalise(logits, list(penalised), list(penalised.values()))
    return _forbid(logits, samplers, positions)


def _forbid(logits: Tensor, samplers: Sequence[Sampler], positions: Sequence[int]) -> dict[int, EngineError]:
    """Set to -inf what a grammar excludes, and endings that come too early."""
    errors: dict[int, EngineError] = {}
    forbidden: dict[int, np.ndarray] = {}
    for i, (sampler, position) in enumerate(zip(samplers, positions, strict=True)):
        endings = [t for t in sampler.rule.ending_token_ids if t < logits.shape[1]]
        if sampler.matcher is not None:
            try:
                allowed = sampler.matcher.allowed(logits.shape[1])
            except EngineError as error:
                errors[i] = error
                continue
            forbidden[i] = ~allowed
            if sampler.holds_endings(position):
                allowed[endings] = False
                # Where the grammar leaves nothing but an ending, it goes before min_tokens.
                forbidden[i] = ~allowed if allowed.any() else forbidden[i]
        elif sampler.holds_endings(position):
            logits[i, endings] = -torch.inf
    if forbidden:
        rows = list(forbidden)
        mask = torch.from_numpy(np.stack(list(forbidden.values()))).to(logits.device)
        logits[rows] = logits[rows].masked_fill(mask, -torch.inf)
    for i, top in _tops(logits, samplers):
        if i not in errors and top == -torch.inf:
            errors[i] = EngineError("the model gives no probability to any token that this answer may go on with")
    return errors


def _tops(logits: Tensor, samplers: Sequence[Sampler]) -> Iterable[tuple[int, float]]:
    """The largest logit of the rows that may have lost it."""
    rows = [i for i, sampler in enumerate(samplers) if sampler.matcher is not None or sampler.rule.min_tokens]
    return zip(rows, logits[rows].amax(-1).tolist(), strict=True) if rows else ()


def _check_finite(logits: Tensor) -> dict[int, EngineError]:
    """The rows whose largest value is no number; NaN anywhere in a row is its largest value."""
    return {i: _not_numbers() for i, top in enumerate(logits.amax(-1).tolist()) if not _is_finite(top)}


def _is_finite(value: float) -> bool:
    return -torch.inf < value < torch.inf


def _not_numbers() -> EngineError:
    return EngineError("the model's logits are not finite numbers")


@dataclass(frozen=True, kw_only=True)
class _Told:
    """The raw law of the rows that want to hear of it."""

    rows: list[int]
    law: Tensor
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    @classmethod
    def of(cls, logits: Tensor, rows: list[int]) -> _Told | None:
        return cls(rows=rows, law=logits[rows].log_softmax(-1)) if rows else None

    def tell(self, token_ids: Tensor, nums: Sequence[int | None]) -> dict[int, SampledToken]:
        """What was chosen in `rows`, with log-probabilities."""
        chosen = token_ids[self.rows].unsqueeze(1)
        logprobs = self.law.gather(1, chosen).squeeze(1).tolist()
        wanted = [nums[i] or 0 for i in self.rows]
        tops = self._tops() if any(wanted) else [()] * len(self.rows)
        ids = chosen.squeeze(1).tolist()
        parts = zip(self.rows, ids, logprobs, tops, wanted, strict=True)
        return {i: SampledToken(token_id, logprob, tuple(top[:num])) for i, token_id, logprob, top, num in parts}

    def _tops(self) -> list[list[tuple[int, float]]]:
        """Always as many as anyone may ask for: which of several equals is among them must not depend on others."""
        values, ids = self.law.topk(min(MAX_TOP_LOGPROBS, self.law.shape[1]))
        pairs = [zip(i, v, strict=True) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
        return [sorted(row, key=lambda pair: (-pair[1], pair[0])) for row in pairs]


@torch.inference_mode()
def told(logits: Tensor, token_id: int, num_logprobs: int | None) -> SampledToken:
    """A token that was chosen elsewhere, with what is to be told of it.

    Args:
        logits: (vocab,) the model's own at its place.
    """
    if num_logprobs is None:
        return SampledToken(token_id)
    law = _Told.of(logits.float().unsqueeze(0), [0])
    assert law is not None
    return law.tell(torch.tensor([token_id], device=logits.device), [num_logprobs])[0]


def new_seed() -> int:
    """A seed for a request that brought none."""
    return secrets.randbits(63)
