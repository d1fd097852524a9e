"Pixel similarity against PyTorch's own losses and distances, on random shapes, and what it refuses"
import random

import pytest
import torch
import torch.nn.functional as F

from course_lib.similarity import class_means, mnist_distance, nearest_mean, rms_distance

REFERENCES = [(mnist_distance, F.l1_loss), (rms_distance, lambda a, b: F.mse_loss(a, b).sqrt())]


@pytest.fixture(params=range(3))
def rand(request):
    "Random sizes and a seeded generator of pictures"
    seed = 100 + request.param
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = random.Random(seed)

    def pictures(*shape, dtype=torch.float64):
        return torch.rand(*shape, generator=generator, dtype=dtype)
    pictures.int = lambda low, high: sizes.randint(low, high)
    return pictures


@pytest.mark.parametrize(("distance", "reference"), REFERENCES)
def test_distance_is_torch_loss_of_each_picture(distance, reference, rand):
    n, h, w = rand.int(1, 9), rand.int(1, 30), rand.int(1, 30)
    x, m = rand(n, h, w), rand(h, w)
    torch.testing.assert_close(distance(x, m), torch.stack([reference(p, m) for p in x]))
    torch.testing.assert_close(distance(m, x), distance(x, m))
    one = distance(x[0], m)
    assert one.shape == () and one.dtype == torch.float64
    torch.testing.assert_close(one, reference(x[0], m))


@pytest.mark.parametrize(("distance", "reference"), REFERENCES)
def test_distance_broadcasts_the_axes_before_the_pixels(distance, reference, rand):
    n, c, h, w = rand.int(2, 6), rand.int(2, 6), rand.int(2, 9), rand.int(2, 9)
    x, m = rand(n, h, w), rand(c, h, w)
    d = distance(x[:, None], m)
    assert d.shape == (n, c)
    torch.testing.assert_close(d, torch.stack([torch.stack([reference(p, q) for q in m]) for p in x]))


@pytest.mark.parametrize("distance", [mnist_distance, rms_distance])
def test_distance_of_views_and_in_single_precision(distance, rand):
    x, m = rand(5, 8, 12), rand(12, 8)
    wide = rand(5, 16, 24)
    wide[:, ::2, ::2] = x
    view = wide[:, ::2, ::2]
    assert not view.is_contiguous() and not m.T.is_contiguous()
    torch.testing.assert_close(distance(view, m.T), distance(x, m.T.contiguous()))
    torch.testing.assert_close(distance(x.float(), m.T.float()), distance(x, m.T).float())
    assert distance(x.float(), m.T.float()).dtype == torch.float32


@pytest.mark.parametrize("distance", [mnist_distance, rms_distance])
def test_distance_has_a_gradient_and_is_zero_for_equal_pictures(distance, rand):
    x, m = rand(4, 6, 6).requires_grad_(), rand(6, 6)
    distance(x, m).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert torch.equal(distance(m, m), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("distance", [mnist_distance, rms_distance])
def test_distance_refuses_bytes_and_other_sizes(distance):
    byte, real = torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4)
    for a, b in [(byte, real), (real, byte), (byte, byte), (real.long(), real)]:
        refusal = rf"^{distance.__name__} needs float pictures, but got torch\.(uint8|int64) .*x\.float\(\) / 255\.$"
        with pytest.raises(ValueError, match=refusal):
            distance(a, b)
    for shape in [(4, 5), (5, 4), (4,), (), (4, 1), (1, 4)]:     # [4, 1] and [4] would broadcast over pixels without a word
        with pytest.raises(ValueError, match=rf"^{distance.__name__} compares pictures .* of one size, but the shapes are \[2, 4, 4\]"):
            distance(real, torch.zeros(shape))


def test_class_means_are_the_means(rand, device):
    n, c, shape = rand.int(30, 60), rand.int(1, 5), [rand.int(1, 9) for _ in range(rand.int(1, 3))]
    x = rand(n, *shape, dtype=torch.float32).to(device)
    y = torch.cat([torch.arange(c), torch.randint(c, (n - c,), generator=torch.Generator().manual_seed(n))])
    means = class_means(x, y, c)                                # labels may stay on the CPU
    assert means.shape == (c, *shape) and means.device == x.device
    for k in range(c):
        torch.testing.assert_close(means[k], torch.stack([p for p, label in zip(x, y, strict=True) if label == k]).mean(0))
    torch.testing.assert_close(class_means(x, y.to(device).to(torch.uint8), c), means)


def test_class_means_of_views(rand):
    x, y = rand(12, 5, 7), torch.arange(12) % 3
    torch.testing.assert_close(class_means(x.transpose(1, 2), y, 3), class_means(x, y, 3).transpose(1, 2))
    torch.testing.assert_close(class_means(x[::2], y[::2], 3), torch.stack([x[::2][y[::2] == c].mean(0) for c in range(3)]))


@pytest.mark.parametrize(("x", "y", "n_classes", "message"), [
    (torch.zeros(3, 2, 2, dtype=torch.uint8), torch.arange(3), 3, r"^class_means needs float pictures, but got torch.uint8"),
    (torch.zeros(3, 2, 2), torch.arange(4), 4, r"^class_means needs one integer label a picture, but got 3 pictures and .* \[4\]"),
    (torch.zeros(3, 2, 2), torch.zeros(3, 1, dtype=torch.int64), 1, r"labels of shape \[3, 1\]"),
    (torch.zeros(3, 2, 2), torch.zeros(3), 1, r"labels of shape \[3\], torch.float32\.$"),
    (torch.zeros(3, 2, 2), torch.tensor([0, 1, 2]), 2, r"^class_means got labels from 0 to 2; with n_classes=2 they have to be 0 to 1\.$"),
    (torch.zeros(3, 2, 2), torch.tensor([0, -1, 1]), 2, r"^class_means got labels from -1 to 1;"),
    (torch.zeros(3, 2, 2), torch.tensor([0, 2, 2]), 4, r"^class_means got no picture of class 1, 3; each class needs at least one\.$"),
    (torch.zeros(0, 2, 2), torch.zeros(0, dtype=torch.int64), 2, r"^class_means got no picture of class 0, 1;"),
])
def test_class_means_refuses(x, y, n_classes, message):
    with pytest.raises(ValueError, match=message):
        class_means(x, y, n_classes)


@pytest.mark.parametrize(("distance", "p"), [(mnist_distance, 1), (rms_distance, 2)])
def test_nearest_mean_is_cdist(distance, p, rand, device):
    n, c, h, w = rand.int(1, 50), rand.int(1, 12), rand.int(1, 30), rand.int(1, 30)
    x, means = rand(n, h, w), rand(c, h, w)
    if device != "cpu":
        x, means = x.float(), means.float()
    expected = torch.cdist(x.flatten(1), means.flatten(1), p=p).argmin(1)
    for chunk in (None, 1, 7, n, 10 * n):
        nearest = nearest_mean(x.to(device), means.to(device), distance, chunk)
        assert nearest.dtype == torch.int64 and nearest.device.type == device and torch.equal(nearest.cpu(), expected)


def test_nearest_mean_takes_l1_if_not_told_otherwise_and_the_lowest_class_in_a_tie():
    x = torch.tensor([[[.6, 0., 0.]], [[0., 0., 0.]]])
    means = torch.tensor([[[0., 0., 0.]], [[.3, .3, .2]], [[0., 0., 0.]]])   # L1: .6 against .8; squares: .36 against .22
    assert nearest_mean(x, means).tolist() == [0, 0]
    assert nearest_mean(x, means, rms_distance).tolist() == [1, 0]


def test_nearest_mean_never_holds_more_than_four_megabytes_of_differences():
    seen = []

    def spy(a, b):
        seen.append(torch.broadcast_shapes(a.shape, b.shape).numel())
        return mnist_distance(a, b)
    assert nearest_mean(torch.rand(700, 28, 28), torch.rand(10, 28, 28), spy).shape == (700,)
    assert len(seen) > 1 and max(seen) * 4 <= 4 * 2**20
    seen.clear()
    nearest_mean(torch.rand(2, 200, 200), torch.rand(30, 200, 200), spy)        # means larger than that: one picture at a time
    assert seen == [30 * 200 * 200] * 2


def test_nearest_mean_of_no_pictures():
    nearest = nearest_mean(torch.zeros(0, 4, 4), torch.zeros(3, 4, 4))
    assert nearest.shape == (0,) and nearest.dtype == torch.int64


@pytest.mark.parametrize(("x", "means", "options", "message"), [
    (torch.zeros(4, 4), torch.zeros(3, 4, 4), {}, r"^nearest_mean needs pictures \[N, H, W\] and means \[C, H, W\], .* are \[4, 4\]"),
    (torch.zeros(2, 1, 4, 4), torch.zeros(3, 4, 4), {}, r"the shapes are \[2, 1, 4, 4\] and \[3, 4, 4\]\.$"),
    (torch.zeros(2, 4, 4), torch.zeros(4, 4), {}, r"the shapes are \[2, 4, 4\] and \[4, 4\]\.$"),
    (torch.zeros(2, 4, 4), torch.zeros(0, 4, 4), {}, r"and \[0, 4, 4\]\.$"),
    (torch.zeros(2, 4, 4), torch.zeros(3, 4, 5), {}, r"^mnist_distance compares pictures"),
    (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4), {}, r"^mnist_distance needs float pictures, but got torch.uint8"),
    (torch.zeros(2, 4, 4), torch.zeros(3, 4, 4), {"chunk": 0}, r"^nearest_mean got chunk=0; it is a number of pictures, at least 1\.$"),
    (torch.zeros(2, 4, 4), torch.zeros(3, 4, 4), {"chunk": -5}, r"^nearest_mean got chunk=-5;"),
    (torch.zeros(2, 4, 4), torch.zeros(3, 4, 4), {"distance": lambda a, b: (a - b).abs().mean()},
     r"^nearest_mean needs a distance that keeps the axes before H and W, \[2, 3\] here, but it returned \[\]\.$"),
])
def test_nearest_mean_refuses(x, means, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_mean(x, means, **options)
