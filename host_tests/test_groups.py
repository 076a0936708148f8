"""Kernel groups: split, join, kept rows and columns."""

import numpy as np
import pytest

from pynq_kgrc.groups import GroupSize, join, kept_columns, kept_rows, split


@pytest.mark.parametrize("shape", [(8, 8, 27), (9, 5, 27), (1, 1, 1), (16, 3, 49), (7, 17, 3)])
@pytest.mark.parametrize("size", [GroupSize(8, 8, 9), GroupSize(4, 2, 5)])
def test_join_undoes_split(shape, size):
    weight = np.random.default_rng(0).integers(-9, 9, shape)
    groups = split(weight, size)
    assert groups.shape[3:] == (size.gm, size.gn, min(shape[2], size.tk))
    np.testing.assert_array_equal(join(groups, *shape), weight)


def test_an_element_lies_where_the_paper_says():
    weight = np.zeros((16, 16, 27), int)
    weight[11, 9, 20] = 1
    assert np.argwhere(split(weight, GroupSize(8, 8, 9))).tolist() == [[1, 1, 2, 3, 1, 2]]


def test_kept_rows_and_columns_follow_the_zeros():
    weight = np.zeros((4, 4, 9), int)
    weight[1, 2, 5] = weight[3, 0, 5] = weight[3, 1, 7] = 1
    groups = split(weight, GroupSize(4, 4, 9))
    assert np.flatnonzero(kept_rows(groups)).tolist() == [1, 3]
    assert np.flatnonzero(kept_columns(groups)).tolist() == [5, 7]
