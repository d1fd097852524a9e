"""What the exercises tell the reader to expect, on real MNIST (their cells are the reader's to fill, so no cell asserts it)."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.dataloader import DataLoader, get_dls, init_params
from course_lib.datasets import mnist, three_or_seven
from course_lib.optim import SGD
from course_lib.settings import data_path
from course_lib.similarity import class_means, mnist_distance, rms_distance

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def real_pictures(monkeypatch):
    if not (data_path() / "MNIST" / "raw").is_dir():
        pytest.skip("MNIST is not in the data folder")
    monkeypatch.setenv("COURSE_SOURCE", "real")


def pictures(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255


def test_02_norms():
    data = three_or_seven()
    mean7, a_3 = class_means(pictures(data.train_x), data.train_y, 2)[1], pictures(mnist().train_x[10000])
    assert 784 * mnist_distance(a_3, mean7).item() == pytest.approx(124.4, abs=.05)
    assert 28 * rms_distance(a_3, mean7).item() == pytest.approx(8.46, abs=.005)


def test_02_a_better_threshold():
    data = three_or_seven()
    means = class_means(pictures(data.train_x), data.train_y, 2)

    def margins(x, y):
        margin = mnist_distance(pictures(x), means[0]) - mnist_distance(pictures(x), means[1])
        return margin[y == 0], margin[y == 1]

    def accuracy(threes, sevens, t):
        return ((threes < t).float().mean() + (sevens >= t).float().mean()).item() / 2
    train, valid = margins(data.train_x, data.train_y), margins(data.valid_x, data.valid_y)
    best = max(torch.linspace(-.05, .05, 201).tolist(), key=lambda t: accuracy(*train, t))
    assert accuracy(*valid, best) > .96


def test_02_nearest_picture():
    data = mnist()
    x, y = pictures(data.train_x).flatten(1), data.train_y

    def accuracy(n):
        half = x[:n].square().sum(1) / 2
        found = [y[:n][(part @ x[:n].T - half).argmax(1)] for part in pictures(data.valid_x).flatten(1).split(500)]
        return (torch.cat(found) == data.valid_y).float().mean().item()
    assert accuracy(1000) > .85 and accuracy(60_000) == pytest.approx(.969, abs=.0005)


def test_04_cross_entropy_frees_the_stuck_start():
    data = three_or_seven()
    rows, three = (lambda x: pictures(x).flatten(1)), (lambda y: (y == 0).float()[:, None])
    torch.manual_seed(42)
    torch.randn(20), torch.randn(3)                  # chapter 03's draws come first
    weights, bias = init_params((784, 1)), init_params(1)
    opt = SGD([weights, bias], lr=.1)
    dl = DataLoader(torch.utils.data.TensorDataset(rows(data.train_x), three(data.train_y)), 256, shuffle=True, seed=0)
    for xb, yb in dl:
        F.binary_cross_entropy_with_logits(xb @ weights + bias, yb).backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        assert (((rows(data.valid_x) @ weights + bias) > 0).float() == three(data.valid_y)).float().mean() > .8


def test_04_ten_classes():
    torch.manual_seed(0)
    dls, model = get_dls(256, seed=0, device="cpu"), nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    opt = SGD(model.parameters(), lr=.1)
    assert sum(p.numel() for p in model.parameters()) == 7850
    for _ in range(3):
        for xb, yb in dls.train:
            F.cross_entropy(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
    with torch.no_grad():
        right = torch.cat([model(xb).argmax(1) == yb for xb, yb in dls.valid])
    assert right.float().mean().item() == pytest.approx(.92, abs=.01)
