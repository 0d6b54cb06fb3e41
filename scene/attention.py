"""Spatial-audio attention: every surfel asks the condition tokens what moves it (GaussianTalker, lineage.md 3.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from utils.distributed import batch_dropout


class _Dropout(nn.Dropout):
    """Drops of a batch shared by several processes what one of them would drop of the whole."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_dropout(x, self.p) if self.training and self.p else x


class TokenAttention(nn.Module):
    """One post-norm transformer layer whose queries are surfel features and whose keys and values are the tokens.

    There are few tokens and many surfels, so the query and output projections are applied to the keys and values of the tokens
    rather than to every surfel and result: the cost per surfel and frame is two small sums.
    """

    def __init__(self, d_model: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)
        self.norm_attention = nn.LayerNorm(d_model)
        self.norm_hidden = nn.LayerNorm(d_model)
        self.hidden = nn.Sequential(nn.Linear(d_model, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, d_model))
        self.dropout = _Dropout(dropout)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (B, T, d) -> keys (B, h, T, d) and biases (B, h, T) of the scores, values (B, h, T, d).

        score = features . key + bias; what a surfel gets is the weighted sum of values over heads and tokens, plus out.bias.
        """
        width, batch = tokens.shape[-1], len(tokens)
        split = width // self.heads
        key, value = (layer(tokens).view(batch, -1, self.heads, split) for layer in (self.key, self.value))
        key = key / math.sqrt(split)
        keys = torch.einsum("bths,hsd->bhtd", key, self.query.weight.view(self.heads, split, width))
        biases = torch.einsum("bths,hs->bht", key, self.query.bias.view(self.heads, split))
        return keys, biases, torch.einsum("bths,dhs->bhtd", value, self.out.weight.view(width, self.heads, split))

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, d) or (B, N, d), tokens (B, T, d) -> ((B, N, d), attention (B, N, T)); attention sums to 1 over T."""
        keys, biases, values = self.project(tokens)
        scores = torch.einsum("nd,bhtd->bnht" if features.dim() == 2 else "bnd,bhtd->bnht", features, keys)
        weights = (scores + biases[:, None]).softmax(-1)  # (B, N, h, T)
        mixed = torch.baddbmm(features + self.out.bias, self.dropout(weights).flatten(2), values.flatten(1, 2))  # and residual
        x = self.norm_attention(mixed).flatten(0, 1)  # rows: in-place ReLU on a view would copy
        x = self.norm_hidden(x + self.dropout(self.hidden(x)))
        return x.unflatten(0, (len(tokens), -1)), weights.mean(2)
