"""What the exercises of chapter 04 and their solutions tell the reader to expect"""
import math

import pytest
import torch
import torch.nn.functional as F
from answers import solutions
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from course_lib.checks import EXERCISES
from course_lib.dataloader import DataLoader, RandomResizedCrop, batch_accuracy, get_dls, init_params, mnist_loss
from course_lib.datasets import mnist, three_or_seven
from course_lib.optim import SGD
from course_lib.settings import set_seed

real = pytest.mark.usefixtures("real_pictures")


def answer(name: str):
    return solutions(4)[name]


def threes_and_sevens() -> tuple[TensorDataset, TensorDataset]:
    "Rows of pixels [N, 784] with targets [N, 1], for training and for validation"
    data = three_or_seven()
    return tuple(TensorDataset(x.flatten(1).float() / 255, (y == 0).float()[:, None])
                 for x, y in ((data.train_x, data.train_y), (data.valid_x, data.valid_y)))


def trained(params: list[Tensor], batches, loss_func, lr: float) -> None:
    opt = SGD(params, lr=lr)
    for xb, yb in batches:
        loss_func(xb @ params[0] + params[1], yb).backward()
        opt.step()
        opt.zero_grad()


def read(params: list[Tensor], valid: TensorDataset) -> float:
    x, y = valid.tensors
    return batch_accuracy((x @ params[0] + params[1]).detach(), y).item()


def test_1_batches_of_threes_and_sevens():
    assert answer("n_batches")(12_396, 256) == 49 and answer("n_batches")(12_396, 256, drop_last=True) == 48
    for n, size in ((1, 1), (100, 7), (64, 64)):
        assert answer("n_batches")(n, size) == len(DataLoader(range(n), size))


def other_answers() -> dict[str, list]:
    "Right answers written in another way than the solutions"
    def bce_from_logsigmoid(z, y):
        return -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean()

    def accumulate_with_sums(xb, yb, model, part=64):
        for i in range(0, len(xb), part):
            p, y = model(xb[i:i + part]).sigmoid(), yb[i:i + part]
            ((p - y).abs().sum() / len(xb)).backward()

    def accumulate_in_equal_parts(xb, yb, model, part=64):
        k = math.ceil(len(xb) / part)
        for x, y in zip(xb.tensor_split(k), yb.tensor_split(k), strict=True):
            (mnist_loss(model(x), y) * (len(x) / len(xb))).backward()

    def pad_with_pad(items):
        h, w = max(x.shape[0] for x, _ in items), max(x.shape[1] for x, _ in items)
        return [torch.stack([F.pad(x, (0, w - x.shape[1], 0, h - x.shape[0])) for x, _ in items]), torch.LongTensor([y for _, y in items])]

    def stream_with_pop(items, size, seed=0):
        import random
        buffer, draw = [], random.Random(seed)
        for item in items:
            buffer.append(item)
            if len(buffer) > size:
                yield buffer.pop(draw.randrange(len(buffer)))
        while buffer:
            yield buffer.pop(draw.randrange(len(buffer)))

    def stream_with_torch(items, size, seed=0):
        g, buffer = torch.Generator().manual_seed(seed), []
        for item in items:
            if len(buffer) == size:
                i = int(torch.randint(size, (), generator=g))
                buffer[i], item = item, buffer[i]
                yield item
            else:
                buffer.append(item)
        for i in torch.randperm(len(buffer), generator=g).tolist():
            yield buffer[i]

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.zeros(784, 10)), nn.Parameter(torch.zeros(10))

        def forward(self, x):
            return x.flatten(1) @ self.w + self.b

    def ten_from_zero(dls, epochs=3, lr=.1):
        model = Flat().to(dls.device)
        for _ in range(epochs):
            for xb, yb in dls.train:
                grads = torch.autograd.grad(F.nll_loss(model(xb).log_softmax(1), yb), list(model.parameters()))
                with torch.no_grad():
                    for p, g in zip(model.parameters(), grads, strict=True):
                        p -= lr * g
        return model

    def kept_in_a_loop(x, boxes):
        shares = []
        for p, (top, left, h, w) in zip(x, boxes.tolist(), strict=True):
            shares.append(float(p[:, top:top + h, left:left + w].sum()) / float(p.sum()))
        return torch.tensor(shares, device=x.device)
    return {"n_batches": [lambda n, batch_size, drop_last=False: n // batch_size if drop_last else -(-n // batch_size),
                          lambda n, b, d=False: len(range(0, n, b)) - bool(d and n % b)],
            "bce_loss": [F.binary_cross_entropy_with_logits, bce_from_logsigmoid],
            "accumulate_grad": [accumulate_with_sums, accumulate_in_equal_parts],
            "pad_collate": [pad_with_pad], "shuffled_stream": [stream_with_pop, stream_with_torch],
            "ten_digit_model": [ten_from_zero], "kept": [kept_in_a_loop]}


@pytest.mark.parametrize("name", other_answers())
def test_other_right_answers_pass(name):
    for other in other_answers()[name]:
        report = EXERCISES[name].examine(other, "cpu")
        assert report.right, report.text


@real
@pytest.mark.slow
def test_2_cross_entropy_frees_the_stuck_start():
    train, valid = threes_and_sevens()
    torch.manual_seed(42)
    torch.randn(20), torch.randn(3)                  # chapter 03's draws come first
    params, found = [init_params((784, 1)), init_params(1)], []
    dl = DataLoader(train, 256, shuffle=True, seed=0)
    for _ in range(5):
        trained(params, dl, answer("bce_loss"), .1)
        found.append(read(params, valid))
    assert found[0] > .8 and found[-1] > .93


@real
@pytest.mark.slow
@pytest.mark.parametrize(("size", "low", "high"), [(100, .495, .497), (1000, .49, .55), (10_000, .95, .98)])
def test_5_how_large_a_buffer_has_to_be(size, low, high):
    train, valid = threes_and_sevens()
    assert int(train.tensors[1].sum()) == 6131
    set_seed(0)
    model = nn.Linear(784, 1)
    params = [model.weight.detach().T.clone().requires_grad_(), model.bias.detach().clone().requires_grad_()]
    order = torch.tensor(list(answer("shuffled_stream")(range(len(train)), size)))
    trained(params, (train[i] for i in order.split(256)), mnist_loss, 1.)
    assert low < read(params, valid) < high


@real
@pytest.mark.slow
def test_6_ten_classes():
    torch.manual_seed(0)
    dls = get_dls(256, seed=0, device="cpu")
    model = answer("ten_digit_model")(dls, 3, .1)
    assert sum(p.numel() for p in model.parameters()) == 7850
    with torch.no_grad():
        right = torch.cat([model(xb).argmax(1) == yb for xb, yb in dls.valid])
    assert right.float().mean().item() == pytest.approx(.92, abs=.01)


@real
@pytest.mark.slow
def test_7_batch_sizes():
    train, valid = threes_and_sevens()
    runs = answer("compare_batch_sizes")(train, valid, {16: 1., 64: 3., 1024: 3., 4096: 3.}, 5, [0, 1])
    mean = {size: [sum(r[i] for r in found) / len(found) for i in range(3)] for size, found in runs.items()}
    assert mean[16][0] == 5 * 775 and mean[64][0] == 5 * 194
    assert mean[16][2] > .98 and mean[64][2] > .98 and mean[1024][2] < .98 and mean[4096][2] < .975
    assert mean[64][1] < .7 * mean[16][1]


@real
@pytest.mark.slow
def test_8_a_crops_price():
    x, lost = mnist().train_x[:, None].float(), {}
    for scale in (.35, .66):
        set_seed(1)
        share = answer("kept")(x, RandomResizedCrop(28, scale=(scale, 1)).draw(len(x), 28, 28)[0])
        lost[scale] = share.mean().item(), (share < .9).float().mean().item()
    assert lost[.35][0] == pytest.approx(.905, abs=.003) and lost[.35][1] == pytest.approx(.352, abs=.01)
    assert lost[.66][1] == pytest.approx(.05, abs=.005)
