"""An adapter as a model of a merge: its base model with the change added, parameter by parameter, when it is read."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoints.conversion import Converter
from ..checkpoints.names import ConversionGroup, NameMap
from ..checkpoints.opening import load_config, open_source
from ..checkpoints.source import ModelReference, ModelSource
from ..checkpoints.storage import StateDictStorage, Storage, TensorInfo
from ..errors import CheckpointError, UnsupportedModelError
from ..hub import fetch_folder
from ..low_rank import Factors
from ..modeling.shell import build_shell, model_class_of, read_anatomy
from .attaching import Attached, attach, nonlinear_part
from .opening import Adapter, adapted_class, adapted_config, unquantized
from .reading import Delta, LowRank, Replaced, Summed, read_deltas, whole_modules


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class AdapterSource(ModelSource):
    """θ_0 + Δ. Use [`AdapterSource.over`].

    **Attributes**:
        - **adapter** ([`Adapter`]) -- The adapter.
        - **base** ([`ModelSource`]) -- The model underneath.
    """

    is_adapter = True
    adapter: Adapter
    base: ModelSource

    @classmethod
    def over(cls, adapter: Adapter, base: ModelSource) -> AdapterSource:
        """Args:
            adapter ([`Adapter`]): The adapter.
            base ([`ModelSource`]): The model that it was trained on.

        Raises:
            CheckpointError: It was trained on a model of another architecture.
        """
        plain = unquantized(base.config)
        model_class = adapted_class(adapter, plain, base.model_class)
        if not isinstance(plain, model_class.config_class or type(plain)):
            raise CheckpointError(
                f"{adapter} was trained on a {model_class.__name__}, and the base model {base} is a '{plain.model_type}' model: give "
                "the model that it was trained on as base_model=... (`base_model` in a recipe, --base on the command line)."
            )
        heads = {
            name: info.shape
            for name, info in read_anatomy(build_shell(model_class, plain, torch.float32)).parameters.items()
            if info.is_task_head
        }
        source = cls(
            name=adapter.name,
            reference=adapter.reference,
            config=unquantized(adapted_config(adapter, plain, model_class, heads)),
            model_class=model_class,
            storage=base.storage,
            folder=adapter.folder,
            generation_config=base.generation_config,
            notes=list(adapter.notes),
        )
        source.adapter, source.base = adapter, base
        kind = nonlinear_part(adapter.config)
        if kind:
            source.notes.append(
                f"{adapter} is {kind}, which is no product of two factors: its change of each weight is what PEFT's merge makes "
                "of the base model's"
            )
        return source

    def __str__(self) -> str:
        return str(self.adapter)

    def fingerprint(self) -> list[Any]:
        settings = self.adapter.config.to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        return [*super().fingerprint(), config, self.adapter.storage.fingerprint(), self.base.fingerprint()]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @cached_property
    def adapter_dtype(self) -> torch.dtype:
        """The dtype that most of the adapter is stored in."""
        dtypes = [info.dtype for info in self.adapter.storage.infos.values() if info.dtype.is_floating_point]
        return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32

    # -- the change -----------------------------------------------------------------------------------------------

    @cached_property
    def attached(self) -> Attached:
        """The adapter on a hollow model."""
        return attach(self.model_class, self.config, self.adapter.config, self.adapter.tensors(), str(self))

    @cached_property
    def deltas(self) -> dict[str, Delta]:
        """The change of every parameter that the adapter touches, by module name."""
        attached = self.attached
        if attached.missing:
            raise CheckpointError(
                f"{self} lacks {len(attached.missing)} tensor(s) that its config asks for, such as '{attached.missing[0]}': the "
                "file and adapter_config.json are of different adapters."
            )
        found = read_deltas(attached, nonlinear_part(self.adapter.config))
        known = self.anatomy.parameters
        return {name: self._without_copy(name, delta) for name, delta in found.items() if name in known}

    def _without_copy(self, name: str, delta: Delta) -> Delta:
        """PEFT saves embeddings that LoRA acts on along with their factors; equal to the base model's they are no change."""
        if not isinstance(delta, Summed):
            return delta
        factors = [part for part in delta.parts if isinstance(part, LowRank)]
        copies = [part for part in delta.parts if isinstance(part, Replaced)]
        if len(factors) != 1 or len(factors) + len(copies) != len(delta.parts):
            return delta
        base = self.read_base(name)
        return factors[0] if all(torch.equal(part.value.to(base.dtype), base) for part in copies) else delta

    @property
    def whole_modules(self) -> list[str]:
        """The modules that the adapter saves whole (`modules_to_save`)."""
        return whole_modules(self.attached)

    def factors(self, name: str) -> Factors | None:
        """The change of a parameter as two factors; `None` where it is none or there is no change."""
        delta = self.deltas.get(name)
        return delta.factors if delta is not None else None

    def change(self, name: str) -> Tensor:
        """The change of a parameter in its shape and in float32; zero where the adapter does not touch it."""
        delta = self.deltas.get(name)
        return delta.dense(self.read_base) if delta is not None else torch.zeros(self.parameters[name].shape)

    def base_name(self, name: str) -> str | None:
        """What the base model calls a parameter, or the one that stands in for it because they are tied."""
        canonical = self.anatomy.canonical(name)
        found = self.base.by_canonical.get(canonical)
        if found is None and canonical in self.base.anatomy.by_canonical:
            found = self.base.tied_stand_in(self.base.anatomy.by_canonical[canonical])
        return found

    def read_base(self, name: str) -> Tensor:
        """The base model's value of a parameter, as stored."""
        found = self.base_name(name)
        if found is None:
            raise CheckpointError(f"The base model has no parameter '{name}', which {self} changes.")
        return self.base.read(found)

    # -- the model ------------------------------------------------------------------------------------------------

    @cached_property
    def converter(self) -> Converter:
        return self.base.converter if self._same_class else Converter(self.shell)

    @property
    def _same_class(self) -> bool:
        return self.model_class is self.base.model_class

    @cached_property
    def names(self) -> NameMap:
        if self._same_class or self.base.live is not None:
            known = self.base.names
        else:
            known = self.converter.map_names(self.base.storage.infos, str(self))
        groups = [group for group in known.groups if all(name in self.parameters for name in group.targets)]
        return NameMap(groups, list(self.attached.unexpected), [], [])

    @property
    def layout(self) -> list[ConversionGroup]:
        return [] if self.base.live is not None else self.names.groups

    @cached_property
    def parameters(self) -> dict[str, TensorInfo]:
        """What the base model stores, what the adapter adds, and tied parameters of which only one was changed."""
        infos = {}
        changed = self.deltas
        for name, info in self.anatomy.parameters.items():
            own = changed.get(name)
            base = self.base.by_canonical.get(self.anatomy.canonical(name))
            if base is not None:
                infos[name] = self._checked(name, self.base.parameters[base], info.shape)
            elif own is not None or self._was_tied(name):
                infos[name] = TensorInfo(info.shape, self.base.dtype)
        return infos

    def _checked(self, name: str, stored: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
        if name not in self.deltas or stored.shape == shape:
            return stored
        if isinstance(self.deltas[name], Replaced):
            return TensorInfo(shape, stored.dtype)
        raise CheckpointError(
            f"{self} changes '{name}' of shape {shape}, which the base model stores as {stored.shape}: they do not belong together."
        )

    def _was_tied(self, name: str) -> bool:
        """Whether the parameter shares its values with one that the adapter changes, and so has to be stored itself."""
        ties = self.anatomy.ties
        partners = {ties.get(name), *(target for target, source in ties.items() if source == name)}
        return any(partner in self.deltas for partner in partners)

    @cached_property
    def duplicates(self) -> dict[str, str]:
        return {}

    def read(self, name: str) -> Tensor:
        """θ_0 + Δ in float32 where the adapter touches the parameter, the base model's stored value elsewhere."""
        delta = self.deltas.get(name)
        if isinstance(delta, Replaced):
            return delta.value
        base = self.read_base(name)
        return base if delta is None else base.float() + delta.dense(self.read_base)


class ShellStorage(Storage):
    """The parameters of a base model of which only the config is there: shapes without values."""

    def __init__(self, shell: PreTrainedModel, dtype: torch.dtype, where: str):
        ties = getattr(shell, "all_tied_weights_keys", None) or {}
        self.infos = {
            name: TensorInfo(tuple(value.shape), dtype if value.dtype.is_floating_point else value.dtype)
            for name, value in shell.state_dict().items()
            if name not in ties
        }
        self._where = where

    def read(self, key: str) -> Tensor:
        raise CheckpointError(
            f"The weights of the base model {self._where} are needed for '{key}', and were not opened."
        )


class ConfigOnlySource(ModelSource):
    """A base model that is known by its config: enough for adapters that are merged into an adapter."""

    @classmethod
    def of(cls, name: str, reference: Any, trust_remote_code: bool, hub_kwargs: dict) -> ConfigOnlySource:
        """Args:
        name (`str`): What messages call it.
        reference: A path, a Hub id or a dictionary with them.
        trust_remote_code (`bool`): Whether code from its repository may run.
        hub_kwargs (`dict`): The Hub's arguments.
        """
        reference = ModelReference.parse(reference, f"The model '{name}'")
        kwargs = hub_kwargs | {
            key: value for key, value in vars(reference).items() if key != "model" and value is not None
        }
        folder, commit = fetch_folder(reference.model, weights=False, **kwargs)
        where = f"'{name}' ({reference.model})"
        config = unquantized(load_config(folder, where, trust_remote_code))
        model_class = model_class_of(config, where, trust_remote_code)
        dtype = getattr(config, "dtype", None) or torch.float32
        shell = build_shell(model_class, config, dtype)
        source = cls(
            name=name,
            reference=ModelReference(reference.model, commit, reference.subfolder),
            config=config,
            model_class=model_class,
            storage=ShellStorage(shell, dtype, where),
            folder=folder,
        )
        source.__dict__["shell"] = shell
        return source

    @classmethod
    def of_live(cls, model: PreTrainedModel, name: str) -> ConfigOnlySource:
        """The same for a model in memory whose weights are of no use, because they are quantised.

        Args:
            model ([`~transformers.PreTrainedModel`]): The model.
            name (`str`): What messages call it.
        """
        config = unquantized(model.config)
        shell = build_shell(type(model), config, torch.float32)
        source = cls(
            name=name,
            reference=ModelReference(config._name_or_path or None),
            config=config,
            model_class=type(model),
            storage=ShellStorage(shell, torch.float32, f"'{name}'"),
        )
        source.__dict__["shell"] = shell
        return source

    def fingerprint(self) -> list[Any]:
        return [str(self.folder), self.config.to_json_string()]


def dequantized(source: ModelSource, trust_remote_code: bool = False) -> ModelSource:
    """A quantised base model with floating-point weights, in memory; quantising the result again is left to the user.

    Args:
        source ([`ModelSource`]): The quantised model.
        trust_remote_code (`bool`): Whether code from its repository may run.

    Raises:
        UnsupportedModelError: transformers cannot dequantise it here.
    """
    remedy = "give the original weights as base_model=... (`base_model` in a recipe, --base on the command line), or merge into an adapter with output='adapter'"
    if source.live is not None:
        raise UnsupportedModelError(
            f"{source} is quantised ({source.quantization}) and in memory, where it would have to be changed: {remedy}."
        )
    try:
        model = source.model_class.from_pretrained(source.folder, trust_remote_code=trust_remote_code).dequantize()
    except (ImportError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"{source} is quantised ({source.quantization}) and cannot be dequantised here ({reason}): {remedy}."
        ) from error
    note = (
        f"{source} is quantised ({source.quantization}): its weights were dequantised, with the rounding that they have, and the "
        "result is not quantised again"
    )
    warnings.warn(note, stacklevel=4)
    opened = open_source(source.name, model)
    opened.config = unquantized(model.config)
    opened.folder, opened.reference, opened.notes = source.folder, source.reference, [note]
    return opened


def live_base(model: Any, name: str) -> ModelSource:
    """The base model inside a live [`~peft.PeftModel`], by its own parameters' names.

    Args:
        model ([`~peft.PeftModel`]): The model, which is not changed.
        name (`str`): What messages call the base model.
    """
    inner: PreTrainedModel = model.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"The PeftModel holds a {type(inner).__name__}, not a PreTrainedModel: only transformers models can be merged."
        )
    config: PreTrainedConfig = unquantized(inner.config)
    shell = build_shell(type(inner), config, torch.float32)
    owned = base_parameters(model, shell)
    ties = getattr(shell, "all_tied_weights_keys", None) or {}
    storage = StateDictStorage({key: value for key, value in owned.items() if key not in ties}, f"'{name}'")
    return ModelSource(
        name=name,
        reference=ModelReference(inner.config._name_or_path or None),
        config=inner.config,
        model_class=type(inner),
        storage=storage,
        generation_config=getattr(inner, "generation_config", None),
        live=inner,
    )


def base_parameters(model: Any, shell: PreTrainedModel) -> dict[str, Tensor]:
    """The base model's values in a live PeftModel, by the names that they have without adapters."""
    from peft.utils.save_and_load import get_base_model_state_dict

    state = get_base_model_state_dict(model)
    return {key: value.detach() for key, value in state.items() if key in shell.state_dict()}
