"""Stand-ins for VGGT, VGGT4D, FastVGGT, StreamVGGT and STream3R."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .common import Mlp, Patches, Scale, VggtRotary, heads_of, joined


class Base(nn.Module):
    def __init__(self, dim, num_heads, qk_norm=False, rope=None):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn, self.rope = self.head_dim**-0.5, True, rope
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def heads(self, x):
        return [heads_of(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1)]

    def turned(self, q, k, pos, pos_k=None):
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k) if self.rope is None else (self.rope(q, pos), self.rope(k, pos if pos_k is None else pos_k))

    def finish(self, x):
        return self.proj_drop(self.proj(joined(x)))


class Attention(Base):
    def forward(self, x, pos=None):
        q, k, v = self.heads(x)
        q, k = self.turned(q, k, pos)
        return self.finish(F.scaled_dot_product_attention(q, k, v))


class MemEffAttention(Attention):
    def forward(self, x, attn_bias=None, pos=None):
        assert pos is None
        assert attn_bias is None
        return super().forward(x)


class FastAttention(Base):
    """Merges every second token into its predecessor after RoPE, and gives both the same output after ``proj``."""

    def forward(self, x, pos=None, global_merging=None):
        q, k, v = self.heads(x)
        q, k = self.turned(q, k, pos)
        if global_merging is not None:
            q, k, v = ((y[:, :, ::2] + y[:, :, 1::2]) / 2 for y in (q, k, v))
        x = self.finish(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0))
        return x if global_merging is None else x.repeat_interleave(2, dim=1)


class Attention4d(Base):
    def forward(self, x, pos=None, is_frame_attn=True, layer_id=0, dyn_masks=None):
        q, k, v = self.heads(x)
        q, k = self.turned(q, k, pos)
        if dyn_masks is None or layer_id not in range(5):
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            masks = F.pad(dyn_masks, (5, 0))
            masks = masks.flatten(0, 1) if is_frame_attn else masks.flatten(1)
            items = (
                F.scaled_dot_product_attention(q[b : b + 1], k[b : b + 1, :, ~m], v[b : b + 1, :, ~m])
                for b, m in enumerate(masks)
            )
            out = torch.cat(list(items))
        return self.finish(out), q, k


class StreamAttention(Base):
    """Caches raw keys ``[B, H, frames, P, D]``; norms and rotates all of them at every frame."""

    def forward(self, x, pos=None, attn_mask=None, past_key_values=None, use_cache=False):
        q, k, v = self.heads(x)
        pos_k, state = pos, None
        if use_cache:
            k, v = k[:, :, None], v[:, :, None]
            if past_key_values is not None:
                k, v = (torch.cat((old, new), dim=2) for old, new in zip(past_key_values, (k, v), strict=True))
            state = (k, v)
            pos_k = None if pos is None else pos.repeat(1, k.shape[2], 1)
            k, v = k.flatten(2, 3), v.flatten(2, 3)
        q, k = self.turned(q, k, pos, pos_k)
        out = self.finish(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask))
        return (out, state) if use_cache else out


class Stream3rAttention(Base):
    def forward(self, x, pos=None, attn_mask=None, kv_cache=None):
        q, k, v = self.heads(x)
        q, k = self.turned(q, k, pos)
        if kv_cache is not None:
            if kv_cache[0] is not None:
                k, v = (torch.cat((old, new), dim=2) for old, new in zip(kv_cache, (k, v), strict=True))
            kv_cache = [k, v]
        out = self.finish(F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask))
        return out if kv_cache is None else (out, kv_cache)


class Block(nn.Module):
    def __init__(self, dim, num_heads, attention=Attention, qk_norm=True, rope=None):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim)
        self.attn = attention(dim, num_heads, qk_norm, rope)
        self.ls1, self.ls2 = Scale(dim), Scale(dim)

    def forward(self, x, *args, **kwargs):
        result = self.attn(self.norm1(x), *args, **kwargs)
        out, *rest = result if isinstance(result, tuple) else (result,)
        x = x + self.ls1(out)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return (x, *rest) if rest else x


class Dino(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.patches = Patches(dim, patch)
        self.blocks = nn.ModuleList(Block(dim, 4, MemEffAttention, qk_norm=False) for _ in range(2))

    def forward(self, images):
        x, pos = self.patches(images)
        for block in self.blocks:
            x = block(x)
        return x, pos


class Aggregator(nn.Module):
    """Alternates attention inside frames and over all frames; 1 camera and 4 register tokens a frame."""

    attention = Attention

    def __init__(self, dim=64, heads=4, depth=2, patch=14):
        super().__init__()
        self.depth, self.patch_size, self.patch_start_idx, self.aa_block_size = depth, patch, 5, 1
        rope = VggtRotary()
        self.patch_embed = Dino(dim, patch)
        self.frame_blocks = nn.ModuleList(Block(dim, heads, self.attention, rope=rope) for _ in range(depth))
        self.global_blocks = nn.ModuleList(Block(dim, heads, self.attention, rope=rope) for _ in range(depth))
        self.special = nn.Parameter(torch.randn(1, 2, 5, dim))  # for the first frame, and for all others

    def embed(self, images, first=True):
        batch, frames = images.shape[:2]
        x, pos = self.patch_embed(images.flatten(0, 1))
        kind = torch.ones(frames, dtype=torch.long)
        kind[0] = 0 if first else 1
        special = self.special[:, kind].expand(batch, -1, -1, -1).flatten(0, 1)
        pos = torch.cat((torch.zeros_like(pos[:, :1]).expand(-1, 5, -1), pos + 1), dim=1)
        return torch.cat((special, x), dim=1), pos

    def forward(self, images):
        batch, frames = images.shape[:2]
        x, pos = self.embed(images)
        size, outputs = x.shape[1], []
        for i in range(self.depth):
            x = self.frame(i, x.reshape(batch * frames, size, -1), pos)
            x = self.all(i, x.reshape(batch, frames * size, -1), pos.reshape(batch, frames * size, 2))
            outputs.append(x.reshape(batch, frames, size, -1))
        return outputs

    def frame(self, i, x, pos):
        return self.frame_blocks[i](x, pos=pos)

    def all(self, i, x, pos):
        return self.global_blocks[i](x, pos=pos)


class CameraHead(nn.Module):
    attention = Attention

    def __init__(self, dim=64):
        super().__init__()
        self.trunk_depth = 2
        self.trunk = nn.ModuleList(Block(dim, 2, self.attention, qk_norm=False) for _ in range(self.trunk_depth))
        self.pose = nn.Linear(dim, 9)

    def forward(self, x):
        for _ in range(4):
            for block in self.trunk:
                x = block(x)
        return self.pose(x)


class Vggt(nn.Module):
    aggregator_class, head_class = Aggregator, CameraHead

    def __init__(self, **size):
        super().__init__()
        self.aggregator = self.aggregator_class(**size)
        dim = self.aggregator.special.shape[-1]
        self.camera_head, self.depth_head = self.head_class(dim), nn.Linear(dim, 2)

    def forward(self, images):
        tokens = self.aggregator(images)[-1]
        return {"pose": self.camera_head(tokens[:, :, 0]), "depth": self.depth_head(tokens[:, :, 5:])}


# Copies of VGGT with other attention.


class FastAggregator(Aggregator):
    attention = FastAttention

    def all(self, i, x, pos):
        return self.global_blocks[i](x, pos=pos, global_merging=i if i else None)


class FastVggt(Vggt):
    aggregator_class = FastAggregator


class Aggregator4d(Aggregator):
    attention = Attention4d
    dyn_masks = None

    def frame(self, i, x, pos):
        return self.frame_blocks[i](x, pos=pos, is_frame_attn=True, layer_id=i, dyn_masks=self.dyn_masks)[0]

    def all(self, i, x, pos):
        x, self.q, self.k = self.global_blocks[i](x, pos=pos, is_frame_attn=False, layer_id=i, dyn_masks=self.dyn_masks)
        return x


class Vggt4d(Vggt):
    aggregator_class = Aggregator4d

    def forward(self, images, dyn_masks=None):
        self.aggregator.dyn_masks = dyn_masks
        out = super().forward(images)
        return {**out, "q": self.aggregator.__dict__.pop("q"), "k": self.aggregator.__dict__.pop("k")}


# StreamVGGT: dense causal masks in batch mode, pairs of 5-D tensors as cache.


def causal_mask(frames, size, like, low):
    frame = torch.arange(frames * size) // size
    return (frame[:, None] < frame[None]).to(like.dtype) * low


class StreamAggregator(Aggregator):
    attention = StreamAttention

    def forward(self, images, past_key_values=None, use_cache=False, past_frame_idx=0):
        batch, frames = images.shape[:2]
        first = True
        if use_cache and past_key_values[0] is not None:
            _, _, past, _, _ = past_key_values[0][0].shape
            first = past == 0
        x, pos = self.embed(images, first)
        size, channels = x.shape[1:]
        outputs = []
        for i in range(self.depth):
            x = self.frame(i, x.reshape(batch * frames, size, channels), pos)
            cached = {"past_key_values_block": past_key_values[i], "use_cache": True} if use_cache else {}
            x, _, new, *state = self._process_global_attention(x, batch, frames, size, channels, i, pos=pos, **cached)
            outputs += new
            if use_cache:
                past_key_values[i] = state[0]
        return (outputs, past_key_values) if use_cache else outputs

    def _process_global_attention(
        self, tokens, B, S, P, C, global_idx, pos=None, past_key_values_block=None, use_cache=False, past_frame_idx=0
    ):
        tokens, pos = tokens.reshape(B, S * P, C), pos.reshape(B, S * P, 2)
        block = self.global_blocks[global_idx]
        if use_cache:
            x, state = block(tokens, pos=pos, attn_mask=None, past_key_values=past_key_values_block, use_cache=True)
            return x, global_idx + 1, [x.reshape(B, S, P, C)], state
        x = block(tokens, pos=pos, attn_mask=causal_mask(S, P, tokens, torch.finfo(tokens.dtype).min))
        return x, global_idx + 1, [x.reshape(B, S, P, C)]


class StreamCameraHead(CameraHead):
    attention = StreamAttention

    def forward(self, x, past=None):
        for _ in range(4):
            for i, block in enumerate(self.trunk):
                if past is None:
                    x = block(x, attn_mask=causal_mask(x.shape[1], 1, x, torch.finfo(x.dtype).min))
                else:  # all four iterations share a cache
                    x, past[i] = block(x, attn_mask=None, past_key_values=past[i], use_cache=True)
        return self.pose(x) if past is None else (self.pose(x), past)


class StreamVggt(Vggt):
    aggregator_class, head_class = StreamAggregator, StreamCameraHead

    def inference(self, frames):
        past, past_camera = [None] * self.aggregator.depth, [None] * self.camera_head.trunk_depth
        results = []
        for i, image in enumerate(frames):
            tokens, past = self.aggregator(image[:, None], past_key_values=past, use_cache=True, past_frame_idx=i)
            pose, past_camera = self.camera_head(tokens[-1][:, :, 0], past_camera)
            results.append({"pose": pose, "depth": self.depth_head(tokens[-1][:, :, 5:])})
        self.past = past
        return results


# STream3R: masks by mode, lists [k, v] as cache, blocks called positionally under checkpointing.


class Stream3rAggregator(Aggregator):
    attention = Stream3rAttention

    def _create_attn_mask(self, S, P, mode, dtype, device):
        if mode == "full":
            return None
        if mode not in ("causal", "window"):
            raise NotImplementedError(mode)
        query, key = (torch.arange(S * P) // P)[:, None], (torch.arange(S * P) // P)[None]
        seen = query >= key
        if mode == "window":
            seen &= (key == 0) | (query - key < 5)
        return torch.zeros(S * P, S * P, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))

    def forward(self, images, mode="causal", kv_cache_list=None):
        batch, frames = images.shape[:2]
        x, pos = self.embed(images, first=kv_cache_list is None or kv_cache_list[0][0] is None)
        size, outputs = x.shape[1], []
        mask = None if kv_cache_list is not None else self._create_attn_mask(frames, size, mode, x.dtype, x.device)
        for i in range(self.depth):
            x = checkpoint(self.frame_blocks[i], x.reshape(batch * frames, size, -1), pos, use_reentrant=False)
            x, p = x.reshape(batch, frames * size, -1), pos.reshape(batch, frames * size, 2)
            if kv_cache_list is None:
                x = checkpoint(self.global_blocks[i], x, p, mask, use_reentrant=False)
            else:
                x, kv_cache_list[i] = checkpoint(
                    self.global_blocks[i], x, p, mask, kv_cache_list[i], use_reentrant=False
                )
            outputs.append(x.reshape(batch, frames, size, -1))
        return outputs if kv_cache_list is None else (outputs, kv_cache_list)


class Stream3rCameraHead(CameraHead):
    attention = Stream3rAttention

    def forward(self, x, mode="causal", kv_cache_list=None):
        frames = x.shape[1]
        mask = (
            None
            if kv_cache_list is not None
            else Stream3rAggregator._create_attn_mask(self, frames, 1, mode, x.dtype, x.device)
        )
        for step in range(4):
            for i, block in enumerate(self.trunk):
                if kv_cache_list is None:
                    x = block(x, attn_mask=mask)
                else:
                    x, kv_cache_list[step][i] = block(x, attn_mask=mask, kv_cache=kv_cache_list[step][i])
        return self.pose(x)


class Stream3r(Vggt):
    aggregator_class, head_class = Stream3rAggregator, Stream3rCameraHead

    def forward(self, images, mode="causal", caches=None):
        if caches is None:
            tokens = self.aggregator(images, mode)[-1]
            return {"pose": self.camera_head(tokens[:, :, 0], mode), "depth": self.depth_head(tokens[:, :, 5:])}
        tokens, caches[0] = self.aggregator(images, mode, caches[0])
        pose = self.camera_head(tokens[-1][:, :, 0], mode, caches[1])
        return {"pose": pose, "depth": self.depth_head(tokens[-1][:, :, 5:])}


class Session:
    """Frame by frame; in window mode the cache is cut to frame 0 and the last five after every frame."""

    def __init__(self, model, mode):
        self.model, self.mode = model, mode
        depth, trunk = model.aggregator.depth, model.camera_head.trunk_depth
        self.caches = [
            [[None, None] for _ in range(depth)],
            [[[None, None] for _ in range(trunk)] for _ in range(4)],
        ]

    def forward_stream(self, image):
        out = self.model(image[:, None], self.mode, self.caches)
        if self.mode == "window":
            size = out["depth"].shape[2] + 5
            self.cut(self.caches[0], size)
            for step in self.caches[1]:
                self.cut(step, 1)
        return out

    @staticmethod
    def cut(caches, size):
        for pair in caches:
            for part in range(2):
                x = pair[part]
                pair[part] = torch.cat((x[:, :, :size], x[:, :, max(size, x.size(2) - 5 * size) :]), dim=2)
