"""TokenKVCache against attention over tokens chosen by restated formulas, and against the authors' own functions."""

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import require_backend

import gate4d
from gate4d.nn import FrameKVCache, RoPE2D, SelfAttention, TokenKVCache
from gate4d.nn.eviction import POLICIES, Candidates, LayerBudgets, Policy, diversity, pooled_query

TOKENS, HEADS, DIM = 11, 3, 16


def frames(count, batch=2, tokens=TOKENS, dim=DIM):
    return torch.randn(count, 3, batch, HEADS, tokens, dim).unbind(0)


def feed(cache, clip, **call):
    """Outputs of each frame."""
    out = []
    for q, k, v in clip:
        cache.append(k, v)
        out.append(cache.attend(q, **call))
    return out


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_that_holds_everything_changes_nothing(policy):
    """Bit for bit, over several pages; attention received needs the lse, so the backend must be one that gives it."""
    if POLICIES[policy].received:
        require_backend("cpu")
    clip = frames(60)
    plain, cache = FrameKVCache(), TokenKVCache(60 * TOKENS, policy)
    assert all(torch.equal(a, b) for a, b in zip(feed(cache, clip), feed(plain, clip), strict=True))
    assert len(cache.pages()) > 1
    assert not cache.evicted
    assert cache.token_ids.shape == (2, 1, 60 * TOKENS)


class Plain:
    """The policies once more, one head and one token at a time, over lists of tokens."""

    def __init__(self, policy, budget, anchors):
        self.policy, self.budget, self.anchors = policy, budget, anchors
        self.held: list[list[list[int]]] = []
        self.received: dict[tuple[int, int], list[float]] = {}
        self.clip = []

    def keys(self, b, h, part):
        return torch.stack([self.clip[i // TOKENS][part][b, h, i % TOKENS] for i in self.held[b][h]])

    def step(self, q, k, v):
        self.clip.append((q, k, v))
        new = range((len(self.clip) - 1) * TOKENS, len(self.clip) * TOKENS)
        if not self.held:
            self.held = [[[] for _ in range(HEADS)] for _ in range(len(q))]
        for row in self.held:
            for head in row:
                head += new
        if self.policy == "infinite":
            self.evict(q)
        out = torch.stack([torch.stack([self.attend(q, b, h) for h in range(HEADS)]) for b in range(len(q))])
        if self.policy in ("evict3r", "frame"):
            for b in range(len(q)):
                shares = [(q[b, h] @ self.keys(b, h, 1).T * DIM**-0.5).softmax(-1).mean(0) for h in range(HEADS)]
                mean = torch.stack(shares).mean(0) * len(self.held[b][0])
                for token, share in zip(self.held[b][0], mean.tolist(), strict=True):
                    self.received.setdefault((b, token), []).append(share)
        if self.policy != "infinite":
            self.evict(q)
        return out

    def attend(self, q, b, h):
        return F.scaled_dot_product_attention(q[b, h], self.keys(b, h, 1), self.keys(b, h, 2))

    def evict(self, q):
        for b, row in enumerate(self.held):
            for h, head in enumerate(row):
                if len(head) > self.budget:
                    row[h] = self.kept(b, h, head, q)
            assert self.policy == "infinite" or all(head == row[0] for head in row)

    def kept(self, b, h, head, q):
        newest = (len(self.clip) - 1) * TOKENS
        stay = [i for i in head if i < self.anchors * TOKENS]
        if self.policy in ("xstream", "frame"):
            stay += [i for i in head if i >= newest]
        free = [i for i in head if i not in stay]
        of = {i: self.clip[i // TOKENS][1][b, :, i % TOKENS] for i in free}  # [H, D]
        if self.policy == "infinite":
            units = {i: of[i][h] / of[i][h].norm() for i in free}
            mean = sum(units.values()) / len(free)
            score = {i: -float(units[i] @ mean) for i in free}
        elif self.policy == "xstream":  # 5 special tokens, then pools of 16: here the other 6 are one pool
            pools = [*q[b].mean(0)[:5], q[b].mean(0)[5:].mean(0)]
            score = {i: float(sum(p @ of[i].mean(0) for p in pools)) / len(pools) for i in free}
        elif self.policy == "window":
            score = {i: i for i in free}
        else:
            score = {i: sum(self.received[b, i]) / len(self.received[b, i]) for i in free}
        room = self.budget - len(stay)
        if self.policy == "frame":
            whole = {f: sum(score[i] for i in free if i // TOKENS == f) for f in {i // TOKENS for i in free}}
            frames = sorted(whole, key=whole.get)[-(room // TOKENS) :] if room >= TOKENS else []
            return sorted(stay + [i for i in free if i // TOKENS in frames])
        return sorted(stay + sorted(free, key=score.get)[len(free) - room :])


@pytest.mark.parametrize("policy", POLICIES)
def test_what_stays_and_what_is_attended(policy):
    clip = frames(9)
    budget, anchors = 40, POLICIES[policy].anchors
    cache, plain = TokenKVCache(budget, policy), Plain(policy, budget, anchors)
    for frame in clip:
        cache.append(*frame[1:])
        want = plain.step(*frame)
        torch.testing.assert_close(cache.attend(frame[0]), want, rtol=1e-4, atol=1e-5)
        ids = cache.token_ids.expand(-1, HEADS, -1)
        assert [[head.tolist() for head in row] for row in ids] == plain.held
        assert cache.num_tokens <= budget
        assert cache.num_tokens == ids.shape[2]
    assert cache.evicted
    assert cache.frames_seen == cache.num_frames == 9


@pytest.mark.parametrize("policy", POLICIES)
def test_special_tokens_stay_beside_the_budget(policy):
    clip = frames(12)
    cache = TokenKVCache(45, policy, anchors=1, specials=2)
    feed(cache, clip)
    always = {*range(TOKENS), *(t * TOKENS + i for t in range(1, 12) for i in range(2))}
    for head in cache.token_ids.flatten(0, 1):
        assert always <= set(head.tolist())
        assert len(set(head.tolist())) == len(head) == cache.num_tokens <= 45 + 11 * 2
    if policy != "frame":  # of which whole frames leave
        assert cache.num_tokens == 45 + 11 * 2
    for b in range(2):
        for h in range(HEADS):
            ids = cache.token_ids[b, h if cache.token_ids.shape[1] > 1 else 0]
            for part, held in enumerate(cache.pages()[0]):
                want = torch.stack([clip[i // TOKENS][1 + part][b, h, i % TOKENS] for i in ids.tolist()])
                assert torch.equal(held[b, h], want)


def test_memory_is_flat_over_a_thousand_frames():
    cache, seen = TokenKVCache(100, "infinite"), set()
    with torch.no_grad():
        for t in range(1000):
            ((q, k, v),) = frames(1, batch=1)
            cache.append(k, v)
            cache.attend(q)
            if t >= 20:
                seen.add((cache.nbytes, cache.num_tokens, cache.pages()[0][0].data_ptr()))
    assert len(seen) == 1
    assert cache.nbytes == 2 * HEADS * (100 + TOKENS) * DIM * 4
    assert set(range(TOKENS)) <= set(cache.token_ids[0, 0].tolist())


def test_a_policy_of_ones_own():
    asked = []

    def norms(c: Candidates):
        asked.append((c.k.shape[2], c.q.shape[2], c.received))
        return c.v.norm(dim=-1)

    cache, clip = TokenKVCache(30, norms), frames(4)
    feed(cache, clip)
    assert asked == [(2 * TOKENS, TOKENS, None), (30, TOKENS, None)]
    assert cache.token_ids.shape == (2, HEADS, 30)
    shared = TokenKVCache(30, Policy(lambda c: c.received[:, None], received=True, anchors=0))
    feed(shared, clip)
    assert shared.token_ids.shape == (2, 1, 30)
    for wrong, got in ((lambda c: c.k.norm(dim=-1)[:, :1, :-1], r"\[2, 1, 21\]"), (lambda c: 3, "int")):
        with pytest.raises(ValueError, match=rf"policy must return scores \[2, 3 or 1, 22\], got {got}"):
            feed(TokenKVCache(30, wrong), clip)
    per_head = Policy(lambda c: c.k.norm(dim=-1), received=True)
    with pytest.raises(ValueError, match=r"policy must return scores \[2, 1, 22\], got \[2, 3, 22\]"):
        feed(TokenKVCache(30, per_head), clip)


def test_gates_where_heads_hold_tokens_of_their_own():
    clip = frames(6)
    cache = TokenKVCache(30, "infinite")
    feed(cache, clip)
    q, (k, v) = clip[0][0], cache.pages()[0]
    scores, query = torch.rand(2, HEADS, 30), torch.rand(2, TOKENS)
    gate = gate4d.MotionGate(query, scores.flatten(0, 1), query)
    weight = 1 - query[:, None, :, None] * scores[:, :, None]
    p = (q @ k.mT * DIM**-0.5).softmax(-1) * weight
    want = p / p.sum(-1, keepdim=True) @ v * query[:, None, :, None]
    torch.testing.assert_close(cache.attend(q, gate=gate), want)
    torch.testing.assert_close(cache.attend(q, gate=gate4d.MotionGate.queries(query)),
                               F.scaled_dot_product_attention(q, k, v) * (1 - query)[:, None, :, None])  # fmt: skip
    with pytest.raises(ValueError, match=r"gate.key_score must be \[6, 30\], one row a head"):
        cache.attend(q, gate=gate4d.MotionGate.keys(scores[:, 0]))
    shared = TokenKVCache(30, "window")
    feed(shared, clip)
    k, v = shared.pages()[0]
    gate = gate4d.MotionGate.keys(scores[:, 0])
    torch.testing.assert_close(shared.attend(q, gate=gate), gate4d.gated_attention(q, k, v, gate=gate))


def test_attention_received_is_under_the_gate():
    """A token that the gate hides receives nothing, so it leaves first."""
    clip, hidden = frames(4), torch.zeros(2, 2 * TOKENS)
    hidden[:, 15:18] = 1
    cache = TokenKVCache(3 * TOKENS - 3, Policy(POLICIES["evict3r"].score, anchors=0, received=True))
    for n, (q, k, v) in enumerate(clip[:3]):
        cache.append(k, v)
        gate = gate4d.MotionGate.keys(F.pad(hidden, (0, n * TOKENS))[:, : (n + 1) * TOKENS])
        cache.attend(q, gate=gate)
    assert not set(range(15, 18)) & set(cache.token_ids[0, 0].tolist())


def test_frozen_and_reset():
    clip, cache = frames(6), TokenKVCache(30)
    feed(cache, clip)
    before = cache.token_ids.clone()
    cache.frozen = True
    feed(cache, clip[:2])
    assert torch.equal(cache.token_ids, before)
    cache.frozen = False
    cache.reset()
    assert (cache.num_tokens, cache.nbytes, cache.frames_seen, cache.evicted) == (0, 0, 0, False)
    feed(cache, frames(5, tokens=7))
    assert cache.num_tokens == 30


def test_claimed_slots():
    """Where a kernel writes keys: the same as appended ones, before and after tokens have left."""
    clip, cache, plain = frames(7), TokenKVCache(30), TokenKVCache(30)
    for q, k, v in clip:
        slot = cache.claim(k, v)
        with pytest.raises(RuntimeError, match="not committed"):
            cache.attend(q)
        slot.k.copy_(k)
        slot.v.copy_(v)
        slot.commit()
        plain.append(k, v)
        assert torch.equal(cache.attend(q), plain.attend(q))
    assert torch.equal(cache.token_ids, plain.token_ids)


def test_16_bits_and_a_module():
    module = SelfAttention(32, 2, qk_norm=True, rope=RoPE2D()).bfloat16()
    x, pos = torch.randn(6, 1, 9, 32).bfloat16(), torch.randint(0, 9, (1, 9, 2))
    cache = TokenKVCache(24, "evict3r")
    with torch.no_grad():
        out = [module(t, pos, cache=cache) for t in x]
    assert all(o.isfinite().all() for o in out)
    assert {t.dtype for t in cache.pages()[0]} == {torch.bfloat16}
    assert cache.num_tokens == 24


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, ValueError, r"budget must be an int >= 1 \(tokens\), got 0"),
        ({"budget": 2.5}, ValueError, r"budget must be an int >= 1 \(tokens\), got 2.5"),
        ({"budget": 9, "specials": -1}, ValueError, r"specials must be an int >= 0 \(tokens\), got -1"),
        ({"budget": 9, "anchors": -1}, ValueError, r"anchors must be an int >= 0"),
        (
            {"budget": 9, "policy": "best"},
            ValueError,
            r"policy must be one of \['evict3r', .*\] or a function",
        ),
        ({"budget": 9, "policy": 3}, TypeError, r"policy must be one of .* or a function, got int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TokenKVCache(**arguments)


def test_what_does_not_fit(monkeypatch):
    clip = frames(6)
    small = TokenKVCache(2 * TOKENS, "xstream")
    with pytest.raises(ValueError, match=r"at least 23 tokens to hold 1 anchor frames and the newest one, of 11"):
        small.append(*clip[0][1:])
    assert small.num_tokens == 0
    cache = TokenKVCache(30)
    feed(cache, clip)
    with pytest.raises(ValueError, match=r"k must have the shape \[2, 3, 11, 16\] of the frames before, got"):
        cache.append(*frames(1, tokens=7)[0][1:])
    with pytest.raises(RuntimeError, match="add_scores belongs to a FrameKVCache"):
        cache.add_scores(torch.zeros(2, 30))
    monkeypatch.setattr("gate4d.nn.token_cache.capturing", lambda x: True)
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        cache.append(*clip[0][1:])


def test_layers_share_a_budget():
    """The layer whose keys are more alike gets less; all shares of a frame are of one moment."""
    budgets = LayerBudgets(60, by_diversity=True)
    layers = [TokenKVCache(budgets) for _ in range(3)]
    alike = torch.randn(1, HEADS, 1, DIM)
    for q, k, v in frames(12, batch=1):
        for number, cache in enumerate(layers):
            cache.append(k + 3 * number * alike, v)
            cache.attend(q)
    counts = [c.num_tokens for c in layers]
    assert counts[0] > counts[1] > counts[2]
    assert 150 < sum(counts) <= 180


# The authors' own functions, from checkouts that the environment names.


def upstream(name, *parts):
    root = os.environ.get(f"GATE4D_UPSTREAM_{name}")
    if root is None:
        pytest.skip(f"needs a checkout: GATE4D_UPSTREAM_{name}")
    path = Path(root).joinpath(*parts)
    spec = importlib.util.spec_from_file_location(f"upstream_{name.lower()}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("count", [67, 700])
def test_infinitevggt_keeps_the_same(count):
    attention = upstream("INFINITEVGGT", "src", "streamvggt", "layers", "attention.py").Attention(48, HEADS)
    k, v = torch.randn(2, 2, HEADS, count, DIM)
    index = torch.arange(count).expand(2, HEADS, -1)[..., None].expand(-1, -1, -1, DIM).float()
    kept, tagged, mean = attention.eviction(k, index, 50, TOKENS)
    free = Candidates(k[:, :, TOKENS:], v[:, :, TOKENS:], k[:, :, :1], None, TOKENS)
    ours = diversity(free).topk(50 - TOKENS, 2).indices.sort(2).values + TOKENS
    assert torch.equal(ours, tagged[:, :, TOKENS:, 0].long())
    assert mean == pytest.approx(-float(diversity(free).mean()), abs=1e-6)
    assert kept.shape[2] == 50


def test_infinitevggt_shares_the_same():
    source = Path(os.environ.get("GATE4D_UPSTREAM_INFINITEVGGT", "")) / "src/streamvggt/models/aggregator.py"
    if "GATE4D_UPSTREAM_INFINITEVGGT" not in os.environ:
        pytest.skip("needs a checkout: GATE4D_UPSTREAM_INFINITEVGGT")
    import ast

    tree = ast.parse(source.read_text())
    (found,) = [n for n in ast.walk(tree) if getattr(n, "name", "") == "_calculate_dynamic_budgets"]
    scope = {"torch": torch}
    exec(compile(ast.Module([found], []), str(source), "exec"), scope)  # the aggregator itself needs its whole package
    scores = torch.rand(24)
    budgets = LayerBudgets(25_000, by_diversity=True)
    for layer in range(24):
        budgets.join()
        budgets.note(layer, scores[layer])
    theirs = scope["_calculate_dynamic_budgets"](type("Aggregator", (), {"last_scores": scores}), 24 * 25_000)
    assert [budgets.of(layer) for layer in range(24)] == theirs.tolist()


@pytest.mark.parametrize(("count", "tokens"), [(90, 11), (900, 40), (900, 37)])
def test_xstreamvggt_keeps_the_same(count, tokens, monkeypatch):
    monkeypatch.setenv("KV_CACHE_SIZE", str(2 * tokens + 9))
    monkeypatch.setenv("USE_XFORMERS", "0")
    unused = types.ModuleType("einops")
    unused.rearrange = None
    monkeypatch.setitem(sys.modules, "einops", unused)
    attention = upstream("XSTREAMVGGT", "src", "streamvggt", "layers", "attention.py").Attention(48, HEADS)
    q, (k, v) = torch.randn(2, HEADS, tokens, DIM), torch.randn(2, 2, HEADS, count, DIM)
    index = torch.arange(count).expand(2, HEADS, -1)[..., None].expand(-1, -1, -1, DIM).float()
    _, tagged = attention.prune_kv_cache((k, index), q)
    free = Candidates(k[:, :, tokens:-tokens], v[:, :, tokens:-tokens], q, None, tokens)
    ours = pooled_query(free).topk(9, 2).indices.sort(2).values[:, 0] + tokens
    assert torch.equal(ours, tagged[:, 0, tokens:-tokens, 0].long())
