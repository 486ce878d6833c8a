"""The published denoiser in PyTorch, written from its description, for timings beside ours.

Letters: B batch, N tokens, L text positions, D width, K codes, H heads.
"""

import torch
from torch import nn
from torch.nn import functional as F


def gelu(x):
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(context_width, width), nn.Linear(context_width, width)

    def forward(self, x, context):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.query(x)), split(self.key(context)), split(self.value(context))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class AdaLayerNorm(nn.Module):
    def __init__(self, width, steps):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(steps, width), nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, h, t):
        scale, shift = self.linear(F.silu(self.embedding(t)))[:, None].chunk(2, dim=-1)
        return self.norm(h) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        width, self.side = size.width, size.side if size.conv else None
        self.norm_self = AdaLayerNorm(width, size.steps)
        self.norm_cross = AdaLayerNorm(width, size.steps)
        self.self_attention = Attention(width, width, size.heads)
        self.cross_attention = Attention(width, size.text_width, size.heads)
        self.norm_mlp = nn.LayerNorm(width)
        make = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if size.conv else nn.Linear
        self.mlp_in, self.mlp_out = (
            make(width, size.ratio * width),
            make(size.ratio * width, width),
        )

    def forward(self, h, t, text):
        x = self.norm_self(h, t)
        h = h + self.self_attention(x, x)
        h = h + self.cross_attention(self.norm_cross(h, t), text)
        x = self.norm_mlp(h)
        if self.side is None:
            return h + self.mlp_out(gelu(self.mlp_in(x)))
        x = x.transpose(1, 2).unflatten(-1, (self.side, self.side))
        return h + self.mlp_out(gelu(self.mlp_in(x))).flatten(-2).transpose(1, 2)


class Denoiser(nn.Module):
    """tokens [B, N], t [B] in 0..T-1, text [B, L, text_width] -> logits float32 [B, K, N]."""

    def __init__(self, size):
        super().__init__()
        self.embedding = nn.Embedding(size.codes + 1, size.width)
        self.rows, self.columns = (nn.Embedding(size.side, size.width) for _ in range(2))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.logits = nn.Linear(size.width, size.codes)

    def forward(self, tokens, t, text):
        position = self.rows.weight[:, None] + self.columns.weight[None]
        h = self.embedding(tokens) + position.flatten(0, 1)
        for block in self.blocks:
            h = block(h, t, text)
        return self.logits(self.norm(h)).float().transpose(1, 2)
