"""Settings of FS-Merge and of plain feature distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import MergeConfig
from ...errors import ConfigError
from ...settings import setting
from .factors import FORMS


@dataclass
class FeatureTrainingConfig(MergeConfig):
    """What the recipes of the methods have in common that train a backbone on the experts' features.

    Args:
        init (`str`): Where the backbone starts: `"first"`, the first expert; `"average"`; or the average after the experts'
            channels were aligned by `"git_rebasin"` or `"zipit"`.
        fit_maps (`bool`): Start from maps to the experts' features that are least-squares solutions on the samples; in `fs_merge`
            also the U of experts that the start does not hear.
        epochs (`int`): Passes over the samples.
        batch_size (`int`): Samples of a task that run together; an update takes one batch of every task.
        learning_rate (`float`): Peak rate of AdamW for matrices.
        vector_learning_rate (`float`, *optional*): For norms, biases and diagonals; `learning_rate` when not given.
        output_learning_rate (`float`, *optional*): For the maps to the experts' features; `learning_rate` when not given.
        weight_decay (`float`): Of AdamW, for matrices.
        adam_beta1 (`float`): AdamW's first decay.
        adam_beta2 (`float`): AdamW's second decay.
        lr_scheduler (`str`): `"cosine"` to zero, or `"constant"`, after the warm-up.
        warmup_ratio (`float`): The part of the updates over which the learning rate rises.
        max_grad_norm (`float`, *optional*): Gradients are clipped to this norm.
        ema_decay (`float`): The result is a moving average of the trained tensors with this decay, such as 0.98; 0: the last
            state.
        feature_weight (`float`): Weight of the squared error of the features, relative to their variance.
        inner_weight (`float`): Weight of the loss on what the layers inside read, beside the loss on the features; 0: off.
        logit_weight (`float`): Weight of the divergence of the predictions that the expert's own head makes of the two features.
        validation_split (`float`): The part of each task's samples that is held out; the state with the best loss there is kept.
            Held-out samples are augmented too, in the same way every time.
        early_stopping_patience (`int`, *optional*): Stop after this many epochs without a better held-out loss.
    """

    init: str = setting(
        "first",
        "'first', 'average', 'git_rebasin' or 'zipit'.",
        choices=("first", "average", "git_rebasin", "zipit"),
        scope="merge",
    )
    fit_maps: bool = setting(False, "Start from least-squares maps.", scope="merge")
    epochs: int = setting(100, "Passes over the samples.", minimum=1, scope="merge")
    batch_size: int = setting(16, "Samples of a task that run together.", minimum=1, scope="merge")
    learning_rate: float = setting(1e-3, "Peak rate for matrices.", above=0, scope="merge")
    vector_learning_rate: float | None = setting(
        None, "For norms, biases and diagonals.", type=float, above=0, scope="merge"
    )
    output_learning_rate: float | None = setting(
        None, "For the maps to the experts' features.", type=float, above=0, scope="merge"
    )
    weight_decay: float = setting(1e-3, "Of AdamW.", minimum=0, scope="merge")
    adam_beta1: float = setting(0.9, "AdamW's first decay.", minimum=0, below=1, scope="merge")
    adam_beta2: float = setting(0.999, "AdamW's second decay.", minimum=0, below=1, scope="merge")
    lr_scheduler: str = setting("cosine", "'cosine' or 'constant'.", choices=("cosine", "constant"), scope="merge")
    warmup_ratio: float = setting(0.1, "Part of the updates that warms up.", minimum=0, maximum=1, scope="merge")
    max_grad_norm: float | None = setting(None, "Clip gradients.", type=float, above=0, scope="merge")
    ema_decay: float = setting(0.0, "Decay of the average of the weights.", minimum=0, below=1, scope="merge")
    feature_weight: float = setting(1.0, "Weight of the loss on the features.", minimum=0, scope="merge")
    inner_weight: float = setting(0.0, "Weight of the loss inside the model.", minimum=0, scope="merge")
    logit_weight: float = setting(0.0, "Weight of the loss on predictions.", minimum=0, scope="merge")
    validation_split: float = setting(0.0, "Part of the samples held out.", minimum=0, maximum=0.9, scope="merge")
    early_stopping_patience: int | None = setting(
        None, "Epochs without progress before stopping.", type=int, minimum=1, scope="merge"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.early_stopping_patience is not None and not self.validation_split:
            raise ConfigError(
                f"{type(self).__name__}.early_stopping_patience looks at held-out samples: set validation_split, e.g. 0.2."
            )
        for name in ("include", "exclude", "rules", "then", "align"):
            if getattr(self, name):
                raise ConfigError(
                    f"{type(self).__name__}.{name} is not possible: the channels of all layers are mapped together."
                )

    def learning_rates(self, scale: float = 1.0) -> dict[str, float]:
        """The peak learning rates by kind of tensor."""
        rates = {
            "matrix": self.learning_rate,
            "vector": self.vector_learning_rate,
            "output": self.output_learning_rate,
        }
        return {name: scale * (self.learning_rate if rate is None else rate) for name, rate in rates.items()}


@dataclass
class KdConfig(FeatureTrainingConfig):
    """Plain feature distillation of all experts into one backbone.

    Args:
        init (`str`): See [`FeatureTrainingConfig`]. The settings are those of [`FsMergeConfig`], without the factors.
    """

    merge_type: ClassVar[str] = "kd"
    papers: ClassVar[tuple[str, ...]] = ("1412.6550",)


@dataclass
class FsMergeConfig(FeatureTrainingConfig):
    """Foldable SuperNets (FS-Merge, arXiv 2410.01483).

    Every weight of the result is W = Σ_i M_i W_i U_i, with trained M_i and U_i and the experts' weights as they are.

    Args:
        form (`str`): Of M and U: `"diagonal_low_rank"`, `"diagonal"`, `"low_rank"` (beside a fixed diagonal) or `"full"`.
        rank (`int`): Of the low-rank parts.
        merged_width (`int`, *optional*): The hidden size of the result; the first expert's when not given. The other widths
            follow in proportion.
        head_aligned (`bool`, *optional*): M may only mix whole heads of queries and keys. When not given: where positions are
            rotary.
        sequential (`bool`): Merge two experts, then the result with the third, and so on.
        block_wise (`bool`): Train one block after another, with one block of the merged model and of each expert in memory. Samples
            are then fixed: augment them by copies.
        refine_epochs (`int`): Passes over the samples in which the folded weights themselves are trained, in the end.
        refine_learning_rate (`float`, *optional*): Their peak rate; a third of `learning_rate` when not given.
    """

    merge_type: ClassVar[str] = "fs_merge"
    papers: ClassVar[tuple[str, ...]] = ("2410.01483",)

    form: str = setting("diagonal_low_rank", "Of M and U.", choices=FORMS, scope="merge")
    rank: int = setting(24, "Of the low-rank parts.", minimum=1, scope="merge")
    merged_width: int | None = setting(None, "Hidden size of the result.", type=int, minimum=1, scope="merge")
    head_aligned: bool | None = setting(None, "Only mix whole heads of queries and keys.", type=bool, scope="merge")
    sequential: bool = setting(False, "Merge one expert after another.", scope="merge")
    block_wise: bool = setting(False, "Train one block after another.", scope="merge")
    refine_epochs: int = setting(0, "Passes that train the folded weights.", minimum=0, scope="merge")
    refine_learning_rate: float | None = setting(
        None, "Peak rate of the refinement.", type=float, above=0, scope="merge"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sequential and self.inner_weight:
            raise ConfigError(
                "FsMergeConfig.inner_weight is not possible with sequential=True: the supernet then holds merged experts, whose "
                "inner features are no task's."
            )
        if self.block_wise:
            self._check_block_wise()

    def _check_block_wise(self) -> None:
        defaults = {
            "sequential": False,
            "refine_epochs": 0,
            "validation_split": 0.0,
            "inner_weight": 0.0,
            "logit_weight": 0.0,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ConfigError(
                    f"FsMergeConfig.{name}={getattr(self, name)!r} is not possible with block_wise=True, which never has the whole "
                    "model in memory: leave it out."
                )
        if self.init not in ("first", "average"):
            raise ConfigError(
                f"FsMergeConfig.init={self.init!r} is not possible with block_wise=True: use 'first' or 'average'."
            )
