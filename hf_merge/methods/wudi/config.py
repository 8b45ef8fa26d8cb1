"""Settings of the WUDI family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...config import LinearLayersConfig, MergeConfig
from ...errors import ConfigError
from ...registry import get_merge_method
from ...settings import setting


@dataclass
class WudiConfig(LinearLayersConfig):
    """WUDI-Merging (arXiv 2503.08099), its spectral form (arXiv 2606.07289) and OptMerge (arXiv 2505.19892).

    All solvers work on the interference of each linear layer, L(M) = Σ_i ‖(M − T_i) T_iᵀ‖² / ‖T_i‖².

    Args:
        solver (`str`): How L is minimised. `"adaptive"`: in closed form, on the directions that the effective rank of the layer
            counts. `"spectral"`: in closed form, with an exponential filter on the top directions. `"adam"`: the first paper's
            gradient descent. `"sgd"`: plain gradient descent. `"closed_form"`: the exact minimiser, which overfits the
            interference and gives worse models. `"optmerge"`: Adam on denoised targets and projectors.
        num_steps (`int`): Steps of `"adam"`, `"sgd"` and `"optmerge"`.
        learning_rate (`float`, *optional*): Their step size. When not given: 1e-5 with Adam; with `"sgd"` half the inverse of
            the curvature's Frobenius norm, which never diverges.
        initial (`str`, *optional*): Where they start: at the `"sum"` or the `"mean"` of the task vectors, or at the result of
            another data-free method, e.g. `"tsv_m"`. When not given: the sum with Adam, the mean with `"sgd"`.
        time (`float`): t of the spectral filter 1 − e^{−λt}: how long the gradient flow that it stands for runs.
        rank_ratio (`float`): The part of the input dimension on which `"spectral"` acts; the other directions keep the sum.
        ridge (`float`): ρ of `"closed_form"`, relative to the mean eigenvalue of the Gram matrix.
        normalize (`bool`): Solve `"adam"` and `"optmerge"` on task vectors that are scaled to a fixed root mean square, one
            factor per layer, and scale back. Adam's step is absolute: without it the result depends on the size of the task
            vectors. The other solvers do not depend on it.
        equalize_norms (`bool`): Scale every expert's task vector to the geometric mean of the experts' norms, taken over the
            linear layers of the whole model.
        check_norms (`bool`): Warn when the norms of two experts' task vectors differ by more than a factor of five.
    """

    merge_type: ClassVar[str] = "wudi"
    papers: ClassVar[tuple[str, ...]] = ("2503.08099", "2606.07289", "2505.19892")

    solver: str = setting(
        "adaptive",
        "How the interference is minimised.",
        choices=("adaptive", "spectral", "closed_form", "adam", "sgd", "optmerge"),
    )
    num_steps: int = setting(300, "Steps of the iterative solvers.", minimum=1)
    learning_rate: float | None = setting(None, "Step size of the iterative solvers.", type=float, above=0)
    initial: str | None = setting(
        None, "Start of the iterative solvers: 'sum', 'mean' or a data-free method.", type=str
    )
    time: float = setting(1300.0, "Time of the spectral filter.", above=0)
    rank_ratio: float = setting(0.65, "Part of the input dimension on which 'spectral' acts.", above=0, maximum=1)
    ridge: float = setting(1e-6, "Ridge of 'closed_form', relative to the mean eigenvalue.", above=0)
    normalize: bool = setting(False, "Make Adam's absolute step independent of the size of the task vectors.")
    equalize_norms: bool = setting(False, "Scale all experts' task vectors to one norm.", scope="merge")
    check_norms: bool = setting(True, "Warn of task vectors whose norms differ fivefold.", scope="merge")

    def __post_init__(self):
        super().__post_init__()
        if self.initial in (None, "sum", "mean"):
            return
        if self.solver not in ("adam", "sgd", "optmerge"):
            raise ConfigError(
                f"WudiConfig.initial is the start of an iterative solver, solver='{self.solver}' has none."
            )
        if self.equalize_norms:
            raise ConfigError("WudiConfig.initial: another method's start and equalize_norms exclude each other.")
        entry = get_merge_method(self.initial)
        if (
            entry.method_cls.requires_data
            or entry.config_cls is WudiConfig
            or entry.method_cls().rounds(entry.config_cls())
        ):
            raise ConfigError(
                f"WudiConfig.initial='{self.initial}' does not work parameter by parameter without data: use 'sum', 'mean' or "
                "a method such as 'tsv_m'."
            )

    def inner_recipes(self) -> list[MergeConfig]:
        if self.initial in (None, "sum", "mean"):
            return []
        return [get_merge_method(self.initial).config_cls(seed=self.seed)]
