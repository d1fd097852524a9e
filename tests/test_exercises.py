"""What the exercises tell the reader to expect, on real MNIST (their cells are the reader's to fill, so no cell asserts it)."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.dataloader import DataLoader, DataLoaders, get_dls, init_params, mnist_loss
from course_lib.datasets import three_or_seven
from course_lib.learner import Callback, CancelBatchException, Learner, accuracy
from course_lib.optim import SGD, Adam
from course_lib.settings import set_seed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_pictures")]


def pictures(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 255


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


def layers(*sizes: int) -> nn.Sequential:
    inner = [m for a, b in zip(sizes[:-2], sizes[1:-1], strict=True) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(*sizes[-2:]))


def ten_learner(seed: int, *sizes: int, metrics) -> Learner:
    set_seed(seed)
    dls = get_dls(256, normalize=False, seed=seed, device="cpu")
    return Learner(dls, layers(*sizes), opt_func=SGD, metrics=metrics, progress=False)


def top_2_accuracy(pred, targ):
    return (pred.topk(2, dim=1).indices == targ[:, None]).any(1).float().mean()


def test_05_a_second_guess():
    learn = ten_learner(0, 784, 10, metrics=[accuracy, top_2_accuracy])
    learn.fit(3, .1)
    assert learn.recorder.values[-1][2] == pytest.approx(.906, abs=.003)
    assert learn.recorder.values[-1][3] == pytest.approx(.96, abs=.005)


def test_05_large_batches_in_small_parts():
    class Accumulate(Callback):
        order = 55

        def __init__(self, k): self.k = k

        def before_backward(self): self.learn.loss = self.learn.loss / self.k

        def before_step(self):
            if (self.learn.iter + 1) % self.k:
                raise CancelBatchException

    data = three_or_seven()
    x, y = pictures(data.train_x).flatten(1)[:12288], (data.train_y == 0).float()[:12288, None]
    ends = []
    for bs, cbs in ((256, ()), (64, Accumulate(4))):
        set_seed(0)
        train = DataLoader(torch.utils.data.TensorDataset(x, y), bs, shuffle=True, seed=0)
        learn = Learner(DataLoaders(train, [(x[:8], y[:8])]), nn.Linear(784, 1), opt_func=SGD, loss_func=mnist_loss,
                        cbs=cbs, progress=False)
        learn.fit(1, 1.)
        assert len(learn.recorder.losses) == 12288 // bs
        ends.append(learn.model.weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


def test_05_existence_is_not_learning():
    x = torch.linspace(-2, 2, 401)[:, None]
    y = torch.sin(3 * x) + x / 2
    misses = []
    for seed in range(5):
        set_seed(seed)
        net = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))
        learn = Learner(DataLoaders([(x, y)], [(x, y)]), net, opt_func=Adam, loss_func=F.mse_loss, progress=False)
        learn.fit(3000, .01)
        with torch.no_grad():
            misses.append((net(x) - y).abs().max().item())
    assert min(misses) > 5 * .017 and max(misses) > .3


def test_05_depth_at_equal_cost():
    for sizes, parameters, low, high in (((784, 50, 10), 39_760, .965, .976), ((784, 48, 32, 10), 39_578, .965, .976),
                                         ((784, 47, 24, 24, 24, 10), 39_497, .955, .968)):
        learners = [ten_learner(seed, *sizes, metrics=accuracy) for seed in range(3)]
        assert sum(p.numel() for p in learners[0].model.parameters()) == parameters
        for learn in learners:
            learn.fit(10, .5)
        assert low < sum(learn.recorder.values[-1][2] for learn in learners) / 3 < high
