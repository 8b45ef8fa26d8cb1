"""[`MergeConfig`]: what a recipe says, and nothing about how it is carried out.

A config is a dataclass that travels as `merge_config.json`. Its constructor is strict (every value is checked, every
misspelling is an error); loading a file written by a newer version drops what it does not know with a warning.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from . import __version__
from .errors import ConfigError, suggest
from .hub import CONFIG_NAME, HubMixin, fetch_file, upload_folder
from .registry import get_merge_method
from .settings import setting, settings_of
from .tokens import parse_token_rules


_RULE_KEYS = ("match", "merge_type")
_WHOLE_RECIPE = (
    "heads",
    "output",
    "adapter_rank",
    "align",
    "dtype",
    "tokenizer",
    "tokens",
    "pad_to_multiple_of",
    "chat_template",
    "experts",
    "base_model",
)


@dataclass
class MergeConfig(HubMixin):
    """Base class of every method's config: what all recipes have in common.

    Do not instantiate it: use the config of a method (`WudiConfig`, `TiesConfig`, ...) or
    [`MergeConfig.from_merge_type`].

    Args:
        include (`list[str]`, *optional*): Regular expressions (`re.search`) on module names. Only matching parameters are
            merged, the others keep the base model's value (the first expert's, when there is no base).
        exclude (`list[str]`, *optional*): Parameters matching one of these are not merged.
        rules (`list[dict]`, *optional*): Per-parameter settings: `{"match": regex, setting: value, ...}`. For each setting the
            first rule that matches and names it wins. `"merge_type"` in a rule chooses another method for the parameters
            that match. `{expert: value}` may name some experts only: the others take their value from the next rule, or the
            config. A rule that matches no parameter is an error.
        then (`list[dict]`): Recipes that are applied to the result, one after another: each takes the result as its only expert
            and keeps the base model. `[{"merge_type": "wise_ft", "alpha": 0.8}]` goes back towards the base.
        heads (`str`): What happens to task heads. `"auto"`: merged when every expert has the same head (shapes and label
            names), kept per task otherwise. `"per_task"`: always kept per task. `"merge"`: merged, an error if their
            shapes differ. `"first"`: the first expert's. `"error"`: heads that differ are an error.
        output (`str`): What the result is. `"model"`: a whole model. `"adapter"`: a PEFT adapter of the base model; of experts that are
            adapters it needs no weights of the base model, unless the method or an adapter does.
        adapter_rank (`int`, *optional*): The largest rank of the factors with `output="adapter"`; what the best approximation of that
            rank discards is in the report. When not given: the sum of the experts' ranks, which loses nothing with methods that
            keep the rank.
        align (`str`, *optional*): `"git_rebasin"`: before the merge the units of every expert are permuted to agree with the base
            model's, or with the first expert's where there is no base. For experts of different initialisation.
        seed (`int`): Seed of every random mask. A mask depends on the seed, the parameter's name and the expert, on nothing else.
        dtype (`str`, *optional*): The dtype of the merged weights; the first expert's when not given. Arithmetic is in float32.
        tokenizer (`str`, *optional*): Whose tokenizer or processor the result has: `"base"`, the name of an expert, or `"union"`, all
            tokens of all models. Where the models' vocabularies differ, embeddings and output layers are merged by token. The
            first expert's when not given; then models that have different tokens in the same row are refused.
        tokens (`dict`): Where the rows of single tokens come from, in models that lack them: `{token: {"source": model}}`, with the
            name of a model, `"zero"`, or `{"model": name, "token": another}`. With `"force": true` also in models that have them. A
            token that no tokenizer has is added. By default a row that is missing is the base model's, else the mean of those
            that have it.
        pad_to_multiple_of (`int`, *optional*): The number of rows of embeddings is rounded up to a multiple of it.
        chat_template (`str`, *optional*): The chat template of the result's tokenizer, as Jinja text; the name of a model: its
            own; `"auto"`: the one that most models have. The chosen tokenizer's own when not given.
        experts (`dict`, *optional*): The experts by name, each `{"model": path or Hub id, "revision": commit}`. Filled in
            when a merged model is saved.
        base_model (`dict`, *optional*): The base model, in the same form.
        hf_merge_version (`str`, *optional*): The version that wrote the file.
    """

    merge_type: ClassVar[str] = ""
    papers: ClassVar[tuple[str, ...]] = ()  # arXiv ids, for the model card

    include: list[str] | None = field(
        default=None, metadata={"help": "Merge only parameters matching one of these regexes."}
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "Do not merge parameters matching one of these regexes."}
    )
    rules: list[dict] = field(
        default_factory=list, metadata={"help": "Per-parameter settings: {match: regex, setting: value}."}
    )
    then: list[dict] = field(default_factory=list, metadata={"help": "Recipes that are applied to the result."})
    heads: str = setting(
        "auto",
        "Task heads: 'auto', 'per_task', 'merge', 'first' or 'error'.",
        choices=("auto", "per_task", "merge", "first", "error"),
        scope="merge",
    )
    output: str = setting(
        "model", "What the result is: a 'model' or a PEFT 'adapter'.", choices=("model", "adapter"), scope="merge"
    )
    adapter_rank: int | None = setting(
        None,
        "Largest rank of output='adapter'; the sum of the experts' ranks when not given.",
        type=int,
        minimum=1,
        scope="merge",
    )
    align: str | None = setting(
        None,
        "'git_rebasin': permute the experts' units to agree with the base's first.",
        type=str,
        choices=("git_rebasin",),
        scope="merge",
    )
    seed: int = setting(0, "Seed of the random masks.", minimum=0, maximum=2**63 - 1, scope="merge")
    dtype: str | None = setting(
        None,
        "Dtype of the merged weights; the first expert's when not given.",
        type=str,
        choices=("float32", "float16", "bfloat16", "float64"),
        scope="merge",
    )
    tokenizer: str | None = setting(
        None, "Whose tokenizer the result has: 'base', an expert's name, or 'union'.", type=str, scope="merge"
    )
    tokens: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Where rows of single tokens come from: {token: {source: model}}."}
    )
    pad_to_multiple_of: int | None = setting(
        None, "The rows of embeddings are rounded up to a multiple of it.", type=int, minimum=1, scope="merge"
    )
    chat_template: str | None = setting(
        None,
        "The chat template (Jinja text), a model's name, or 'auto' for the most common one.",
        type=str,
        scope="merge",
    )
    experts: dict[str, Any] | None = field(default=None, metadata={"help": "The experts by name."})
    base_model: Any = field(default=None, metadata={"help": "The base model."})
    hf_merge_version: str | None = field(
        default=None, metadata={"help": "The version of hf_merge that wrote the file."}
    )

    def __post_init__(self):
        if not self.merge_type:
            raise ConfigError(
                "MergeConfig is the base class of the methods' configs: use e.g. WudiConfig(), or MergeConfig.from_merge_type('wudi')."
            )
        self.include = _regexes("include", self.include)
        self.exclude = _regexes("exclude", self.exclude)
        for name, spec in settings_of(self).items():
            spec.check(f"{type(self).__name__}.{name}", getattr(self, name))
            if spec.type is int and isinstance(getattr(self, name), float):
                setattr(self, name, int(getattr(self, name)))
        if not isinstance(self.rules, (list, tuple)):
            raise ConfigError(
                f"{type(self).__name__}.rules must be a list of dictionaries, got {type(self.rules).__name__}."
            )
        self.rules = [dict(rule) if isinstance(rule, Mapping) else rule for rule in self.rules]
        for index, rule in enumerate(self.rules):
            self._check_rule(f"{type(self).__name__}.rules[{index}]", rule)
        self.tokens = {} if self.tokens is None else self.tokens
        parse_token_rules(f"{type(self).__name__}.tokens", self.tokens)
        self.next_recipes()
        if self.hf_merge_version is None:
            self.hf_merge_version = __version__

    def _check_rule(self, where: str, rule: Any) -> None:
        if not isinstance(rule, dict) or "match" not in rule:
            raise ConfigError(
                f"{where} must be a dictionary with the key 'match' (a regular expression), got {rule!r}."
            )
        _compile(f"{where}['match']", rule["match"])
        target = get_merge_method(rule["merge_type"]).config_cls if "merge_type" in rule else type(self)
        specs = {name: spec for name, spec in settings_of(target).items() if spec.scope != "merge"}
        for name, value in rule.items():
            if name in _RULE_KEYS:
                continue
            if name not in specs:
                raise ConfigError(
                    f"{where}: '{name}' is not a per-parameter setting of {target.__name__}.{suggest(name, specs)} "
                    f"It has: {', '.join(specs) or 'none'}."
                )
            specs[name].check(f"{where}[{name!r}]", value)

    def next_recipes(self) -> list[MergeConfig]:
        """The recipes of `then`, as configs."""
        if not isinstance(self.then, (list, tuple)) or not all(isinstance(step, Mapping) for step in self.then):
            raise ConfigError(
                f"{type(self).__name__}.then must be a list of recipes (dictionaries), got {self.then!r}."
            )
        where = f"{type(self).__name__}.then"
        for index, step in enumerate(self.then):
            for key in ("then", *_WHOLE_RECIPE):
                if step.get(key):
                    raise ConfigError(
                        f"{where}[{index}]: '{key}' belongs to the recipe as a whole, not to a step of 'then'."
                    )
        return [
            MergeConfig.from_dict({"seed": self.seed} | dict(step), origin=f"{where}[{index}]")
            for index, step in enumerate(self.then)
        ]

    def inner_recipes(self) -> list[MergeConfig]:
        """The recipes of other methods that this method carries out on the same models."""
        return []

    # -- per-parameter resolution ---------------------------------------------------------------------------------

    def selects(self, name: str) -> bool:
        """Whether `include` and `exclude` leave the parameter to the method."""
        if self.include is not None and not any(re.search(pattern, name) for pattern in self.include):
            return False
        return not any(re.search(pattern, name) for pattern in self.exclude or ())

    def unmatched(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """The patterns of `include`, `exclude` and `rules` that match none of `names`: `(field, pattern)`."""
        patterns = [(key, pattern) for key in ("include", "exclude") for pattern in getattr(self, key) or ()]
        patterns += [(f"rules[{index}]['match']", rule["match"]) for index, rule in enumerate(self.rules)]
        return [(key, pattern) for key, pattern in patterns if not any(re.search(pattern, name) for name in names)]

    def overruled(self, names: Sequence[str]) -> list[str]:
        """The patterns of `rules` that match some of `names`, but whose every setting an earlier rule decides wherever they do."""
        idle = {
            index for index, rule in enumerate(self.rules) if any(re.search(rule["match"], name) for name in names)
        }
        for name in names:
            decided: set[str] = set()
            for index, rule in enumerate(self.rules):
                if not re.search(rule["match"], name):
                    continue
                given = rule.keys() - {"match"}
                if given - decided:
                    idle.discard(index)
                # A value for some experts leaves the others to the next rule.
                decided |= {key for key in given if not isinstance(rule[key], Mapping) or "gradient" in rule[key]}
        return [self.rules[index]["match"] for index in sorted(idle)]

    def resolve(self, name: str, depth: float, experts: Sequence[str]) -> MergeConfig:
        """The settings of one parameter: a config whose rules are applied and whose values are plain.

        Args:
            name (`str`): The module name of the parameter.
            depth (`float`): 0 at the input, 1 at the output of the model.
            experts (`Sequence[str]`): The experts' names.

        Returns:
            [`MergeConfig`]: Of this class, or of the class that a rule's `merge_type` chose. Settings with the scope `"expert"`
            are lists with one value per expert.
        """
        rules = [rule for rule in self.rules if re.search(rule["match"], name)]
        merge_type = next((rule["merge_type"] for rule in rules if "merge_type" in rule), self.merge_type)
        if merge_type == self.merge_type:
            resolved = copy.copy(self)
        else:
            resolved = get_merge_method(merge_type).config_cls(seed=self.seed)
        specs = settings_of(resolved)
        for key, spec in specs.items():
            if spec.scope == "merge":
                continue
            chosen = [rule[key] for rule in rules if key in rule]
            where = f"{type(resolved).__name__}.{key}"
            setattr(resolved, key, spec.resolve_first(where, chosen, getattr(resolved, key), depth, experts))
        resolved.resolve_nested(name, depth, experts)
        return resolved

    def resolve_nested(self, name: str, depth: float, experts: Sequence[str]) -> None:
        """Resolves, in place, the configs of other methods that this one holds. Called on the config of one parameter."""

    # -- JSON and Hub ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All fields and `merge_type`, ready for JSON."""
        return {"merge_type": self.merge_type} | dataclasses.asdict(self)

    def to_json_string(self) -> str:
        """The text of `merge_config.json`: two spaces, sorted fields. The experts keep their order, which has a meaning."""
        return json.dumps(dict(sorted(self.to_dict().items())), indent=2, default=list) + "\n"

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> None:
        """Writes `merge_config.json` into a folder, which is made if needed.

        Args:
            save_directory (`str` or `Path`): The folder.
            kwargs: `push_to_hub` and the arguments of [`~MergeConfig.push_to_hub`].
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"Cannot save to '{folder}': it is a file, not a folder.")
        push_to_hub = kwargs.pop("push_to_hub", False)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(self.to_json_string(), encoding="utf-8")
        if push_to_hub:
            upload_folder(folder, kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> MergeConfig:
        """Loads `merge_config.json` from a folder, a file or a Hub repository.

        The class is chosen by `merge_type`. Keys that this version does not know are dropped with a warning.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder, a JSON file, or a Hub id.
            kwargs: The Hub's arguments (`revision`, `token`, `cache_dir`, ...); any field of the config overrides the file's.
        """
        hub_kwargs = HubMixin.split_hub_kwargs(kwargs)
        path = fetch_file(pretrained_model_name_or_path, CONFIG_NAME, **hub_kwargs)
        return cls.from_json_file(path, **kwargs)

    @classmethod
    def from_json_file(cls, path: str | Path, **overrides) -> MergeConfig:
        """Loads a JSON file; see [`~MergeConfig.from_pretrained`]."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"Cannot read the merge config '{path}': {error}.") from error
        if not isinstance(data, dict):
            raise ConfigError(f"'{path}' holds a JSON {type(data).__name__}, not an object with the key 'merge_type'.")
        return cls.from_dict(data | overrides, origin=str(path), known_only=True)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, origin: str = "the recipe", known_only: bool = False
    ) -> MergeConfig:
        """Builds the config of the method that `data["merge_type"]` names.

        Args:
            data (`Mapping`): The fields.
            origin (`str`): What messages call the source.
            known_only (`bool`): Drop unknown keys with a warning (files of a newer version) instead of raising.

        Raises:
            ConfigError: `merge_type` is missing or unknown, belongs to another class, or a key or value is invalid.
        """
        data = dict(data)
        merge_type = data.pop("merge_type", cls.merge_type)
        if not isinstance(merge_type, str) or not merge_type:
            raise ConfigError(f'{origin} has no \'merge_type\': add it, e.g. "merge_type": "wudi".')
        config_cls = get_merge_method(merge_type).config_cls
        if not issubclass(config_cls, cls):
            raise ConfigError(
                f"{origin} is a recipe for '{merge_type}' ({config_cls.__name__}), not for {cls.__name__}."
            )
        known = {f.name for f in dataclasses.fields(config_cls)}
        unknown = sorted(str(key) for key in data if key not in known)
        if unknown and known_only:
            warnings.warn(
                f"{origin} has the unknown key(s) {', '.join(unknown)}, which are ignored. It was probably written by a newer "
                f"version of hf_merge ({data.get('hf_merge_version')}); this is {__version__}.",
                stacklevel=3,
            )
        elif unknown:
            raise ConfigError(
                f"{origin}: unknown key '{unknown[0]}' for the method '{merge_type}'.{suggest(unknown[0], known)} "
                f"Known keys: {', '.join(sorted(known))}."
            )
        return config_cls(**{key: value for key, value in data.items() if key in known})

    @classmethod
    def from_merge_type(cls, merge_type: str, **kwargs) -> MergeConfig:
        """The config of a method by name: `MergeConfig.from_merge_type("ties", density=0.3)`."""
        return cls.from_dict(
            {"merge_type": merge_type, **kwargs}, origin=f"MergeConfig.from_merge_type('{merge_type}')"
        )

    @classmethod
    def from_mergekit(cls, recipe: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> MergeConfig:
        """The config that a [mergekit](https://github.com/arcee-ai/mergekit) recipe describes.

        Args:
            recipe (`str`, `Path`, `dict` or `list`): A file, YAML text, or what YAML text says: one document, or several of which
                those with a `name` are models for the others.

        Returns:
            [`MergeConfig`]: With `experts` and `base_model`, ready for `Merger.from_pretrained(config=...)`.

        Raises:
            ConfigError: A key or value is unknown to mergekit, or asks for something that hf_merge does not do.
        """
        from .interop.mergekit import translate

        return translate(recipe)


@dataclass
class LinearLayersConfig(MergeConfig):
    """Base class of the configs of methods that are defined on linear layers only.

    Args:
        other_parameters (`str`): What happens to parameters that are not weights of linear layers (embeddings, norms, biases,
            convolutions): `"mean"` (of the experts), `"base"` (the base model's), `"task_arithmetic"`
            (θ_0 + `other_scaling` Σ τ_i).
        other_scaling (`float`): The coefficient of `other_parameters="task_arithmetic"`.
    """

    other_parameters: str = setting(
        "mean",
        "Parameters that are not linear weights: 'mean', 'base' or 'task_arithmetic'.",
        choices=("mean", "base", "task_arithmetic"),
    )
    other_scaling: float = setting(0.3, "Coefficient of other_parameters='task_arithmetic'.")


def _regexes(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)):
        raise ConfigError(f"'{name}' must be a list of regular expressions, got {value!r}.")
    for pattern in patterns:
        _compile(name, pattern)
    return list(patterns)


def _compile(where: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"{where} must be a regular expression (a string), got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where} is not a valid regular expression: {pattern!r} ({error}).") from error
