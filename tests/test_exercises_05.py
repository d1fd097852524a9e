"""What the exercises of chapter 05 and their solutions tell the reader to expect"""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from answers import solutions
from torch import nn
from torch.utils.data import TensorDataset

from course_lib.checks import EXERCISES
from course_lib.dataloader import DataLoader, DataLoaders, get_dls, mnist_loss
from course_lib.datasets import mnist, three_or_seven
from course_lib.learner import Callback, CancelBatchException, CancelFitException, Learner, accuracy
from course_lib.optim import SGD, Adam
from course_lib.settings import set_seed

real = pytest.mark.usefixtures("real_pictures")


def answer(name: str):
    return solutions(5)[name]


def ten_learner(seed: int, *sizes: int, metrics) -> Learner:
    set_seed(seed)
    dls = get_dls(256, mnist(), normalize=False, seed=seed, device="cpu")
    return Learner(dls, answer("mlp")(*sizes), opt_func=SGD, metrics=metrics, progress=False)


def other_answers() -> dict[str, list]:
    "Right answers written in another way than the solutions"
    def collapse_by_probing(first, second):
        x = torch.eye(first.in_features, device=first.weight.device)
        with torch.no_grad():
            zero = second(first(torch.zeros_like(x[:1])))[0]
            one = nn.Linear(first.in_features, second.out_features).to(x.device)
            one.weight.data, one.bias.data = (second(first(x)) - zero).T.contiguous(), zero
        return one

    def collapse_with_parameters(first, second):
        zero = torch.zeros((), device=first.weight.device)
        inner, outer = (zero if m.bias is None else m.bias for m in (first, second))
        layer = nn.Linear(1, 1)
        layer.weight = nn.Parameter(second.weight @ first.weight)
        layer.bias = nn.Parameter(second.weight @ inner.expand(first.out_features) + outer)
        return layer

    def top_2_by_sorting(pred, targ):
        order = pred.argsort(1, descending=True)
        return sum(int(t in o[:2].tolist()) for o, t in zip(order, targ.tolist(), strict=True)) / len(targ)

    class StopsInValidation(Callback):
        "Counts in a list, restores before it raises"
        order = 70

        def __init__(self, patience=3):
            self.patience = patience

        def before_fit(self):
            self.losses, self.states = [], []

        def after_epoch(self):
            self.losses.append(self.learn.recorder.values[-1][1])
            self.states.append({k: v.clone() for k, v in self.learn.model.state_dict().items()})
            best = self.losses.index(min(self.losses))
            last = self.learn.epoch + 1 == self.learn.n_epoch
            if len(self.losses) - 1 - best >= self.patience or last:
                self.learn.model.load_state_dict(self.states[best])
                raise CancelFitException

    class AccumulateWithACounter(Callback):
        order = 60

        def __init__(self, k):
            self.k, self.n = k, 0

        def after_loss(self):
            if self.learn.training:
                self.learn.loss = self.learn.loss / self.k

        def after_backward(self):
            self.n += 1
            if self.n % self.k:
                raise CancelBatchException

    class AccumulateByScalingGradients(Callback):
        def __init__(self, k):
            self.k = k

        def before_step(self):
            if (self.learn.iter + 1) % self.k:
                raise CancelBatchException
            for p in self.learn.model.parameters():
                p.grad /= self.k

    def miss_with_a_learner(net, x, y, steps=3000, lr=.01):
        learn = Learner(DataLoaders([(x, y)], [(x, y)]), net, opt_func=Adam, loss_func=nn.MSELoss(), progress=False, device=x.device)
        learn.fit(steps, lr)
        return max(abs(a - b) for a, b in zip(net(x).flatten().tolist(), y.flatten().tolist(), strict=True))

    class Mlp(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)])

        def forward(self, x):
            x = x.flatten(1)
            for layer in self.layers[:-1]:
                x = F.relu(layer(x))
            return self.layers[-1](x)

    class NestedLoops:
        def __init__(self, dls, model, loss_func, opt_func, cbs=()):
            self.dls, self.model, self.loss_func, self.opt_func, self.cbs = dls, model, loss_func, opt_func, list(cbs)
            for cb in self.cbs:
                cb.learn = self

        def __call__(self, event):
            for cb in self.cbs:
                if hasattr(cb, event):
                    getattr(cb, event)()

        def fit(self, n_epoch, lr):
            if not hasattr(self, "opt"):
                self.opt = self.opt_func(list(self.model.parameters()), lr=lr)
            self("before_fit")
            for _ in range(n_epoch):
                self.model.train()
                for self.xb, self.yb in self.dls.train:
                    self.opt.zero_grad()
                    self.pred = self.model(self.xb)
                    self.loss = self.loss_func(self.pred, self.yb)
                    self("after_loss")
                    self.loss.backward()
                    self.opt.step()
                    self("after_batch")
                self.model.eval()
                with torch.no_grad():
                    for self.xb, self.yb in self.dls.valid:
                        self.pred = self.model(self.xb)
                        self.loss = self.loss_func(self.pred, self.yb)
                        self("after_batch")
                self("after_epoch")
            self("after_fit")

    class DeadUnitsInOneBatch(Callback):
        "The whole validation set at once, with a hook of PyTorch's own"
        def __init__(self, i=2):
            self.i, self.counts = i, []

        def after_epoch(self):
            found = []
            hook = self.learn.model[self.i].register_forward_hook(lambda m, inputs, out: found.append(out))
            with torch.no_grad():
                self.learn.model(self.learn.dls.valid.dataset.tensors[0])
            hook.remove()
            self.counts.append((found[0].amax(0) <= 0).sum())
    return {"collapse": [collapse_by_probing, collapse_with_parameters], "top_2_accuracy": [top_2_by_sorting],
            "EarlyStopping": [StopsInValidation], "Accumulate": [AccumulateWithACounter, AccumulateByScalingGradients],
            "largest_miss": [miss_with_a_learner], "mlp": [Mlp], "MyLearner": [NestedLoops], "DeadUnits": [DeadUnitsInOneBatch]}


@pytest.mark.parametrize("name", other_answers())
def test_other_right_answers_pass(name):
    for other in other_answers()[name]:
        report = EXERCISES[name].examine(other, "cpu")
        assert report.right, report.text


def test_a_notebooks_own_learner_is_used():
    "In chapter 05 Learner and Callback are those of its cells, and course_lib's Learner would refuse a callback of theirs"
    from course_lib import learner
    used, own = [], {**vars(learner)}
    exec("class Callback(Callback):\n    def cleanup(self): ...", own)

    class OwnLearner(learner.Learner):
        def fit(self, *args, **kwargs):
            used.append(self)
            return super().fit(*args, **kwargs)
    own["Learner"] = OwnLearner
    body = {k: v for k, v in vars(answer("EarlyStopping")).items() if k not in ("__dict__", "__weakref__")}
    assert EXERCISES["EarlyStopping"].examine(type("EarlyStopping", (own["Callback"],), body), "cpu").right and used


@pytest.mark.parametrize(("sizes", "parameters"), [((784, 50, 10), 39_760), ((784, 48, 32, 10), 39_578),
                                                     ((784, 47, 24, 24, 24, 10), 39_497)])
def test_6_parameters(sizes, parameters):
    assert sum(p.numel() for p in answer("mlp")(*sizes).parameters()) == parameters


def test_7_the_same_losses_as_the_courses_learner():
    class Losses:
        def before_fit(self): self.losses = []

        def after_batch(self):
            if self.learn.model.training:
                self.losses.append(self.learn.loss.item())
    x, y, ends = torch.rand(200, 20, generator=torch.Generator().manual_seed(0)), torch.ones(200, 1), []
    for cls, more in ((answer("MyLearner"), {"cbs": [losses := Losses()]}), (Learner, {"progress": False, "device": "cpu"})):
        set_seed(1)
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Dropout(.2), nn.Linear(30, 1))
        dls = DataLoaders(*(DataLoader(TensorDataset(x, y), 32, shuffle=s, seed=5) for s in (True, False)))
        learn = cls(dls, model, loss_func=mnist_loss, opt_func=lambda params, lr: SGD(params, lr=lr, momentum=.9), **more)
        set_seed(2)
        learn.fit(3, .1)
        ends.append(copy.deepcopy(model.state_dict()))
    assert losses.losses == list(learn.recorder.losses)
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


@real
@pytest.mark.slow
def test_2_a_second_guess():
    learn = ten_learner(0, 784, 10, metrics=[accuracy, answer("top_2_accuracy")])
    learn.fit(3, .1)
    assert learn.recorder.values[-1][2] == pytest.approx(.906, abs=.003)
    assert learn.recorder.values[-1][3] == pytest.approx(.96, abs=.005)


@real
@pytest.mark.slow
def test_4_large_batches_in_small_parts():
    data = three_or_seven()
    x, y = data.train_x[:12288].flatten(1).float() / 255, (data.train_y == 0).float()[:12288, None]
    ends = []
    for bs, cbs in ((256, ()), (64, answer("Accumulate")(4))):
        set_seed(0)
        train = DataLoader(TensorDataset(x, y), bs, shuffle=True, seed=0)
        learn = Learner(DataLoaders(train, [(x[:8], y[:8])]), nn.Linear(784, 1), opt_func=SGD, loss_func=mnist_loss,
                        cbs=cbs, progress=False)
        learn.fit(1, 1.)
        assert len(learn.recorder.losses) == 12288 // bs
        ends.append(learn.model.weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_5_existence_is_not_learning():
    x = torch.linspace(-2, 2, 401)[:, None]
    y = torch.sin(3 * x) + x / 2
    misses = []
    for seed in range(5):
        set_seed(seed)
        misses.append(answer("largest_miss")(nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1)), x, y))
    assert min(misses) > 5 * .017 and max(misses) > .3 and sum(m < .2 for m in misses) == 4


@real
@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "low", "high"), [((784, 50, 10), .965, .976), ((784, 48, 32, 10), .965, .976),
                                                    ((784, 47, 24, 24, 24, 10), .955, .968)])
def test_6_depth_at_equal_cost(sizes, low, high):
    learners = [ten_learner(seed, *sizes, metrics=accuracy) for seed in range(3)]
    for learn in learners:
        learn.fit(10, .5)
    assert low < math.fsum(learn.recorder.values[-1][2] for learn in learners) / 3 < high
