"""hf_merge: merge HuggingFace models. The public names and nothing else; each is imported on first use."""

from __future__ import annotations

import importlib


__version__ = "0.1.0"

_EXPORTS = {
    "auto": [
        "AutoMergeConfig",
        "AutoMergedModel",
        "AutoMergedModelForAudioClassification",
        "AutoMergedModelForCTC",
        "AutoMergedModelForCausalLM",
        "AutoMergedModelForImageClassification",
        "AutoMergedModelForImageTextToText",
        "AutoMergedModelForMaskedLM",
        "AutoMergedModelForMultipleChoice",
        "AutoMergedModelForObjectDetection",
        "AutoMergedModelForQuestionAnswering",
        "AutoMergedModelForSemanticSegmentation",
        "AutoMergedModelForSeq2SeqLM",
        "AutoMergedModelForSequenceClassification",
        "AutoMergedModelForSpeechSeq2Seq",
        "AutoMergedModelForTokenClassification",
    ],
    "config": ["LinearLayersConfig", "MergeConfig"],
    "data.calibration": ["CalibrationData"],
    "errors": [
        "CheckpointError",
        "ConfigError",
        "MergeError",
        "MissingDependencyError",
        "NonFiniteError",
        "OutputError",
        "PlanError",
        "RankLostError",
        "UnsupportedModelError",
    ],
    "evaluation": ["EvaluationResult", "EvaluationTask", "Metric", "compare_merges", "evaluate_merge"],
    "evaluation.report": ["write_report"],
    "engines.estimate": ["Estimate"],
    "engines.plan": ["MergePlan"],
    "engines.report": ["MergeReport"],
    "data.augmentations": ["Chain", "Mixup", "RandomShift"],
    "merger": ["Merger"],
    "training.arguments": ["ProDistillArguments"],
    "training.callback": ["MergeCallback", "MergeResult"],
    "training.together": ["merge_checkpoints", "merge_trainers"],
    "registry": ["available_merge_methods", "register_merge_method"],
    "methods.arcee_fusion": ["ArceeFusionConfig"],
    "methods.breadcrumbs": ["BreadcrumbsConfig"],
    "methods.concatenation": ["CatConfig", "SvdConfig"],
    "methods.consensus_ta": ["ConsensusTaConfig"],
    "methods.dare": ["DareConfig"],
    "methods.della": ["DellaConfig"],
    "methods.karcher": ["KarcherConfig"],
    "methods.knots": ["CoreSpaceConfig", "KnotsConfig"],
    "methods.linear": ["LinearConfig"],
    "methods.localize_and_stitch": ["LocalizeAndStitchConfig"],
    "methods.magmax": ["MagMaxConfig"],
    "methods.moe": ["MoeConfig"],
    "methods.model_stock": ["ModelStockConfig"],
    "methods.multislerp": ["MultiSlerpConfig"],
    "methods.nearswap": ["NearSwapConfig"],
    "methods.nuslerp": ["NuSlerpConfig"],
    "methods.passthrough": ["PassthroughConfig"],
    "methods.pcb": ["PcbConfig"],
    "methods.prodistill": ["ProDistillConfig"],
    "methods.ram": ["RamConfig"],
    "methods.regmean": ["RegMeanConfig", "RegMeanPlusPlusConfig"],
    "methods.sce": ["SceConfig"],
    "methods.slerp": ["SlerpConfig"],
    "methods.task_arithmetic": ["TaskArithmeticConfig"],
    "methods.ties": ["TiesConfig"],
    "methods.wise_ft": ["WiseFtConfig"],
    "methods.adamerging": ["AdaMergingConfig", "AdaMergingPlusPlusConfig"],
    "methods.direct_train": ["DirectTrainConfig"],
    "methods.distill_merge": ["DirectDistillConfig", "DistillMergeConfig"],
    "methods.ensemble": ["EnsembleConfig"],
    "methods.fisher": ["FisherConfig"],
    "methods.fs_merge": ["FsMergeConfig", "KdConfig"],
    "methods.alignment": ["GitRebasinConfig", "OtFusionConfig", "ZipItConfig"],
    "methods.mats": ["MatsConfig"],
    "methods.ace": ["AceConfig"],
    "methods.isotropic": ["IsoCConfig", "IsoCtsConfig"],
    "methods.surgery": ["SurgeryConfig"],
    "methods.svc": ["SvcConfig"],
    "methods.tsv_m": ["TsvMConfig"],
    "methods.twin": ["TwinConfig"],
    "methods.wudi": ["WudiConfig"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_merge' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
