"""Stand-ins for the CroCo family: DUSt3R, Easi3R, CUT3R, TTT3R."""

import torch
import torch.nn.functional as F
from torch import nn

from .common import Mlp, Patches, Rotary, heads_of, joined, softmax_attention


class Base(nn.Module):
    def __init__(self, dim, rope, num_heads, cross=False):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        if cross:
            self.projq, self.projk, self.projv = (nn.Linear(dim, dim) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)
        self.rope = rope

    def heads(self, *inputs):
        if len(inputs) == 1:
            return [heads_of(x, self.num_heads) for x in self.qkv(inputs[0]).chunk(3, dim=-1)]
        projections = (self.projq, self.projk, self.projv)
        return [heads_of(p(x), self.num_heads) for p, x in zip(projections, inputs, strict=True)]

    def turn(self, x, pos, dtype=None):
        if self.rope is None or pos is None:
            return x
        return self.rope(x.to(dtype or x.dtype), pos).to(x.dtype)

    def finish(self, x):
        return self.proj_drop(self.proj(joined(x)))


class Attention(Base):
    def forward(self, x, xpos):
        q, k, v = self.heads(x)
        return self.finish(softmax_attention(self.turn(q, xpos), self.turn(k, xpos), v, self.scale)[0])


class CrossAttention(Base):
    def __init__(self, dim, rope, num_heads):
        super().__init__(dim, rope, num_heads, cross=True)

    def forward(self, query, key, value, qpos, kpos):
        q, k, v = self.heads(query, key, value)
        return self.finish(softmax_attention(self.turn(q, qpos), self.turn(k, kpos), v, self.scale)[0])


class Block(nn.Module):
    def __init__(self, dim, num_heads, rope, attention=Attention):
        super().__init__()
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim)
        self.attn = attention(dim, rope, num_heads)

    def forward(self, x, xpos):
        x = x + self.attn(self.norm1(x), xpos)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(Block):
    def __init__(self, dim, num_heads, rope, attention=Attention, cross=CrossAttention):
        super().__init__(dim, num_heads, rope, attention)
        self.norm3, self.norm_y = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.cross_attn = cross(dim, rope, num_heads)

    def forward(self, x, y, xpos, ypos):
        x = x + self.attn(self.norm1(x), xpos)
        y_ = self.norm_y(y)
        x = x + self.cross_attn(self.norm2(x), y_, y_, xpos, ypos)
        return x + self.mlp(self.norm3(x)), y


class Dust3r(nn.Module):
    """Two views; an encoder shared by both, two decoders that look at each other."""

    block, decoder_block = Block, DecoderBlock

    def __init__(self, enc_dim=64, enc_heads=4, dec_dim=48, dec_heads=2, depth=2, dec_depth=2):
        super().__init__()
        rope = Rotary()
        self.patch_embed = Patches(enc_dim, 16)
        self.enc_blocks = nn.ModuleList(self.block(enc_dim, enc_heads, rope) for _ in range(depth))
        self.enc_norm, self.decoder_embed = nn.LayerNorm(enc_dim), nn.Linear(enc_dim, dec_dim)
        self.dec_blocks = nn.ModuleList(self.decoder_block(dec_dim, dec_heads, rope) for _ in range(dec_depth))
        self.dec_blocks2 = nn.ModuleList(self.decoder_block(dec_dim, dec_heads, rope) for _ in range(dec_depth))
        self.dec_norm = nn.LayerNorm(dec_dim)
        self.head1, self.head2 = nn.Linear(dec_dim, 4), nn.Linear(dec_dim, 4)

    def encode(self, image):
        x, pos = self.patch_embed(image)
        for block in self.enc_blocks:
            x = block(x, pos)
        return self.decoder_embed(self.enc_norm(x)), pos

    def forward(self, view1, view2):
        (f1, pos1), (f2, pos2) = self.encode(view1["img"]), self.encode(view2["img"])
        for one, two in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            new, _ = one(f1, f2, pos1, pos2)
            f2, _ = two(f2, f1, pos2, pos1)
            f1 = new
        return {"pts3d": self.head1(self.dec_norm(f1))}, {"pts3d": self.head2(self.dec_norm(f2))}


class Dust3rSteps(Dust3r):
    """DUSt3R's forward pass in the steps that it is made of, under their names."""

    def __init__(self, **size):
        super().__init__(**size)
        self.patch_embed.patch_size = (16, 16)

    def _encode_image(self, image, true_shape):
        assert true_shape.shape == (len(image), 2)
        x, pos = self.patch_embed(image)
        for block in self.enc_blocks:
            x = block(x, pos)
        return self.enc_norm(x), pos, None

    def _encode_symmetrized(self, view1, view2):
        sides = [(v["true_shape"], *self._encode_image(v["img"], v["true_shape"])[:2]) for v in (view1, view2)]
        return tuple(zip(*sides, strict=True))

    def forward(self, view1, view2):
        _, (f1, f2), (pos1, pos2) = self._encode_symmetrized(view1, view2)
        f1, f2 = self.decoder_embed(f1), self.decoder_embed(f2)
        for one, two in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            (f1, _), (f2, _) = one(f1, f2, pos1, pos2), two(f2, f1, pos2, pos1)
        res1, res2 = ({"pts3d": head(self.dec_norm(f))} for head, f in ((self.head1, f1), (self.head2, f2)))
        return res1, {"pts3d_in_other_view": res2["pts3d"]}


# Easi3R: masks in, logits out, everywhere.


def _zeroed(probabilities, qmask, kmask):
    blocked = (qmask[:, None] < 0.5) & (kmask.mT[:, None] > 0.5)
    return torch.where(blocked, 0.0, probabilities)


class Easi3rAttention(Base):
    def forward(self, x, xpos, xmask=None, return_attn=False):
        q, k, v = self.heads(x)
        logits = self.turn(q, xpos) @ self.turn(k, xpos).mT * self.scale
        p = logits.softmax(-1)
        if xmask is not None:
            p = _zeroed(p, xmask, xmask)
        out = self.finish(p @ v)
        return (out, logits.detach().clone()) if return_attn else out


class Easi3rCrossAttention(CrossAttention):
    def forward(self, query, key, value, qpos, kpos, qmask=None, kmask=None):
        q, k, v = self.heads(query, key, value)
        logits = self.turn(q, qpos) @ self.turn(k, kpos).mT * self.scale
        p = logits.softmax(-1)
        if qmask is not None and kmask is not None:
            p = _zeroed(p, qmask, kmask)
        return self.finish(p @ v), logits.detach().clone()


class Easi3rBlock(Block):
    def __init__(self, dim, num_heads, rope):
        super().__init__(dim, num_heads, rope, Easi3rAttention)


class Easi3rDecoderBlock(DecoderBlock):
    def __init__(self, dim, num_heads, rope):
        super().__init__(dim, num_heads, rope, Easi3rAttention, Easi3rCrossAttention)

    def forward(self, x, y, xpos, ypos, xmask, ymask, self_mask):
        out, own = self.attn(self.norm1(x), xpos, xmask=self_mask, return_attn=True)
        x = x + out
        y_ = self.norm_y(y)
        out, cross = self.cross_attn(self.norm2(x), y_, y_, xpos, ypos, qmask=xmask, kmask=ymask)
        x = x + out
        return x + self.mlp(self.norm3(x)), y, own, cross


class Easi3r(Dust3r):
    """Needs 12 decoder layers of 12 heads: the maps have 144 channels."""

    block, decoder_block = Easi3rBlock, Easi3rDecoderBlock

    def __init__(self):
        super().__init__(dec_dim=48, dec_heads=12, dec_depth=12)

    def forward(self, view1, view2):
        (f1, pos1), (f2, pos2) = self.encode(view1["img"]), self.encode(view2["img"])
        shape1, shape2 = (torch.tensor(v["img"].shape[-2:])[None].repeat(len(v["img"]), 1) for v in (view1, view2))
        masks = [self._mask(v) for v in (view1, view2)]
        maps = []
        for one, two in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            new, _, _, cross1 = one(f1, f2, pos1, pos2, *masks, None)
            f2, _, _, cross2 = two(f2, f1, pos2, pos1, None, None, None)
            f1 = new
            maps.append((cross1, cross2))
        cross1, cross2 = zip(*maps, strict=True)
        res1, res2 = {"pts3d": self.head1(self.dec_norm(f1))}, {"pts3d": self.head2(self.dec_norm(f2))}
        res1["cross_atten_maps_k"] = self._get_attn_k(torch.cat(cross1), shape1)
        res2["cross_atten_maps_k"] = self._get_attn_k(torch.cat(cross2), shape2)
        return res1, res2

    def _mask(self, view):
        if "atten_mask" not in view:
            return None
        return F.max_pool2d(view["atten_mask"].float()[:, None], 16).flatten(2).mT

    def _get_attn_k(self, attn, shape):
        rows, columns = (int(x) // 16 for x in shape[0])
        return attn.mean(2).permute(2, 0, 1).reshape(-1, rows, columns, 144)


# CUT3R: fused attention; the encoder rotates in half precision, the decoders in single; TTT3R also returns logits.


def _fused(self, q, k, v):
    return self.finish(F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p, scale=self.scale))


class EncoderAttention(Base):
    def forward(self, x, xpos):
        q, k, v = self.heads(x)
        return _fused(self, self.turn(q, xpos, torch.float16), self.turn(k, xpos, torch.float16), v)


class Cut3rAttention(Base):
    def forward(self, x, xpos):
        q, k, v = self.heads(x)
        return _fused(self, self.turn(q, xpos, torch.float32), self.turn(k, xpos, torch.float32), v)


class Cut3rCrossAttention(CrossAttention):
    def forward(self, query, key, value, qpos, kpos):
        q, k, v = self.heads(query, key, value)
        return _fused(self, self.turn(q, qpos, torch.float32), self.turn(k, kpos, torch.float32), v)


class Ttt3rAttention(Base):
    def forward(self, x, xpos, return_attn=False):
        q, k, v = self.heads(x)
        q, k = self.turn(q, xpos, torch.float32), self.turn(k, xpos, torch.float32)
        if not return_attn:
            return _fused(self, q, k, v)
        out, logits = softmax_attention(q, k, v, self.scale)
        return self.finish(out), logits.detach().clone()


class Ttt3rCrossAttention(CrossAttention):
    def forward(self, query, key, value, qpos, kpos, return_attn=False):
        q, k, v = self.heads(query, key, value)
        q, k = self.turn(q, qpos, torch.float32), self.turn(k, kpos, torch.float32)
        if not return_attn:
            return _fused(self, q, k, v)
        out, logits = softmax_attention(q, k, v, self.scale)
        return self.finish(out), logits.detach().clone()


class Cut3rBlock(DecoderBlock):
    def __init__(self, dim, num_heads, rope):
        super().__init__(dim, num_heads, rope, Cut3rAttention, Cut3rCrossAttention)


class Ttt3rBlock(DecoderBlock):
    def __init__(self, dim, num_heads, rope):
        super().__init__(dim, num_heads, rope, Ttt3rAttention, Ttt3rCrossAttention)

    def forward(self, x, y, xpos, ypos, return_attn=False):
        if not return_attn:
            return *super().forward(x, y, xpos, ypos), None, None
        out, own = self.attn(self.norm1(x), xpos, return_attn=True)
        x = x + out
        y_ = self.norm_y(y)
        out, cross = self.cross_attn(self.norm2(x), y_, y_, xpos, ypos, return_attn=True)
        x = x + out
        return x + self.mlp(self.norm3(x)), y, own, cross


class Memory(nn.Module):
    """The pose memory: blocks without RoPE, one query or one key."""

    def __init__(self, dim, block):
        super().__init__()
        self.mem = nn.Parameter(torch.randn(1, 6, dim))
        self.write_blocks = nn.ModuleList([block(dim, 2, None)])
        self.read_blocks = nn.ModuleList([block(dim, 2, None)])

    def forward(self, pose):
        mem = self.write_blocks[0](self.mem.expand(len(pose), -1, -1), pose, None, None)[0]
        return self.read_blocks[0](pose, mem, None, None)[0]


class Cut3r(nn.Module):
    """A recurrent state that attends to images and back; the pose token has position -1."""

    block, learns_rate = Cut3rBlock, False

    def __init__(self, enc_dim=64, dec_dim=96, state_tokens=10):
        super().__init__()
        self.rope = Rotary(quantise=False)
        self.patch_embed = Patches(enc_dim, 16)
        self.enc_blocks = nn.ModuleList(Block(enc_dim, 4, self.rope, EncoderAttention) for _ in range(2))
        self.enc_norm, self.decoder_embed = nn.LayerNorm(enc_dim), nn.Linear(enc_dim, dec_dim)
        self.register_tokens = nn.Embedding(state_tokens, dec_dim)
        self.pose_token = nn.Parameter(torch.randn(1, 1, dec_dim))
        self.pose_retriever = Memory(dec_dim, self.block)
        self.dec_blocks = nn.ModuleList(self.block(dec_dim, 4, self.rope) for _ in range(2))
        self.dec_blocks_state = nn.ModuleList(self.block(dec_dim, 2, self.rope) for _ in range(2))  # 2 heads of 48
        self.head = nn.Linear(dec_dim, 4)

    def forward(self, views):
        state = self.register_tokens.weight[None].expand(len(views[0]["img"]), -1, -1)
        state_pos = torch.cartesian_prod(torch.arange(len(state[0]) // 2), torch.arange(2)).expand(len(state), -1, -1)
        outputs = []
        for step, view in enumerate(views):
            x, pos = self.patch_embed(view["img"])
            for block in self.enc_blocks:
                x = block(x, pos)
            pose = self.pose_retriever(self.pose_token.expand(len(x), -1, -1))
            image = torch.cat((pose, self.decoder_embed(self.enc_norm(x))), dim=1)
            image_pos = torch.cat((torch.full_like(pos[:, :1], -1), pos), dim=1)
            new, logits = state, []
            for state_block, image_block in zip(self.dec_blocks_state, self.dec_blocks, strict=True):
                kwargs = {"return_attn": True} if self.learns_rate else {}
                result = state_block(new, image, state_pos, image_pos, **kwargs)
                image = image_block(image, new, image_pos, state_pos, **kwargs)[0]
                new = result[0]
                logits.append(result[-1])
            if self.learns_rate and step:
                rate = torch.stack(logits).mean((0, 2, 4)).sigmoid()[..., None]
                new = new * rate + state * (1 - rate)
            state = new
            outputs.append({"pts3d": self.head(image), "state": state})
        return outputs


class Ttt3r(Cut3r):
    block, learns_rate = Ttt3rBlock, True


class PoseMemory(Memory):
    """Read before a frame, written after it."""

    def inquire(self, feature, mem):
        return self.read_blocks[0](feature, mem, None, None)[0]

    def update_mem(self, mem, feature, pose):
        return self.write_blocks[0](mem, feature + pose, None, None)[0]


class Cut3rSteps(Cut3r):
    """CUT3R's rollout in the steps that its loops are made of, under their names."""

    def __init__(self, enc_dim=64, dec_dim=96, state_tokens=10):
        super().__init__(enc_dim, dec_dim, state_tokens)
        self.pose_retriever = PoseMemory(dec_dim, self.block)
        self.dec_norm_state, self.dec_norm = nn.LayerNorm(dec_dim), nn.LayerNorm(dec_dim)

    def _encode_views(self, views):
        feats, positions = [], []
        for view in views:
            x, pos = self.patch_embed(view["img"])
            for block in self.enc_blocks:
                x = block(x, pos)
            feats.append(self.enc_norm(x))
            positions.append(pos)
        return [view["true_shape"] for view in views], [feats], positions

    def _forward_encoder(self, views):
        shape, feats, pos = self._encode_views(views)
        state = self.register_tokens.weight[None].expand(len(views[0]["img"]), -1, -1)
        grid = torch.cartesian_prod(torch.arange(state.shape[1] // 2), torch.arange(2)).to(state.device)
        mem = self.pose_retriever.mem.expand(len(state), -1, -1)
        return (feats[-1], pos, shape), (state.clone(), mem.clone(), state, grid.expand(len(state), -1, -1), mem)

    def _recurrent_rollout(
        self, state_feat, state_pos, current_feat, current_pos, pose_feat, pose_pos, init_state_feat,
        img_mask=None, reset_mask=None, update=None,
    ):  # fmt: skip
        image = torch.cat((pose_feat, self.decoder_embed(current_feat)), dim=1)
        pos = torch.cat((pose_pos, current_pos), dim=1)
        state = state_feat
        for state_block, image_block in zip(self.dec_blocks_state, self.dec_blocks, strict=True):
            state, image = state_block(state, image, state_pos, pos)[0], image_block(image, state, pos, state_pos)[0]
        return self.dec_norm_state(state), [self.dec_norm(image)]

    def _forward_decoder_step(
        self, views, i, feat_i, pos_i, shape_i, init_state_feat, init_mem, state_feat, state_pos, mem
    ):
        feature = self.decoder_embed(feat_i).mean(1, keepdim=True)
        pose = self.pose_retriever.inquire(feature, mem) if i else self.pose_token.expand(len(feat_i), -1, -1)
        new, dec = self._recurrent_rollout(
            state_feat, state_pos, feat_i, pos_i, pose, torch.full_like(pos_i[:, :1], -1), init_state_feat,
            img_mask=views[i]["img_mask"], reset_mask=views[i]["reset"], update=views[i]["update"],
        )  # fmt: skip
        result = {"pts3d": self.head(dec[-1])}
        new_mem = self.pose_retriever.update_mem(mem, feature, dec[-1][:, :1])
        update = (views[i]["img_mask"] & views[i]["update"])[:, None, None]
        state, mem = torch.where(update, new, state_feat), torch.where(update, new_mem, mem)
        reset = views[i]["reset"][:, None, None]
        return result, (torch.where(reset, init_state_feat, state), torch.where(reset, init_mem, mem))

    def forward(self, views):
        (feat, pos, shape), (init_state, init_mem, state, state_pos, mem) = self._forward_encoder(views)
        outputs = []
        for i in range(len(views)):
            result, (state, mem) = self._forward_decoder_step(
                views, i, feat[i], pos[i], shape[i], init_state, init_mem, state, state_pos, mem
            )
            outputs.append({**result, "state": state})
        return outputs


def cut3r_steps(dtype=torch.float32):
    """A seeded :class:`Cut3rSteps` whose matrices are enlarged, so that its attention is not nearly uniform."""
    torch.manual_seed(0)
    model = Cut3rSteps().eval()
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(1.5)
    return model.to(dtype)
