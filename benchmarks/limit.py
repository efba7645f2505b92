"""The matrix products of a training step and nothing else: what a step without padding can't get below.

Counted for the real tokens of a batch: forward, input-gradient and weight-gradient products of every linear layer of
the encoder, and attention's products, texts of equal length together. `pruned` leaves out what the last layer computes
for other than first tokens, which a classifier doesn't need and emoray doesn't compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


class MatrixProducts:
    """Runs the products of one step on buffers that are made once."""

    def __init__(self, layers: int, hidden: int, intermediate: int, heads: int, pruned: bool, most_tokens: int) -> None:
        self.layers, self.hidden, self.intermediate, self.heads = layers, hidden, intermediate, heads
        self.pruned = pruned
        size = max(most_tokens * intermediate, intermediate * hidden)
        self.left, self.right = torch.randn(size), torch.randn(size)
        self.out = torch.empty(size)
        shapes = ((hidden, hidden), (intermediate, hidden), (hidden, intermediate))
        self.weights = {shape: torch.randn(shape) for shape in shapes}

    def step(self, lengths: Sequence[int]) -> None:
        """All products for texts of these many tokens."""
        tokens, hidden, intermediate = sum(lengths), self.hidden, self.intermediate
        for layer in range(self.layers):
            rows = len(lengths) if self.pruned and layer == self.layers - 1 else tokens
            for _ in range(3):
                self._linear(tokens, hidden, hidden)
            self._linear(rows, hidden, hidden)
            self._linear(rows, intermediate, hidden)
            self._linear(rows, hidden, intermediate)
            for length, texts in groupby(sorted(lengths)):
                self._attention(len(list(texts)) * self.heads, length, hidden // self.heads)

    def _linear(self, rows: int, outputs: int, inputs: int) -> None:
        weight = self.weights[outputs, inputs]
        x, grad = _view(self.left, rows, inputs), _view(self.right, rows, outputs)
        torch.mm(x, weight.t(), out=_view(self.out, rows, outputs))
        torch.mm(grad, weight, out=_view(self.out, rows, inputs))
        torch.mm(grad.t(), x, out=_view(self.out, outputs, inputs))

    def _attention(self, count: int, length: int, size: int) -> None:
        states, probs = _view(self.left, count, length, size), _view(self.right, count, length, length)
        square, flat = _view(self.out, count, length, length), _view(self.out, count, length, size)
        torch.bmm(states, states.transpose(1, 2), out=square)  # scores
        torch.bmm(probs, states, out=flat)  # output
        torch.bmm(probs.transpose(1, 2), states, out=flat)  # gradient of values
        torch.bmm(states, states.transpose(1, 2), out=square)  # gradient of probabilities
        torch.bmm(probs, states, out=flat)  # gradient of queries
        torch.bmm(probs.transpose(1, 2), states, out=flat)  # gradient of keys


def _view(buffer: Tensor, *shape: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return buffer[:count].view(shape)
