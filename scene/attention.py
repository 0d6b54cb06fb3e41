"""Spatial-audio attention: every surfel asks the condition tokens what moves it (GaussianTalker, lineage.md 3.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TokenAttention(nn.Module):
    """One post-norm transformer layer whose queries are surfel features and whose keys and values are the tokens.

    The queries do not depend on the frame, so they are projected once a step; and since there are few tokens, the output
    projection is applied to the values rather than to the (B, N) results: the cost per surfel and frame is two small sums.
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
        self.dropout = nn.Dropout(dropout)

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T, d) -> keys, scaled, and values, through the output projection, (B, h, T, d): as wide as the model.

        Keys are zero outside their head's columns, so whole queries may meet them, and weighted values need only be summed.
        """
        width = tokens.shape[-1]
        own = torch.eye(self.heads, device=tokens.device).repeat_interleave(width // self.heads, 1)[:, None]  # (h, 1, d)
        key = self.key(tokens)[:, None] * (own / math.sqrt(width // self.heads))
        return key, (self.value(tokens)[:, None] * own) @ self.out.weight.T

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, d) or (B, N, d), tokens (B, T, d) -> ((B, N, d), attention (B, N, T)); attention sums to 1 over T."""
        batch, count, width = tokens.shape
        split = width // self.heads
        query = self.query(features).unflatten(-1, (self.heads, split))  # ([B,] N, h, s)
        key = self.key(tokens).view(batch, count, self.heads, split)
        value = self.value(tokens).view(batch, count, self.heads, split)
        scores = torch.einsum("...nhs,bths->bnht" if query.dim() == 3 else "bnhs,bths->bnht", query, key)
        weights = (scores / math.sqrt(split)).softmax(-1)  # (B, N, h, T)
        per_head = self.out.weight.view(width, self.heads, split)
        projected = torch.einsum("bths,whs->bhtw", value, per_head).flatten(1, 2)  # (B, h T, d)
        mixed = torch.baddbmm(features + self.out.bias, self.dropout(weights).flatten(2), projected)  # residual included
        x = self.norm_attention(mixed).flatten(0, 1)  # rows: in-place ReLU on a view would copy
        x = self.norm_hidden(x + self.dropout(self.hidden(x)))
        return x.unflatten(0, (batch, -1)), weights.mean(2)
