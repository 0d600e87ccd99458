"""A key/value cache with a budget of tokens: which ones stay is decided token by token, and head by head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import gated_attention
from ..gates import MotionGate
from ..statistics.received import received_attention
from .cache import FrameKVCache, Slot, capturing, keys_of
from .eviction import Candidates, LayerBudgets, Policy, Score, policy_of, similarity_to_mean


class TokenKVCache(FrameKVCache):
    """Keys (after norm and RoPE) and values of past tokens, at most ``budget`` of them a head.

    As long as all tokens fit it is a :class:`FrameKVCache` without a window, bit for bit. Then what stays is moved into
    memory of ``budget`` tokens and one frame, which is never exceeded; every head has tokens of its own there, so that
    no mask is needed. Tokens leave in :meth:`attend`, once for each frame.

    Args:
        budget: tokens a head, anchors included; or a :class:`~gate4d.nn.eviction.LayerBudgets` shared with the caches
            of other layers.
        policy: ``"infinite"`` (InfiniteVGGT), ``"xstream"`` (XStreamVGGT), ``"evict3r"`` (Evict3R), ``"frame"`` (the
            frame that receives least attention leaves whole), ``"window"`` (the oldest leave), a
            :class:`~gate4d.nn.eviction.Policy`, or a score: a function of
            :class:`~gate4d.nn.eviction.Candidates` to ``[B, H or 1, n]``, of which the largest stay.
        anchors: leading frames that never leave; None is the policy's own number (1, for "window" 0).
        specials: leading tokens of every frame that stay when the frame's others go, beside the budget. Memory then
            grows with the frames by these few tokens.
        dtype: storage dtype; None is that of the values.

    Raises:
        ValueError, TypeError: an argument is out of range or of another kind.
    """

    def __init__(
        self,
        budget: int | LayerBudgets,
        policy: str | Policy | Score = "infinite",
        *,
        anchors: int | None = None,
        specials: int = 0,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(budget, LayerBudgets):
            budget = LayerBudgets(_checked_int("budget", budget, 1))
        self.budgets, self.layer = budget, budget.join()
        self.eviction = policy_of(policy)
        self.specials = _checked_int("specials", specials, 0)
        super().__init__(anchors=self.eviction.anchors if anchors is None else anchors, dtype=dtype)

    def reset(self) -> None:
        super().reset()
        self._store: tuple[Tensor, Tensor] | None = None  # k and v, [B, H, capacity, D]; None while all tokens fit
        self._ids: Tensor | None = None  # int64 [B, H or 1, count]: order of arrival of the tokens stored
        self._count = 0  # tokens stored
        self._fixed = 0  # of these, the leading ones that never leave
        self._mixed = 0  # frames stored last, whose special tokens are among the others
        self._received: Tensor | None = None  # fp32 [2, B, count]: sum of shares received, frames that saw the token

    def __repr__(self) -> str:
        return f"TokenKVCache(budget={self.budgets.budget}, frames_seen={self.frames_seen}, tokens={self.num_tokens})"

    @property
    def evicted(self) -> bool:
        """Whether tokens have left since the last reset, so that what is held are no whole frames."""
        return self._store is not None

    @property
    def num_frames(self) -> int:
        """Frames held, or once tokens have left: frames seen."""
        return super().num_frames if self._store is None else self.frames_seen

    @property
    def num_tokens(self) -> int:
        return super().num_tokens if self._store is None else self._count

    @property
    def frame_ids(self) -> tuple[int, ...]:
        """Ids of the frames of which a token is held, in any head of the first batch item."""
        if self._store is None:
            return super().frame_ids
        return tuple((self.token_ids[0] // max(1, self.tokens_per_frame)).unique().tolist())

    @property
    def token_ids(self) -> Tensor:
        """``[B, H or 1, num_tokens]`` int64: of each token held, how many came before it, in storage order."""
        if self._ids is None:
            held = self.pages()
            ids = torch.arange(self.num_tokens, device=held[0][0].device if held else None)
            return ids.expand(held[0][0].shape[0] if held else 1, 1, -1)
        return self._ids

    @property
    def nbytes(self) -> int:
        return super().nbytes if self._store is None else sum(x.untyped_storage().nbytes() for x in self._store)

    def pages(self) -> list[tuple[Tensor, Tensor]]:
        if self._store is None:
            return super().pages()
        k, v = self._store
        return [(k[:, :, : self._count], v[:, :, : self._count])]

    def stores(self, dtype: torch.dtype) -> torch.dtype:
        return super().stores(dtype) if self._store is None else self._store[1].dtype

    def reserve(self, k: Tensor, v: Tensor) -> None:
        if capturing(k):
            raise RuntimeError(
                "a cache with a budget cannot be captured into a CUDA graph: what stays depends on data."
            )
        if self._store is None:
            self._check_budget(k.shape[2])
            super().reserve(k, v)
            return
        self._check(k, v)
        self._open = None
        tokens = k.shape[2]
        self._grow(self._count + tokens)
        rows = torch.arange(self._next_id * tokens, (self._next_id + 1) * tokens, device=k.device)
        assert self._ids is not None
        self._ids = torch.cat((self._ids, rows.expand(*self._ids.shape[:2], -1)), 2)
        self._next_id += 1
        self._count += tokens
        self._mixed += 1
        self._reserved = True

    def claim(self, k: Tensor, v: Tensor) -> Slot:
        if self._store is None:
            return super().claim(k, v)
        self.reserve(k, v)
        self._open = Slot(self, *(x[:, :, self._count - k.shape[2] : self._count] for x in self._store))
        return self._open

    def write(self, k: Tensor, v: Tensor) -> None:
        if self._store is None:
            super().write(k, v)
            return
        for stored, new in zip(self._store, (k, v), strict=True):
            stored[:, :, self._count - k.shape[2] : self._count] = new.detach()
        self._reserved = False

    def attend(
        self, q: Tensor, *, gate: MotionGate | None = None, scale: float | None = None, backend: str = "auto"
    ) -> Tensor:
        """Attention of ``q [B, H, Nq, D]`` to what is held, ``[B, H, Nq, Dv]``; tokens beyond the budget leave.

        ``gate`` has key scores ``[B, num_tokens]`` in storage order; where heads hold tokens of their own
        (:attr:`token_ids` has H rows), ``[B * H, num_tokens]``, head by head.
        """
        policy = self.eviction
        self._check_committed()
        if policy.before:
            self._evict(q)
        out, lse = self._attend(q, gate, scale, backend)
        if policy.received and not self.frozen:
            self._note_received(q, lse, gate, scale)
        if not policy.before:
            self._evict(q)
        return out

    def add_scores(self, scores: Tensor) -> None:
        """Not of this cache: its policy sees queries, keys and attention received itself.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("add_scores belongs to a FrameKVCache; give a TokenKVCache a policy that scores tokens.")

    def _attend(self, q: Tensor, gate, scale, backend) -> tuple[Tensor, Tensor | None]:
        with_lse = self.eviction.received
        if self._store is None:
            return self._over_pages(q, gate, scale, backend, with_lse)
        ((k, v),) = self.pages()
        call: dict[str, Any] = {"scale": scale, "backend": backend, "return_aux": with_lse}
        dtype, q = q.dtype, q.to(k.dtype)
        if self.token_ids.shape[1] > 1 and gate is not None:
            rows, heads = q.shape[:2]
            folded = (x.flatten(0, 1)[:, None] for x in (q, k, v))
            result = gated_attention(*folded, gate=_by_head(gate, rows, heads, self._count), **call)
            result = (result[0], result[1].lse) if with_lse else (result, None)
            out, lse = (None if x is None else x[:, 0].unflatten(0, (rows, heads)) for x in result)
        else:
            result = gated_attention(q, k, v, gate=gate, **call)
            out, lse = (result[0], result[1].lse) if with_lse else (result, None)
        return out.to(dtype), lse

    def _note_received(self, q: Tensor, lse: Tensor | None, gate, scale) -> None:
        """Of each token held: its share of this frame's attention, 1 for an equal one."""
        assert lse is not None
        shares, start = [], 0
        for k, _ in self.pages():
            part = keys_of(gate, start, start + k.shape[2])
            start += k.shape[2]
            shares.append(received_attention(q.to(k.dtype), k, lse, gate=part, scale=scale).mean.float())
        share = torch.cat(shares, 1) * start
        seen = torch.stack((share, torch.ones_like(share)))
        if self._received is not None:
            seen[:, :, : self._received.shape[2]] += self._received
        self._received = seen

    def _check_budget(self, tokens: int) -> None:
        least = (self.anchors + self.eviction.newest) * tokens + 1
        if self.budgets.budget < least:
            newest = " and the newest one" if self.eviction.newest else ""
            raise ValueError(
                f"budget must be at least {least} tokens to hold {self.anchors} anchor frames{newest}, of {tokens} "
                f"tokens each, and a token more; got {self.budgets.budget}."
            )

    def _check(self, k: Tensor, v: Tensor) -> None:
        if self._store is None:
            super()._check(k, v)
            return
        for name, x, held in zip("kv", (k, v), self._store, strict=True):
            wanted = [*held.shape[:2], self.tokens_per_frame, held.shape[3]]
            if list(x.shape) != wanted:
                raise ValueError(
                    f"{name} must have the shape {wanted} of the frames before, got {list(x.shape)}: frames of another "
                    "resolution or batch need a reset() of the cache."
                )

    def _evict(self, q: Tensor) -> None:
        """Let the tokens beyond the budget go. Storage: those that never leave, then the others in order of arrival."""
        beside = self.specials * max(0, self.frames_seen - self.anchors)
        budget = self.budgets.of(self.layer)
        if self.frozen or self.num_tokens - beside <= budget:
            return
        if self._store is None:
            self._leave_pages()
        self._move_specials()
        assert self._store is not None
        policy, first, tokens = self.eviction, self._fixed, self.tokens_per_frame - self.specials
        end = self._count - (tokens if policy.newest else 0)
        received = None if self._received is None else (self._received[0] / self._received[1])[:, first:end]
        k, v = (x[:, :, first:end] for x in self._store)
        free = Candidates(k, v, q.to(k.dtype), received, tokens)
        keep = min(max(0, budget + beside - first - (self._count - end)), end - first)
        if policy.whole_frames:
            keep -= keep % max(1, tokens)
        if self.budgets.by_diversity:
            self.budgets.note(self.layer, similarity_to_mean(k).mean())
        score = self._checked(policy.score(free), free)
        kept = score.topk(keep, dim=2).indices.sort(2).values + first  # [B, H or 1, keep]
        later = torch.arange(end, self._count, device=kept.device).expand(*kept.shape[:2], -1)
        self._gather(first, torch.cat((kept, later), 2))

    def _checked(self, score: Any, free: Candidates) -> Tensor:
        rows, heads, count = free.k.shape[:3]
        # What is known of attention received is a mean over heads, of the same tokens.
        wanted = (1,) if self.eviction.received else (heads, 1)
        if not isinstance(score, Tensor) or tuple(score.shape) not in [(rows, n, count) for n in wanted]:
            got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
            heads_or_1 = " or ".join(map(str, wanted))
            raise ValueError(f"policy must return scores [{rows}, {heads_or_1}, {count}], got {got}.")
        return score

    def _leave_pages(self) -> None:
        """From pages of frames to one store, with room for the next frame."""
        held, ids = super().pages(), self.token_ids.contiguous()
        self._count = ids.shape[2]
        room = max(self._count, self.budgets.budget + self.tokens_per_frame)
        stores = []
        for parts in zip(*held, strict=True):
            store = parts[0].new_empty((*parts[0].shape[:2], room, parts[0].shape[3]))
            torch.cat(parts, 2, out=store[:, :, : self._count])
            stores.append(store)
        self._pages.clear()
        self._scores.clear()
        self._store, self._ids = (stores[0], stores[1]), ids
        self._fixed = min(self.anchors, self.frames_seen) * self.tokens_per_frame
        self._mixed = self.frames_seen - self.anchors

    def _move_specials(self) -> None:
        """Put the special tokens of the frames that came last behind the tokens that never leave."""
        assert self._store is not None
        frames, self._mixed = self._mixed, 0
        if not self.specials or not frames:
            return
        tokens, device = self.tokens_per_frame, self._store[0].device
        start = self._count - frames * tokens
        place = torch.arange(self._fixed, self._count, device=device)
        special = (place >= start) & ((place - start) % tokens < self.specials)
        order = place[torch.sort(~special, stable=True).indices]
        self._gather(self._fixed, order.expand(self._store[0].shape[0], 1, -1))
        self._fixed += frames * self.specials

    def _gather(self, first: int, kept: Tensor) -> None:
        """What is stored from ``first`` on becomes the tokens ``kept [B, H or 1, n]``, places in the store."""
        assert self._store is not None
        assert self._ids is not None
        end = first + kept.shape[2]
        for x in self._store:
            # Whole rows are copied: several times as fast as a gather of numbers.
            batch, heads, capacity, dim = x.shape
            row = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * capacity + kept
            x[:, :, first:end] = x.view(-1, dim).index_select(0, row.flatten()).view(batch, heads, -1, dim)
        rows = max(self._ids.shape[1], kept.shape[1])
        ids = self._ids.expand(-1, rows, -1)
        moved = ids.gather(2, kept.expand(-1, rows, -1))
        self._ids = torch.cat((ids[:, :, :first], moved), 2)
        if self._received is not None:
            known = self._received
            index = kept[:, 0].expand(2, -1, -1)
            self._received = torch.cat((known[:, :, :first], known.gather(2, index)), 2)
        self._count = end

    def _grow(self, tokens: int) -> None:
        """Room for so many tokens; the least that is needed, or with special tokens that add up a quarter more."""
        assert self._store is not None
        if tokens <= self._store[0].shape[2]:
            return
        if self.specials:
            tokens += tokens // 4
        grown = []
        for x in self._store:
            new = x.new_empty((*x.shape[:2], tokens, x.shape[3]))
            new[:, :, : self._count] = x[:, :, : self._count]
            grown.append(new)
        self._store = grown[0], grown[1]


def _by_head(gate: MotionGate, rows: int, heads: int, count: int) -> MotionGate:
    """The gate of each head as that of a batch item."""
    for name in ("key_score", "dropped_keys"):
        x = getattr(gate, name)
        if x is not None and tuple(x.shape) != (rows * heads, count):
            raise ValueError(
                f"gate.{name} must be [{rows * heads}, {count}], one row a head, since heads hold tokens of their own; "
                f"got {list(x.shape)}."
            )
    query, output = (
        None if x is None else x.expand(rows, -1).repeat_interleave(heads, 0)
        for x in (gate.query_score, gate.output_scale)
    )
    return MotionGate(query, gate.key_score, output, gate.dropped_keys, gate.strength, gate.renormalize)


def _checked_int(name: str, value: Any, least: int) -> int:
    """An int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int >= {least} (tokens), got {value!r}.")
    return value
