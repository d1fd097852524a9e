"The drawn digits: MNIST's sizes and counts, the same bytes everywhere, MNIST's difficulty, speed, bad input"
import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from course_lib import drawn
from course_lib.drawn import digits, draw_digits
from course_lib.similarity import class_means, nearest_mean, rms_distance

# Per-class counts of MNIST, written down here once more: the module's own constants must not check themselves.
COUNTS = {"train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
          "valid": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]}


@pytest.fixture(scope="module")
def mnist_like() -> tuple[torch.Tensor, ...]:
    return digits()


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().tobytes()).hexdigest()


def test_sizes_types_and_counts(mnist_like):
    train_x, train_y, valid_x, valid_y = mnist_like
    assert train_x.shape == (60_000, 28, 28) and valid_x.shape == (10_000, 28, 28)
    assert train_x.dtype == valid_x.dtype == torch.uint8 and train_y.dtype == valid_y.dtype == torch.int64
    assert train_y.bincount().tolist() == COUNTS["train"] and valid_y.bincount().tolist() == COUNTS["valid"]
    assert train_x.is_contiguous() and valid_x.is_contiguous()


def test_order_is_a_seeded_permutation(mnist_like):
    train_y = mnist_like[1]
    assert train_y[12] == train_y[10_000] == 3
    threes = sorted(f"{i}.png" for i in (train_y == 3).nonzero()[:, 0].tolist())
    assert threes[:2] == ["10.png", "10000.png"]            # by file name, as MNIST's threes begin
    assert (train_y[1:] != train_y[:-1]).float().mean() > .85            # shuffled: neighbours differ nine times in ten
    generator = torch.Generator().manual_seed(1)
    other = drawn._labels(drawn.TRAIN_COUNTS, generator, drawn._PINNED)
    assert other.bincount().tolist() == COUNTS["train"] and other[12] == other[10_000] == 3 and not other.equal(train_y)


def test_mean_and_spread(mnist_like):
    x = mnist_like[0] / 255
    assert abs(x.mean() - .1307) < .005 and abs(x.std() - .3081) < .01


def test_pictures_look_like_mnists_format(mnist_like):
    x = mnist_like[0][:5000] / 255
    total = x.sum((1, 2))
    axis = torch.arange(28.)
    column, row = (x.sum(1) * axis).sum(1) / total, (x.sum(2) * axis).sum(1) / total
    for middle in (column, row):                       # centred by mass, within the noise that is put on top
        assert abs(middle.mean() - 13.5) < .15 and middle.std() < 1
    high = (x.amax(2) > .5).sum(1).float()             # most digits are 20 pixels high, none fills the picture
    assert 19 <= high.median() <= 21 and total.min() > 10
    frame = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    assert (frame > .5).any(1).float().mean() < .08      # few reach the frame


def three_or_seven(train_x, train_y, valid_x, valid_y):
    means = class_means(train_x / 255, train_y, 10)[[3, 7]]
    right = [nearest_mean(valid_x[valid_y == digit] / 255, means) == place for place, digit in enumerate((3, 7))]
    return sum(r.float().mean() for r in right) / 2


def ten_classes(train_x, train_y, valid_x, valid_y):
    return (nearest_mean(valid_x / 255, class_means(train_x / 255, train_y, 10), rms_distance) == valid_y).float().mean()


def test_as_difficult_as_mnist(mnist_like):
    assert .93 <= three_or_seven(*mnist_like) <= .97        # MNIST: .951
    assert .76 <= ten_classes(*mnist_like) <= .84           # MNIST: .820


def test_as_difficult_with_another_seed():
    other = digits(seed=1)
    assert .93 <= three_or_seven(*other) <= .97 and .76 <= ten_classes(*other) <= .84


ELSEWHERE = """
import hashlib, torch
from course_lib.drawn import digits, draw_digits
def digest(x): return hashlib.sha256(x.numpy().tobytes()).hexdigest()
for threads in (1, 2):
    torch.set_num_threads(threads)
    for variation in (0., 1.): print(digest(draw_digits(torch.arange(700) % 10, seed=5, variation=variation)))
    assert torch.get_num_threads() == threads
for x in digits(): print(digest(x))
"""


def test_same_seed_same_bytes_in_a_new_process_and_with_one_or_two_threads(mnist_like, threads):
    run = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    torch.set_num_threads(2)
    here = [digest(draw_digits(torch.arange(700) % 10, seed=5, variation=v)) for v in (0., 1.)]
    assert run.stdout.split() == here + here + [digest(x) for x in mnist_like]
    assert digest(draw_digits(torch.arange(700) % 10, seed=6)) != here[0] != here[1]


def test_a_picture_depends_on_seed_place_and_label_only():
    labels = torch.randint(10, (600,), generator=torch.Generator().manual_seed(0))
    whole = draw_digits(labels, seed=3)
    for n in (0, 1, 7, 256, 257, 599):
        assert draw_digits(labels[:n], seed=3).equal(whole[:n])
    changed = labels.clone(); changed[300] = (labels[300] + 1) % 10
    same = (draw_digits(changed, seed=3) == whole).all(2).all(1)
    assert not same[300] and same.sum() == 599
    assert whole.flatten(1).unique(dim=0).shape[0] == 600                # no picture comes twice


def test_leaves_the_random_state_and_the_threads_alone(threads):
    torch.set_num_threads(2)
    torch.manual_seed(0); before = torch.get_rng_state()
    draw_digits(torch.tensor([1, 2, 3]))
    assert torch.get_rng_state().equal(before) and torch.get_num_threads() == 2
    reference = draw_digits(torch.arange(10))
    torch.set_default_dtype(torch.float64)
    try: drawn.glyphs.cache_clear(); other = draw_digits(torch.arange(10))
    finally: torch.set_default_dtype(torch.float32); drawn.glyphs.cache_clear()
    assert other.equal(reference)


def test_speed_on_one_thread(threads):
    torch.set_num_threads(1)
    labels = torch.arange(5000) % 10
    draw_digits(labels[:256])
    seconds = []
    for _ in range(3):
        start = time.process_time(); draw_digits(labels); seconds.append(time.process_time() - start)
    assert len(labels) / min(seconds) >= 10_000            # about 40,000 where it was written


def test_variation_makes_digits_more_different():
    labels = torch.full((2000,), 4)
    spread = [(draw_digits(labels, variation=v) / 255).var(0).sum().item() for v in (0., .5, 1.)]
    assert spread[0] < spread[1] < spread[2]


def test_a_hand_of_ones_own():
    labels = torch.full((300,), 2)
    stiff = drawn.Hand(**dict.fromkeys(drawn.Hand.__dataclass_fields__, 0.))
    pictures = draw_digits(labels, variation=stiff)
    assert (pictures == pictures[0]).all() and pictures[0].max() == 255      # nothing differs any more
    assert draw_digits(labels, variation=drawn.STEADY).equal(draw_digits(labels))


@pytest.mark.parametrize("labels", [torch.tensor([0, 10]), torch.tensor([-1]), torch.tensor([1.]), torch.tensor(3),
                                    torch.zeros(2, 2, dtype=torch.long), torch.tensor([True]), torch.tensor([300])])
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="draw_digits"):
        draw_digits(labels)


@pytest.mark.parametrize("variation", [-.1, 1.5, float("nan"), "much"])
def test_bad_variation(variation):
    with pytest.raises(ValueError, match="variation"):
        draw_digits(torch.tensor([1]), variation=variation)


def test_labels_of_any_integer_type():
    expected = draw_digits(torch.tensor([3, 7]))
    for labels in (torch.tensor([3, 7], dtype=torch.uint8), torch.tensor([3, 7], dtype=torch.int32), [3, 7]):
        assert draw_digits(labels).equal(expected)
    assert draw_digits(torch.tensor([], dtype=torch.long)).shape == (0, 28, 28)


def test_import_is_light():
    code = """
import sys, torch
before = set(sys.modules)
import course_lib.drawn as drawn
own = {name for name in set(sys.modules) - before if name.startswith("course_lib")}
assert own == {"course_lib", "course_lib.drawn"}, own
assert "matplotlib" not in sys.modules and drawn.glyphs.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_glyph_tables_are_sound():
    table = drawn.glyphs()
    last = torch.cat([table.digit[1:] != table.digit[:-1], torch.tensor([True])])
    assert last.sum() == 10 and (table.share[last] == 1).all()         # so every random number below 1 reaches a way
    assert (table.share[1:] > table.share[:-1])[~last[:-1]].all()
    torch.testing.assert_close(table.matrix.sum(2), torch.ones(len(table.digit), drawn.POSITIONS))
    for ways in drawn.GLYPHS.values():
        for _, strokes in ways:
            points = [tuple(map(float, p.split(","))) for p in strokes.replace(";", " ").split()]
            assert len(set(points)) <= drawn.CONTROLS and len(points) >= 2
            assert all(p != q for stroke in strokes.split(";") for p, q in zip(stroke.split(), stroke.split()[1:], strict=False))


def test_spline_matrix_against_the_formula():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, 2, generator=generator)
    chords = (p[1:] - p[:-1]).norm(dim=1)
    curve = drawn.spline_matrix(chords, 41) @ p
    torch.testing.assert_close(curve[[0, -1]], p[[0, -1]])
    along = torch.linspace(0, float(chords.sum()), 41)
    extended = [2 * p[0] - p[1], *p, 2 * p[-1] - p[-2]]
    for place, got in zip(along.tolist(), curve, strict=True):
        piece = 0
        while piece < 3 and place > chords[:piece + 1].sum(): piece += 1
        t = (place - chords[:piece].sum()) / chords[piece]
        a, b, c, d = extended[piece:piece + 4]
        want = b + t * (c - a) / 2 + t**2 * (a - 2.5 * b + 2 * c - d / 2) + t**3 * (-a + 3 * b - 3 * c + d) / 2
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_ink_against_plain_distances():
    generator = torch.Generator().manual_seed(0)
    line, radius = 28 * torch.rand(3, 20, 2, generator=generator), .5 + torch.rand(3, 20, generator=generator)
    got = drawn.ink(line, radius)
    y, x = torch.meshgrid(torch.arange(28.), torch.arange(28.), indexing="ij")
    squares = (x[None, ..., None] - line[:, None, None, :, 0])**2 + (y[None, ..., None] - line[:, None, None, :, 1])**2
    want = (.5 - (squares - radius[:, None, None]**2).amin(-1) / (2 * .87 * radius.mean(1)[:, None, None])).clamp(0, 1)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_scenes_sizes_types_and_counts():
    train_x, train_y, valid_x, valid_y = drawn.scenes(n_train=203, n_valid=40)
    assert train_x.shape == (203, 3, 64, 64) and valid_x.shape == (40, 3, 64, 64) and train_x.is_contiguous()
    assert train_x.dtype == valid_x.dtype == torch.uint8 and train_y.dtype == valid_y.dtype == torch.int64
    assert train_y.bincount().tolist() == [21] * 3 + [20] * 7 and valid_y.bincount().tolist() == [4] * 10
    assert (train_y[1:] != train_y[:-1]).float().mean() > .8                       # shuffled
    assert train_x.equal(drawn.draw_scenes(train_y, 0)) and valid_x.equal(drawn.draw_scenes(valid_y, 1))
    assert drawn.scenes(1, 10, 0)[0].equal(drawn.draw_scenes(drawn.scenes(1, 10, 0)[1], 2))
    with pytest.raises(ValueError, match="n_train is -1"):
        drawn.scenes(n_train=-1)


SCENES_ELSEWHERE = """
import hashlib, torch
from course_lib.drawn import draw_scenes
for threads in (1, 2):
    torch.set_num_threads(threads)
    print(hashlib.sha256(draw_scenes(torch.arange(150) % 10, seed=5).numpy().tobytes()).hexdigest())
"""


def test_scenes_are_the_same_in_a_new_process_and_with_one_or_two_threads(threads):
    run = subprocess.run([sys.executable, "-c", SCENES_ELSEWHERE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [digest(drawn.draw_scenes(torch.arange(150) % 10, seed=5))] * 2


def test_a_scene_depends_on_seed_place_and_label_only():
    labels = torch.randint(10, (130,), generator=torch.Generator().manual_seed(0))
    whole = drawn.draw_scenes(labels, seed=3)
    for n in (0, 1, 63, 64, 129):
        assert drawn.draw_scenes(labels[:n], seed=3).equal(whole[:n])
    changed = labels.clone(); changed[70] = (labels[70] + 1) % 10
    same = (drawn.draw_scenes(changed, seed=3) == whole).flatten(1).all(1)
    assert not same[70] and same.sum() == 129
    assert whole.flatten(1).unique(dim=0).shape[0] == 130 and not drawn.draw_scenes(labels, seed=4).equal(whole)


def test_scenes_leave_the_random_state_alone_and_name_bad_labels():
    torch.manual_seed(0); before = torch.get_rng_state()
    reference = drawn.draw_scenes(torch.arange(10))
    assert torch.get_rng_state().equal(before)
    torch.set_default_dtype(torch.float64)
    try: other = drawn.draw_scenes([*range(10)])
    finally: torch.set_default_dtype(torch.float32)
    assert other.equal(reference)
    for labels in (torch.tensor([10]), torch.tensor([.5])):
        with pytest.raises(ValueError, match="draw_scenes"):
            drawn.draw_scenes(labels)


def test_digits_of_scenes_are_inside_at_many_sizes_and_seen(monkeypatch):
    covers = []
    paint = drawn._painted
    monkeypatch.setattr(drawn, "_painted", lambda x, cover, colour: covers.append((x, cover, colour)) or paint(x, cover, colour))
    drawn.draw_scenes(torch.arange(64) % 10, seed=1)
    below, cover, colour = covers[-1]                                              # the last stroke is the digit
    frame = torch.cat([cover[:, 0], cover[:, -1], cover[:, :, 0], cover[:, :, -1]], 1)
    assert frame.max() < .8                                                        # the pen may touch the frame, no more
    rows, columns = (cover > .5).any(2).sum(1), (cover > .5).any(1).sum(1)
    longer = torch.maximum(rows, columns)
    assert longer.min() < 40 < 45 < longer.max() <= 64
    middle = (cover.sum(1) * torch.arange(64.)).sum(1) / cover.sum((1, 2))         # anywhere: from left to right
    assert middle.min() < 22 and middle.max() > 42
    mean = (below * cover[:, None]).sum((2, 3)) / cover.sum((1, 2))[:, None]
    assert (mean - colour).norm(dim=1).min() > .25                                 # in a colour that stands out


def test_speed_of_scenes_on_one_thread(threads):
    torch.set_num_threads(1)
    labels = torch.arange(256) % 10
    drawn.draw_scenes(labels[:1])
    seconds = []
    for _ in range(3):
        start = time.process_time(); drawn.draw_scenes(labels); seconds.append(time.process_time() - start)
    assert len(labels) / min(seconds) >= 500               # about 1,500 where it was written
