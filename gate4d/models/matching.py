"""What changed between the frames of a clip: differences, block matching and least-squares flow, as features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matching(nn.Module):
    """What changed between a frame and the first one, and those 1 and 3 before and after it, where they are known.

    Differences of the images; block matching: normalised cross-correlation of 5 x 5 neighbourhoods at half the size for
    shifts of up to 8 pixels; and, for what moves by less than a pixel, the least-squares flow of each patch (Lucas and
    Kanade, 1981), with its products with the patch's place: their means over patches that rest are what a moving camera
    looks like, which attention can take. A model of this size, trained for an hour, does not come to find
    correspondences by attention over patches; where a pixel went is given to it, whether the camera or an object moved
    is not.
    """

    radius, block, sharpness = 4, 5, 30.0
    steps = (-1, -3, 1, 3)  # slow objects show over three frames, fast ones have not left the window after one

    def __init__(self, widths: tuple[int, int], dim: int):
        super().__init__()
        half, quarter = widths
        others = 1 + len(self.steps)
        self.change = nn.Conv2d(3 * others, half, 7, 2, 3)
        self.shift = nn.Conv2d(others * ((2 * self.radius + 1) ** 2 + 3), half, 1)
        self.smooth = nn.Conv2d(half, half, 3, 1, 1)
        self.down = nn.Conv2d(half, quarter, 3, 2, 1)
        self.mix = nn.Conv2d(quarter, quarter, 3, 1, 1)
        self.patch = nn.Conv2d(quarter, dim, 2, 2)
        self.flow = nn.Conv2d(9 * others + 5, dim, 1)

    def forward(
        self, images: Tensor, before: Tensor | None, causal: bool, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``[B, T, 3, H, W]`` to what is added to the patches ``[B * T, P, C]``, and maps at a half and a
        quarter of the size.

        ``before [B, n, 3, H, W]`` are the first frame and the last ones before these (see :func:`remember`), those that
        count are ``known [B, n]`` (None: all). With ``causal`` no frame sees a later one.
        """
        with torch.no_grad():
            change, shift, flow = self.compare(images, before, causal, known)
        half = F.gelu(self.change(change) + self.shift(shift))
        half = half + F.gelu(self.smooth(half))
        quarter = F.gelu(self.down(half))
        quarter = quarter + F.gelu(self.mix(quarter))
        flow = torch.cat((flow, places(flow).expand(len(flow), -1, -1, -1)), dim=1)
        return (self.patch(quarter) + self.flow(flow)).flatten(2).mT, half, quarter

    @torch.autocast("cpu", enabled=False)
    def compare(
        self, images: Tensor, before: Tensor | None, causal: bool, known: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """In fp32 (16 bits would round sub-pixel motion away), all ``[B * T, channels, ...]``; see :meth:`forward`."""
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        clip = images if before is None else torch.cat((before.to(images.dtype), images), dim=1)
        frames, skipped = clip.shape[1], clip.shape[1] - images.shape[1]
        small = F.avg_pool2d(clip.flatten(0, 1), 2).unflatten(0, clip.shape[:2])
        described = self.describe(small.flatten(0, 1)).unflatten(0, clip.shape[:2])
        numbers = torch.arange(skipped, frames, device=images.device)
        exists = torch.ones((len(clip), frames), dtype=torch.bool, device=images.device)
        if known is not None:
            exists[:, :skipped] = known
        parts: list[list[Tensor]] = []
        for step in (None, *self.steps):
            other = torch.zeros_like(numbers) if step is None else numbers + step
            at = other.clamp(0, frames - 1)
            seen = (other == at) & (other != numbers) & exists[:, at]
            if step is not None and step > 0 and causal:
                parts.append([torch.zeros_like(x) for x in parts[0]])
                continue
            found = (
                4 * (clip[:, at] - images).flatten(0, 1),
                self.correlate(*(x.flatten(0, 1) for x in (described[:, skipped:], described[:, at]))),
                patch_flow(*(x.flatten(0, 1) for x in (small[:, skipped:], small[:, at]))),
            )
            parts.append([x * seen.flatten().to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for x in found])
        return tuple(torch.cat(x, dim=1) for x in zip(*parts, strict=True))

    def describe(self, small: Tensor) -> Tensor:
        """Images ``[N, 3, h, w]`` to unit vectors ``[N, 25, h, w]``: grey neighbourhoods without their mean."""
        pad = self.block // 2
        blocks = F.unfold(F.pad(small.mean(1, keepdim=True), (pad,) * 4, mode="replicate"), self.block)
        blocks = blocks - blocks.mean(1, keepdim=True)
        # The constant is the noise of 8-bit colours: a flat neighbourhood matches nothing.
        return (blocks / (blocks.square().sum(1, keepdim=True) + 1e-3).sqrt()).unflatten(2, small.shape[-2:])

    def correlate(self, a: Tensor, b: Tensor) -> Tensor:
        """``[N, d, h, w]`` twice to products, expected shift (y, x) and greatest product ``[N, shifts + 3, h, w]``."""
        r, side, width = self.radius, 2 * self.radius + 1, a.shape[-1]
        rows = F.pad(b, (r, r, r, r)).unfold(2, side, 1).permute(0, 2, 1, 4, 3).flatten(3)
        products = a.permute(0, 2, 3, 1) @ rows  # [N, h, w, side * (w + 2r)]: a band of rows, then its diagonals
        x = torch.arange(width, device=a.device)[:, None] + torch.arange(side, device=a.device)
        index = x[:, None].expand(*products.shape[:2], width, side, side)
        products = products.unflatten(3, (side, -1)).gather(4, index)  # [N, h, w, side, side]
        weight = (self.sharpness * products.flatten(3)).softmax(-1).view_as(products)
        shift = torch.arange(-r, r + 1, device=a.device, dtype=a.dtype)
        y, x = (weight.sum(4) * shift).sum(-1), (weight.sum(3) * shift).sum(-1)
        extra = torch.stack((y, x, products.flatten(3).amax(-1)), dim=-1)
        return torch.cat((products.flatten(3), extra), dim=-1).permute(0, 3, 1, 2)


def patch_flow(a: Tensor, b: Tensor, window: int = 4) -> Tensor:
    """Least-squares flow of each window from ``a`` to ``b [N, 3, h, w]``.

    Returns:
        ``[N, 9, h / 4, w / 4]``: flow (y, x) in the images' pixels, the confidence in [0, 1] that the texture gives
        (from the lesser eigenvalue), flow times confidence, and that times the place y and times the place x.
    """
    middle = F.pad((a + b) / 2, (1, 1, 1, 1), mode="replicate")
    gx, gy = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2, (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    gt = b - a
    pairs = torch.stack([(p * q).sum(1) for p, q in ((gx, gx), (gx, gy), (gy, gy), (gx, gt), (gy, gt))], dim=1)
    xx, xy, yy, xt, yt = F.avg_pool2d(pairs, window).unbind(1)
    xx, yy = xx + 1e-4, yy + 1e-4
    determinant = xx * yy - xy * xy
    flow = torch.stack((xy * xt - xx * yt, xy * yt - yy * xt), dim=1) / determinant[:, None]
    flow = flow.clamp(-2, 2)
    least = (xx + yy) / 2 - ((xx - yy).square() / 4 + xy * xy).sqrt()
    weight = (least / (least + 3e-4))[:, None]
    sure = flow * weight
    y, x = places(flow)[:, :2, None].unbind(1)
    return torch.cat((flow, weight, sure, sure * y, sure * x), dim=1)


def places(like: Tensor) -> Tensor:
    """y, x, y y, x x, x y of every patch of ``like [..., h, w]``, from -1 to 1: ``[1, 5, h, w]``."""
    y, x = (torch.linspace(-1, 1, n, device=like.device, dtype=like.dtype) for n in like.shape[-2:])
    y, x = torch.broadcast_tensors(y[:, None], x)
    return torch.stack((y, x, y * y, x * x, x * y))[None]


def remember(before: Tensor | None, images: Tensor) -> Tensor:
    """Frames that :class:`Matching` needs of the past, ``[B, up to 4, 3, H, W]``: the first, and the last three."""
    clip = images if before is None else torch.cat((before, images), dim=1)
    reach = max(Matching.steps)
    return clip if clip.shape[1] <= reach + 1 else torch.cat((clip[:, :1], clip[:, -reach:]), dim=1)
