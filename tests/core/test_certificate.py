import pytest
import torch

from nearplane.core.certificate import ratio, verify
from nearplane.core.errors import NumericalError
from nearplane.core.grid import Certificate


def certificate(loss, bound, clipped=None):
    return Certificate(torch.tensor(loss), torch.tensor(bound), torch.tensor(clipped or [0] * len(loss)))


def test_ratio_sums_over_rows():
    assert ratio(certificate([1.0, 2.0], [4.0, 8.0])) == 0.25


def test_ratio_of_an_empty_bound_is_finite():
    assert ratio(certificate([0.0], [0.0])) == 0.0


def test_a_violation_is_a_numerical_error_that_names_the_row():
    with pytest.raises(NumericalError, match="row 1 has loss 2"):
        verify(certificate([0.5, 2.0, 0.9], [1.0, 1.0, 1.0]))


def test_one_bad_row_is_not_averaged_away():
    bad = certificate([0.1, 1.1], [1.0, 1.0])
    assert ratio(bad) < 1
    with pytest.raises(NumericalError):
        verify(bad)


def test_a_loss_that_is_not_finite_is_an_error():
    for loss, bound in (([float("nan")], [1.0]), ([1.0], [float("inf")])):
        with pytest.raises(NumericalError, match="not finite"):
            verify(certificate(loss, bound, clipped=[3]))


def test_a_loss_within_rounding_of_the_bound_passes():
    verify(certificate([1.0, 0.3], [1.0, 1.0]))
    verify(certificate([1.00001], [1.0]))


def test_nothing_is_claimed_for_rows_with_clipped_codes_but_all_for_the_others():
    verify(certificate([2.0, 0.5], [1.0, 1.0], clipped=[1, 0]))
    with pytest.raises(NumericalError, match="row 1"):
        verify(certificate([3.0, 2.0], [1.0, 1.0], clipped=[1, 0]))
