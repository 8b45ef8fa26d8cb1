"""[`evaluate_with_harness`]: language models on the tasks of EleutherAI's lm-evaluation-harness. Only its public functions are used, and
only when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from ..checkpoints.tokenizers import load_tokenizer
from ..data.samples import TaskModel
from ..errors import ConfigError, MissingDependencyError
from .results import EvaluationResult, TaskScore
from .subjects import evaluating, fitting, load, subject_of


def evaluate_with_harness(
    subject: Any,
    tasks: Sequence[str],
    *,
    metric: str | None = None,
    experts: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    batch_size: int | str = 8,
    trust_remote_code: bool = False,
    **kwargs,
) -> EvaluationResult:
    """Measures a merged language model with lm-evaluation-harness.

    Args:
        subject ([`Merger`], `str` or [`~transformers.PreTrainedModel`]): As in [`evaluate_merge`].
        tasks (`list[str]`): Names of the harness's tasks.
        metric (`str`, *optional*): Which of a task's metrics counts (`"acc_norm"`); its first one when not given.
        experts (`dict[str, str]`, *optional*): `{task: expert}`: which experts are measured too, on which tasks.
        tokenizer (*optional*): The tokenizer; the folder's own when not given.
        batch_size (`int` or `str`): Of the harness.
        trust_remote_code (`bool`): Whether code from the models' repositories may run.
        kwargs: Arguments of `lm_eval.simple_evaluate`: `num_fewshot`, `limit`, `task_manager`, ...

    Returns:
        [`EvaluationResult`]

    Raises:
        MissingDependencyError: `lm_eval` is not installed.
        ConfigError: There is no such task, metric or expert, or no tokenizer.
    """
    if not tasks or isinstance(tasks, str):
        raise ConfigError("tasks must be a list with at least one name of a task of lm-evaluation-harness.")
    known = subject_of(subject, trust_remote_code)
    options = {"metric": metric, "batch_size": batch_size, **kwargs}
    result = EvaluationResult(_run(known.model(""), known.fits(""), list(tasks), tokenizer, **options))
    sources = known.experts() if experts else {}
    for task, name in (experts or {}).items():
        if task not in result.tasks or name not in sources:
            raise ConfigError(
                f"experts={{'{task}': '{name}'}}: tasks are {', '.join(tasks)}, experts {', '.join(sources)}."
            )
        source = sources[name]
        score, own = result.tasks[task], _run(load(source), fitting(source), [task], tokenizer, **options)[task]
        over, under = (score.value, own.value) if score.greater_is_better else (own.value, score.value)
        score.expert, score.normalized = own.value, over / under if under else None
    return result


def _run(
    model: PreTrainedModel,
    fits: TaskModel,
    tasks: list[str],
    tokenizer: Any,
    *,
    metric: str | None,
    batch_size: int | str,
    **kwargs,
) -> dict[str, TaskScore]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingDependencyError("lm_eval", "Evaluation with lm-evaluation-harness") from error
    if tokenizer is None:
        if fits.folder is None:
            raise ConfigError("The model has no folder with a tokenizer: pass tokenizer=....")
        tokenizer = load_tokenizer(fits.folder)
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, **kwargs)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"lm-evaluation-harness refuses {', '.join(tasks)}: {' '.join(str(error).split())}"
            ) from error
    return {task: _score(task, found, metric) for task in tasks}


def _score(task: str, found: Mapping[str, Any], metric: str | None) -> TaskScore:
    """The number that counts, from the harness's table: `{"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "..."}`."""
    row = found["results"].get(task, {})
    values = {key.partition(",")[0]: value for key, value in row.items() if "," in key and "_stderr," not in key}
    chosen = metric if metric is not None else next(iter(values), None)
    if chosen not in values:
        raise ConfigError(f"The task '{task}' has no metric '{chosen}': it has {', '.join(values) or 'none'}.")
    greater = found.get("higher_is_better", {}).get(task, {}).get(chosen)
    count = found.get("n-samples", {}).get(task, {}).get("effective", 0)
    return TaskScore(float(values[chosen]), chosen, count, greater is not False)
