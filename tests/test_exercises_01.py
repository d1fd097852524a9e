"""What the exercises of chapter 01 tell the reader to expect (their cells are the reader's to fill, so no cell asserts it)."""
import pytest
import torch
from answers import solutions

from course_lib.datasets import mnist, three_or_seven

answers = solutions(1)


def test_1_threes():
    assert answers["count"](mnist().train_y, 3) == 6131


def test_2_a_header():
    assert answers["idx_shape"](bytes([0, 0, 8, 1, 0, 0, 39, 16])) == (10000,)


def test_3_fours_and_nines():
    pair = answers["two_digits"](mnist(), 4, 9)
    assert len(pair.train_x) == 11_791 and pair.classes == ["4", "9"]
    assert torch.bincount(pair.train_y).tolist() == [5842, 5949] and torch.bincount(pair.valid_y).tolist() == [982, 1009]


def test_3_is_three_or_seven_but_for_the_order():
    ours, known = answers["two_digits"](mnist(), 3, 7), three_or_seven()
    assert ours.train_y.equal(known.train_y) and not ours.train_x.equal(known.train_x)
    assert ours.train_x.flatten(1).sum(1).sort().values.equal(known.train_x.flatten(1).sum(1).sort().values)


def test_4_the_first_are_all_threes_and_a_random_choice_is_half():
    both = three_or_seven()
    assert (both.train_y[:2000] == 0).all()
    shares = [(answers["hold_out"](both, 2000, seed).valid_y == 0).float().mean().item() for seed in range(5)]
    assert all(abs(share - 6131 / 12396) < .05 for share in shares)


def test_5_the_same_as_in_floats():
    x = mnist().train_x
    assert answers["mean_std"](x) == pytest.approx(((x.float() / 255).mean().item(), (x.float() / 255).std().item()), abs=5e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_5_the_numbers_of_mnist():
    assert answers["mean_std"](mnist().train_x) == pytest.approx((.1307, .3081), abs=5e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_6_two_measures_share_four_of_ten_fours():
    data = mnist()
    places = (data.train_y == 4).nonzero()[:, 0]
    v = data.train_x[places].flatten(1).float() / 255
    far = answers["oddness"](data.train_x[places]).topk(10).indices
    lonely = torch.cdist(v, v).fill_diagonal_(torch.inf).amin(1).topk(10).indices
    assert len(set(far.tolist()) & set(lonely.tolist())) == 4
    assert places[lonely[-1]] == 59915                  # the solution speaks of the last picture of its lower row
