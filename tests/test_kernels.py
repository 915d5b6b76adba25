"""Infinite-width kernels against wide finite networks and closed forms; ridge regression against scikit-learn."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge

from potstill.errors import PotstillError
from potstill.functional import Key
from potstill.kernels import Kernel, check_gram, kernel, label_solve, predict, ridge_solve

NAMES = [
    f"{kind}-{body}"
    for kind in ("ntk", "nngp")
    for body in ("dense-d1", "dense-d3", "conv-d1", "conv-d2", "conv-pool-d2", "conv-gap-d2")
]
DENSE = [n for n in NAMES if "dense" in n]
CONVOLUTIONAL = [n for n in NAMES if "conv" in n]


def draw(count: int, *shape: int, name: str = "x") -> torch.Tensor:
    return Key(4).fold(name).normal(count, *shape).double()


def samples(name: str, count: int, tag: str = "x") -> torch.Tensor:
    return draw(count, *((7,) if "dense" in name else (2, 4, 3)), name=tag)


# A finite network of each body, in plain PyTorch: standard normal parameters, scaled where they are used.


def parameters(k: Kernel, shape: tuple[int, ...], width: int, key: Key) -> dict[str, torch.Tensor]:
    channels = shape[0] if k.body != "dense" else math.prod(shape)
    taps = (3, 3) if k.body != "dense" else ()
    out = {}
    for layer in range(k.depth):
        out[f"w{layer}"] = key.fold("w", layer).normal(width, channels, *taps).double()
        out[f"b{layer}"] = key.fold("b", layer).normal(width).double()
        channels = width
    high, wide = shape[1:] if k.body != "dense" else (1, 1)
    if k.body == "conv-pool":
        for _ in range(k.depth):
            high, wide = (high // 2, wide // 2) if min(high, wide) >= 2 else (high, wide)
    features = width * (1 if k.body == "conv-gap" else high * wide)
    out["w"] = key.fold("w").normal(features).double()
    out["b"] = key.fold("b").normal(1).double()
    return out


def output(k: Kernel, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Output (N,) of the finite network whose infinite relative k describes."""
    h = x.flatten(1) if k.body == "dense" else x
    for layer in range(k.depth):
        w, b = p[f"w{layer}"], p[f"b{layer}"]
        scaled = k.weight_std * w / math.sqrt(w[0].numel())
        h = F.linear(h, scaled) if k.body == "dense" else F.conv2d(h, scaled, padding=1)
        h = torch.relu(h + k.bias_std * b.reshape(-1, *[1] * (h.ndim - 2)))
        if k.body == "conv-pool" and min(h.shape[2:]) >= 2:
            h = F.avg_pool2d(h, 2)
    h = h.mean((2, 3)) if k.body == "conv-gap" else h.flatten(1)
    return k.weight_std * h @ p["w"] / math.sqrt(len(p["w"])) + k.bias_std * p["b"]


def finite(k: Kernel, x: torch.Tensor, width: int, key: Key) -> torch.Tensor:
    """Kernel (N, N) of one random network of that width.

    NTK: inner products of the gradients of the output. NNGP: the same with respect to the read-out alone, which is the
    covariance of the output over read-outs, given the features.
    """
    p = parameters(k, tuple(x.shape[1:]), width, key)
    wanted = p if k.kind == "ntk" else {name: p[name] for name in ("w", "b")}
    jacobian = torch.func.jacrev(lambda some: output(k, {**p, **some}, x))(wanted)
    return sum(j.flatten(1) @ j.flatten(1).T for j in jacobian.values())


CASES = [
    ("dense", 1, (5,), 256, 40), ("dense", 2, (5,), 256, 40), ("conv", 1, (2, 4, 3), 128, 24),
    ("conv", 2, (2, 4, 3), 128, 24), ("conv-pool", 1, (2, 5, 4), 128, 24), ("conv-pool", 2, (1, 5, 4), 128, 24),
    ("conv-gap", 2, (2, 3, 3), 128, 24),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
@pytest.mark.parametrize(("body", "depth", "shape", "width", "seeds"), CASES, ids=lambda v: str(v))
def test_a_kernel_is_the_mean_over_wide_finite_networks(kind, body, depth, shape, width, seeds):
    """Within five standard errors of the mean, and a part of 2 / width where finite width has a bias (depth 2)."""
    k = Kernel(kind, body, depth, weight_std=1.3, bias_std=0.6)
    x = draw(4, *shape)
    x = torch.cat([x, 0.9 * x[:1] + 0.3 * x[1:2]])  # a pair at a small angle
    all_networks = torch.stack([finite(k, x, width, Key(seed)) for seed in range(seeds)])
    mean, error = all_networks.mean(0), all_networks.std(0) / math.sqrt(seeds)
    gram = k(x)
    bias = 0 if depth == 1 else 2 / width
    assert bool(((gram - mean).abs() <= 5 * error + bias * gram.diagonal().mean()).all())
    assert float((error / gram).max()) < 0.04  # the test can tell: a wrong factor of 2 or 9 is far outside


def test_one_hidden_layer_is_the_arc_cosine_kernel():
    """Cho and Saul 2009: k_n = |u|^n |v|^n J_n(theta) / pi with J_0 = pi - theta, J_1 = sin + (pi - theta) cos.

    For unit Gaussian weights they take 2 E[relu relu], so half of it is meant; u is the input with its bias.
    """
    x1, x2 = draw(4, 6), draw(5, 6, name="y")
    u, v = (torch.cat([math.sqrt(2 / 6) * x, torch.full((len(x), 1), 0.1, dtype=torch.float64)], 1) for x in (x1, x2))
    angle = torch.stack([torch.stack([torch.acos(a @ b / a.norm() / b.norm()) for b in v]) for a in u])
    j0, j1 = math.pi - angle, angle.sin() + (math.pi - angle) * angle.cos()
    k1 = u.norm(dim=1)[:, None] * v.norm(dim=1)[None] * j1 / math.pi
    nngp = 2 * k1 / 2 + 0.01
    ntk = nngp + 2 * (u @ v.T) * j0 / math.pi / 2
    torch.testing.assert_close(Kernel("nngp")(x1, x2), nngp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Kernel("ntk")(x1, x2), ntk, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ntk-conv-d3", "nngp-conv-d2", "ntk-conv-pool-d2", "ntk-conv-gap-d3"])
def test_a_convolution_of_constant_images_without_edges_is_a_dense_network(name):
    """One pixel and a zero border: the patch is a ninth of the pixel, so weights three times as wide undo it."""
    k = kernel(name)
    wide = dataclasses.replace(k, weight_std=3.0, bias_std=0.0)
    dense = Kernel(k.kind, "dense", k.depth, 1.0, 0.0)
    x = draw(5, 6)
    # every convolution loses a factor of 9, the read-out none
    torch.testing.assert_close(wide(x[..., None, None]), 9 * dense(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_gram_matrices_are_symmetric_positive_and_have_the_diagonal(name):
    k = kernel(name)
    x = samples(name, 12)
    x = torch.cat([x, x[:3], -x[:2], torch.zeros_like(x[:1])])  # equal, opposite and empty samples
    gram = k(x)
    assert torch.equal(gram, gram.T)
    assert torch.equal(gram.diagonal(), k.diagonal(x))
    assert float(torch.linalg.eigvalsh(gram)[0]) > -1e-12 * float(gram.trace())
    torch.testing.assert_close(k(x, x.clone()), gram, rtol=1e-12, atol=1e-12)  # the diagonal, too, as if of two sets
    assert torch.equal(k(x, x), gram)
    torch.testing.assert_close(k(x[:5], x[5:]), gram[:5, 5:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(k(x[5:], x[:5]), k(x[:5], x[5:]).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ntk-dense-d2", "ntk-conv-d2"])
def test_a_kernel_grows_with_the_square_of_its_inputs_without_biases(name):
    k = dataclasses.replace(kernel(name), bias_std=0.0)
    x, y = samples(name, 3), samples(name, 4, "y")
    torch.testing.assert_close(k(3 * x, 5 * y), 15 * k(x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_blocks_do_not_matter(name):
    """Values equal to rounding, derivatives too, for blocks of one pair, of some, and of all."""
    k = kernel(name)
    x, y = samples(name, 3), samples(name, 4, "y")
    weight = draw(3, 4, name="weight")

    def run(chunk, of=lambda a, b, c: k(a, b, chunk=c)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        gram = of(a, b, chunk)
        return gram, *torch.autograd.grad((gram * weight).sum(), (a, b))

    pair = 8 * (12 if name.endswith("conv") or "conv-d" in name else 144)
    whole = run(2**30)
    for chunk in (1, 3 * pair, 9 * pair):
        for ours, theirs in zip(run(chunk), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(k(x, chunk=1), k(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(k.diagonal(x, chunk=1), k.diagonal(x), rtol=1e-12, atol=1e-12)


def test_blocks_bound_what_a_gradient_keeps():
    """The graph of many pairs holds their inputs, not their maps."""
    k = kernel("ntk-conv-d3")
    x, y = draw(4, 1, 12, 12).requires_grad_(), draw(40, 1, 12, 12, name="y")

    def kept(chunk):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            k(x, y, chunk=chunk)
        return sum(sizes)

    assert kept(8 * 144 * 40) < 0.5 * kept(2**30)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_equal_differences(name):
    k = kernel(name)
    x, y = samples(name, 2).requires_grad_(), samples(name, 3, "y").requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: k(a, b), (x, y), fast_mode="conv" in name)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_of_the_symmetric_form_equal_differences(name):
    """Where one argument moves both sides, the diagonal is as smooth as the rest."""
    k = kernel(name)
    x = samples(name, 3).requires_grad_()
    for form in (lambda a: k(a), lambda a: k(a, a), lambda a: k.diagonal(a)):
        assert torch.autograd.gradcheck(form, (x,), fast_mode="conv" in name)


@pytest.mark.parametrize("bias_std", [0.1, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_finite_where_samples_coincide(name, bias_std):
    """Equal, opposite, parallel and empty samples, on both sides, in both precisions."""
    k = dataclasses.replace(kernel(name), bias_std=bias_std)
    x = samples(name, 2)
    x = torch.cat([x, x, -x, 2 * x, x + 1e-9, torch.zeros_like(x)])
    for dtype in (torch.float64, torch.float32):
        a, b = x.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()
        for gram in (k(a, b), k(a, a)):
            assert gram.dtype == dtype and bool(gram.isfinite().all())
            weight = draw(*gram.shape, name="weight").to(dtype)
            for grad in torch.autograd.grad((gram * weight).sum(), (a, b), allow_unused=True):
                if grad is not None:
                    assert bool(grad.isfinite().all())
                    assert float(grad.abs().max()) < 1e3


def test_the_derivative_where_two_sets_share_a_sample_is_that_of_its_length():
    """The angle stands still, so half of the derivative of k(x, x), which moves both."""
    for name in NAMES:
        k = kernel(name)
        x = samples(name, 3)
        both = torch.func.grad(lambda a, k=k: k.diagonal(a).sum())(x)
        one = torch.func.grad(lambda a, k=k, x=x: k(a, x).diagonal().sum())(x)
        torch.testing.assert_close(one, both / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ntk-dense-d2", "ntk-conv-d2", "nngp-conv-pool-d1"])
def test_function_transforms_agree_with_autograd(name):
    k = kernel(name)
    x, y = samples(name, 3), samples(name, 4, "y")
    for chunk in (1, 2**22):
        leaf = x.clone().requires_grad_()
        (theirs,) = torch.autograd.grad(k(leaf, y, chunk=chunk).square().sum(), leaf)
        ours = torch.func.grad(lambda a, c=chunk: k(a, y, chunk=c).square().sum())(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_precision_and_shape_follow_the_inputs():
    x = draw(3, 2, 4, 4)
    for name in NAMES:
        k = kernel(name)
        assert k(x.float(), x[:2].float()).dtype == torch.float32
        torch.testing.assert_close(k(x.float(), x[:2].float()).double(), k(x, x[:2]), rtol=1e-2, atol=1e-2)
        assert k(x[:0], x).shape == (0, 3) and k(x, x[:0]).shape == (3, 0)
    assert torch.equal(Kernel()(x), Kernel()(x.flatten(1)))


def test_names():
    assert kernel("ntk-dense") == Kernel("ntk", "dense", 1) and kernel("nngp-conv-pool-d12").depth == 12
    for name in NAMES:
        assert kernel(name).name == name
        assert hash(kernel(name)) == hash(kernel(name)) and kernel(name) == dataclasses.replace(kernel(name))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ntk-dens-d2", "no kernel 'ntk-dens'; did you mean 'ntk-dense'"),
        ("rbf", "no kernel 'rbf'; there are: nngp-conv, "),
        ("ntk", "no kernel 'ntk'; "),
        ("ntk-dense-d", "no kernel 'ntk-dense-d'; "),
        ("ntk-dense-w128", "no kernel 'ntk-dense-w128'; "),
        ("ntk-dense-d0", "depth 0 is no number of hidden layers"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(PotstillError, match=message):
        kernel(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "nkt"}, "did you mean 'ntk'"), ({"body": "convolution"}, "no body of a kernel 'convolution'"),
        ({"depth": 0}, "depth 0"), ({"depth": True}, "depth True"),
        ({"weight_std": 0.0}, "weight_std = 0.0"), ({"weight_std": math.nan}, "weight_std = nan"),
        ({"bias_std": -0.1}, "bias_std = -0.1"), ({"bias_std": math.inf}, "bias_std = inf"),
    ],
)  # fmt: skip
def test_kernels_that_cannot_be(fields, message):
    with pytest.raises(PotstillError, match=message):
        Kernel(**fields)


def test_inputs_that_do_not_fit():
    with pytest.raises(PotstillError, match="needs images .* try 'ntk-dense'"):
        kernel("ntk-conv-d2")(draw(2, 5))
    with pytest.raises(PotstillError, match=r"10,000 numbers .* up to 8 x 8.*is 100: 'ntk-conv-d2'"):
        kernel("ntk-conv-pool-d2").diagonal(draw(2, 1, 10, 10))
    with pytest.raises(PotstillError, match="one shape and floating-point type"):
        Kernel()(draw(2, 5), draw(2, 6))
    with pytest.raises(PotstillError, match="torch.float32"):
        Kernel()(draw(2, 5), draw(2, 5).float())
    with pytest.raises(PotstillError, match="torch.uint8"):
        Kernel()(torch.zeros(2, 5, dtype=torch.uint8))


# Regression


def problem(n: int = 12, m: int = 30, classes: int = 3):
    k = Kernel("ntk", depth=2)
    s, t = draw(n, 6, name="s"), draw(m, 6, name="t")
    return k(s), k(t, s), draw(n, classes, name="ys"), draw(m, classes, name="yt")


@given(st.integers(1, 20), st.floats(1e-8, 10), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_ridge_regression_is_that_of_scikit_learn(n, ridge, classes):
    gram, cross, targets, _ = problem(n, 9, classes)
    theirs = KernelRidge(alpha=ridge * float(gram.trace()) / n, kernel="precomputed").fit(gram.numpy(), targets.numpy())
    coefficients = ridge_solve(gram, targets, ridge)
    np.testing.assert_allclose(coefficients.numpy(), theirs.dual_coef_.reshape(n, -1), rtol=1e-6, atol=1e-9)
    ours = predict(cross, gram, targets, ridge)
    np.testing.assert_allclose(ours.numpy(), theirs.predict(cross.numpy()).reshape(9, -1), rtol=1e-6, atol=1e-9)


def test_ridge_regression_interpolates_as_the_ridge_vanishes():
    gram, _, targets, _ = problem()
    errors = [float((predict(gram, gram, targets, ridge) - targets).abs().max()) for ridge in (1e-2, 1e-5, 1e-8, 0.0)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10


def test_the_unit_of_the_kernel_does_not_matter():
    gram, cross, targets, _ = problem()
    once = predict(cross, gram, targets, 1e-2)
    torch.testing.assert_close(predict(7 * cross, 7 * gram, targets, 1e-2), once, rtol=1e-10, atol=1e-10)


def test_the_solve_is_differentiable():
    gram, cross, targets, _ = problem(5, 4, 2)
    args = tuple(v.clone().requires_grad_() for v in (cross, gram, targets))
    assert torch.autograd.gradcheck(lambda c, g, y: predict(c, (g + g.T) / 2, y, 0.1), args)


def test_a_matrix_that_cannot_be_solved_gives_nan_and_its_reason():
    """No exception inside a step; the reason outside. A good matrix beside it in a batch is untouched."""
    gram, _, targets, _ = problem(4)
    bad = gram.clone()
    bad[0, 0] = -1.0
    assert bool(ridge_solve(bad, targets, 1e-6).isnan().all())
    both = torch.func.vmap(lambda g: ridge_solve(g, targets, 1e-6))(torch.stack([bad, gram]))
    assert bool(both[0].isnan().all()) and bool(both[1].isfinite().all())
    check_gram(gram, 1e-6)
    with pytest.raises(PotstillError, match="not positive definite .* larger ridge"):
        check_gram(bad, 1e-6)
    with pytest.raises(PotstillError, match="not finite"):
        check_gram(gram * math.nan, 1e-6)
    with pytest.raises(PotstillError, match="ridge = -1"):
        check_gram(gram, -1.0)


@pytest.mark.parametrize(("n", "m"), [(6, 30), (6, 6), (9, 4)])
def test_solved_labels_satisfy_the_normal_equations_and_are_best(n, m):
    gram, cross, _, targets = problem(n, m)
    ridge = 1e-3
    labels = label_solve(cross, gram, targets, ridge)
    design = predict(cross, gram, torch.eye(n).double(), ridge)  # predictions are linear in the labels
    torch.testing.assert_close(design.T @ design @ labels, design.T @ targets, rtol=1e-8, atol=1e-8)

    def loss(y):
        return float((predict(cross, gram, y, ridge) - targets).square().sum())

    best = loss(labels)
    assert best < 1e-16 if m <= n else best > 0.1
    for i in range(20):
        other = labels + 10.0 ** (-i % 5) * Key(i).fold("labels").normal(*labels.shape).double()
        assert loss(other) > best


def test_solved_labels_with_equal_samples():
    """A kernel without full rank: as good as without the repetition, and finite."""
    k, s, t, targets = Kernel(), draw(5, 6, name="s"), draw(40, 6, name="t"), draw(40, 3, name="yt")
    twice = torch.cat([s, s[:2]])

    def error(x):
        labels = label_solve(k(t, x), k(x), targets, 1e-6)
        assert labels.dtype == torch.float64 and float(labels.abs().max()) < 1e4
        return float((predict(k(t, x), k(x), labels, 1e-6) - targets).square().mean())

    assert error(twice) == pytest.approx(error(s), rel=1e-6)
    assert error(s.float().double()) == pytest.approx(error(s), rel=1e-4)
    with pytest.raises(PotstillError, match="cross has numbers that are not finite"):
        label_solve(k(t, s) * math.nan, k(s), targets, 1e-6)
