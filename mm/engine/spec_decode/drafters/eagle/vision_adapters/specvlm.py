"""SpecVLM's elastic compressor: prune, pool, convolve, resample or leave out, as a gate chooses for each input.

Paper     SpecVLM (fast speculative decoding in vision-language models), arXiv:2509.11815: the selecting mode.
Equation  branch = argmax gate(mean feature of the question); in training a straight-through Gumbel softmax.
Reads     Visual embeddings, and last hidden states of the question.
Cost      From 0 to N / 3 inputs per item.
Differs   Pruning draws from a generator seeded by the number of tokens, so that a prompt is always compressed alike.
          The gate's weight, which is 1, multiplies the chosen inputs: by its gradient the gate learns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mm.engine.spec_decode.drafters.eagle.vision_adapters.base import (
    AdapterOutput,
    VisionAdapter,
    VisualContext,
    last_positions,
)

BRANCHES = ("prune", "pool", "convolve", "resample", "leave_out")


class ElasticCompressor(VisionAdapter):
    """Five branches and the gate over them.

    Args:
        strong: Tokens per input of pruning and pooling.
        stride: Tokens per input of the convolution.
        num_queries: Inputs of the resampler.
        branch: Always this one, without a gate. None lets the gate choose.
    """

    def __init__(
        self, width: int, strong: int = 20, stride: int = 3, num_queries: int = 2, branch: str | None = None
    ) -> None:
        super().__init__(width)
        if branch is not None and branch not in BRANCHES:
            raise TypeError(f"branch {branch!r} is none of {', '.join(BRANCHES)}")
        self.strong, self.stride, self.branch = strong, stride, branch
        self.gate = nn.Linear(width, len(BRANCHES))
        self.convolution = nn.Linear(stride * width, width)
        self.queries = nn.Parameter(torch.randn(num_queries, width) * width**-0.5)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        with torch.no_grad():  # at first the convolution is the average
            self.convolution.weight.copy_(torch.eye(width).repeat(1, stride) / stride)
            self.convolution.bias.zero_()

    def choose_branch(self, question: Tensor) -> Tensor:
        """(5,) weights of the branches, one of them 1 and the others 0."""
        if self.branch is not None:
            return nn.functional.one_hot(torch.tensor(BRANCHES.index(self.branch)), len(BRANCHES)).to(question)
        mean = question.mean(0) if len(question) else question.new_zeros(self.width)
        logits: Tensor = self.gate(mean)
        if self.training:
            return nn.functional.gumbel_softmax(logits.float(), hard=True).to(logits.dtype)
        return nn.functional.one_hot(logits.argmax(), len(BRANCHES)).to(logits)

    def compress(self, context: VisualContext) -> AdapterOutput:
        if not context.num_items:
            return self.no_tokens(context)
        weights = self.choose_branch(context.question)
        which = int(weights.argmax())
        branch: Callable[[Tensor], Tensor] = getattr(self, BRANCHES[which])
        inputs: list[Tensor] = []
        positions: list[Tensor] = []
        for item in range(context.num_items):
            tokens = context.tokens_of(item)
            compressed = branch(context.embeddings[tokens])
            inputs.append(compressed * weights[which])
            positions.append(last_positions(context, tokens, len(compressed)))
        return AdapterOutput(inputs=torch.cat(inputs), positions=torch.cat(positions))

    def prune(self, embeddings: Tensor) -> Tensor:
        """A random subset of an item's tokens."""
        generator = torch.Generator().manual_seed(len(embeddings))
        kept = torch.randperm(len(embeddings), generator=generator)[: self._few(embeddings)].sort().values
        return embeddings[kept.to(embeddings.device)]

    def pool(self, embeddings: Tensor) -> Tensor:
        """Means of adjacent tokens."""
        return torch.stack([part.mean(0) for part in embeddings.tensor_split(self._few(embeddings))])

    def convolve(self, embeddings: Tensor) -> Tensor:
        """A strided convolution; the last token pads the end."""
        missing = -len(embeddings) % self.stride
        padded = torch.cat([embeddings, embeddings[-1:].expand(missing, -1)])
        return self.convolution(padded.view(-1, self.stride * self.width))

    def resample(self, embeddings: Tensor) -> Tensor:
        """Attention of learned queries to the tokens."""
        projected: Tensor = self.key_value(embeddings)
        key, value = projected.chunk(2, dim=-1)
        scores = self.queries.to(key.dtype) @ key.T * self.width**-0.5
        return scores.softmax(-1) @ value

    def leave_out(self, embeddings: Tensor) -> Tensor:
        """Nothing."""
        return embeddings[:0]

    def _few(self, embeddings: Tensor) -> int:
        return max(1, round(len(embeddings) / self.strong))
