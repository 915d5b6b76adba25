"""One row per method: what holds for all of them. And recipes as data."""

import dataclasses

import pytest
import torch

from potstill import recipe as recipes
from potstill.augment import Augment
from potstill.errors import PotstillError
from potstill.experts import record
from potstill.functional import SGD, Adam
from potstill.methods import CITATIONS, METHODS, PRESETS, cite
from potstill.objectives import DistributionMatching, Unroll
from potstill.replay import Experts
from potstill.testing import CHECKS, check_method, toy

LEARNING = [name for name, make in METHODS.items() if make("paper").objective is not None]


@pytest.fixture
def small(tmp_path):
    """Makes a recipe small: on a small network, three steps where it walks, two short experts where it replays some."""

    def make(recipe, network, data):
        settings = {"network": network, "student": recipe.student if recipe.student == "kernel" else network}
        if isinstance(recipe.objective, Unroll):
            settings["objective.steps"] = 3
        recipe = recipes.change(recipe, settings)
        if isinstance(recipe.source, Experts):
            made = record(
                data, out=tmp_path, count=3, epochs=2, network=network, batch=8, augment="none", holdout=0.0, force=True
            )
            recipe = dataclasses.replace(recipe, source=Experts(max_start=2, span=1, folder=str(made.folder)))
        return recipe

    return make


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", LEARNING)
def test_contract(method, check, small):
    data = toy()
    check(small(METHODS[method]("paper"), "convnet-w8", data), data)


@pytest.mark.parametrize("method", LEARNING)
@pytest.mark.parametrize("network", ["convnet-batch-w8", "convnet-none-w8", "mlp-w16"])
def test_contract_on_other_networks(method, network, small):
    check_method(small(METHODS[method]("small"), network, toy()), network=network)


@pytest.mark.parametrize("method", LEARNING)
def test_contract_on_other_shapes(method, small):
    data = toy(shape=(3, 6, 10), sizes=(8, 5))
    check_method(small(METHODS[method]("paper"), "convnet-w4", data), data, "convnet-w4")
    plain = dataclasses.replace(METHODS[method]("paper"), augment=Augment())
    check_method(small(plain, "mlp-w16", toy(shape=(9,))), toy(shape=(9,)), "mlp-w16")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_round_trips(method, preset, tmp_path):
    recipe = METHODS[method](preset)
    file = tmp_path / "recipe.toml"
    file.write_text(recipes.write(recipe))
    assert recipes.read(file) == recipe
    assert recipe.preset == preset and recipe.method == method


@pytest.mark.parametrize("method", LEARNING)
def test_every_method_cites_its_paper(method):
    assert any(year in cite(method) for year in map(str, range(2018, 2027)))
    assert method in CITATIONS


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective.reel": 4}, "objective.real"),
        ({"objectiv.real": 4}, "objective"),
        ({"optimiser.inputs.rate": 4}, "optimiser.inputs"),
        ({"steps": "many"}, "int is needed"),
        ({"objective.real": 2.5}, "int is needed"),
        ({"optimiser.inputs.lr": True}, "float is needed"),
        ({"objective.kind": "distribusion"}, "distribution"),
        ({"learn": ["inputs", "labelz"]}, "labelz"),
        ({"augment.ops": ["flipp"]}, "flip"),
        ({"init": "reel"}, "real"),
        ({"steps": -1}, "below 0"),
        ({"source.size": 0}, "below 1"),
        ({"objective.real": 0}, "objective.real = 0 is below 1"),
        ({"learn": []}, "nothing is learned"),
        ({"method": "../../etc"}, "is no name"),
        ({"optimiser.inputs.lr": -0.1}, "optimiser.inputs.lr' is -0.1; it must be at least 0 and finite"),
        ({"optimiser.inputs.lr": float("inf")}, "optimiser.inputs.lr' is inf"),
        ({"optimiser.inputs.momentum": 1}, "optimiser.inputs.momentum' is 1; it must be at least 0 and below 1"),
        ({"optimiser.inputs.weight_decay": -1}, "optimiser.inputs.weight_decay"),
        ({"optimiser.inputs.kind": "adam", "optimiser.inputs.beta2": 1.0}, "optimiser.inputs.beta2"),
        ({"source.lr": -1}, "source.lr' is -1"),
        ({"objective.kind": "gradient", "objective.eps": -1e-6}, "objective.eps"),
        ({"optimiser.inputs.kind": "adam", "optimiser.inputs.momentum": 0.5}, "optimiser.inputs.momentum"),
        ({"kind": "adam"}, "no recipe field 'kind'"),
    ],
)
def test_a_wrong_field_is_named(settings, words):
    with pytest.raises(PotstillError, match=words):
        recipes.change(METHODS["dm"]("paper"), settings)


def test_set_changes_one_field():
    paper = METHODS["dm"]("paper")
    changed = recipes.change(paper, {"optimiser.inputs.lr": 3, "objective.real": 8})
    assert changed.optimiser["inputs"].lr == 3.0 and changed.objective.real == 8
    assert recipes.change(changed, {"optimiser.inputs.lr": 1.0, "objective.real": 256}) == paper


def test_another_kind_keeps_what_both_have_and_takes_its_own_defaults():
    """Whatever the order of the settings, and back again."""
    paper = recipes.change(METHODS["dm"]("paper"), {"optimiser.inputs.lr": 0.25, "optimiser.inputs.weight_decay": 0.5})
    for settings in (
        {"optimiser.inputs.kind": "adam", "optimiser.inputs.beta1": 0.8},
        {"optimiser.inputs.beta1": 0.8, "optimiser.inputs.kind": "adam"},
    ):
        made = recipes.change(paper, settings)
        assert made.optimiser["inputs"] == Adam(lr=0.25, beta1=0.8, weight_decay=0.5)
        assert recipes.change(made, {"optimiser.inputs.kind": "sgd"}).optimiser["inputs"] == SGD(0.25, 0.0, 0.5)
    same = recipes.change(paper, {"optimiser.inputs.kind": "sgd"})
    assert same == paper and same.optimiser["inputs"].momentum == 0.5
    gradient = recipes.change(METHODS["dc"]("paper"), {"objective.real": 7, "objective.eps": 1e-3})
    assert recipes.change(gradient, {"objective.kind": "distribution"}).objective == DistributionMatching(real=7)


def test_an_adam_recipe_round_trips():
    kind = {"kind": "adam", "lr": 0.1}
    recipe = recipes.change(METHODS["dm"]("paper"), {"optimiser.inputs": kind})
    assert recipe.optimiser["inputs"].beta2 == 0.999
    assert recipes.from_dict(recipes.to_dict(recipe)) == recipe


def test_a_method_from_outside(tmp_path, monkeypatch):
    module = tmp_path / "outside_method.py"
    module.write_text(
        "from potstill.methods import dm\nfrom potstill.recipe import change\n"
        "def mine(preset, ipc):\n    return change(dm(preset), {'method': 'mine'})\n"
        "def text(preset, ipc):\n    return preset\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert recipes.find("outside_method:mine", "small").method == "mine"
    with pytest.raises(PotstillError, match="no recipe"):
        recipes.find("outside_method:text")
    with pytest.raises(PotstillError, match="cannot be imported"):
        recipes.find("outside_method:absent")


def test_random_is_the_start_of_a_real_initialisation():
    from potstill.functional import Key
    from potstill.synthetic import initialise

    data = toy()
    s = initialise(data, [2, 2, 2], "real", Key(0).fold("init"))
    prepared = data.prepare(data.train.inputs)
    for row, label in zip(*s.take(torch.arange(6)), strict=True):
        matches = (prepared == row).flatten(1).all(1)
        assert matches.sum() == 1 and data.train.labels[matches].item() == label
