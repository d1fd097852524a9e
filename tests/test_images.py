"Pictures in every form that they come in: converted, drawn, tabulated, shown with their description"
import base64
import io
import os
import subprocess
import sys
import textwrap
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

matplotlib.use("agg")
import matplotlib.pyplot as plt

from course_lib import images
from course_lib.images import STYLE, image2tensor, pixel_table, show_figure, show_image, show_images, subplots, tensor


@pytest.fixture(autouse=True)
def quiet_and_tidy(caplog, capfd):
    "No warning, no log line, nothing printed; figures closed afterwards"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")
    out = capfd.readouterr()
    assert not caplog.records and not out.out and not out.err


def picture(mode: str, size=(5, 4), seed=0) -> Image.Image:
    "A random PIL picture, 5 wide and 4 high"
    rgb = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    return rgb if mode == "RGB" else rgb.convert(mode)


def drawn(ax) -> np.ndarray:
    [image] = ax.images
    return np.asarray(image.get_array())


# tensor

@pytest.mark.parametrize(("args", "expected"), [
    ((1, 2, 3), torch.tensor([1, 2, 3])), (([1, 2], [3, 4]), torch.tensor([[1, 2], [3, 4]])), ((5,), torch.tensor(5)),
    (([1., 2.],), torch.tensor([1., 2.])), ((1, 2.5), torch.tensor([1, 2.5])), (((1, 2),), torch.tensor([1, 2])),
    (([],), torch.tensor([])), ((True, False), torch.tensor([True, False])), ((np.float64(2.5),), torch.tensor(2.5, dtype=torch.float64)),
    ((torch.tensor(1), torch.tensor(2)), torch.tensor([1, 2])), (([torch.ones(2), torch.zeros(2)],), torch.tensor([[1., 1.], [0., 0.]])),
    ((np.arange(2), np.arange(2)), torch.tensor([[0, 1], [0, 1]])), ((range(3),), torch.tensor([0, 1, 2]))])
def test_tensor(args, expected):
    assert torch.equal(tensor(*args), expected) and tensor(*args).dtype == expected.dtype


@pytest.mark.parametrize("seed", range(3))
def test_tensor_of_nested_lists_is_torch_tensor(seed):
    rng = np.random.default_rng(seed)
    lists = rng.normal(size=rng.integers(1, 5, rng.integers(1, 5))).tolist()
    assert torch.equal(tensor(lists), torch.tensor(lists))
    assert torch.equal(tensor(*lists), torch.tensor(lists))
    assert torch.equal(tensor(lists, dtype=torch.float64), torch.tensor(lists, dtype=torch.float64))


def test_tensor_passes_on_dtype_and_device(device):
    for x in (tensor(1, 2, dtype=torch.float16, device=device), tensor([picture("L")] * 2, dtype=torch.float16, device=device)):
        assert x.dtype == torch.float16 and x.device.type == device


def test_tensor_shares_an_array_where_it_can():
    array = np.zeros((2, 3), dtype=np.float32)
    tensor(array)[0, 0] = 7
    assert array[0, 0] == 7
    same = torch.ones(2)
    assert tensor(same) is same


def test_tensor_copies_an_array_where_it_must():
    array = np.arange(6).reshape(2, 3)
    assert tensor(array[::-1, ::-1]).tolist() == [[5, 4, 3], [2, 1, 0]]
    assert tensor(array.T).tolist() == array.T.tolist()
    array.flags.writeable = False
    tensor(array)[0, 0] = 9
    assert array[0, 0] == 0
    deep = np.array([0, 40000, 65535], dtype=np.uint16)
    assert (tensor(deep) + 1).tolist() == [1, 40001, 65536]


@pytest.mark.parametrize(("mode", "shape"), [("L", (4, 5)), ("RGB", (4, 5, 3)), ("RGBA", (4, 5, 4)), ("LA", (4, 5, 2)), ("P", (4, 5, 3)),
                                             ("CMYK", (4, 5, 3)), ("HSV", (4, 5, 3)), ("YCbCr", (4, 5, 3))])
def test_tensor_of_pil_pictures(mode, shape):
    x = tensor(picture(mode))
    assert x.shape == shape and x.dtype == torch.uint8
    x[0] = 0                                             # its own memory, and writeable


def test_tensor_of_unusual_pil_pictures():
    for mode, dtype in [("1", torch.bool), ("F", torch.float32), ("I", torch.int32)]:
        assert tensor(picture(mode)).dtype == dtype
    deep = np.array([[0, 40000], [65535, 1]], dtype=np.uint16)
    assert tensor(Image.fromarray(deep)).tolist() == deep.tolist()
    red = Image.new("P", (2, 2)); red.putpalette([255, 0, 0] * 256)
    assert tensor(red)[0, 0].tolist() == [255, 0, 0]     # the colour, not its place in the palette


def test_tensor_refuses():
    with pytest.raises(ValueError, match="expected sequence of length 3"):
        tensor([[1, 2, 3], [4, 5]])
    with pytest.raises((TypeError, ValueError)):
        tensor("picture.png")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_image2tensor(mode, channels):
    im = picture(mode)
    x = image2tensor(im)
    assert x.shape == (channels, 4, 5) and x.dtype == torch.uint8
    assert torch.equal(x, torch.from_numpy(np.array(im).reshape(4, 5, channels)).permute(2, 0, 1))


# show_image

def grey_forms(device):
    x = torch.arange(20, dtype=torch.uint8).view(4, 5) * 10
    wide = torch.zeros(8, 10, dtype=torch.uint8); wide[::2, ::2] = x
    return x, [x, x[None], x[..., None], x.numpy(), Image.fromarray(x.numpy()), x.tolist(), wide[::2, ::2], x.T.contiguous().T,
               x.to(device)]


def test_show_image_draws_every_form_of_a_grey_picture_alike(device):
    x, forms = grey_forms(device)
    for im in forms:
        ax = show_image(im)
        assert (drawn(ax) == x.numpy()).all() and ax.images[0].get_cmap().name == "Greys" and not ax.axison


def test_show_image_draws_every_form_of_a_colour_picture_alike(device):
    im = picture("RGB")
    hwc = torch.from_numpy(np.array(im))
    forms = [im, hwc, hwc.numpy(), hwc.permute(2, 0, 1), image2tensor(im).contiguous(), hwc.long(), hwc.permute(2, 0, 1).to(torch.int32)]
    for form in [*forms, hwc.to(device)]:
        assert (drawn(show_image(form)) == hwc.numpy()).all()
    np.testing.assert_allclose(drawn(show_image(hwc.float() / 255)), hwc.numpy() / 255, atol=1e-6)
    rgba = tensor(picture("RGBA"))
    assert (drawn(show_image(rgba.permute(2, 0, 1))) == rgba.numpy()).all()


def test_show_image_reads_the_channel_axis_first():
    assert drawn(show_image(torch.rand(3, 9, 3))).shape == (9, 3, 3)
    assert drawn(show_image(torch.rand(1, 9, 3))).shape == (9, 3)
    assert drawn(show_image(torch.rand(4, 9, 3))).shape == (4, 9, 3)     # 4 rows in RGB rather than 4 channels


def test_show_image_scales():
    dim = torch.tensor([[0, 100]], dtype=torch.uint8)
    assert show_image(dim).images[0].get_clim() == (0, 255)              # half-dark stays half-dark
    assert show_image(dim.float()).images[0].get_clim() == (0, 100)
    assert show_image(torch.tensor([[-2., 5.]])).images[0].get_clim() == (-2, 5)
    image = show_image(dim, vmin=50, vmax=60, cmap="viridis").images[0]
    assert image.get_clim() == (50, 60) and image.get_cmap().name == "viridis"


def test_show_image_clips_colours_outside_their_range():
    x = torch.linspace(-3, 3, 4 * 5 * 3).view(4, 5, 3)
    np.testing.assert_allclose(drawn(show_image(x)), x.clamp(0, 1))
    whole = torch.tensor([-5, 100, 300]).expand(2, 2, 3)
    assert (drawn(show_image(whole)) == [0, 100, 255]).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_show_image_of_every_number_type(dtype, shape):
    x = (torch.arange(4 * 5).view(4, 5) % 2).expand(shape).to(dtype)
    ax = show_image(x)
    assert (drawn(ax).reshape(4, 5, -1)[..., 0] == (torch.arange(20).view(4, 5) % 2).numpy()).all()
    ax.figure.canvas.draw()


def test_show_image_that_needs_a_gradient_holds_nan_or_one_value():
    x = torch.rand(4, 5, requires_grad=True)
    show_image(x * 2)
    for odd in (torch.full((4, 5), float("nan")), torch.zeros(4, 5), torch.ones(4, 5)):
        show_image(odd).figure.canvas.draw()


def test_show_image_on_given_axes_with_title():
    fig, axs = subplots(1, 2)
    x = torch.rand(4, 5)
    assert show_image(x, axs[0], title="left") is axs[0] and show_image(x, ctx=axs[1]) is axs[1]
    assert axs[0].get_title() == "left" and axs[1].get_title() == "" and len(plt.get_fignums()) == 1
    assert tuple(show_image(x, figsize=(1, 2)).figure.get_size_inches()) == (1, 2)


@pytest.mark.parametrize("shape", [(5,), (), (2, 4, 5), (5, 4, 2), (2, 3, 4, 5), (0, 5), (3, 0, 5)])
def test_show_image_refuses(shape):
    with pytest.raises(ValueError) as error:
        show_image(torch.zeros(shape))
    assert str(error.value) == f"show_image draws one picture, [H, W] or with 1, 3 or 4 channels, but the shape is {list(shape)}."
    assert not plt.get_fignums()                                         # no empty figure left behind


# show_images

@pytest.mark.parametrize("n", range(1, 18))
def test_show_images_shows_every_one(n):
    x = torch.rand(n, 4, 5)
    for form in (x, list(x), [p[None] for p in x]):
        fig = show_images(form)
        shown = [drawn(ax) for ax in fig.axes if ax.images]
        np.testing.assert_array_equal(np.stack(shown), x.numpy())
        assert not any(ax.axison for ax in fig.axes)                     # empty places are blank
    assert n > 8 or len(fig.axes) == n


@pytest.mark.parametrize(("nrows", "ncols", "grid"), [(2, None, (2, 3)), (None, 2, (3, 2)), (2, 4, (2, 4)), (1, 5, (1, 5)),
                                                      (5, None, (5, 1))])
def test_show_images_in_a_given_grid(nrows, ncols, grid):
    fig = show_images(torch.rand(5, 4, 5), nrows=nrows, ncols=ncols, imsize=.5)
    assert fig.axes[0].get_subplotspec().get_gridspec().get_geometry() == grid
    assert tuple(fig.get_size_inches()) == (grid[1] * .5, grid[0] * .5) and sum(len(ax.images) for ax in fig.axes) == 5


def test_show_images_titles_and_options():
    fig = show_images(torch.rand(3, 4, 5), titles=["a", "b", 3], cmap="gray", vmin=0, vmax=2)
    assert [ax.get_title() for ax in fig.axes] == ["a", "b", "3"]
    assert all(ax.images[0].get_cmap().name == "gray" and ax.images[0].get_clim() == (0, 2) for ax in fig.axes)


def test_show_images_refuses():
    with pytest.raises(ValueError, match="^show_images got no picture; give it at least one.$"):
        show_images([])
    with pytest.raises(ValueError, match="^show_images got 3 pictures and 2 titles; give one title a picture.$"):
        show_images(torch.rand(3, 4, 5), titles=["a", "b"])
    with pytest.raises(ValueError, match="^show_images got 5 pictures for 2 x 2 places; leave out nrows or ncols"):
        show_images(torch.rand(5, 4, 5), nrows=2, ncols=2)


# pixel_table

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float32, torch.float16, torch.bfloat16])
def test_pixel_table_holds_the_numbers(device, dtype):
    x = (torch.arange(12).view(3, 4) * 20).to(dtype).to(device)
    ax = pixel_table(x, origin=(4, 10))
    form = "{:.2f}" if dtype.is_floating_point else "{:.0f}"
    expected = {((c, r), form.format(float(x[r, c]))) for r in range(3) for c in range(4)}
    assert {(t.get_position(), t.get_text()) for t in ax.texts} == expected
    assert [t.get_text() for t in ax.get_xticklabels()] == ["10", "11", "12", "13"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["4", "5", "6"]


def test_pixel_table_is_readable():
    ax = pixel_table(torch.tensor([[0, 255], [20, 240]], dtype=torch.uint8))
    assert {t.get_text(): t.get_color() for t in ax.texts} == {"0": "black", "20": "black", "255": "white", "240": "white"}
    ax = pixel_table(torch.full((11, 18), 255, dtype=torch.uint8))
    ax.figure.canvas.draw()                              # no number is wider than its cell
    cell = ax.transData.transform((1, 0))[0] - ax.transData.transform((0, 0))[0]
    assert all(t.get_window_extent().width < .9 * cell for t in ax.texts)


def test_pixel_table_on_given_axes_and_of_other_forms():
    _, ax = subplots()
    assert pixel_table(picture("L"), ax) is ax and len(ax.texts) == 20
    pixel_table([[1, 2], [3, 4]]); pixel_table(np.ones((2, 2))[::-1]); pixel_table(torch.rand(2, 2, requires_grad=True))
    for shape in [(3,), (3, 4, 4), (0, 4)]:
        with pytest.raises(ValueError) as error:
            pixel_table(torch.zeros(shape))
        assert str(error.value) == f"pixel_table draws a grey picture [H, W], but the shape is {list(shape)}."


# subplots, show_figure

def test_subplots_has_the_style_and_leaves_matplotlib_as_it_was():
    before = dict(plt.rcParams)
    fig, axs = subplots(2, 3)
    assert dict(plt.rcParams) == before and axs.shape == (2, 3) and tuple(fig.get_size_inches()) == (9, 6)
    assert tuple(subplots(figsize=(5, 2))[0].get_size_inches()) == (5, 2) and tuple(subplots(1, 2, imsize=2)[0].get_size_inches()) == (4, 2)
    ax = axs[0, 0]
    lines = [ax.plot([0, 1])[0] for _ in range(6)]
    assert len({line.get_color() for line in lines}) == len({str((line.get_linestyle(), line._dash_pattern)) for line in lines}) == 6
    assert not ax.spines["top"].get_visible() and fig.get_layout_engine() is not None
    assert subplots(2, squeeze=False, sharex=True)[1].shape == (2, 1)


def test_every_entry_of_the_style_takes_effect():
    "What matplotlib reads only when something is drawn later would be lost when `subplots` returns"
    late = {"axes.titlesize", "legend.frameon", "image.cmap", "savefig.dpi", "lines.linewidth"}
    assert not late & set(STYLE)


@pytest.fixture
def shown(monkeypatch):
    "What show_figure hands to the notebook"
    import IPython.display
    calls = []
    monkeypatch.setattr(images, "in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda data, **options: calls.append((data, options)))
    return calls


def test_show_figure_in_a_notebook(shown):
    fig, ax = subplots(figsize=(4, 2)); ax.plot([1, 2])
    assert show_figure(fig, alt="A line that rises.", caption="It *rises*.") is None
    (data, options), (caption, _) = shown
    png = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert png.size == (576, 288) and data["text/plain"] == "A line that rises." and options["raw"] is True
    assert options["metadata"] == {"image/png": {"alt": "A line that rises.", "width": 360, "height": 180}}
    assert caption.data == r"*It \*rises\*.*" and not plt.get_fignums()
    shown.clear()
    fig, ax = subplots(figsize=(4, 2))
    show_figure(fig, "An empty figure.", dpi=90)
    assert Image.open(io.BytesIO(base64.b64decode(shown[0][0]["image/png"]))).size == (360, 180)
    assert shown[0][1]["metadata"]["image/png"]["width"] == 360          # dpi changes the sharpness, not the size
    assert shown[1][0].data == "*An empty figure.*"


def test_show_figure_replaces_a_figure_of_the_same_name(shown):
    for replace in (False, True):
        show_figure(subplots()[0], "A line that grows.", name="growing", replace=replace)
    assert [(o["display_id"], o["update"]) for _, o in shown] == [("growing-figure", False), ("growing-caption", False),
                                                                  ("growing-figure", True), ("growing-caption", True)]


def test_show_figure_wants_an_alt_text():
    for alt in ("", "  \n"):
        with pytest.raises(ValueError, match="^show_figure needs an alt text: say in a sentence what the figure shows.$"):
            show_figure(subplots()[0], alt=alt)


def test_show_figure_in_a_script(monkeypatch):
    opened = []
    monkeypatch.setattr(plt, "show", lambda: opened.append(plt.get_fignums()))
    show_figure(subplots()[0], "Nothing.")                               # agg has no window
    assert not opened and not plt.get_fignums()
    fig, _ = subplots()
    monkeypatch.setattr(type(fig.canvas), "required_interactive_framework", "tk")
    show_figure(fig, "Nothing.")
    assert len(opened) == 1 and opened[0] and not plt.get_fignums()      # shown before it was closed


def test_png_with_a_palette_is_small_and_looks_the_same():
    fig = show_images(torch.rand(8, 28, 28, generator=torch.Generator().manual_seed(0)))
    fig.axes[0].plot([0, 27], [0, 27], "r-", linewidth=.8)               # a rare colour that must survive
    plain = io.BytesIO(); fig.savefig(plain, format="png", dpi=144)
    before, after = (np.array(Image.open(b).convert("RGB"), dtype=int) for b in (plain, io.BytesIO(images._png(fig, 144))))
    assert np.abs(before - after).max() <= 12 and len(images._png(fig, 144)) < .7 * plain.getbuffer().nbytes


def test_png_of_a_photo_keeps_every_colour():
    colours = torch.arange(2**14)
    photo = torch.stack([colours % 128 * 2, colours // 128 * 2, colours % 251]).to(torch.uint8).view(3, 128, 128)
    fig, ax = subplots(figsize=(1, 1)); fig.set_layout_engine("none"); ax.set_position((0, 0, 1, 1))
    show_image(photo, ax)
    png = Image.open(io.BytesIO(images._png(fig, 128)))
    assert png.mode == "RGB" and (np.array(png) == photo.permute(1, 2, 0).numpy()).all()


def test_script_without_a_display():
    code = """
        import torch, warnings
        from course_lib.images import show_figure, show_images
        warnings.simplefilter("error")          # ours; what an old matplotlib says while it is imported is not
        fig = show_images(torch.rand(5, 28, 28))
        show_figure(fig, alt="Five pictures of noise.")"""
    env = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env)
    assert ran.returncode == 0 and not ran.stdout and not ran.stderr, ran.stderr
