"""What the exercises of chapter 11 and their solutions state (the chapter's own cells are the reader's to fill, so no cell asserts it)."""
import math

import pytest
import torch
from answers import solutions

from course_lib.resnet import resnet50


def test_spacing():
    spacing = solutions(11)["spacing"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert spacing(1., dtype) == torch.finfo(dtype).eps
    assert spacing(1023., torch.float16) == .5 and spacing(1024., torch.float16) == 1 and spacing(2048., torch.float16) == 2
    assert (torch.tensor(2048.).half() + 1).item() == 2048


def test_largest_batch_of_resnet50():
    fits, params = solutions(11)["fits"], sum(p.numel() for p in resnet50(10).parameters())
    assert fits(params, 29 * 2**20, 496, 16) and not fits(params, 29 * 2**20, 497, 16)


def test_gathered_against_the_wrong_means():
    gathered, counts, right = solutions(11)["gathered"], [5, 5, 1], [4, 3, 1]
    assert gathered(counts, right) == pytest.approx(.727, abs=.0005)
    assert (4 / 5 + 3 / 5 + 1) / 3 == pytest.approx(.8) and (4 + 3 + 5) / 15 == .8


def test_scaling():
    speedup, efficiency, lost = solutions(11)["scaling"]([400], [640], 2, 128)
    assert math.isclose(speedup, 1.6) and math.isclose(efficiency, .8) and math.isclose(lost, .04)
