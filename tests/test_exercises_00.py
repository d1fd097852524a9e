"""What the exercises of chapter 00 tell the reader to expect (their cells are the reader's to fill, so no cell asserts it)."""
import pytest
import torch
from answers import solutions
from matplotlib import cbook
from PIL import Image

from course_lib.datasets import mnist
from course_lib.images import image2tensor, tensor

answers = solutions(0)


def longer_sides(pictures: torch.Tensor) -> list[int]:
    boxes = [answers["ink_box"](im) for im in pictures]
    return [max(bottom - top, right - left) + 1 for top, bottom, left, right in boxes]


def test_2_drawn_digits_are_a_little_larger(monkeypatch):
    monkeypatch.setenv("COURSE_SOURCE", "drawn")
    assert 20 < max(longer_sides(mnist().train_x[:1000])) <= 23


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_2_the_longer_side_has_twenty_pixels():
    assert longer_sides(mnist().train_x[:100]) == [20] * 100


def test_3_no_pixel_gets_smaller():
    im = mnist().train_x[10000]
    assert (answers["add_light"](im, 60) >= im).all()


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_3_pixels_that_would_wrap_around():
    im = mnist().train_x[10000]
    assert (im > 0).sum() == 164 and (im + 60 < im).sum() == 89


def test_4_ten_pictures_in_four_columns():
    sheet = answers["contact_sheet"](mnist().train_x[:10], 4)
    assert sheet.shape == (84, 112) and not sheet[56:, 56:].any()


def test_5_skin_is_dark_by_blue_light():
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).crop((60, 0, 460, 400)).resize((160, 160))
    chw = image2tensor(photo)
    cheeks = [answers["to_grey"](chw, w)[100:115, 65:80].float().mean() for w in ((.299, .587, .114), (1 / 3,) * 3, (0, 0, 1))]
    torch.testing.assert_close(tensor(cheeks), tensor(139., 136., 88.), atol=1, rtol=0)      # decoders of JPEG differ a little


@pytest.mark.slow
@pytest.mark.usefixtures("real_pictures")
def test_6_twins():
    x = mnist().train_x[:10_000]
    assert answers["closest_pair"](x) == (961, 7175)
    assert len({im.numpy().tobytes() for im in x}) == 10_000                                 # no two are equal
