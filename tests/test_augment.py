"""Augmentation: properties of every operation, oracles written elsewhere, and the formulas typed out."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from potstill.augment import OPS, Augment
from potstill.errors import PotstillError
from potstill.functional import Key

FULL = "color_crop_cutout_flip_scale_rotate"
CASES = [*OPS, FULL]


def noise(*shape, dtype=torch.float32, name="x"):
    return Key(7).fold(name).normal(*shape).to(dtype)


def fixed(augment, groups=1, **u):
    """Draws at chosen places of their ranges: 0.5 is the middle, "op" the place in `ops`."""
    made = {name: torch.full_like(d, u.get(name, 0.5)) for name, d in augment.draws(Key(0), groups).items()}
    if "op" in made:
        made["op"] = torch.full_like(made["op"], u.get("op", 0), dtype=torch.int64)
    return made


def sources(augment, draws, h=33, w=33):
    """Where the pixels round the image's middle come from, (G, 5, 5, 2): x and y in pixels from the middle."""
    y, x = torch.meshgrid(torch.arange(h) - (h - 1) / 2, torch.arange(w) - (w - 1) / 2, indexing="ij")
    groups = next(iter(draws.values())).shape[0]
    out = augment(torch.stack([x, y]).expand(groups, 1, 2, h, w), draws)[:, 0]
    return out[:, :, h // 2 - 2 : h // 2 + 3, w // 2 - 2 : w // 2 + 3].movedim(1, -1)


def matrices(augment, draws, h=33, w=33):
    """The affine maps behind `sources`: matrices (G, 2, 2), rows x and y, and shifts (G, 2)."""
    s = sources(augment, draws, h, w)
    return torch.stack([(s[:, 2, 4] - s[:, 2, 0]) / 4, (s[:, 4, 2] - s[:, 0, 2]) / 4], -1), s[:, 2, 2]


# --- what every operation has in common


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("mode", ["one", "all"])
@pytest.mark.parametrize("n", [1, 10, 256])
def test_siamese_draws_act_alike_on_batches_of_any_size(text, mode, n):
    augment = Augment.parse(text, mode)
    draws = augment.draws(Key(1), 3)
    x = noise(3, n, 3, 8, 8)
    whole, single = augment(x, draws), augment(x[:, -1:], draws)
    torch.testing.assert_close(whole[:, -1:], single)
    permuted = augment(x.flip(1), draws).flip(1)
    torch.testing.assert_close(whole, permuted)


@pytest.mark.parametrize("augment", [Augment(), Augment.parse("none"), Augment.parse(FULL, "all", 0.0)])
def test_identity_returns_x_itself(augment):
    x = noise(2, 3, 3, 8, 8)
    draws = augment.draws(Key(0), 2)
    assert augment.is_identity and draws == {} and augment(x, draws) is x
    table = torch.zeros(4, 2)  # nothing to do means nothing to ask of the input either
    assert augment(table, draws) is table


@pytest.mark.parametrize("text", CASES)
@pytest.mark.parametrize("mode", ["one", "all"])
def test_small_strength_is_near_identity(text, mode):
    augment = Augment.parse(text, mode, 1e-6)
    x = noise(4, 3, 3, 9, 12)
    torch.testing.assert_close(augment(x, augment.draws(Key(0), 4, 3)), x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(1, 1, 3, 16, 16), (1, 1, 1, 16, 16), (2, 1, 5, 12, 20), (3, 4, 3, 21, 8)])
def test_every_operation_alone_changes_x_and_keeps_its_shape(op, shape):
    augment = Augment((op,), flip=1.0)
    x = noise(*shape)
    for per_group in (None, shape[1]):
        out = augment(x, augment.draws(Key(2), shape[0], per_group))
        assert out.shape == x.shape and out.isfinite().all()
        assert (out - x).abs().amax((1, 2, 3, 4)).min() > 1e-3  # in every group


@pytest.mark.parametrize("mode", ["one", "all"])
def test_independent_draws_differ_within_a_group_and_equal_one_sample_at_a_time(mode):
    augment = Augment.parse(FULL, mode)
    draws = augment.draws(Key(3), 6, 5)
    x = noise(6, 1, 3, 10, 14).expand(6, 5, 3, 10, 14)
    out = augment(x, draws)
    for i in range(5):
        mine = {name: d if name == "op" else d[:, i : i + 1] for name, d in draws.items()}
        torch.testing.assert_close(out[:, i : i + 1], augment(x[:, i : i + 1], mine))
    if mode == "all":
        assert all((out[:, i] - out[:, 0]).abs().amax((1, 2, 3)).min() > 1e-3 for i in range(1, 5))


@pytest.mark.parametrize("mode", ["one", "all"])
def test_draws_depend_on_the_key_alone(mode):
    augment = Augment.parse(FULL, mode)
    before = torch.get_rng_state()
    draws = augment.draws(Key(0), 4, 3)
    first = augment(noise(4, 3, 3, 8, 8), draws)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(123)
    again = augment.draws(Key(0), 4, 3)
    assert draws.keys() == again.keys() and all(torch.equal(draws[k], again[k]) for k in draws)
    assert torch.equal(first, augment(noise(4, 3, 3, 8, 8), again))
    assert {tuple(d.shape) for name, d in draws.items() if name != "op"} == {(4, 3)}
    uniform = [d for name, d in draws.items() if name != "op"]
    assert all(not torch.equal(a, b) for i, a in enumerate(uniform) for b in uniform[:i])  # a key for each
    other = augment.draws(Key(1), 4, 3)
    assert all(not torch.equal(draws[k], other[k]) for k in draws if k != "op")


def test_mode_one_uses_one_operation_per_group_equally_often():
    augment = Augment.parse(FULL)
    groups = 3000
    draws = augment.draws(Key(0), groups)
    assert draws["op"].shape == (groups, 1) == augment.draws(Key(0), groups, 4)["op"].shape
    x = noise(1, 1, 3, 8, 8).expand(groups, 1, 3, 8, 8)
    out = augment(x, draws)
    for i, op in enumerate(OPS):
        mine = draws["op"][:, 0] == i
        # within five standard deviations of one sixth
        assert abs(mine.float().mean() - 1 / 6) < 5 * math.sqrt(5 / 36 / groups)
        alone = Augment((op,))
        expected = alone(x, {**draws, "op": torch.zeros_like(draws["op"])})
        torch.testing.assert_close(out[mine], expected[mine], atol=1e-5, rtol=1e-5)


def test_mode_one_leaves_the_others_out_of_it():
    augment = Augment(("cutout", "rotate", "color"))  # the place in `ops`, not in OPS, is what counts
    x = noise(1, 2, 3, 16, 16)
    out = augment(x, fixed(augment, op=0, rotate=1.0, brightness=1.0, cutout_x=0.25))
    kept = out != 0
    assert torch.equal(out[kept], x[kept])
    assert (~kept).sum() == 2 * 3 * 8 * 8


def test_mode_all_is_color_then_one_resampling_then_cutout():
    augment = Augment.parse(FULL, "all")
    draws = augment.draws(Key(5), 4)
    x = noise(4, 2, 3, 16, 16)
    expected = x
    for text in ("color", "crop_flip_scale_rotate", "cutout"):
        expected = Augment.parse(text, "all")(expected, draws)
    torch.testing.assert_close(augment(x, draws), expected)


def test_composition_is_crop_flip_scale_rotate_in_this_order():
    augment = Augment(("rotate", "scale", "crop", "flip"), "all", flip=1.0)
    draws = augment.draws(Key(5), 20)
    matrix, shift = matrices(augment, draws, 33, 41)
    one = {op: matrices(Augment((op,), "all", flip=1.0), draws, 33, 41) for op in augment.ops}
    # the last transform's source is looked up first
    torch.testing.assert_close(matrix, one["flip"][0] @ one["scale"][0] @ one["rotate"][0], atol=1e-4, rtol=0)
    torch.testing.assert_close(shift, one["crop"][1], atol=1e-4, rtol=0)


# --- each operation against its definition or someone else's code


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("s", [1.0, 0.3])
def test_color_is_the_formula(channels, s):
    augment = Augment(("color",), strength=s, brightness=0.8, saturation=1.7, contrast=0.4)
    draws = augment.draws(Key(0), 3, 4)
    x = noise(3, 4, channels, 6, 5) + 1
    out = augment(x, draws)
    for g in range(3):
        for i in range(4):
            u1, u2, u3 = (float(draws[name][g, i]) for name in ("brightness", "saturation", "contrast"))
            y = x[g, i] + s * (u1 - 0.5) * 0.8
            mean = y.mean(0, keepdim=True)
            y = (y - mean) * ((1 - s) + s * (u2 * 1.7)) + mean
            mean = y.mean()
            y = (y - mean) * ((1 - s) + s * (u3 + 0.4)) + mean
            torch.testing.assert_close(out[g, i], y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("s", [1.0, 0.4])
def test_jitter_draws_both_factors_evenly_in_their_logarithm(s):
    """x about its mean, times exp of a number uniform in plus or minus s jitter: 1.28 and 1/1.28 lie equally far out."""
    augment = Augment(("color",), strength=s, brightness=0.5, jitter=0.25)
    draws, x = augment.draws(Key(0), 2, 5), noise(2, 5, 3, 6, 5) + 1
    out = augment(x, draws)
    for g in range(2):
        for i in range(5):
            b, a, c = (2 * float(draws[name][g, i]) - 1 for name in ("brightness", "saturation", "contrast"))
            y = x[g, i] + s * 0.25 * b
            y = (y - y.mean(0)) * math.e ** (s * 0.25 * a) + y.mean(0)
            y = (y - y.mean()) * math.e ** (s * 0.25 * c) + y.mean()
            torch.testing.assert_close(out[g, i], y, atol=1e-5, rtol=1e-5)
    largest = augment(x, fixed(augment, 2, brightness=0.5, saturation=0.5, contrast=1.0))
    ratio = (largest - largest.mean((2, 3, 4), True)).norm() / (x - x.mean((2, 3, 4), True)).norm()
    assert float(ratio) == pytest.approx(math.exp(s * 0.25), rel=1e-4)


def test_saturation_of_one_channel_is_the_identity():
    augment = Augment(("color",), brightness=0.0)
    x = noise(1, 2, 1, 6, 6)
    torch.testing.assert_close(augment(x, fixed(augment, saturation=0.0)), x)  # contrast at its middle is 1
    x = noise(1, 2, 3, 6, 6)
    grey = augment(x, fixed(augment, saturation=0.0))
    torch.testing.assert_close(grey, x.mean(2, keepdim=True).expand_as(x))


def test_flip_is_exact():
    augment = Augment(("flip",))
    x = noise(1, 3, 3, 8, 11)
    torch.testing.assert_close(augment(x, fixed(augment, flip=0.4)), x.flip(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(augment(x, fixed(augment, flip=0.6)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fill", ["zero", "edge"])
@pytest.mark.parametrize("h, w", [(16, 16), (28, 12), (9, 20)])
def test_crop_is_a_shift_with_zeros_or_the_pixels_of_the_edge(h, w, fill):
    augment = Augment(("crop",), crop=0.2, fill=fill)
    draws = augment.draws(Key(4), 12)
    x = noise(12, 2, 3, h, w)
    out = augment(x, draws)
    py, px = math.floor(0.2 * h + 0.5), math.floor(0.2 * w + 0.5)
    padded = F.pad(x.flatten(0, 1), (px, px, py, py), "constant" if fill == "zero" else "replicate").unflatten(
        0, (12, 2)
    )
    for g in range(12):
        top, left = int(draws["crop_y"][g] * (2 * py + 1)), int(draws["crop_x"][g] * (2 * px + 1))
        torch.testing.assert_close(out[g], padded[g, ..., top : top + h, left : left + w], atol=1e-5, rtol=0)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("op", ["rotate", "scale"])
def test_the_edge_is_the_image_with_a_margin_of_its_nearest_pixels(op, align_corners):
    """A warp about the middle brings in what lies in a wide margin of replicated pixels."""
    augment = Augment((op,), fill="edge", scale=1.3, rotate=25.0, align_corners=align_corners)
    draws, x = fixed(augment, scale_x=0.9, scale_y=1.0, rotate=0.95), noise(1, 2, 3, 12, 16)
    wide = F.pad(x[0], (16, 16, 16, 16), "replicate")[None]
    inside = augment(wide, draws)[..., 16:-16, 16:-16]
    torch.testing.assert_close(augment(x, draws), inside, atol=1e-4, rtol=0)
    assert float((augment(x, draws) - Augment((op,), scale=1.3, rotate=25.0)(x, draws)).abs().max()) > 0.1


@pytest.mark.parametrize("align_corners", [True, False])
def test_quarter_turns_are_rot90(align_corners):
    augment = Augment(("rotate",), rotate=90.0, align_corners=align_corners)
    for size in (8, 11):
        x = noise(1, 2, 3, size, size)
        out = augment(x, fixed(augment, rotate=1.0))
        torch.testing.assert_close(out, torch.rot90(x, 1, (-2, -1)), atol=2e-5, rtol=0)
        out = augment(x, fixed(augment, rotate=0.0))
        torch.testing.assert_close(out, torch.rot90(x, -1, (-2, -1)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("h, w", [(16, 16), (12, 25), (31, 14)])
@pytest.mark.parametrize("angle", [-33.0, 15.0])
def test_rotation_equals_torchvision(h, w, angle):
    augment = Augment(("rotate",), rotate=abs(angle))
    x = noise(1, 2, 3, h, w)
    out = augment(x, fixed(augment, rotate=float(angle > 0)))
    expected = vision.rotate(x[0], angle, interpolation=InterpolationMode.BILINEAR)[None]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_rotation_of_rectangles_keeps_distances():
    augment = Augment(("rotate",), rotate=40.0)
    matrix, shift = matrices(augment, augment.draws(Key(0), 50), 17, 61)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(2).expand(50, 2, 2), atol=1e-4, rtol=0)
    assert shift.abs().max() < 1e-4 and (torch.linalg.det(matrix) > 0.99).all()


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(15, 15), (12, 20)])
def test_scale_equals_affine_grid_in_both_conventions(align_corners, size):
    augment = Augment(("scale",), align_corners=align_corners)
    draws = augment.draws(Key(8), 6)
    x = noise(6, 2, 3, *size)
    sx, sy = (1 / 1.2 + draws[name][:, 0] * (1.2 - 1 / 1.2) for name in ("scale_x", "scale_y"))
    theta = torch.stack([sx, 0 * sx, 0 * sx, 0 * sy, sy, 0 * sy], -1).reshape(6, 2, 3)
    grid = F.affine_grid(theta, [6, 6, *size], align_corners=align_corners)
    expected = F.grid_sample(x.flatten(1, 2), grid, align_corners=align_corners).reshape(x.shape)
    torch.testing.assert_close(augment(x, draws), expected, atol=1e-4, rtol=0)


def test_align_corners_changes_rounding_only():
    x = noise(6, 2, 3, 14, 20)
    a, b = (Augment(OPS, "all", align_corners=flag) for flag in (True, False))
    torch.testing.assert_close(a(x, a.draws(Key(0), 6)), b(x, a.draws(Key(0), 6)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("h, w, part", [(16, 16, 0.5), (15, 9, 0.3), (12, 20, 0.25)])
def test_cutout_is_one_patch_of_zeros_cut_at_the_border(h, w, part):
    augment = Augment(("cutout",), cutout=part)
    groups = 400
    x = noise(groups, 1, 2, h, w).abs() + 1
    out = augment(x, augment.draws(Key(0), groups))
    gone = out == 0
    assert torch.equal(out[~gone], x[~gone]) and torch.equal(gone[:, :, 0], gone[:, :, 1])
    for size, line in ((h, gone[:, 0, 0].any(2)), (w, gone[:, 0, 0].any(1))):
        side = math.floor(part * size + 0.5)
        lengths = line.sum(1)
        assert lengths.max() == side and lengths.min() == (side + 1) // 2  # never less than half of it is inside
        assert (line[:, 1:] != line[:, :-1]).sum(1).max() <= 2  # in one piece
    assert torch.equal(gone[:, 0, 0].sum((1, 2)), gone[:, 0, 0].any(2).sum(1) * gone[:, 0, 0].any(1).sum(1))
    first, last = (augment(x[:1], fixed(augment, cutout_x=u, cutout_y=u))[0, 0, 0] == 0 for u in (0.0, 0.999999))
    assert first[0, 0] and torch.equal(first, last.flip(0, 1))  # both borders alike


def test_ranges_of_the_draws():
    n = 4000
    for strength in (1.0, 0.5):
        rotate = Augment(("rotate",), strength=strength)
        matrix, _ = matrices(rotate, rotate.draws(Key(0), n))
        angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
        uniform(angle, -15 * strength, 15 * strength)
        scale = Augment(("scale",), strength=strength)
        matrix, _ = matrices(scale, scale.draws(Key(0), n))
        for factor in (matrix[:, 0, 0], matrix[:, 1, 1]):
            uniform(factor, 1.2**-strength, 1.2**strength)
        assert abs(torch.corrcoef(torch.stack([matrix[:, 0, 0], matrix[:, 1, 1]]))[0, 1]) < 0.1
        flip = Augment(("flip",), strength=strength)
        matrix, _ = matrices(flip, flip.draws(Key(0), n))
        assert abs((matrix[:, 0, 0] < 0).float().mean() - 0.5 * strength) < 5 * 0.5 / math.sqrt(n)
        crop = Augment(("crop",), strength=strength)
        _, shift = matrices(crop, crop.draws(Key(0), n), 32, 24)
        for values, size in ((shift[:, 0], 24), (shift[:, 1], 32)):
            far = math.floor(0.125 * strength * size + 0.5)
            # the middle of an even side lies half a pixel beside the pixel that is read
            counts = torch.bincount((values - 0.5).round().long() + far)
            assert len(counts) == 2 * far + 1
            assert (counts / n - 1 / len(counts)).abs().max() < 5 / math.sqrt(n * len(counts))


def uniform(values, low, high):
    """Assert that values cover [low, high] evenly: both ends, mean and variance."""
    n, width = len(values), high - low
    assert low - 1e-4 <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high + 1e-4
    assert abs(values.mean() - (low + high) / 2) < 5 * width / math.sqrt(12 * n)
    assert abs(values.var() / (width**2 / 12) - 1) < 0.1


# --- what the compiled step needs


@pytest.mark.parametrize("text", CASES)
def test_gradient_equals_central_differences(text):
    augment = Augment.parse(text, "all")
    x = noise(1, 2, 2, 4, 5, dtype=torch.float64).requires_grad_()
    for per_group in (None, 2):
        draws = augment.draws(Key(1), 1, per_group)
        assert torch.autograd.gradcheck(lambda x, draws=draws: augment(x, draws), x)
    assert torch.autograd.gradgradcheck(lambda x: augment(x, draws).pow(2), x)


@pytest.mark.parametrize("mode", ["one", "all"])
def test_float_types(mode):
    augment = Augment.parse(FULL, mode)
    draws = augment.draws(Key(1), 6)
    x = noise(6, 3, 3, 8, 8).to(torch.bfloat16)
    reference = augment(x.double(), draws)
    assert reference.dtype == torch.float64
    for dtype, tol in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        out = augment(x.to(dtype), draws)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), reference, atol=tol, rtol=tol)
    assert torch.equal(augment(x, draws), augment(x.float(), draws).to(torch.bfloat16))  # rounded once, at the end


@pytest.mark.parametrize("mode", ["one", "all"])
@pytest.mark.parametrize("per_group", [None, 3])
def test_func_transforms(mode, per_group):
    augment = Augment.parse(FULL, mode)
    x = noise(4, 6, 3, 3, 8, 8)  # four repetitions of six groups
    keys = [Key(i) for i in range(4)]
    each = [augment.draws(key, 6, per_group) for key in keys]
    stacked = {name: torch.stack([d[name] for d in each]) for name in each[0]}
    expected = torch.stack([augment(a, d) for a, d in zip(x, each, strict=True)])
    torch.testing.assert_close(torch.func.vmap(augment)(x, stacked), expected)

    def loss(x, draws):
        return augment(x, draws).pow(3).sum()

    leaf = x.clone().requires_grad_()
    (grads,) = torch.autograd.grad(sum(loss(a, d) for a, d in zip(leaf, each, strict=True)), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, stacked), grads)
    shared = torch.func.vmap(augment, (0, None))(x, each[0])
    torch.testing.assert_close(shared, torch.stack([augment(a, each[0]) for a in x]))


def test_arguments_are_left_alone():
    augment = Augment.parse(FULL, "all")
    draws, x = augment.draws(Key(0), 2), noise(2, 2, 3, 8, 8)
    before = {k: (d, d.clone(), d._version) for k, d in (draws | {"x": x}).items()}
    augment(x, draws)
    assert all(d._version == version and torch.equal(d, copy) for d, copy, version in before.values())


@pytest.mark.compiled
def test_compiled_equals_eager():
    augment = Augment.parse(FULL)

    def loss(x, draws):
        return augment(x, draws).pow(2).mean()

    x, draws = noise(6, 2, 3, 8, 8), augment.draws(Key(0), 6)
    step = torch.compile(torch.func.grad_and_value(loss), fullgraph=True, dynamic=False)
    for seed in (0, 1):  # other draws, same graph
        draws = augment.draws(Key(seed), 6)
        torch.testing.assert_close(step(x, draws), torch.func.grad_and_value(loss)(x, draws))


# --- names and mistakes


def test_names_come_back():
    assert Augment.parse(FULL).ops == OPS and str(Augment.parse(FULL)) == FULL
    assert Augment.parse("") == Augment.parse("none") == Augment() and Augment().name == "none"
    for text in ("flip", "rotate_color"):
        assert Augment.parse(text).name == text
    assert Augment.parse("flip", "all", 0.5) == Augment(("flip",), mode="all", strength=0.5)
    assert hash(Augment(["flip"])) == hash(Augment(("flip",)))  # as a configuration file would give it


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Augment.parse("colour_crop"), ["colour", "did you mean 'color'"]),
        (lambda: Augment(("flip", "flip")), ["once", "flip_flip"]),
        (lambda: Augment("flip"), ["ops", "flip", "parse"]),
        (lambda: Augment(mode="al"), ["mode", "'all'"]),
        (lambda: Augment(fill="edges"), ["fill", "'edges'", "edge"]),
        (lambda: Augment(jitter=-0.1), ["jitter", "at least 0", "-0.1"]),
        (lambda: Augment(strength=-1.0), ["strength", "at least 0", "-1"]),
        (lambda: Augment(rotate=math.inf), ["rotate", "inf", "finite"]),
        (lambda: Augment(strength=math.nan), ["strength", "nan"]),
        (lambda: Augment(strength="1"), ["strength", "'1'"]),
        (lambda: Augment(scale=0.8), ["scale", "at least 1", "0.8"]),
        (lambda: Augment(cutout=1.5), ["cutout", "[0, 1]", "1.5"]),
        (lambda: Augment(("flip",))(torch.zeros(2, 3, 4), {}), ["flip", "height", "(2, 3, 4)"]),
        (lambda: Augment(("flip",))(torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8), {}), ["floating", "uint8"]),
        (lambda: Augment(("flip",))(torch.zeros(1, 2, 3, 4, 4), {}), ["draws", "'flip'", "(1, 1)", "none"]),
        (
            lambda: Augment(("flip",))(torch.zeros(3, 2, 3, 4, 4), Augment(("flip",)).draws(Key(0), 3, 5)),
            ["'flip'", "(3, 1)", "(3, 2)", "(3, 5)"],
        ),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(PotstillError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
