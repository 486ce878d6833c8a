"""The published f8 tokenizer and its discriminator in PyTorch, written from their description.

Letters: B batch, S image side, C channels, K codes, E codebook dimension.
"""

import torch
from torch import nn
from torch.nn import functional as F


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(mixed.unflatten(2, x.shape[2:]))


class Down(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(inputs, width, blocks, attends):
    parts = []
    for index in range(blocks):
        parts.append(ResBlock(width if index else inputs, width))
        parts += [Attention(width)] * attends
    return parts


def middle(width):
    return [ResBlock(width, width), Attention(width), ResBlock(width, width)]


def head(width, outputs):
    return [norm(width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1)]


class Autoencoder(nn.Module):
    """Images [B, 3, S, S] -> reconstructions; the nearest of K codes, straight through."""

    def __init__(self, config):
        super().__init__()
        widths, latent, dim = config.widths, config.latent_channels, config.codebook_dim
        attends = [config.image_size >> i in config.attention_resolutions for i in range(9)]
        count, last = config.num_res_blocks, len(widths) - 1
        down, inputs = [nn.Conv2d(3, config.channels, 3, padding=1)], config.channels
        for index, width in enumerate(widths):
            down += level(inputs, width, count, attends[index])
            down += [Down(width)] if index < last else []
            inputs = width
        down += [*middle(inputs), *head(inputs, latent), nn.Conv2d(latent, dim, 1)]
        up = [nn.Conv2d(dim, latent, 1), nn.Conv2d(latent, inputs, 3, padding=1), *middle(inputs)]
        for index in reversed(range(last + 1)):
            up += level(inputs, widths[index], count + 1, attends[index])
            inputs = widths[index]
            up += [Up(inputs)] if index else []
        self.encoder, self.decoder = nn.Sequential(*down), nn.Sequential(*up, *head(inputs, 3))
        self.codebook = nn.Parameter(torch.randn(config.num_codes, dim))

    def forward(self, images):
        z = self.encoder(images)
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        with torch.no_grad():
            distances = self.codebook.square().sum(1) - 2 * flat @ self.codebook.T
            chosen = self.codebook[distances.argmin(1)]
        chosen = chosen.reshape(*z.shape[:1], *z.shape[2:], -1).permute(0, 3, 1, 2)
        commitment = (z - chosen).square().mean()
        return self.decoder(z + (chosen - z).detach()), commitment


def patchgan(channels=64, layers=3):
    """The published discriminator."""
    parts, inputs = [], 3
    for index in range(layers + 1):
        width = channels * min(2**index, 8)
        stride = 1 if index == layers else 2
        parts.append(nn.Conv2d(inputs, width, 4, stride, 1, bias=index == 0))
        parts += [nn.BatchNorm2d(width)] if index else []
        parts.append(nn.LeakyReLU(0.2))
        inputs = width
    return nn.Sequential(*parts, nn.Conv2d(inputs, 1, 4, 1, 1))
