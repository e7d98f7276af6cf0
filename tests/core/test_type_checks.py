"""The run-time checks that conftest installs are on: a wrong shape or dtype is refused where it enters."""

import jaxtyping
import pytest
import torch

from nearplane.core.grid import Grid, decode, encode, fit_groups
from nearplane.core.moments import Moments

refused = pytest.raises(jaxtyping.TypeCheckError)


def test_mismatched_columns_are_refused():
    with refused:
        fit_groups(torch.zeros(3, 10), Grid(), torch.ones(9))


def test_integer_values_are_refused():
    with refused:
        encode(torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3), Grid())


def test_shapes_that_do_not_broadcast_are_refused():
    with refused:
        decode(torch.zeros(3, 4), torch.ones(2, 4), torch.zeros(3, 4))


def test_dataclass_fields_are_checked():
    with refused:
        Moments(torch.zeros(3, 4))
