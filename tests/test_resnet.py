"course_lib.resnet against torchvision, its counts against known figures, its blocks against their parts, and bad input"
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import TensorDataset

import course_lib.schedule  # noqa: F401  (gives the Learner its fit_one_cycle)
from course_lib.conv import ConvLayer, noop
from course_lib.dataloader import DataLoader, DataLoaders
from course_lib.datasets import ImageData
from course_lib.learner import Callback, Hooks, Learner, accuracy, evaluating
from course_lib.optim import AdamW
from course_lib.resnet import (NETS, WIDTHS, Muon, ResBlock, ResNet, SqueezeExcite, add_attention, conv_block, costs, orthogonalize,
                               photo_learner, photo_net, pooled_net, resnet18, resnet34, resnet50, resnet_stem, whiten)
from course_lib.settings import set_seed

AS_TORCHVISION = {"stem": "basic", "shortcut": "stride", "zero_norm": False}
PAIRS = pytest.mark.parametrize("name, ours", [("resnet18", resnet18), ("resnet34", resnet34), ("resnet50", resnet50)])


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def scramble(model: nn.Module) -> nn.Module:
    "Norms with factors, summands and running averages of their own, so that none of them can be forgotten unseen"
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(.5, 1.5); m.bias.normal_(0, .2)
                m.running_mean.normal_(0, .2); m.running_var.uniform_(.5, 1.5)
    return model


def as_torchvision(name: str, ours, classes: int = 1000) -> tuple[nn.Module, nn.Module]:
    "Ours and torchvision's with the same weights"
    theirs = scramble(getattr(torchvision.models, name)(num_classes=classes))
    mine = ours(classes, **AS_TORCHVISION)
    mine.load_state_dict(dict(zip(mine.state_dict(), theirs.state_dict().values(), strict=True)))
    return mine, theirs


@PAIRS
def test_equals_torchvision_in_every_part(seed, name, ours):
    mine, theirs = as_torchvision(name, ours)
    assert count(mine) == count(theirs) and len(convs(mine)) == len(convs(theirs))
    for a, b in zip(convs(mine), convs(theirs), strict=True):
        assert (a.kernel_size, a.stride, a.padding, a.bias is None) == (b.kernel_size, b.stride, b.padding, b.bias is None)
    x, outputs = torch.randn(2, 3, 64, 96), []
    for net, parts in ((mine, [*mine[:5], mine[7]]),
                       (theirs, [theirs.maxpool, theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4, theirs.fc])):
        with evaluating(net), Hooks(parts, lambda m, i, o: o) as hooks:
            net(x)
        outputs.append(hooks.stored)
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_equals_torchvision_in_training_too(seed):
    mine, theirs = (net.double() for net in as_torchvision("resnet18", resnet18, 10))
    x, y = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randint(10, (4,))
    for net in (mine, theirs):
        net.train()
        F.cross_entropy(net(x), y).backward()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-7)
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@PAIRS
def test_each_option_changes_what_it_says(name, ours):
    basic, mine = ours(**AS_TORCHVISION), ours()
    assert len(convs(mine)) - len(convs(basic)) == 2                     # of the stem
    assert sum(isinstance(m, nn.AvgPool2d) for m in mine.modules()) == 3 and not any(
        isinstance(m, nn.AvgPool2d) for m in basic.modules())
    zero = sum((m.weight == 0).all() for m in mine.modules() if isinstance(m, nn.BatchNorm2d))
    blocks = [m for m in mine.modules() if isinstance(m, ResBlock)]
    assert zero == len(blocks) - (3 if name != "resnet50" else 4) == sum(b.idconv is noop for b in blocks)
    every = sum((m.weight == 0).all() for m in ours(zero_norm=True).modules() if isinstance(m, nn.BatchNorm2d))
    assert every == len(blocks)


# parameters, convolutions, million multiply-adds at 128 pixels
KNOWN = {"plain": (395_674, 5, 20.6), "ResBlock": (1_226_890, 15, 70.1), "two ResBlocks": (2_800_202, 25, 164.5),
         "ResNet-18": (11_200_874, 22, 670.4), "ResNet-50": (23_547_754, 55, 1412.8)}


@pytest.mark.parametrize("name", KNOWN)
def test_nets_of_the_book(name):
    net = NETS[name](10)
    found = costs(net)
    assert (count(net), len(convs(net))) == KNOWN[name][:2]
    assert round(sum(c.macs for c in found) / 1e6, 1) == KNOWN[name][2]
    assert all(c.params > 0 and c.macs > 0 and c.activations > 0 for c in found) and len(found) == len(convs(net)) + 1


def test_the_control_has_the_convolutions_of_the_residual_net():
    def long_way(net): return [(m.in_channels, m.out_channels, m.stride) for m in convs(net) if m.kernel_size == (3, 3)]
    control, net = NETS["ten in a row"](10), NETS["ResBlock"](10)
    assert long_way(control) == long_way(net) and len(convs(control)) == 10
    assert not any(isinstance(m, ResBlock) for m in control.modules())
    macs = [sum(c.macs for c in costs(n)) for n in (control, net)]
    assert .95 < macs[0] / macs[1] < 1


def test_known_weights():
    def weights(m): return sum(c.weight.numel() for c in convs(m))
    assert weights(ResBlock(256, 256, expansion=4)) == 69_632
    assert weights(ResBlock(64, 64)) == 73_728 and weights(ResBlock(256, 256)) == 1_179_648
    assert convs(resnet_stem())[0].weight.numel() == 864
    assert [m.stride for m in convs(resnet50()) if m.stride != (1, 1)] == [(2, 2)] * 4


def test_costs_against_pytorchs_counter(seed):
    from torch.utils.flop_counter import FlopCounterMode
    for make, size in ((resnet18, 96), (NETS["two ResBlocks"], 67), (resnet50, 64)):
        net = make(7)
        with FlopCounterMode(display=False) as counter, evaluating(net):
            net(torch.zeros(1, 3, size, size))
        assert 2 * sum(c.macs for c in costs(net, size)) == counter.get_total_flops()
        names = dict(net.named_modules())
        assert all(sum(p.numel() for p in names[c.name].parameters()) == c.params for c in costs(net, size))


def test_costs_leave_the_model_as_it_is(seed):
    net = resnet18()
    state, before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    costs(net, 64)
    assert net.training and torch.get_rng_state().equal(before) and not any(m._forward_hooks for m in net.modules())
    assert all(a.equal(b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    grey = costs(resnet18(channels=1).double(), 32, channels=1)
    assert grey[0].params == 1 * 32 * 9


def test_costs_leave_out_what_is_not_used():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.used(x)
    assert [c.name for c in costs(Half(), 4)] == ["used"]


@pytest.mark.parametrize("expansion", [1, 4])
@pytest.mark.parametrize("shortcut", ["pool", "stride"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_block_is_its_equation_at_every_size(seed, stride, shortcut, expansion):
    for ni, nf in ((8, 8), (8, 16), (16, 8)):
        block = scramble(ResBlock(ni, nf, stride, expansion, shortcut=shortcut)).double().eval()
        for n in (1, 2, 5, 7, 8):
            x = torch.randn(2, ni, n, n + 1, dtype=torch.float64)
            short = F.avg_pool2d(x, stride, ceil_mode=True) if shortcut == "pool" and stride > 1 else x
            if block.idconv is not noop:
                short = block.idconv(short)
            got = block(x)
            assert got.shape == (2, nf, -(-n // stride), -(-(n + 1) // stride))
            torch.testing.assert_close(got, F.relu(block.convs(x) + short))


@pytest.mark.parametrize("expansion", [1, 4])
def test_block_starts_as_the_identity(seed, expansion):
    block = ResBlock(16, 16, expansion=expansion)
    x = torch.rand(3, 16, 6, 6)
    assert block(x).equal(x)                                             # of what is not negative
    assert block.eval()(x).equal(x)
    assert not ResBlock(16, 16, expansion=expansion, zero_norm=False)(x).equal(x)
    assert not any((m.weight == 0).any() for m in ResBlock(16, 16, 2, expansion).modules() if isinstance(m, nn.BatchNorm2d))
    shrink = ResBlock(16, 16, 2, expansion, zero_norm=True)              # same channels: only the mean is left
    torch.testing.assert_close(shrink(x), F.avg_pool2d(x, 2))


def test_shortcut_has_a_norm_and_no_activation():
    block = ResBlock(8, 16, 2)
    assert [type(m) for m in block.idconv] == [nn.Conv2d, nn.BatchNorm2d]
    assert [type(m) for m in block.convs[-1]] == [nn.Conv2d, nn.BatchNorm2d]
    assert ResBlock(8, 8).idconv is noop and ResBlock(8, 8).pool is noop
    assert all(m.bias is None for m in convs(block))                     # a norm has its own


def test_activation_of_choice(seed):
    block = ResBlock(4, 4, act_cls=lambda: nn.LeakyReLU(.1), zero_norm=False).eval()
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), F.leaky_relu(block.convs(x) + x, .1))
    for make in (resnet18, resnet50):
        kinds = [type(m) for m in make(act_cls=nn.SiLU).modules()]
        assert nn.ReLU not in kinds and kinds.count(nn.SiLU) == [type(m) for m in make().modules()].count(nn.ReLU)


@pytest.mark.parametrize("make", [*NETS.values(), resnet34])
def test_any_size_of_picture(make):
    net = make(10).eval()
    with torch.no_grad():
        for size in ((33, 33), (64, 48)):
            assert net(torch.zeros(1, 3, *size)).shape == (1, 10)


def test_pooled_net_takes_its_block_as_an_argument(seed):
    made = []

    def block(ni: int, nf: int) -> nn.Module:
        made.append((ni, nf))
        return ConvLayer(ni, nf, stride=2)
    net = pooled_net(block, 7, widths=(4, 6), channels=1)
    assert made == [(1, 4), (4, 6)] and net(torch.randn(5, 1, 9, 9)).shape == (5, 7)
    x = torch.randn(2, 1, 16, 16)
    net.eval()
    torch.testing.assert_close(net(x), F.linear(net[1](net[0](x)).mean((2, 3)), net[-1].weight, net[-1].bias))


def test_slices_of_a_resnet_are_modules(seed):
    net = resnet18()
    assert type(net[:-1]) is nn.Sequential and net[:-1](torch.randn(2, 3, 64, 64)).shape == (2, 512)
    assert net[0] is list(net)[0] and net[-1].out_features == 10 and len(net) == 8
    assert [p.shape for p in net[1:5].parameters()] and net[1:5][0] is net[1]


def test_survives_copying_and_pickling(seed):
    net = scramble(resnet18()).eval()
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x))


def test_every_parameter_learns(seed):
    for make in (resnet18, resnet50):
        net = make(4, zero_norm=False)
        net(torch.randn(4, 3, 64, 64)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        assert all(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if not n.endswith("bias"))


def test_learns_a_simple_thing():
    set_seed(0)
    x = torch.randn(256, 3, 16, 16)
    y = torch.arange(256) % 2
    x[y == 1, 0] += 1                                                    # red or not
    dl = DataLoader(TensorDataset(x, y), 32, shuffle=True, seed=0)
    learn = Learner(DataLoaders(dl, dl), pooled_net(lambda a, b: ResBlock(a, b, 2), 2, (8, 16)), metrics=accuracy, progress=False)
    learn.fit_one_cycle(3, 1e-2)
    assert learn.recorder.values[-1][-1] > .97


@pytest.mark.parametrize("call, words", [
    (lambda: ResNet(10, [2, 2, 2]), "each of 4 groups"), (lambda: ResNet(10, [2, 2, 0, 2]), "each of 4 groups"),
    (lambda: resnet18(stem="deeep"), "stem is 'deeep'"), (lambda: resnet18(shortcut="conv"), "shortcut is 'conv'"),
    (lambda: conv_block(8, 10, expansion=4), "expansion is 4"), (lambda: ResBlock(8, 8, expansion=0), "expansion is 0")])
def test_bad_settings(call, words):
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


def test_widths_are_those_of_the_paper():
    assert WIDTHS == (64, 128, 256, 512)
    assert [g[-1].convs[-1][0].out_channels for g in resnet50()[1:5]] == [256, 512, 1024, 2048]


def test_squeeze_and_excitation_is_torchvisions(seed):
    mine, theirs = SqueezeExcite(32, 4), torchvision.ops.SqueezeExcitation(32, 8)
    for linear, conv in ((mine.squeeze, theirs.fc1), (mine.excite, theirs.fc2)):
        conv.load_state_dict({"weight": linear.weight[:, :, None, None], "bias": linear.bias})
    x = torch.randn(3, 32, 5, 6)
    torch.testing.assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_attention_ends_every_block(seed, make):
    net = make(5)
    plain = copy.deepcopy(net)
    blocks = [m for m in add_attention(net).modules() if isinstance(m, ResBlock)]
    assert [m.convs[-1].excite.out_features for m in blocks] == [m.convs[-1][0].out_channels for m in plain.modules()
                                                                  if isinstance(m, ResBlock)]
    x = torch.rand(2, 64, 8, 8)
    block, other = net[1][0].eval(), plain[1][0].eval()
    torch.testing.assert_close(block.convs(x), block.convs[-1](other.convs(x)))
    assert costs(net)[-1].params == costs(plain)[-1].params


@pytest.mark.parametrize("shape", [(4, 9), (64, 576), (64, 27), (10, 10), (1, 5)])
def test_orthogonalize(seed, shape):
    x = torch.randn(shape) * 10 ** torch.empty(1).uniform_(-4, 4)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    got = orthogonalize(x)
    assert got.shape == x.shape and got.dtype == x.dtype
    after = torch.linalg.svdvals(got)
    assert after.max() < 1.25
    assert (after > .6)[s / s.norm() > .05].all()                        # five rounds do not lift all that is weaker
    torch.testing.assert_close(got.T @ got @ vt.T[:, 0], vt.T[:, 0] * (vt[0] @ got.T @ got @ vt.T[:, 0]), atol=.05, rtol=.05)
    assert not orthogonalize(torch.zeros(shape)).any()                    # and no nan


@pytest.mark.parametrize("kernel, channels, out", [(3, 3, 32), (2, 1, 3), (1, 3, 3), (3, 2, 4)])
def test_whiten(seed, kernel, channels, out):
    pictures = torch.randn(8, channels, 20, 20).cumsum(3) / 3                 # neighbours alike
    pictures -= pictures.mean((0, 2, 3), keepdim=True)
    conv = nn.Conv2d(channels, out, kernel, stride=2, padding=1, bias=False)
    begin, state = conv.weight.detach().clone(), torch.get_rng_state()
    whiten(conv, pictures)
    assert torch.get_rng_state().equal(state) and conv.weight.requires_grad
    n = min(out, channels * kernel**2)
    assert conv.weight[n:].equal(begin[n:])                                   # there are no more directions
    seen = F.conv2d(pictures, conv.weight[:n].detach()).transpose(0, 1).flatten(1)          # every window
    products = seen @ seen.T / seen.shape[1]
    strongest = torch.linalg.eigvalsh((w := F.unfold(pictures, kernel).transpose(0, 1).flatten(1)) @ w.T / w.shape[1]).flip(0)[:n]
    torch.testing.assert_close(products, (strongest / (strongest + .01)).diag(), atol=2e-3, rtol=0)


def test_whiten_needs_pictures_for_its_convolution():
    for pictures in (torch.zeros(4, 1, 8, 8), torch.zeros(3, 8, 8)):
        with pytest.raises(ValueError, match=r"this convolution needs \[N, 3, H, W\]"):
            whiten(nn.Conv2d(3, 8, 3), pictures)


def test_muon_is_pytorchs_on_matrices(seed):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon (2.9 has)")
    settings = {"lr": .05, "weight_decay": .1}
    mine, theirs = ([nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(seed))) for s in ((8, 20), (20, 8))]
                    for _ in range(2))
    ours, reference = Muon(mine, **settings), torch.optim.Muon(theirs, momentum=.95, **settings)
    for _ in range(20):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours.step(); reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=.02, rtol=0)                # bfloat16, rounded at other places


def test_muon_leaves_vectors_to_adamw(seed):
    start = [torch.randn(7), torch.randn(4, 3, 2, 2)]
    mine, theirs = [nn.Parameter(p.clone()) for p in start], nn.Parameter(start[0].clone())
    ours, adam = Muon(mine, lr=.1, vectors=.2), AdamW([theirs], lr=.02, betas=(.95, .99), eps=1e-5, weight_decay=0)
    for _ in range(5):
        for p in mine:
            p.grad = torch.randn_like(p)
        theirs.grad = mine[0].grad.clone()
        ours.step(); adam.step()
    torch.testing.assert_close(mine[0], theirs)
    before = mine[1].detach().clone()
    mine[0].grad, mine[1].grad = None, torch.randn_like(before)           # vectors need not take part
    ours.step()
    step = (mine[1] - before * (1 - .1 * .01)).flatten(1)
    assert .05 < torch.linalg.svdvals(step).min() and torch.linalg.svdvals(step).max() < .125


def test_muon_goes_on_from_its_state(seed):
    def made():
        set_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        return net, Muon(net.parameters(), lr=.05)

    def steps(net, opt, n):
        for i in range(n):
            net(torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(i))).square().sum().backward()
            opt.step(); opt.zero_grad()
    net, opt = made()
    steps(net, opt, 3)
    other, again = made()
    other.load_state_dict(net.state_dict()); again.load_state_dict(opt.state_dict())
    steps(net, opt, 2); steps(other, again, 2)
    assert all(a.equal(b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_photo_learner_grows_its_crops_and_repeats():
    x, y = torch.randint(0, 256, (40, 3, 48, 48), dtype=torch.uint8), torch.arange(40) % 4
    data = ImageData(x, y, x, y, list("abcd"), "drawn", "noise")
    seen = []

    class Note(Callback):
        def before_batch(self):
            seen.append((self.learn.training, self.learn.xb.shape[-1]))

    def run():
        learn = photo_learner(data, 3, lambda n: pooled_net(lambda a, b: ResBlock(a, b, 2), n, (4, 8)), batch_size=20, small=16,
                              size=48, cbs=[Note()], progress=False)
        learn.fit(5, .02)
        return learn
    first, second = run(), run()
    assert [n for training, n in seen[:len(seen) // 2] if training] == [16, 16, 32, 32, 32, 32, 48, 48, 48, 48]
    assert {n for training, n in seen if not training} == {48}
    assert all(a.equal(b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    first.fit(1, .02)                                                     # never gets beyond small ones
    assert seen[-3:] == [(True, 16), (True, 16), (False, 48)] and first.dls.one_batch()[0].shape[-1] == 48
    assert photo_net(4)(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
