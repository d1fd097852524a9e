"""What the exercises of chapter 02 and their solutions tell the reader to expect, on real MNIST where pictures are involved."""
import pytest
import torch
from answers import solutions
from torch import Tensor

from course_lib.datasets import mnist, three_or_seven
from course_lib.settings import set_seed
from course_lib.similarity import class_means, mnist_distance, nearest_mean, rms_distance

answers = solutions(2)


def pictures(x: Tensor) -> Tensor:
    return x.float() / 255


@pytest.fixture
def real(real_pictures):
    return three_or_seven()


@pytest.fixture
def means(real) -> Tensor:
    return class_means(pictures(real.train_x), real.train_y, 2)


def accuracy(found: Tensor, y: Tensor) -> float:
    return (found == y).float().mean().item()


def test_1_the_pictures_of_the_task():
    mae, rmse = answers["two_distances"](torch.tensor([[0., 1.], [0., 1.]]), torch.tensor([[0., 0.], [1., 1.]]))
    assert mae.item() == .5 and rmse.item() == pytest.approx(.5**.5)


@pytest.mark.slow
def test_2_norms(real, means):
    a_3 = pictures(mnist().train_x[10000])
    l1, l2 = answers["to_norms"](mnist_distance(a_3, means[1]), rms_distance(a_3, means[1]), 784)
    assert l1.item() == pytest.approx(124.4, abs=.05) and l2.item() == pytest.approx(8.46, abs=.005)


@pytest.mark.slow
def test_4_a_better_threshold(real, means):
    def margins(x, y):
        margin = mnist_distance(pictures(x), means[0]) - mnist_distance(pictures(x), means[1])
        return margin[y == 0], margin[y == 1]

    t = answers["best_threshold"](*margins(real.train_x, real.train_y))
    threes, sevens = margins(real.valid_x, real.valid_y)
    mean = ((threes < t).float().mean() + (sevens >= t).float().mean()).item() / 2
    assert t == pytest.approx(.012, abs=5e-4) and mean > .96 and mean == pytest.approx(.9651, abs=5e-4)


@pytest.mark.slow
def test_5_how_far_a_picture_may_move(real, means):
    def share(label, pixels):
        x = pictures(real.valid_x[real.valid_y == label])
        return accuracy(nearest_mean(answers["shifted"](x, pixels), means), torch.full((len(x),), label))

    threes = {pixels: share(0, pixels) for pixels in range(-5, 6)}
    assert [p for p, a in threes.items() if a < .5] == [-5, -4, 5]
    assert [threes[p] for p in (0, 4, 5, -4)] == pytest.approx([.917, .608, .333, .446], abs=.001)
    assert share(1, 2) == pytest.approx(.997, abs=.001) and share(1, 2) > share(1, 0)


@pytest.mark.slow
def test_6_nearest_picture(real_pictures):
    data = mnist()
    for n, known in ((1000, .869), (60_000, .969)):
        found = answers["nearest_picture"](pictures(data.valid_x), pictures(data.train_x[:n]), data.train_y[:n])
        assert accuracy(found, data.valid_y) == pytest.approx(known, abs=.0005)


@pytest.mark.slow
def test_7_prototypes(real_pictures):
    data = mnist()
    set_seed(0)
    prototypes, labels = answers["my_prototypes"](pictures(data.train_x), data.train_y)
    right = accuracy(labels[nearest_mean(pictures(data.valid_x), prototypes, rms_distance)], data.valid_y)
    assert prototypes.shape == (100, 28, 28) and right > .89 and right == pytest.approx(.92, abs=.01)
