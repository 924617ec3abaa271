"""What to merge and how: read from a mergekit-style YAML file or made from the command line.

mergekit's names are kept where it has them (``merge_method``, ``base_model``, ``models``,
``weight``, ``density``, ``lambda``, ``normalize``); what is ours beside it: ``mask``,
``mask_density``, ``trim_scope``, ``seed``. A key that is not understood is an error, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from compressor.checkpoint.outputs import check_dtype
from compressor.errors import InputError

Method = Literal["ta", "ties"]
Mask = Literal["none", "dare", "impart"]
Scope = Literal["model", "tensor"]

DENSITY = 0.2  # what TIES keeps, as in its paper
# merge_method of mergekit -> ours, and the mask it implies
_METHODS: dict[str, tuple[Method, Mask]] = {
    "task_arithmetic": ("ta", "none"),
    "ties": ("ties", "none"),
    "dare_linear": ("ta", "dare"),
    "dare_ties": ("ties", "dare"),
}
_TOP = frozenset(
    {
        "merge_method",
        "base_model",
        "models",
        "parameters",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "seed",
    }
)
_PER_MODEL = frozenset({"weight", "density", "mask_density"})
_GLOBAL = _PER_MODEL | {
    "lambda",
    "normalize",
    "rescale",
    "mask",
    "trim_scope",
    "int8_mask",  # how mergekit holds its masks in memory; changes no result
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A number, or the first of several whose filter is part of the tensor's name."""

    rules: tuple[tuple[str, float], ...]

    def at(self, name: str) -> float:
        """Return the value for a tensor. Raises InputError if no filter fits."""
        for part, value in self.rules:
            if part in name:
                return value
        raise InputError(f"{name}: no filter fits it; end the list with a value for the rest")

    @property
    def is_constant(self) -> bool:
        return len({value for _, value in self.rules}) == 1


def constant(value: float) -> Setting:
    """Return a setting that is the same for every tensor."""
    return Setting((("", value),))


@dataclass(frozen=True, slots=True)
class MergeModel:
    """One model to merge: a full fine-tune, an adapter or a delta, by directory or Hub id.

    weight        of its task vector
    density       share of its task vector that TIES' trimming keeps, within 0..1
    mask_density  share that the mask keeps, within 0..1; not used without a mask
    """

    name: str
    weight: Setting = field(default_factory=lambda: constant(1.0))
    density: Setting = field(default_factory=lambda: constant(DENSITY))
    mask_density: Setting = field(default_factory=lambda: constant(1.0))


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """A merge: ``W = W_base + scale * combine(mask(tau_1), mask(tau_2), ...)``.

    method      ``ta``: weighted sum; ``ties``: trim, elect signs, disjoint mean
    scale       lambda
    normalize   divide by the weights that took part: the mean of TIES. Default: as the papers
    trim_scope  TIES' trimming compares magnitudes within the whole model, as the paper does, or
                within each tensor, as mergekit does
    rescale     divide what DARE keeps by its density (without it the draw is biased)
    tokenizer   name of the model whose tokenizer the result gets; None: the base's
    """

    base: str
    models: tuple[MergeModel, ...]
    method: Method = "ties"
    mask: Mask = "none"
    scale: float = 1.0
    normalize: bool | None = None
    rescale: bool = True
    trim_scope: Scope = "model"
    seed: int = 0
    dtype: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        _one_of("method", self.method, get_args(Method))
        _one_of("mask", self.mask, get_args(Mask))
        _one_of("trim_scope", self.trim_scope, get_args(Scope))
        check_dtype(self.dtype)
        if not self.models:
            raise InputError("nothing to merge: name at least one model beside the base")
        if not math.isfinite(self.scale):
            raise InputError(f"lambda must be a finite number, got {self.scale}")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"the seed must be within [0, 2^63), got {self.seed}")
        for model in self.models:
            self._check(model)
        if (self.mask == "none") != all(m.mask_density == constant(1.0) for m in self.models):
            raise InputError(
                "a mask needs to know how much to keep (mask_density, below 1), and without a mask "
                "there is nothing that mask_density could mean"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Every model that is read."""
        return (self.base, *(model.name for model in self.models))

    @property
    def is_mean(self) -> bool:
        """Whether to divide by the weights that took part."""
        return self.method == "ties" if self.normalize is None else self.normalize

    @property
    def trims(self) -> bool:
        return self.method == "ties" and any(
            model.density != constant(1.0) for model in self.models
        )

    def _check(self, model: MergeModel) -> None:
        for key in ("density", "mask_density"):
            for _, value in getattr(model, key).rules:
                if not 0 < value <= 1:
                    raise InputError(f"{model.name}: {key} must be within (0, 1], got {value:g}")
        if self.method == "ties" and self.trim_scope == "model" and not model.density.is_constant:
            raise InputError(
                f"{model.name}: density differs from tensor to tensor, which needs "
                "trim_scope: tensor"
            )


def read_merge_config(file: Path, seed: int | None = None) -> MergeConfig:
    """Read a mergekit-style YAML file. `seed` overrides the file's.

    Raises InputError naming the key that is unknown, missing or of the wrong kind.
    """
    record = _load(file)
    _known(record, _TOP, str(file))
    method, mask = _method(record)
    shared = _mapping(record.get("parameters"), "parameters")
    _known(shared, _GLOBAL, "parameters")
    mask = shared.get("mask", mask)
    base = _text(record, "base_model")
    tokenizer = record.get("tokenizer_source")
    if tokenizer == "union":
        raise InputError("tokenizer_source: union is not supported; name one of the models")
    return MergeConfig(
        base=base,
        models=_models(record, base, shared, is_dare=_METHODS[record["merge_method"]][1] != "none"),
        method=method,
        mask=mask,
        scale=_number(shared.get("lambda", 1.0), "lambda"),
        normalize=_flag(shared, "normalize"),
        rescale=_flag(shared, "rescale") is not False,
        trim_scope=shared.get("trim_scope", "model"),
        seed=record.get("seed", 0) if seed is None else seed,
        dtype=record.get("out_dtype") or record.get("dtype"),
        tokenizer=None if tokenizer in (None, "base", base) else str(tokenizer),
    )


def _models(
    record: Mapping[str, Any], base: str, shared: Mapping[str, Any], *, is_dare: bool
) -> tuple[MergeModel, ...]:
    entries = record.get("models")
    if not isinstance(entries, list):
        raise InputError("models must be a list of entries with model and parameters")
    models = []
    for entry in entries:
        fields = _mapping(entry, "models")
        _known(fields, {"model", "parameters"}, "models")
        name = _text(fields, "model")
        own = _mapping(fields.get("parameters"), f"{name}: parameters")
        _known(own, _PER_MODEL, f"{name}: parameters")
        if name == base and not own:
            continue  # mergekit's examples list the base among the models
        settings = {
            key: _setting(value, f"{name}: {key}")
            for key in _PER_MODEL
            if (value := own.get(key, shared.get(key))) is not None
        }
        if is_dare:  # mergekit's density is then the mask's, and nothing is trimmed
            settings.setdefault("mask_density", settings.pop("density", constant(1.0)))
            settings["density"] = constant(1.0)
        elif "density" not in settings:
            settings["density"] = constant(DENSITY)
        models.append(MergeModel(name, **settings))
    return tuple(models)


def _method(record: Mapping[str, Any]) -> tuple[Method, Mask]:
    name = record.get("merge_method")
    if name not in _METHODS:
        raise InputError(
            f"merge_method {name!r} is not supported; choose from {', '.join(_METHODS)}"
        )
    return _METHODS[name]


def _setting(value: Any, what: str) -> Setting:
    """Read a number, or mergekit's list of ``{filter, value}``."""
    if not isinstance(value, list):
        return constant(_number(value, what))
    rules = []
    for rule in value:
        if not isinstance(rule, dict) or "value" not in rule:
            raise InputError(
                f"{what}: expected a number or a list of filter and value; gradients over the "
                "layers are not supported"
            )
        _known(rule, {"filter", "value"}, what)
        part = rule.get("filter") or ""
        rules.append(("" if part == "*" else str(part), _number(rule["value"], what)))
    if not rules:
        raise InputError(f"{what}: an empty list")
    return Setting(tuple(rules))


def _load(file: Path) -> Mapping[str, Any]:
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {error}") from error
    return _mapping(record, str(file))


def _known(record: Mapping[str, Any], known: frozenset[str] | set[str], where: str) -> None:
    for key in record:
        if key not in known:
            raise InputError(f"{where}: unknown key {key}; known are {', '.join(sorted(known))}")


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{what}: expected keys and values, found {value!r:.40}")
    return value


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise InputError(f"{key} must name a model, found {value!r:.40}")
    return value


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{what}: expected a number, found {value!r:.40}")
    return float(value)


def _flag(record: Mapping[str, Any], key: str) -> bool | None:
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{key} must be true or false, found {value!r:.40}")
    return value


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{key} must be one of {', '.join(allowed)}, got {value!r:.40}")
