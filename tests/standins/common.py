"""Parts shared by the stand-ins."""

import gc

import torch
from torch import nn


class Rotary(nn.Module):
    """RoPE-2D straight from its definition, feature by feature; ``quantise`` computes in the tokens' dtype."""

    def __init__(self, base=100.0, quantise=True):
        super().__init__()
        self.base = base
        self.F0 = 1.0
        self.quantise = quantise

    def forward(self, tokens, positions):
        half = tokens.shape[-1] // 2
        work = tokens.dtype if self.quantise else torch.float32
        out = tokens.clone().to(work)
        for axis in (0, 1):
            for i in range(half // 2):
                a, b = axis * half + i, axis * half + i + half // 2
                angle = (positions[..., axis].float() * self.base ** (-2 * i / half))[:, None].to(work)
                x, y = tokens[..., a].to(work), tokens[..., b].to(work)
                out[..., a] = x * angle.cos() - y * angle.sin()
                out[..., b] = y * angle.cos() + x * angle.sin()
        return out.to(tokens.dtype)


class VggtRotary(Rotary):
    """The same under VGGT's attribute names."""

    def __init__(self):
        super().__init__()
        self.base_frequency, self.scaling_factor = self.base, 1.0
        del self.base, self.F0
        self.base_frequency = 100.0

    def forward(self, tokens, positions):
        self.base = self.base_frequency
        try:
            return super().forward(tokens, positions)
        finally:
            del self.base


class Mlp(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.2))

    def forward(self, x):
        return x * self.gamma


class Patches(nn.Module):
    """Image ``[B, 3, H, W]`` to tokens and their (y, x) positions."""

    def __init__(self, dim, patch):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, image):
        tokens = self.proj(image)
        rows, columns = tokens.shape[-2:]
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(image.device)
        return tokens.flatten(2).mT, grid.expand(image.shape[0], -1, -1)


def heads_of(x, heads):
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def softmax_attention(q, k, v, scale):
    logits = q @ k.mT * scale
    return logits.softmax(-1) @ v, logits


def live_bytes(earlier: dict[int, object]) -> int:
    """Bytes of the tensors alive, but for the objects of other tests, ``earlier`` by id."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) in (torch.Tensor, nn.Parameter) and id(x) not in earlier]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in found)}.values())
