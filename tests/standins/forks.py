"""Stand-ins for TTT3R's loops and for forks of it, which keep its names and read its attention maps in other ways."""

from types import SimpleNamespace

import torch
from torch import nn

from .croco import Cut3rSteps, Ttt3rBlock, Ttt3rCrossAttention


class Ttt3rSteps(Cut3rSteps):
    """The loops ask for all maps; :meth:`rate` is what a fork makes of those of the state's attention to the image."""

    block = Ttt3rBlock
    kinds = ("cut3r", "ttt3r")

    def __init__(self, **size):
        super().__init__(**size)
        self.config = SimpleNamespace(model_update_type=self.kinds[-1])

    def _init_state(self, image_tokens, image_pos):
        state = self.register_tokens.weight[None].expand(len(image_tokens), -1, -1)
        grid = torch.cartesian_prod(torch.arange(state.shape[1] // 2), torch.arange(2)).to(state.device)
        return state, grid.expand(len(state), -1, -1)

    def _decoder(self, state, state_pos, image, image_pos, return_attn):
        outputs, maps = [], []
        for state_block, image_block in zip(self.dec_blocks_state, self.dec_blocks, strict=True):
            new, _, *own = state_block(state, image, state_pos, image_pos, return_attn=return_attn)
            image, _, *other = image_block(image, state, image_pos, state_pos, return_attn=return_attn)
            state = new
            outputs.append((state, image))
            maps.append((*own, *other))
        return zip(*outputs, strict=True), zip(*maps, strict=True)

    def _recurrent_rollout(
        self, state_feat, state_pos, current_feat, current_pos, pose_feat, pose_pos, init_state_feat,
        img_mask=None, reset_mask=None, update=None, return_attn=False,
    ):  # fmt: skip
        image = torch.cat((pose_feat, self.decoder_embed(current_feat)), dim=1)
        pos = torch.cat((pose_pos, current_pos), dim=1)
        (states, images), maps = self._decoder(state_feat, state_pos, image, pos, return_attn)
        return self.dec_norm_state(states[-1]), [self.dec_norm(images[-1])], *maps

    def _forward_decoder_step(
        self, views, i, feat_i, pos_i, shape_i, init_state_feat, init_mem, state_feat, state_pos, mem
    ):
        result, state, mem, _ = self._step(views[i], i == 0, feat_i, pos_i, state_feat, state_pos, mem, False)
        return result, (state, mem)

    def _step(self, view, first, feat, pos, state, state_pos, mem, return_attn):
        feature = self.decoder_embed(feat).mean(1, keepdim=True)
        pose = self.pose_token.expand(len(feat), -1, -1) if first else self.pose_retriever.inquire(feature, mem)
        new, dec, *maps = self._recurrent_rollout(
            state, state_pos, feat, pos, pose, torch.full_like(pos[:, :1], -1), state, img_mask=view["img_mask"],
            reset_mask=view["reset"], update=view["update"], return_attn=return_attn,
        )  # fmt: skip
        new_mem = self.pose_retriever.update_mem(mem, feature, dec[-1][:, :1])
        return {"pts3d": self.head(dec[-1])}, new, new_mem, maps

    def rate(self, maps, new, old, feat):
        """The learning rate ``[B, S, 1]`` of a frame that is not the first; maps of the state's cross-attention."""
        return 1.0 if self.config.model_update_type == "cut3r" else self.mean_rate(maps)

    def mean_rate(self, maps):
        return torch.stack(maps).mean((0, 2, 4)).sigmoid()[..., None]

    def start(self):
        """What a fork forgets before a clip."""

    def _forward_impl(self, views, ret_state=False):
        self.start()
        _, feats, positions = self._encode_views(views)
        state, state_pos = self._init_state(feats[-1][0], positions[0])
        mem, outputs = self.pose_retriever.mem.expand(len(state), -1, -1), []
        for i, (view, feat, pos) in enumerate(zip(views, feats[-1], positions, strict=True)):
            asks = self.config.model_update_type != "filt3r"
            result, new, mem, maps = self._step(view, i == 0, feat, pos, state, state_pos, mem, asks)
            rate = 1.0 if i == 0 else self.rate(maps[1], new, state, feat)
            state = rate * new + (1 - rate) * state
            outputs.append({**result, "state": state})
        return outputs, views

    def forward(self, views, ret_state=False):
        return self._forward_impl(views, ret_state)[0]

    def forward_recurrent_lighter(self, views, device="cuda", ret_state=False):
        return self._forward_impl([{n: v.to(device) for n, v in view.items()} for view in views])[0]


class ReCal3r(Ttt3rSteps):
    """Entropy of the rows without the pose token, distance to the first state, and a running pressure."""

    kinds = ("cut3r", "ttt3r", "recal3r")

    def start(self):
        self.__dict__.pop("pressure", None)

    def rate(self, maps, new, old, feat):
        if self.config.model_update_type != "recal3r":
            return super().rate(maps, new, old, feat)
        mean = self.mean_rate(maps)
        self.pressure = 0.9 * getattr(self, "pressure", torch.zeros_like(mean)) + 0.1 * mean
        rows = torch.stack(maps)[..., 1:].softmax(-1)  # [L, B, H, S, N]
        entropy = -(rows * rows.log()).sum(-1).mean((0, 2)) / torch.tensor(float(rows.shape[-1])).log()
        rank = (old - self.register_tokens.weight).norm(dim=-1).argsort(-1).argsort(-1) / old.shape[1]
        doubt = rank * entropy.argsort(-1).argsort(-1) / old.shape[1]
        return (mean * torch.exp(-self.pressure) * (1 - doubt[..., None])).clamp(0, 1)


class Ttsa3r(Ttt3rSteps):
    """The image token that changed most where the state looks, and how far the state itself moved."""

    def start(self):
        self.before = None

    def rate(self, maps, new, old, feat):
        return self.spatial_rate(maps, new, feat)

    def spatial_rate(self, maps, new, feat):
        before, self.before = self.before, (new, feat)
        if before is None:
            return 1.0
        moved = (new - before[0]).norm(dim=-1)
        change = 1 - torch.cosine_similarity(feat, before[1], dim=-1)  # [B, N]
        looks = torch.cat(maps).permute(2, 3, 0, 1).flatten(2)[None, :, 1:].mean(-1).abs()  # as for a batch of one
        spatial = (looks * change[:, None]).amax(-1).sigmoid()
        return ((moved / moved.mean() - 1.5).sigmoid() * spatial)[..., None]


class MemixCrossAttention(Ttt3rCrossAttention):
    def forward(self, query, key, value, qpos, kpos, return_attn=False, attn_mask=None):
        q, k, v = self.heads(query, key, value)
        q, k = self.turn(q, qpos, torch.float32), self.turn(k, kpos, torch.float32)
        mask = None if attn_mask is None else attn_mask[:, None].to(q.dtype)
        if not return_attn:
            return self.finish(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale))
        logits = q @ k.mT * self.scale
        logits = logits if mask is None else logits + mask
        return self.finish(logits.softmax(-1) @ v), logits.detach().clone()


class MemixBlock(Ttt3rBlock):
    def __init__(self, dim, num_heads, rope):
        super().__init__(dim, num_heads, rope)
        self.cross_attn = MemixCrossAttention(dim, rope, num_heads)

    def forward(self, x, y, xpos, ypos, return_attn=False, attn_mask=None):
        own = self.attn(self.norm1(x), xpos, return_attn=return_attn)
        x = x + (own[0] if return_attn else own)
        y_ = self.norm_y(y)
        other = self.cross_attn(self.norm2(x), y_, y_, xpos, ypos, return_attn=return_attn, attn_mask=attn_mask)
        x = x + (other[0] if return_attn else other)
        x = x + self.mlp(self.norm3(x))
        return (x, y, own[1], other[1]) if return_attn else (x, y)


class Memix(Ttsa3r):
    """Writes only where state and image agree least; the pose token looks at those state tokens only."""

    block = MemixBlock
    kinds = ("cut3r", "ttt3r", "memix")

    def _decoder(self, state, state_pos, image, image_pos, return_attn):
        seen = self._written(state, image[:, 1:])[..., 0] > 0
        mask = image.new_zeros(len(image), image.shape[1], state.shape[1])
        mask[:, 0] = (~seen) * torch.finfo(mask.dtype).min
        outputs, maps = [], []
        for state_block, image_block in zip(self.dec_blocks_state, self.dec_blocks, strict=True):
            new, _, *own = state_block(state, image, state_pos, image_pos, return_attn)
            image, _, *other = image_block(image, state, image_pos, state_pos, return_attn, mask)
            state = new
            outputs.append((state, image))
            maps.append((*own, *other) or (None,) * 4)
        return zip(*outputs, strict=True), zip(*maps, strict=True)

    def _written(self, state, image):
        score = (state * image.mean(1, keepdim=True)).sum(-1)
        return torch.zeros_like(score).scatter(1, score.topk(6, largest=False).indices, 1.0)[..., None]

    def rate(self, maps, new, old, feat):
        kind = self.config.model_update_type
        rate = 1.0 if kind == "cut3r" else self.mean_rate(maps)
        rate = self.spatial_rate(maps, new, feat) if kind == "memix" else rate
        return rate * self._written(new, self.decoder_embed(feat))


class Filt3r(Ttt3rSteps):
    """A gain from the variance of the state's own innovations; maps are not asked for."""

    kinds = ("cut3r", "ttt3r", "filt3r")

    def start(self):
        self.variance = 1.5

    def rate(self, maps, new, old, feat):
        if self.config.model_update_type != "filt3r":
            return super().rate(maps, new, old, feat)
        expected = self.variance + (new - old).pow(2).mean(-1)
        gain = expected / (expected + 1.0)
        self.variance = (1 - gain) ** 2 * expected + gain**2
        return gain[..., None]


FORKS = (Ttt3rSteps, ReCal3r, Ttsa3r, Memix, Filt3r)


def views(count, batch=1, height=32, width=48):
    yes = torch.ones(batch, dtype=torch.bool)
    return [
        {"img": torch.rand(batch, 3, height, width), "true_shape": torch.tensor([[height, width]] * batch),
         "img_mask": yes, "update": yes, "reset": ~yes} for _ in range(count)
    ]  # fmt: skip
