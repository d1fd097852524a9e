"""course_lib.conv against torch.nn.functional.conv2d and known sizes; and what it says to bad input"""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.conv import (ConvLayer, Flatten, NormType, conv2d, conv_size, noop, receptive_field, sequential,
                             simple_cnn, windows)


def number(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def pair(low: int, high: int) -> int | tuple[int, int]:
    "One number, or two that differ mostly"
    return number(low, high) if number(0, 1) else (number(low, high), number(low, high))


def case(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    "A random picture, kernels, biases and settings, some of them of odd form"
    groups, kernel = number(1, 3), (number(1, 4), number(1, 4))
    c_in, out = groups * number(1, 3), groups * number(1, 3)
    size = number(0, 3), c_in, number(7, 13), number(7, 13)
    settings = {"stride": pair(1, 3), "padding": pair(0, 3), "dilation": pair(1, 2), "groups": groups}
    if number(0, 3) == 0:
        settings |= {"padding": "same", "stride": 1}
    elif number(0, 3) == 0:
        settings["padding"] = "valid"
    x = torch.randn(size, dtype=dtype, device=device)
    return x, torch.randn(out, c_in // groups, *kernel, dtype=dtype, device=device), torch.randn(out, dtype=dtype, device=device), settings


# Results

@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_equals_torch(dtype, atol, seed):
    for _ in range(150):
        x, weight, bias, settings = case(dtype)
        ours, theirs = conv2d(x, weight, bias, **settings), F.conv2d(x, weight, bias, **settings)
        print(settings)
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 0, atol=atol)
        if isinstance(settings["padding"], int):
            rows = conv_size(x.shape[2], weight.shape[2], *(v if isinstance(v, int) else v[0] for v in
                                                            (settings["stride"], settings["padding"], settings["dilation"])))
            assert rows == theirs.shape[2]


def test_gradients_equal_torchs(seed):
    for _ in range(40):
        x, weight, bias, settings = case()
        if settings["padding"] == "same":
            settings["padding"] = 1
        ours, theirs = ([t.clone().requires_grad_() for t in (x, weight, bias)] for _ in range(2))
        out = F.conv2d(*theirs, **settings)
        upstream = torch.randn_like(out)
        out.backward(upstream)
        conv2d(*ours, **settings).backward(upstream)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"stride": (2, 1), "padding": (0, 2)}, {"padding": "same"}, {"dilation": (1, 2), "groups": 2}])
def test_gradcheck(settings, seed):
    groups = settings.get("groups", 1)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 2, 5, 6), (4, 2 // groups, 3, 3), (4,))]
    assert torch.autograd.gradcheck(lambda *a: conv2d(*a, **settings), args)


def test_input_that_is_not_contiguous(seed):
    x = torch.randn(9, 4, 12, 3, dtype=torch.float64)[:, ::2].permute(3, 1, 0, 2)         # [3, 2, 9, 12]
    weight = torch.randn(3, 3, 2, 5, dtype=torch.float64).permute(3, 2, 1, 0)              # [5, 2, 3, 3]
    bias = torch.randn(10, dtype=torch.float64)[::2]
    assert not x.is_contiguous() and not weight.is_contiguous() and not bias.is_contiguous()
    torch.testing.assert_close(conv2d(x, weight, bias, 2, 1), F.conv2d(x, weight, bias, 2, 1), rtol=0, atol=1e-10)
    last = torch.randn(2, 3, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(conv2d(last, weight), F.conv2d(last, weight), rtol=0, atol=1e-10)
    broadcast = torch.randn(1, 3, 1, 8, dtype=torch.float64).expand(2, 3, 8, 8)
    torch.testing.assert_close(conv2d(broadcast, weight), F.conv2d(broadcast, weight), rtol=0, atol=1e-10)


def test_one_picture_and_no_picture(seed):
    x, weight, bias = torch.randn(2, 6, 7), torch.randn(3, 2, 3, 3), torch.randn(3)
    torch.testing.assert_close(conv2d(x, weight, bias, padding=1), F.conv2d(x, weight, bias, padding=1))
    assert conv2d(x, weight).shape == (3, 4, 5) and conv2d(torch.empty(0, 2, 6, 7), weight).shape == (0, 3, 4, 5)
    before = x.clone()
    conv2d(x, weight, bias, padding=2)
    assert torch.equal(x, before)


def test_lists_and_short_pairs_are_taken_as_torch_takes_them(seed):
    x, weight = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 3, 3)
    for value in ([2, 1], (2,), torch.Size([2, 1])):
        torch.testing.assert_close(conv2d(x, weight, stride=value), F.conv2d(x, weight, stride=value), rtol=1e-5, atol=1e-5)


def test_windows_copy_nothing(seed):
    x = torch.randn(2, 3, 9, 8)
    w = windows(x, (3, 2), (2, 1), (1, 3))
    assert w.shape == (2, 3, 4, 5, 3, 2) and w.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    for n, c, i, j, a, b in itertools.product(range(2), range(3), range(4), range(5), range(3), range(2)):
        assert w[n, c, i, j, a, b] == x[n, c, 2 * i + a, j + 3 * b]
    columns = windows(x, 3, 2).permute(0, 1, 4, 5, 2, 3).reshape(2, 27, -1)
    assert torch.equal(columns, F.unfold(x, 3, stride=2))


def test_sizes():
    known = {(28, 3, 1, 0): 26, (28, 3, 1, 1): 28, (28, 3, 2, 1): 14, (14, 3, 2, 1): 7, (7, 3, 2, 1): 4, (4, 3, 2, 1): 2,
             (2, 3, 2, 1): 1, (5, 4, 1, 2): 6, (5, 3, 2, 1): 3, (4, 3): 2, (28, 5, 2, 2): 14, (128, 3, 2, 1): 64}
    assert all(conv_size(*args) == size for args, size in known.items())
    for n, k, s, p, d in itertools.product(range(1, 20), range(1, 5), range(1, 5), range(3), range(1, 4)):
        starts = [i for i in range(0, n + 2 * p, s) if i + d * (k - 1) < n + 2 * p]       # counted, not calculated
        if starts:
            assert conv_size(n, k, s, p, d) == len(starts)


# Layers

@pytest.mark.parametrize("norm_type", [None, *NormType], ids=str)
@pytest.mark.parametrize("act_cls", [nn.ReLU, None, nn.GELU], ids=str)
def test_conv_layer(norm_type, act_cls, seed):
    layer = ConvLayer(3, 12, 5, stride=2, norm_type=norm_type, act_cls=act_cls)
    conv, *rest = layer
    assert isinstance(conv, nn.Conv2d) and conv.padding == (2, 2) and conv.stride == (2, 2)
    assert (conv.bias is None) == (norm_type is not None) and len(rest) == (norm_type is not None) + (act_cls is not None)
    assert act_cls is None or type(layer[-1]) is act_cls
    assert layer(torch.randn(2, 3, 16, 16)).shape == (2, 12, 8, 8)
    if norm_type in (NormType.Batch, NormType.BatchZero):
        assert type(layer[1]) is nn.BatchNorm2d and torch.equal(layer[1].weight, torch.full((12,), float(norm_type is NormType.Batch)))
    if norm_type is not None and norm_type is not NormType.BatchZero:
        out = nn.Sequential(*layer[:2])(torch.randn(4, 3, 16, 16) * 5 + 3)
        assert out.mean().abs() < 1e-4 and abs(out.std() - 1) < .01
    assert isinstance(layer[:1], nn.Sequential)                       # a part of it is a Sequential too


def test_what_the_norms_average_over(seed):
    x = torch.randn(4, 8, 6, 6)
    for norm_type, axes in {NormType.Batch: (0, 2, 3), NormType.Instance: (2, 3), NormType.Layer: (1, 2, 3)}.items():
        mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
        torch.testing.assert_close(ConvLayer(8, 8, norm_type=norm_type)[1](x), (x - mean) / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)
    groups = x.view(4, 4, 2, 6, 6)
    mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), correction=0, keepdim=True)
    torch.testing.assert_close(ConvLayer(8, 8, norm_type=NormType.Group)[1](x), ((groups - mean) / (var + 1e-5).sqrt()).view_as(x),
                               rtol=1e-4, atol=1e-5)
    assert [ConvLayer(1, nf, norm_type=NormType.Group)[1].num_groups for nf in (1, 3, 6, 8, 10)] == [1, 1, 2, 4, 2]


def test_conv_layer_settings_that_are_given():
    assert ConvLayer(1, 2, padding=0)[0].padding == (0, 0) and ConvLayer(1, 2, bias=True)[0].bias is not None
    assert ConvLayer(1, 2, norm_type=None, bias=False)[0].bias is None
    assert [p.numel() for p in ConvLayer(1, 4, norm_type=None).parameters()] == [36, 4]


def test_sequential_leaves_out_what_is_not_there():
    layer = nn.ReLU()
    assert list(sequential(None, layer, noop, None)) == [layer] and len(sequential()) == 0
    assert Flatten()(torch.zeros(3, 2, 1, 1)).shape == (3, 2) and noop(5, 1, b=2) == 5


@pytest.mark.parametrize(("norm_type", "params"), [(None, 30_282), (NormType.Batch, 30_542)])
def test_simple_cnn(norm_type, params, seed):
    net = simple_cnn(norm_type=norm_type)
    assert sum(p.numel() for p in net.parameters()) == params and len(net) == 6
    x, shapes = torch.randn(2, 1, 28, 28), []
    for block in net:
        x = block(x)
        shapes.append(list(x.shape))
    assert shapes == [[2, 8, 14, 14], [2, 16, 7, 7], [2, 32, 4, 4], [2, 64, 2, 2], [2, 10, 1, 1], [2, 10]]
    assert not isinstance(net[4][-1], nn.ReLU) and all(isinstance(block[-1], nn.ReLU) for block in net[:4])
    assert simple_cnn(3)(torch.randn(2, 1, 32, 17)).shape == (2, 3)
    net(torch.randn(4, 1, 28, 28)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


# Receptive fields

def test_receptive_fields():
    assert receptive_field([(3, 2)] * 5) == [3, 7, 15, 31, 63]
    assert receptive_field([(5, 2), *[(3, 2)] * 4]) == receptive_field(simple_cnn()) == [5, 9, 17, 33, 65]
    assert receptive_field([(3, 1)] * 5) == [3, 5, 7, 9, 11] and receptive_field([]) == []
    assert receptive_field(nn.Sequential(nn.Conv2d(1, 1, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.AvgPool2d(2))) == [7, 11, 15]
    assert receptive_field([nn.Conv2d(1, 1, 3, dilation=2), (3, 1, 4)]) == [5, 13]
    assert receptive_field([simple_cnn()[:2], nn.ReLU(), (3, 1)]) == [5, 9, 17]


def test_receptive_fields_against_the_gradient(seed):
    for _ in range(30):
        layers = [(number(1, 4), number(1, 2), number(1, 2)) for _ in range(number(1, 4))]
        net = nn.Sequential(*[nn.Conv2d(1, 1, k, s, dilation=d) for k, s, d in layers])
        for p in net.parameters():
            nn.init.ones_(p)
        x = torch.zeros(1, 1, 120, 120, requires_grad=True)
        out = net(x)
        out[0, 0, 1, 1].backward()
        rows = x.grad[0, 0].any(1).nonzero()
        assert rows.max() - rows.min() + 1 == receptive_field(layers)[-1], layers


# Bad input: one sentence each

X, W = torch.zeros(1, 3, 5, 5), torch.zeros(2, 3, 3, 3)
BAD = [
    (lambda: conv2d(torch.zeros(5, 5), W), "takes pictures"),
    (lambda: conv2d(X, torch.zeros(3, 3)), "takes pictures"),
    (lambda: conv2d(torch.zeros(1, 4, 5, 5), W), "have 4 channels, but the kernels .* expect 3"),
    (lambda: conv2d(X, torch.zeros(2, 1, 3, 3), groups=3), "does not divide"),
    (lambda: conv2d(X, W, groups=0), "groups is 0"),
    (lambda: conv2d(X, W, torch.zeros(3)), "bias has the shape"),
    (lambda: conv2d(X, torch.zeros(2, 3, 6, 3)), "finds no place on 5"),
    (lambda: conv2d(X, W, dilation=3), "reaches over 7"),
    (lambda: conv2d(X, W, stride=0), "1 or more"),
    (lambda: conv2d(X, W, stride=(1, 2, 3)), "stride is"),
    (lambda: conv2d(X, W, stride=1.5), "stride is 1.5"),
    (lambda: conv2d(X, W, padding=-1), "cannot be negative"),
    (lambda: conv2d(X, W, padding="full"), "'same' or 'valid'"),
    (lambda: conv2d(X, W, padding="same", stride=2), "stride of 1 only"),
    (lambda: conv_size(2, 3), "finds no place"),
    (lambda: conv_size(8, 3, stride=0), "1 or more"),
    (lambda: conv_size(8, 3, padding=-1), "0 or more"),
    (lambda: ConvLayer(1, 2, norm_type="Batch"), "has to be None or one of NormType.Batch"),
    (lambda: receptive_field([3, 2]), "receptive_field got"),
    (lambda: receptive_field([(3,)]), "receptive_field got"),
    (lambda: receptive_field([nn.Conv2d(1, 1, (3, 5))]), "the same for rows and columns"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[t for _, t in BAD])
def test_bad_input_gets_a_sentence(call, text):
    with pytest.raises(ValueError, match=text) as e:
        call()
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


@pytest.mark.gpu
def test_equals_torch_on_a_gpu(seed):
    for _ in range(50):
        x, weight, bias, settings = case(device="cuda")
        torch.testing.assert_close(conv2d(x, weight, bias, **settings), F.conv2d(x, weight, bias, **settings), rtol=0, atol=1e-10)
