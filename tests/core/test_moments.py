"""Moments against float64, in any merge order, over ranks, and with bad arguments."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from gate4d import Moments


def reference(x, dims):
    x = x.double()
    return x.mean(dims), x.var(dims, unbiased=True)


def close(got, want, relative=1e-5):
    assert torch.isfinite(got).all()
    assert ((got.double() - want).abs() <= relative * want.abs()).all(), (got, want)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dims", [(0,), (1, 2), -1])
def test_from_samples(offset, dims):
    x = torch.randn(7, 50, 33, generator=torch.Generator().manual_seed(0)) + offset + 1
    m = Moments.from_samples(x, dims)
    mean, variance = reference(x, dims)
    close(m.mean, mean, 1e-5 if offset else 3e-5)
    close(m.variance(), variance)
    close(m.std(), variance.sqrt())
    close(m.variance(unbiased=False), x.double().var(dims, unbiased=False))


def test_low_precision_samples_are_computed_in_fp32():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    m = Moments.from_samples(x, 0)
    assert m.mean.dtype == torch.float32
    close(m.variance(), x.double().var())


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=2, max_size=6), seed=st.integers(0, 999), data=st.data())
def test_merge_order_does_not_matter(sizes, seed, data):
    generator = torch.Generator().manual_seed(seed)
    parts = [3 + torch.randn(n, 5, generator=generator) for n in sizes]
    moments = [Moments.from_samples(p, 0) for p in parts]
    order = data.draw(st.permutations(range(len(parts))))
    merged = moments[order[0]]
    for i in order[1:]:
        merged = merged.merge(moments[i])
    tree = moments[0].merge(moments[1])
    for m in moments[2:]:
        tree = m.merge(tree)
    x = torch.cat(parts)
    assert (merged.count == len(x)).all()
    for m in (merged, tree):
        if len(x) > 1:
            close(m.mean, x.double().mean(0))
            close(m.variance(), x.double().var(0))


def test_a_billion_samples_in_fp32():
    # 20000 partials of 50000 samples whose level drifts: plain fp32 sums of m2 lose the partials' last digits.
    generator = torch.Generator().manual_seed(1)
    partials, size = 20_000, 50_000
    level = 10 + torch.linspace(0, 1, partials, dtype=torch.float64)
    mean = (level + 1e-3 * torch.randn(partials, generator=generator, dtype=torch.float64)).float()
    m2 = (size * (1 + 0.1 * torch.rand(partials, generator=generator, dtype=torch.float64))).float()
    total = Moments.empty(())
    for a, b in zip(mean, m2, strict=True):
        total = total.merge(Moments(size, a, b))
    expected_mean = mean.double().mean()
    expected_m2 = m2.double().sum() + size * (mean.double() - expected_mean).square().sum()
    assert total.count == partials * size == 10**9
    close(total.mean, expected_mean, 1e-7)
    close(total.m2, expected_m2, 1e-6)


def test_carry_keeps_what_fp32_would_drop():
    big = Moments(1, torch.zeros(1), torch.full((1,), 2.0**24))
    one = Moments(1, torch.zeros(1), torch.ones(1))
    for _ in range(64):
        big = big.merge(one)
    assert big.m2.item() == 2.0**24 + 64  # plain fp32 would still be at 2 ** 24


@pytest.mark.parametrize("size", [2, 3, 7, 64])
@pytest.mark.parametrize("std", [1e-2, 3e-3])
def test_partials_at_a_large_mean_keep_their_spread(size, std):
    """A float32 at 10^4 has steps of 10^-3: the means of partials must not be rounded to them."""
    generator = torch.Generator().manual_seed(size)
    x = (1e4 + std * torch.randn(4096 // size, size, generator=generator)).float()
    exact = x.double().var()
    parts = Moments.from_samples(x, 1)
    close(parts.pool(0).variance(), exact)
    total, fine = Moments.empty(()), Moments.empty((), torch.float64)
    for row in x:
        total = total.merge(Moments.from_samples(row, 0))
        fine = fine.merge(Moments.from_samples(row.double(), 0).to(torch.float32).to(torch.float64))
    close(total.variance(), exact)
    close(fine.variance(), exact)
    narrowed = Moments.from_samples(x.double(), 1).to(torch.float32)  # what statistics in float64 return
    assert narrowed.mean.dtype == torch.float32
    close(narrowed.pool(0).variance(), exact)
    halves = narrowed.to(torch.float64).pool(0)
    close(halves.variance(), exact)


def test_pool_beside_entries_without_samples():
    x = (1e4 + 1e-2 * torch.randn(3, 50, generator=torch.Generator().manual_seed(3))).float()
    m = Moments.from_samples(x, 1)
    count = torch.tensor([0, *m.count.tolist()])
    padded = Moments(count, torch.cat((torch.zeros(1), m.mean)), torch.cat((torch.zeros(1), m.m2)))
    close(padded.pool(0).variance(), Moments(m.count, m.mean, m.m2).pool(0).variance())
    none = Moments.empty((2, 0, 3)).pool((0, 1))
    assert none.count.tolist() == [0, 0, 0]


def test_counts_stop_instead_of_wrapping_around():
    most = 2**63 - 1
    big = Moments(2**62, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    merged = big.merge(Moments(2**62, torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0])))
    assert merged.count.tolist() == [most, most]
    assert merged.mean.tolist() == [2.0, 3.0]
    assert merged.merge(big).count.tolist() == [most, most]
    pooled = Moments(2**62, torch.tensor([[1.0], [3.0], [5.0]]), torch.ones(3, 1)).pool(0)
    assert pooled.count.tolist() == [most]
    assert pooled.mean.tolist() == [3.0]
    assert (pooled.variance() > 0).all()
    for count in (2**63, -1):
        with pytest.raises(ValueError, match=r"count must be in \[0, 2\^63 - 1\]"):
            Moments(count, torch.zeros(2), torch.zeros(2))


def test_counts_broadcast_and_differ():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    halves = Moments.from_samples(x[:2], 0), Moments.from_samples(x[2:], 0)
    uneven = Moments(torch.tensor([2, 0, 2, 0]), halves[0].mean * torch.tensor([1.0, 0, 1, 0]), halves[0].m2 * 0)
    assert uneven.merge(halves[1]).count.tolist() == [6, 4, 6, 4]
    close(uneven.merge(halves[1]).mean[1:2], x[2:].double().mean(0)[1:2])
    assert Moments(5, torch.zeros(2, 3), torch.zeros(2, 3)).count.shape == (2, 3)


def test_pool_is_merging_along_a_dimension():
    x = 1000 + torch.randn(3, 4, 500, generator=torch.Generator().manual_seed(3))
    pooled = Moments.from_samples(x, 2).pool((0, 1))
    close(pooled.variance(), x.double().var())
    close(pooled.mean, x.double().mean())
    seen = torch.tensor([[2, 0], [3, 0]])
    m = Moments(seen, torch.tensor([[1.0, 9.0], [2.0, 9.0]]), torch.zeros(2, 2)).pool(0)
    assert m.count.tolist() == [5, 0]
    assert m.mean.tolist() == pytest.approx([1.6, 0.0])


def test_too_few_samples_give_nan_like_torch():
    mean, variance = Moments.empty((2,)).finalize()
    assert mean.isnan().all()
    assert variance.isnan().all()
    one = Moments.from_samples(torch.ones(1, 2), 0)
    assert one.variance().isnan().all()
    assert (one.variance(unbiased=False) == 0).all()


@pytest.mark.parametrize(
    ("build", "error", "names"),
    [
        (lambda: Moments(1, torch.zeros(2), torch.zeros(3)), ValueError, "m2"),
        (lambda: Moments(1, torch.zeros(2, dtype=torch.long), torch.zeros(2)), TypeError, "mean"),
        (lambda: Moments(1.5, torch.zeros(2), torch.zeros(2)), TypeError, "count"),
        (lambda: Moments(torch.ones(3, dtype=torch.long), torch.zeros(2), torch.zeros(2)), ValueError, "count"),
        (lambda: Moments.empty((2,)).merge(Moments.empty((3,))), ValueError, "other"),
        (lambda: Moments.empty((2,)).pool(3), ValueError, "dims"),
        (lambda: Moments.empty((2,)).all_reduce(), RuntimeError, "init_process_group"),
    ],
)
def test_bad_arguments_are_named(build, error, names):
    with pytest.raises(error, match=names):
        build()


def _rank(rank, ranks, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    x = 50 + torch.randn(30, 4, generator=torch.Generator().manual_seed(7))
    mine = x[:10] if rank == 0 else x[10:]
    total = Moments.from_samples(mine, 0).all_reduce()
    results[rank] = (total.count, total.mean, total.m2)
    dist.destroy_process_group()


def test_all_reduce_over_two_processes(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (2, tmp_path / "store", results), nprocs=2)
        x = 50 + torch.randn(30, 4, generator=torch.Generator().manual_seed(7))
        for a, b in zip(results[0], results[1], strict=True):
            assert torch.equal(a, b)
        total = Moments(*results[0])
    assert (total.count == 30).all()
    close(total.mean, x.double().mean(0))
    close(total.variance(), x.double().var(0))


def _unlike(rank, ranks, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = []
    cases = [((2, 3), torch.float32), ((3, 2), torch.float32)], [((2,), torch.float32), ((2,), torch.float64)]
    for case in (*cases, [((), torch.float32), ((1,), torch.float32)]):
        shape, dtype = case[rank]
        try:
            Moments.empty(shape, dtype).all_reduce()
        except ValueError as e:
            found.append(str(e))
    whole = Moments(2**53 + 1, torch.full((2,), 1e4), torch.ones(2)).all_reduce()  # the group works after an error
    results[rank] = found, whole.count.tolist()
    dist.destroy_process_group()


def test_all_reduce_refuses_unlike_ranks_on_all_of_them(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_unlike, (2, tmp_path / "store", results), nprocs=2)
        (first, count), other = results[0], results[1]
    assert (first, count) == other
    assert count == [2**54 + 2] * 2
    says = "all_reduce needs one shape and dtype over the ranks, got rank 0: {}; rank 1: {}."
    assert first == [
        says.format("[2, 3] torch.float32", "[3, 2] torch.float32"),
        says.format("[2] torch.float32", "[2] torch.float64"),
        says.format("[] torch.float32", "[1] torch.float32"),
    ]
