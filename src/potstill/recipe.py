"""A recipe: one named choice of objective, source, what is learned, augmentation, optimiser and protocol.

A recipe is a tree of frozen dataclasses. As a plain dict (and so as TOML and in records) each part that has several
forms carries its `kind`; `--set` and `--recipe` change that dict, and everything unknown in it is named.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from .augment import Augment
from .errors import PotstillError, unknown
from .functional import OPTIMISERS, Optimiser
from .objectives import OBJECTIVES, Objective
from .replay import Experts
from .sources import Pool, Source
from .strict import read_toml
from .synthetic import INITIALISERS, SELECTORS


@dataclass(frozen=True)
class Recipe:
    """How a set is made and what it asks for when it is used.

    Args:
        method: The alias that made it, `dm`, or a name of your own.
        preset: `paper` or `small`.
        objective: What is minimised; nothing for a coreset.
        source: Where networks come from.
        learn: What of S is learned.
        init: How S starts.
        space: Where an `init` that chooses among training samples compares them: `pixels` (standardised), `features`
            (of `network`, trained by protocol `whole` on the training data) or `random-features` (of `network`, fresh).
        labels: `hard`; `soft`: probabilities by `student`, trained by protocol `whole`, for coresets only; `logits`, which
            are learned and stored as probabilities; `centred`: around 0, for squared losses, learned or not.
        augment: One augmentation for objective and source.
        optimiser: One per learned part.
        final: Share of the learning rates of `optimiser` that is left at the end of the run, reached along a cosine.
        steps: Steps of a run that names neither steps nor minutes.
        looks: Looks at held-out accuracy during the run.
        network: What S is learned with.
        student: The network that the set asks to be judged with.
        protocol: The evaluation that it asks for.
    """

    method: str
    preset: str
    objective: Objective | None = None
    source: Source | None = None
    learn: tuple[str, ...] = ()
    init: str = "real"
    space: str = "pixels"
    labels: str = "hard"
    augment: Augment = Augment()
    optimiser: Mapping[str, Optimiser] = field(default_factory=dict)
    final: float = 1.0
    steps: int = 0
    looks: int = 4
    network: str = "convnet"
    student: str = "convnet"
    protocol: str = "dsa"

    def __post_init__(self) -> None:
        if self.init not in INITIALISERS:
            raise unknown("initialiser", self.init, INITIALISERS)
        if self.space not in SPACES:
            raise unknown("space", self.space, SPACES)
        if self.space != "pixels" and self.init not in SELECTORS:
            raise PotstillError(f"init '{self.init}' chooses no samples in {self.space}; {', '.join(SELECTORS)} do")
        if self.labels not in LABELS:
            raise unknown("kind of labels", self.labels, LABELS)
        if self.labels == "soft" and self.objective is not None:
            raise PotstillError(f"labels = soft is for coresets; method '{self.method}' has an objective")
        if self.labels == "hard" and "labels" in self.learn:
            raise PotstillError("recipe: labels that are learned are no classes; set labels to logits or centred")
        if not 0 <= self.final <= 1:
            raise PotstillError(f"recipe: final = {self.final:g} is not within 0 ... 1")
        for part in self.learn:
            if part not in LEARNABLE:
                raise unknown("learnable part of S", part, LEARNABLE)
            if part not in self.optimiser:
                raise PotstillError(f"recipe: '{part}' is learned but has no optimiser; set optimiser.{part}")
        if not re.fullmatch(r"[A-Za-z0-9][\w.:-]*", self.method):
            raise PotstillError(f"method '{self.method}' is no name: letters, digits and . : _ - are allowed")
        if self.objective is not None:
            if not self.learn:
                raise PotstillError("recipe: nothing is learned; learn needs at least one of " + ", ".join(LEARNABLE))
            if "lr" in self.learn and self.objective.start_rates() is None:
                raise PotstillError(
                    "recipe: this objective does not train on S and has no learning rates to learn; take 'lr' out of learn"
                )
            if self.objective.needs.network != (type(self.source) is not Source):
                wanted = "a source of networks" if self.objective.needs.network else "no networks: source.kind = none"
                raise PotstillError(f"recipe: this objective needs {wanted}")
            if self.objective.needs.goal and not (isinstance(self.source, Experts) and self.source.span):
                raise PotstillError(
                    "recipe: this objective needs to know where experts went: source.kind = experts, source.span = 1 or more"
                )
            if self.objective.needs.finish and self.labels != "centred":
                raise PotstillError(
                    f"recipe: labels that are solved for are centred, not {self.labels}; set labels = centred"
                )
        for name in ("steps", "looks"):
            if not 0 <= getattr(self, name) <= 10**9:
                raise PotstillError(f"recipe: {name} = {getattr(self, name)} is below 0 or above 1,000,000,000")
        if self.objective is None and self.steps:
            raise PotstillError(f"method '{self.method}' has no objective and takes 0 steps, not {self.steps}")
        parts: dict[str, Any] = {"objective": self.objective, "source": self.source}
        for path, at in {**parts, **{f"optimiser.{k}": v for k, v in self.optimiser.items()}}.items():
            _check_rates(path, at)


LEARNABLE = ("inputs", "labels", "lr")
SPACES = ("pixels", "features", "random-features")
LABELS = ("hard", "soft", "logits", "centred")
SOURCES: dict[str, type[Source]] = {"pool": Pool, "experts": Experts, "none": Source}
_KINDS: dict[str, Mapping[str, type]] = {"objective": OBJECTIVES, "source": SOURCES}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain numbers, strings, lists and dicts."""
    return _plain(recipe)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {} if type(value) in (Recipe, Augment) else {"kind": kind_of(value)}
        for f in dataclasses.fields(value):
            if f.metadata.get("recipe", True) and (item := getattr(value, f.name)) is not None:
                out[f.name] = _plain(item)
        return out
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


RATES = {"lr": math.inf, "weight_decay": math.inf, "eps": math.inf, "momentum": 1.0, "beta1": 1.0, "beta2": 1.0}


def _check_rates(path: str, part: Any) -> None:
    """Refuse a rate below 0, or not below what `RATES` allows: whatever the part, a name means the same."""
    for name, end in RATES.items():
        value = getattr(part, name, 0.0)
        if isinstance(value, int | float) and not 0 <= value < end:
            allowed = "at least 0 and finite" if end == math.inf else f"at least 0 and below {end:g}"
            raise PotstillError(f"recipe field '{path}.{name}' is {value:g}; it must be {allowed}")


def kind_of(value: Any) -> str:
    """The name of a part's form: a short one for the library's own, `module:Class` for one from outside."""
    for table in (OBJECTIVES, SOURCES, OPTIMISERS):
        for kind, cls in table.items():
            if type(value) is cls:
                return kind
    return f"{type(value).__module__}:{type(value).__qualname__}"


def from_dict(plain: Mapping[str, Any], like: Recipe | None = None) -> Recipe:
    """The recipe of a plain dict.

    Args:
        plain: As `to_dict` makes it.
        like: A recipe whose own objective and source are known kinds too, if they are from outside.

    Raises:
        PotstillError: A field that does not exist (with the nearest ones), or a value of another type.
    """
    if not isinstance(plain, Mapping):
        raise PotstillError(f"a recipe is a table of fields, not {plain!r}")
    parts = dict(plain)
    for name, table in _KINDS.items():
        if name in parts:
            own = getattr(like, name, None)
            parts[name] = _build(name, parts[name], table if own is None else {**table, kind_of(own): type(own)})
    if "augment" in parts:
        parts["augment"] = _make(Augment, parts["augment"], "augment.")
    rules = _table("optimiser", parts.get("optimiser", {}))
    parts["optimiser"] = {k: _build(f"optimiser.{k}", v, OPTIMISERS) for k, v in rules.items()}
    return _make(Recipe, parts, "")


def _table(path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PotstillError(f"recipe field '{path}' is {value!r}; a table of fields is needed")
    return value


def _build(path: str, value: Any, table: Mapping[str, type]) -> Any:
    rest = dict(_table(path, value))
    kind = rest.pop("kind", None)
    if kind is None:
        raise PotstillError(f"recipe field '{path}' lacks its kind; there are: {', '.join(table)}")
    if not isinstance(kind, str) or kind not in table:
        raise unknown(f"kind of {path.split('.')[0]}", str(kind), table)
    return _make(table[kind], rest, path + ".")


def _make(cls: type, plain: Mapping[str, Any], prefix: str) -> Any:
    """An instance of a dataclass from plain values, each checked against its field's type."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("recipe", True)}
    values = {}
    for name, value in _table(prefix[:-1], plain).items():
        if name not in fields:
            known = [prefix + f for f in fields]
            raise unknown("recipe field", prefix + name, known, "`potstill show METHOD` shows all")
        values[name] = _typed(value, hints[name], prefix + name)
    needed = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING and n not in values]
    if needed:
        raise PotstillError(
            f"recipe field '{prefix}{needed[0]}' is missing; `potstill show METHOD` shows a whole recipe"
        )
    return cls(**values)


def _typed(value: Any, hint: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise PotstillError(f"recipe field '{path}' is {value!r}; a list of strings is needed")
        return tuple(value)
    wanted = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(hint)
    if wanted is None:
        return value
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise PotstillError(f"recipe field '{path}' is {value!r}; {hint.__name__} is needed")
    if hint is float and math.isnan(float(value)):
        raise PotstillError(f"recipe field '{path}' is not a number")
    return float(value) if hint is float else value


def change(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A recipe with some fields changed.

    Args:
        recipe: The recipe to start from.
        settings: Dotted path to value: `{"optimiser.inputs.lr": 2.0, "objective.real": 64}`. With another `kind` a part
            keeps the fields that both kinds have, and takes the new kind's defaults for the rest; kinds come first,
            whatever the order.

    Example:
        >>> from potstill.methods import METHODS
        >>> change(METHODS["dm"]("paper"), {"objective.real": 64}).objective.real
        64
    """
    plain = to_dict(recipe)
    for path, value in sorted(settings.items(), key=lambda setting: not setting[0].endswith(".kind")):
        *parents, last = path.split(".")
        at = plain
        for i, name in enumerate(parents):
            if not isinstance(at.get(name), dict):
                known = [".".join([*parents[:i], k]) for k, v in at.items() if isinstance(v, dict)]
                raise unknown("recipe table", ".".join(parents[: i + 1]), known, "`potstill show METHOD` shows all")
            at = at[name]
        if last == "kind" and parents:
            fields = _fields_of_kind(parents[0], value)
            for name in [n for n in at if fields is not None and n not in fields]:
                del at[name]
        at[last] = value
    changed = from_dict(plain, recipe)
    if isinstance(changed.source, Experts) and isinstance(recipe.source, Experts):
        changed = replace(changed, source=replace(changed.source, folder=recipe.source.folder))
    return changed


def _fields_of_kind(part: str, kind: Any) -> set[str] | None:
    """Names of the fields of a kind of objective, source or optimiser; nothing where there is no such kind."""
    table = {**_KINDS, "optimiser": OPTIMISERS}.get(part, {})
    cls = table.get(kind) if isinstance(kind, str) else None
    return None if cls is None else {f.name for f in dataclasses.fields(cls)}


def find(name: str, preset: str | None = None, ipc: int = 1) -> Recipe:
    """The recipe of a method: an alias, or `package.module:function` from outside.

    Args:
        name: `dm`, or `my_package.my_module:my_recipe`: a `Recipe`, or a function of preset and images per class.
        preset: `paper` if absent.
        ipc: Images per class, the most of any; some papers' numbers depend on it.

    Raises:
        PotstillError: No such method, preset, module or function.
    """
    from .methods import METHODS, PRESETS

    preset = preset or "paper"
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    if ":" not in name:
        if name not in METHODS:
            raise unknown("method", name, METHODS, "`potstill list methods` shows all")
        return METHODS[name](preset, ipc)
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise PotstillError(f"method '{name}' cannot be imported ({error}); package.module:recipe is needed") from error
    try:
        recipe = made if isinstance(made, Recipe) else made(preset, ipc)
    except TypeError as error:
        raise PotstillError(f"method '{name}' is no function of preset and images per class ({error})") from error
    if not isinstance(recipe, Recipe):
        raise PotstillError(f"method '{name}' is no recipe but {type(recipe).__name__}")
    return recipe


def write(recipe: Recipe) -> str:
    """A recipe as TOML."""
    return tomli_w.dumps(to_dict(recipe))


def read(path: Path) -> Recipe:
    """A recipe from TOML.

    Raises:
        PotstillError: No such file, no TOML, or fields that do not exist.
    """
    try:
        return from_dict(read_toml(path))
    except PotstillError:
        raise
    except (OSError, ValueError) as error:
        raise PotstillError(f"--recipe {path} cannot be read ({error})") from error
