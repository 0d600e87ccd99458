"""Stand-in for MoRe's own code: VGGT's shape, six arguments an attention, key ranges, a copied camera token a frame."""

import torch
import torch.nn.functional as F
from torch import nn

from . import vggt
from .common import Mlp, Patches, Scale, VggtRotary

SPECIAL = 5


def flex_flash_attn_func(q, k, v, q_ranges, k_ranges, attn_type_map, softmax_scale=None, **_):
    """Stands for a kernel that only a GPU has: here a dense mask over ``[N, H, D]``."""
    mask = torch.zeros(len(q), len(k), dtype=torch.bool)
    for (a, b), (c, d), kind in zip(q_ranges.tolist(), k_ranges.tolist(), attn_type_map.tolist(), strict=True):
        assert kind == 0
        mask[a:b, c:d] = True
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    logits = (q @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)).masked_fill(
        ~mask, -torch.inf
    )
    return (logits.softmax(-1) @ v).transpose(0, 1), None


class Attention(vggt.Base):
    def forward(self, x, attn_bias=None, pos=None, motion_scores=None, save_attn=False, kv_cache=None):
        q, k, v = self.heads(x)
        q, k = self.turned(q, k, pos)
        if kv_cache is not None:
            if kv_cache["k"] is not None:
                k, v = torch.cat((kv_cache["k"], k), dim=2), torch.cat((kv_cache["v"], v), dim=2)
            kv_cache.update(k=k, v=v)
        out = self.finish(F.scaled_dot_product_attention(q, k, v))
        if save_attn:
            return out, (q[:, :, ::save_attn] * self.scale @ k.mT).softmax(-1)
        return out, kv_cache


class SparseAttention(Attention):
    def forward(self, x, attn_bias=None, pos=None, motion_scores=None, save_attn=False, kv_cache=None):
        q, k, v = self.heads(x)
        q, k = self.turned(q, k, pos)
        batch, tokens, _ = x.shape
        frames = tokens // attn_bias
        ends = [(t + 1) * attn_bias for t in range(frames)]
        queries = [(end - attn_bias, end) for end in ends]
        keys = [(0, end) for end in ends]
        if tokens % attn_bias:
            queries.append((ends[-1], tokens))
            keys.append((0, ends[-1]))
        shift = torch.arange(batch)[:, None, None] * tokens
        ranges = [(torch.tensor(r)[None] + shift).flatten(0, 1).int() for r in (queries, keys)]
        flat = [y.transpose(1, 2).flatten(0, 1) for y in (q, k, v)]
        out, _ = flex_flash_attn_func(
            *flat, q_ranges=ranges[0], k_ranges=ranges[1], attn_type_map=torch.zeros(len(ranges[0])).int()
        )
        return self.finish(out.unflatten(0, (batch, tokens)).transpose(1, 2)), None


class MemEffAttention(Attention):
    def forward(self, x, attn_bias=None, pos=None, motion_scores=None, save_attn=False, kv_cache=None):
        assert pos is None
        assert attn_bias is None
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, dim, heads, attention=Attention, qk_norm=True, rope=None):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim)
        self.attn = attention(dim, heads, qk_norm, rope)
        self.ls1, self.ls2 = Scale(dim), Scale(dim)

    def forward(self, x, pos=None, **call):
        out, more = self.attn(self.norm1(x), pos=pos, **call)
        x = x + self.ls1(out)
        return x + self.ls2(self.mlp(self.norm2(x))), more


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.patches = Patches(dim, patch)
        self.blocks = nn.ModuleList([Block(dim, 2, MemEffAttention, qk_norm=False)])

    def forward(self, images):
        x, pos = self.patches(images)
        for block in self.blocks:
            x, _ = block(x)
        return x, pos


class Aggregator(nn.Module):
    """The copied camera tokens ride behind the clip: in a frame block each takes the place of its frame's camera token,
    in a global block they see the whole frames."""

    def __init__(self, dim=32, heads=2, depth=2, patch=14, sparse=True, additional_token=True, same_token=False):
        super().__init__()
        self.depth, self.patch_size, self.patch_start_idx, self.aa_block_size = depth, patch, SPECIAL, 1
        self.aa_order, self.additional_token, self.same_token = ["frame", "global"], additional_token, same_token
        rope, kind = VggtRotary(), SparseAttention if sparse else Attention
        self.patch_embed = PatchEmbed(dim, patch)
        self.frame_blocks = nn.ModuleList(Block(dim, heads, rope=rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(dim, heads, kind, rope=rope) for _ in range(depth))
        self.camera_token = nn.Parameter(torch.randn(1, 2, 1, dim))
        self.register_token = nn.Parameter(torch.randn(1, 2, SPECIAL - 1, dim))
        if additional_token:
            self.additional_camera_token = nn.Parameter(torch.randn(1, 2, 1, dim))

    def special(self, token, batch, frames):
        kind = torch.ones(frames, dtype=torch.long)
        kind[0] = int(self.same_token)
        return token[:, kind].expand(batch, -1, -1, -1)

    def embed(self, images):
        batch, frames = images.shape[:2]
        x, pos = self.patch_embed(images.flatten(0, 1))
        special = [self.special(t, batch, frames) for t in (self.camera_token, self.register_token)]
        pos = torch.cat((torch.zeros_like(pos[:, :1]).expand(-1, SPECIAL, -1), pos + 1), dim=1)
        return torch.cat((*special, x.unflatten(0, (batch, frames))), dim=2), pos

    def forward(self, images):
        batch, frames = images.shape[:2]
        x, pos = self.embed(images)
        size, outputs, rows = x.shape[2], [], None
        pos_all = pos.unflatten(0, (batch, frames)).flatten(1, 2)
        copies = self.special(self.additional_camera_token, batch, frames)[:, :, 0] if self.additional_token else None
        if copies is not None:
            pos_all = torch.cat((pos_all, torch.zeros_like(pos_all[:, :frames])), dim=1)
        for i in range(self.depth):
            save = size if i == self.depth - 1 else 0
            before = x
            x, rows = self.frame_blocks[i](before.flatten(0, 1), pos=pos, save_attn=save)
            inside = x = x.unflatten(0, (batch, frames))
            x = x.flatten(1, 2)
            if copies is not None:
                swapped = torch.cat((copies[:, :, None], before.detach()[:, :, 1:]), dim=2)
                moved = self.frame_blocks[i](swapped.flatten(0, 1), pos=pos, save_attn=save)[0]
                copies = moved.unflatten(0, (batch, frames))[:, :, 0]
                x, inside = torch.cat((x, copies), dim=1), torch.cat((inside, copies[:, :, None]), dim=2)
            x, _ = self.global_blocks[i](x, pos=pos_all, attn_bias=size)
            if copies is not None:
                x, copies = x.split((frames * size, frames), dim=1)
            x = x.unflatten(1, (frames, size))
            over = x if copies is None else torch.cat((x, copies[:, :, None]), dim=2)
            outputs.append(torch.cat((inside, over), dim=-1))
        return outputs, SPECIAL, rows


class StreamAggregator(Aggregator):
    """Frame by frame over calls; each layer's cache is handed to the next one, so that all share one."""

    def __init__(self, **options):
        super().__init__(**{"sparse": False, **options})
        self.global_kv_cache = [{"k": None, "v": None} for _ in range(self.depth)]

    def forward(self, images):
        batch, frames = images.shape[:2]
        x, pos = self.embed(images)
        size, outputs = x.shape[2], []
        for i in range(self.depth):
            x, _ = self.frame_blocks[i](x.flatten(0, 1), pos=pos)
            inside = x.unflatten(0, (batch, frames))
            pos_all = pos.unflatten(0, (batch, frames)).flatten(1, 2)
            x, state = self.global_blocks[i](inside.flatten(1, 2), pos=pos_all, kv_cache=self.global_kv_cache[i])
            if i + 1 < self.depth:
                self.global_kv_cache[i + 1] = state
            x = x.unflatten(1, (frames, size))
            outputs.append(torch.cat((inside, x), dim=-1))
        return outputs, SPECIAL, None


class CameraHead(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.trunk = nn.ModuleList(Block(dim, 2, qk_norm=False) for _ in range(2))
        self.pose = nn.Linear(dim, 9)

    def forward(self, tokens, rounds=4, first_token=True):
        x, poses = tokens[-1][:, :, 0 if first_token else -1], []
        for _ in range(rounds):
            for block in self.trunk:
                x, _ = block(x)
            poses.append(self.pose(x))
        return poses


class More(nn.Module):
    def __init__(self, stream=False, **options):
        super().__init__()
        self.aggregator = (StreamAggregator if stream else Aggregator)(**options)
        dim = 2 * self.aggregator.camera_token.shape[-1]
        self.additional_token = self.aggregator.additional_token
        self.camera_head, self.depth_head = CameraHead(dim), nn.Linear(dim, 2)
        self.motion_head = nn.Linear(dim, 14 * 14)

    def forward(self, images, query_points=None):
        tokens, start, rows = self.aggregator(images)
        out = {"attn_weight": rows, "pose_enc": self.camera_head(tokens)[-1]}
        if self.additional_token and not isinstance(self.aggregator, StreamAggregator):
            out["dup_pose_enc"] = self.camera_head(tokens, first_token=False)[-1]
        height, width = images.shape[-2] // 14, images.shape[-1] // 14
        patches = tokens[-1][:, :, start : start + height * width]
        out["depth"] = self.depth_head(patches)
        maps = self.motion_head(patches).unflatten(3, (14, 14)).unflatten(2, (height, width))
        out["motion"] = maps.transpose(3, 4).flatten(4, 5).flatten(2, 3)[..., None]
        return out
