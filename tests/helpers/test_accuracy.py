"""The tolerance rule fails when it should."""

import pytest
import torch

from helpers.accuracy import SLACK, assert_accurate, assert_accurate_gradient
from helpers.attention_cases import ORDERS


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(2, 3, 40, 16, dtype=torch.float64)


def test_accepts_the_baseline_and_one_rounding(exact):
    rounded = exact.bfloat16()
    assert_accurate("x", rounded, exact, rounded)
    assert_accurate_gradient("x", rounded, exact, rounded)
    assert_accurate("x", rounded, exact, exact)  # a perfect baseline leaves one rounding step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rejects_an_error_above_twice_the_baseline(exact, dtype):
    noise = torch.randn_like(exact) * 0.1
    assert_accurate("x", (exact + 1.9 * noise).to(dtype), exact, exact + noise)
    with pytest.raises(AssertionError, match="largest error"):
        assert_accurate("x", (exact + 2.5 * noise).to(dtype), exact, exact + noise)


def test_rejects_one_wrong_value(exact):
    wrong = exact.float()
    wrong[1, 2, 17, 3] += 1e-4
    with pytest.raises(AssertionError, match="largest error"):
        assert_accurate("x", wrong, exact, exact.float())


def test_rejects_many_slightly_wrong_values(exact):
    """Below the largest error, but everywhere: found by the norm."""
    baseline = exact.clone()
    baseline[0, 0, 0, 0] += 1e-2
    with pytest.raises(AssertionError, match="rms error"):
        assert_accurate("x", (exact + 1e-3).float(), exact, baseline)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rejects_what_is_not_finite(exact, value):
    wrong = exact.float()
    wrong[0, 1, 2, 3] = value
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate("x", wrong, exact, exact.float())
    with pytest.raises(AssertionError, match="torch baseline"):
        assert_accurate("x", exact.float(), exact, wrong)


def test_infinities_must_match_place_and_sign(exact):
    exact[0, 0, 0, 0] = -torch.inf
    assert_accurate("lse", exact.float(), exact, exact.float())
    for value in (0.0, torch.inf, torch.nan):
        wrong = exact.float()
        wrong[0, 0, 0, 0] = value
        with pytest.raises(AssertionError, match="infinite as"):
            assert_accurate("lse", wrong, exact, exact.float())


def test_rejects_a_wrong_shape(exact):
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate("x", exact.float()[:1], exact, exact.float())


def test_rejects_a_missing_gradient(exact):
    with pytest.raises(AssertionError, match="no gradient"):
        assert_accurate_gradient("x", None, exact, exact.float())


def test_rejects_a_missing_gradient_row(exact):
    """The row is far smaller than the error that the largest entries allow."""
    exact[0, 0, 7] *= 1e-4
    baseline = exact + torch.where(exact.abs() > 1, 1e-2, 1e-6) * torch.randn_like(exact)
    wrong = exact.float()
    wrong[0, 0, 7] = 0
    assert_accurate("x", wrong, exact, baseline)
    with pytest.raises(AssertionError, match="1 rows lack their gradient, first 7"):
        assert_accurate_gradient("x", wrong, exact, baseline)
    assert_accurate_gradient("x", wrong, exact, torch.where(exact.abs() < 1e-3, 0.0, baseline))  # lost there too


def test_rejects_a_missing_score_gradient():
    exact = torch.randn(2, 100, dtype=torch.float64)
    exact[1, 3] = 1e-5
    baseline = exact + 1e-3 * torch.randn_like(exact) * (exact.abs() > 0.1)
    wrong = exact.float()
    wrong[1, 3] = 0
    with pytest.raises(AssertionError, match="lack their gradient, first 103"):
        assert_accurate_gradient("x", wrong, exact, baseline)


def test_rejects_a_gradient_row_that_must_be_zero(exact):
    exact[1, 1, 5] = 0
    baseline = exact + torch.where(exact.abs() > 1, 1e-2, 0.0)
    wrong = exact.float()
    wrong[1, 1, 5] = 1e-3
    assert_accurate("x", wrong, exact, baseline)
    with pytest.raises(AssertionError, match="1 rows must have none"):
        assert_accurate_gradient("x", wrong, exact, baseline)


def test_rejects_a_turned_gradient(exact):
    """A baseline that is too long, not turned: its error bounds allow a turn that the angle does not."""
    turned = exact + 0.1 * torch.randn_like(exact)
    baseline = exact * 1.5
    assert_accurate("x", turned.float(), exact, baseline)
    with pytest.raises(AssertionError, match="rad away"):
        assert_accurate_gradient("x", turned.float(), exact, baseline)


def test_all_zero_and_empty_gradients_pass():
    for shape in ((2, 3, 4, 5), (2, 0, 4, 5)):
        zero = torch.zeros(shape, dtype=torch.float64)
        assert_accurate_gradient("x", zero.float(), zero, zero.float())


def test_enough_orders_are_drawn_to_know_an_error_that_hangs_on_one_rounding():
    """An equally accurate computation is rejected less than once in a thousand cases."""
    errors = torch.randn(20000, 1 + ORDERS).abs()
    allowed = SLACK * errors[:, 1:].amax(1)
    assert (errors[:, 0] > allowed).float().mean() < 1e-3
