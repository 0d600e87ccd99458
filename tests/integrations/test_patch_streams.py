"""Streaming loops of StreamVGGT and STream3R, statistics of TTT3R and Easi3R, and real checkouts where present."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import require_backend
from helpers.upstream import PeakBytes
from standins import croco, vggt
from torch.utils._pytree import tree_leaves

import gate4d
from gate4d.integrations.croco import Easi3rMaps, mean_over_keys, mean_over_queries


def stream(model, frames, **patch):
    with torch.no_grad(), gate4d.patch(model, **patch):
        return model.inference(frames), model.past


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_cache_holds_keys_and_values_once_and_never_moves_them(window):
    """Bytes, addresses and the keys a frame attends to, layer by layer and frame by frame."""
    model, frames, frame_bytes = vggt.StreamVggt().eval(), torch.rand(16, 1, 3, 28, 42), 2 * 4 * 11 * 16 * 4
    past, addresses, seen, peaks = [None, None], {}, [], []
    with gate4d.patch(model, window=window) as handle:
        for t, image in enumerate(frames):
            with PeakBytes() as peak:
                tokens, past = model.aggregator(image[:, None], past_key_values=past, use_cache=True, past_frame_idx=t)
            peaks.append(peak.peak)
            for layer, (keys, values) in enumerate(past):
                held = min(t + 1, window or 16)
                assert keys.shape == values.shape == (1, 4, held, 11, 16)
                for i, page in enumerate(keys.cache.pages()):
                    pointers = [x.data_ptr() for x in page]
                    assert addresses.setdefault((layer, i), pointers) == pointers
                assert keys.cache.nbytes <= (window or held + held // 2 + 4) * frame_bytes
            seen.append({row.tokens for row in handle.table.select("global")})
            del tokens
    assert keys.cache.nbytes == (window or 16) * frame_bytes  # K and V once
    assert seen == [{(11, 11 * min(t + 1, window or 16))} for t in range(16)]
    if window:  # what a frame costs is the same from then on
        assert len(set(peaks[4:])) == 1


def test_window_is_the_causal_mask_with_that_window():
    """A windowed stream equals the clip under a windowed mask; its memory and frames stay constant."""
    model, frames = vggt.StreamVggt().eval(), torch.rand(9, 1, 3, 28, 42)
    results, past = stream(model, list(frames), window=3, anchors=1)
    assert past[0][0].shape[2] == 4
    assert past[0][0].cache.nbytes == 2 * 4 * 4 * 11 * 16 * 4
    visible = gate4d.Visibility.frame_causal(gate4d.TokenLayout(9, 11), window=3, sinks=1)
    mask = torch.zeros(99, 99).masked_fill(~visible.dense(99, 99)[0], -torch.inf)
    for block in model.aggregator.global_blocks:
        block.register_forward_pre_hook(lambda _, args, kw: (args, {**kw, "attn_mask": mask}), with_kwargs=True)
    with torch.no_grad():
        clip = model(frames.transpose(0, 1))
    got = torch.cat([r["depth"] for r in results], dim=1)
    assert torch.allclose(got, clip["depth"], rtol=1e-4, atol=1e-4)


def test_stream_started_before_the_patch():
    model, frames = vggt.StreamVggt().eval(), list(torch.rand(4, 2, 3, 28, 42))
    with torch.no_grad():
        expected = model.inference(frames)
        past = [None, None]
        for image in frames[:3]:
            model.aggregator(image[:, None], past_key_values=past, use_cache=True)
        with gate4d.patch(model):
            tokens, _ = model.aggregator(frames[3][:, None], past_key_values=past, use_cache=True)
    assert torch.allclose(model.depth_head(tokens[-1][:, :, 5:]), expected[3]["depth"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "why"), [((42, 42), "another resolution"), ((42, 28), "another patch grid")])
def test_changing_resolution_in_a_stream(size, why):
    model = vggt.StreamVggt().eval()
    with gate4d.patch(model), torch.no_grad(), pytest.raises(ValueError, match=why):
        model.inference([torch.rand(1, 3, 28, 42), torch.rand(1, 3, *size)])
    model = vggt.Stream3r().eval()
    with gate4d.patch(model), torch.no_grad():
        session = vggt.Session(model, "causal")
        session.forward_stream(torch.rand(1, 3, 28, 42))
        with pytest.raises(ValueError, match=why):
            session.forward_stream(torch.rand(1, 3, *size))


def test_state_left_behind_is_refused():
    model = vggt.StreamVggt().eval()
    attention = model.aggregator.global_blocks[0].attn
    x, pos = torch.rand(1, 11, 64), torch.zeros(1, 11, 2, dtype=torch.long)
    with gate4d.patch(model), torch.no_grad():
        _, first = attention(x, pos, use_cache=True)
        _, second = attention(x, pos, past_key_values=first, use_cache=True)
        assert second[0].shape[2] == 2
        with pytest.raises(RuntimeError, match="frames were appended since"):
            attention(x, pos, past_key_values=first, use_cache=True)


@torch.no_grad()
def test_stream_after_the_patch_is_removed():
    """StreamVGGT's raw keys are gone: an error. STream3R's are kept as upstream keeps them: it goes on."""
    model, frames = vggt.StreamVggt().eval(), list(torch.rand(3, 1, 3, 28, 42))
    past = [None, None]
    with gate4d.patch(model):
        model.aggregator(frames[0][:, None], past_key_values=past, use_cache=True)
    with pytest.raises(RuntimeError, match=r"stored after norm and RoPE.*finish the stream before"):
        model.aggregator(frames[1][:, None], past_key_values=past, use_cache=True)
    model = vggt.Stream3r().eval()
    expected = [vggt.Session.forward_stream(s, f)["pose"] for s in [vggt.Session(model, "causal")] for f in frames]
    session = vggt.Session(model, "causal")
    with gate4d.patch(model):
        got = [session.forward_stream(f)["pose"] for f in frames[:2]]
    got.append(session.forward_stream(frames[2])["pose"])
    assert torch.allclose(torch.cat(got), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_ttt3r_returns_the_mean_over_keys():
    model = croco.Ttt3r().eval()
    attention = model.dec_blocks_state[0].cross_attn
    q, k = torch.rand(2, 10, 96), torch.rand(2, 7, 96)
    qpos, kpos = torch.randint(0, 5, (2, 10, 2)), torch.randint(-1, 5, (2, 7, 2))
    with torch.no_grad():
        _, logits = attention(q, k, k, qpos, kpos, return_attn=True)
        with gate4d.patch(model):
            out, mean = attention(q, k, k, qpos, kpos, return_attn=True)
            assert isinstance(attention(q, k, k, qpos, kpos), torch.Tensor)
    assert mean.shape == (2, 2, 10, 1)
    assert torch.allclose(mean, logits.mean(-1, keepdim=True), atol=1e-5)
    assert out.shape == q.shape


@pytest.mark.parametrize("reduce", [mean_over_keys, mean_over_queries])
def test_mean_logits_copy_nothing(reduce):
    """q and k come as views [B, H, N, D] of [B, N, H, D]: neither is copied, whatever the reduction."""
    q, k = (torch.randn(1, n, 16, 48).transpose(1, 2) for n in (768, 577))
    with PeakBytes() as peak:
        peak.known = {x.untyped_storage()._cdata for x in (q, k)}
        got = reduce(q, k, 0.1)
    assert peak.peak <= 16 * 4 * (2 * 768 + 2 * 48)  # a result and its scaled copy, and the mean
    logits = 0.1 * q.double() @ k.double().mT
    expected = logits.mean(-1 if reduce is mean_over_keys else -2, keepdim=True)
    assert got.shape == expected.shape
    naive = (0.1 * q @ k.mT).mean(-1 if reduce is mean_over_keys else -2, keepdim=True)
    assert (got - expected).abs().max() <= 2 * (naive - expected).abs().max() + 2**-24 * expected.abs().max()


def test_easi3r_maps_of_larger_batches():
    """Each item of a batch gets the maps it gets alone (upstream mixes them up)."""
    model = croco.Easi3r().eval()
    views = [{"img": torch.rand(2, 3, 32, 48)} for _ in range(2)]
    with gate4d.patch(model), torch.no_grad():
        both = model(*views)[0]["cross_atten_maps_k"]
        alone = [model(*[{"img": v["img"][i : i + 1]} for v in views])[0]["cross_atten_maps_k"] for i in range(2)]
        assert isinstance(model._get_attn_k, Easi3rMaps)
    assert both.shape == (2, 2, 3, 144)
    assert torch.allclose(both, torch.cat(alone), atol=1e-5)


UPSTREAM = (
    "DUST3R",
    "EASI3R",
    "CUT3R",
    "TTT3R",
    "RECAL3R",
    "TTSA3R",
    "FILT3R",
    "VGGT",
    "FASTVGGT",
    "STREAMVGGT",
    "STREAM3R",
    "PI3",
    "VGGT_OMEGA",
    "MORE",
)


@pytest.mark.parametrize("name", UPSTREAM)
def test_real_checkout(name):
    """The real classes with random weights at small size; they need their own requirements on PYTHONPATH."""
    if f"GATE4D_UPSTREAM_{name}" not in os.environ:
        pytest.skip(f"GATE4D_UPSTREAM_{name} does not name a checkout")
    script = Path(__file__).parents[1] / "helpers" / "upstream.py"
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    for run, result in report["runs"].items():
        assert result["difference"] <= 1e-4, run
        assert result["restored"], run
    if "3R" in name and name not in ("DUST3R", "EASI3R", "STREAM3R"):  # CUT3R and its forks, encoders included
        assert {"cut3r"} <= set(report["families"]) <= {"cut3r", "ttt3r"}


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(tree_leaves(results), tree_leaves(others), strict=True))


@pytest.mark.parametrize("policy", ["infinite", "xstream", "evict3r", "frame", "window"])
def test_a_budget_of_tokens(policy):
    """One that holds the clip changes nothing, bit for bit; a smaller one bounds memory whatever the frames."""
    require_backend("cpu")
    model, frames = vggt.StreamVggt().eval(), list(torch.rand(14, 1, 3, 28, 42))
    plain, _ = stream(model, frames)
    whole, past = stream(model, frames, budget=14 * 11, policy=policy)
    assert same(plain, whole)
    assert not past[0][0].cache.evicted
    bounded, past = stream(model, frames, budget=40, policy=policy)
    assert same(plain[:3], bounded[:3])
    assert not same(plain[-1], bounded[-1])
    held = [keys.cache.num_tokens for keys, _ in past]
    assert sum(held) <= 40 * len(held)
    assert all(keys.shape == (1, 4, 14, 11, 16) for keys, _ in past)
    with pytest.raises(RuntimeError, match="tokens have left this cache"):
        past[0][1].tensor()


def test_streams_do_not_share_budgets():
    model, frames = vggt.StreamVggt().eval(), list(torch.rand(9, 1, 3, 28, 42))
    with torch.no_grad(), gate4d.patch(model, budget=40):
        first = model.inference(frames)
        again = model.inference(frames)
        copied = copy.deepcopy(model).inference(frames)
    assert same(first, again)
    assert same(first, copied)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "infinite"}, r"policy and specials belong to a budget: give budget=TOKENS, too"),
        ({"specials": 5}, r"policy and specials belong to a budget"),
        ({"budget": 40, "window": 3}, r"give window or budget, not both"),
        ({"budget": 40, "policy": "best"}, r"policy must be one of"),
        ({"budget": 0}, r"budget must be an int >= 1 \(tokens\), got 0"),
        ({"anchors": 1}, r"anchors=1 has no effect without a window"),
    ],
)
def test_budgets_that_mean_nothing(options, message):
    model = vggt.StreamVggt().eval()
    with pytest.raises(ValueError, match=message):
        gate4d.patch(model, **options)
    assert not gate4d.inspect(model).problems
    with pytest.raises(ValueError, match="window and budget need a model with a key/value cache"):
        gate4d.patch(vggt.Vggt().eval(), budget=40)
