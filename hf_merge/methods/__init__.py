"""The merge methods: WHAT is computed. One folder per method or close family; importing one registers it."""

from .ace import Ace, AceConfig
from .adamerging import AdaMerging, AdaMergingConfig, AdaMergingPlusPlus, AdaMergingPlusPlusConfig
from .alignment import GitRebasin, GitRebasinConfig, OtFusion, OtFusionConfig, ZipIt, ZipItConfig
from .arcee_fusion import ArceeFusion, ArceeFusionConfig
from .breadcrumbs import Breadcrumbs, BreadcrumbsConfig
from .concatenation import Cat, CatConfig, Svd, SvdConfig
from .consensus_ta import ConsensusTa, ConsensusTaConfig
from .dare import Dare, DareConfig
from .della import Della, DellaConfig
from .direct_train import DirectTrain, DirectTrainConfig
from .distill_merge import DirectDistill, DirectDistillConfig, DistillMerge, DistillMergeConfig
from .ensemble import Ensemble, EnsembleConfig
from .fisher import Fisher, FisherConfig
from .fs_merge import FsMerge, FsMergeConfig, Kd, KdConfig
from .isotropic import IsoC, IsoCConfig, IsoCts, IsoCtsConfig
from .karcher import Karcher, KarcherConfig
from .knots import CoreSpace, CoreSpaceConfig, Knots, KnotsConfig
from .linear import LinearConfig, LinearMerge
from .localize_and_stitch import LocalizeAndStitch, LocalizeAndStitchConfig
from .magmax import MagMax, MagMaxConfig
from .mats import Mats, MatsConfig
from .model_stock import ModelStock, ModelStockConfig
from .moe import Moe, MoeConfig
from .multislerp import MultiSlerp, MultiSlerpConfig
from .nearswap import NearSwap, NearSwapConfig
from .nuslerp import NuSlerp, NuSlerpConfig
from .passthrough import Passthrough, PassthroughConfig
from .pcb import Pcb, PcbConfig
from .prodistill import ProDistill, ProDistillConfig
from .ram import Ram, RamConfig
from .regmean import RegMean, RegMeanConfig, RegMeanPlusPlus, RegMeanPlusPlusConfig
from .sce import Sce, SceConfig
from .slerp import Slerp, SlerpConfig
from .surgery import Surgery, SurgeryConfig
from .svc import Svc, SvcConfig
from .task_arithmetic import TaskArithmetic, TaskArithmeticConfig
from .ties import Ties, TiesConfig
from .tsv_m import TsvM, TsvMConfig
from .twin import Twin, TwinConfig
from .wise_ft import WiseFt, WiseFtConfig
from .wudi import Wudi, WudiConfig, merge_low_rank


__all__ = [
    "Ace",
    "AceConfig",
    "AdaMerging",
    "AdaMergingConfig",
    "AdaMergingPlusPlus",
    "AdaMergingPlusPlusConfig",
    "ArceeFusion",
    "ArceeFusionConfig",
    "Breadcrumbs",
    "BreadcrumbsConfig",
    "Cat",
    "CatConfig",
    "ConsensusTa",
    "ConsensusTaConfig",
    "CoreSpace",
    "CoreSpaceConfig",
    "Dare",
    "DareConfig",
    "Della",
    "DellaConfig",
    "DirectDistill",
    "DirectDistillConfig",
    "DirectTrain",
    "DirectTrainConfig",
    "DistillMerge",
    "DistillMergeConfig",
    "Ensemble",
    "EnsembleConfig",
    "Fisher",
    "FisherConfig",
    "FsMerge",
    "FsMergeConfig",
    "GitRebasin",
    "GitRebasinConfig",
    "IsoC",
    "IsoCConfig",
    "IsoCts",
    "IsoCtsConfig",
    "Karcher",
    "KarcherConfig",
    "Kd",
    "KdConfig",
    "Knots",
    "KnotsConfig",
    "LinearConfig",
    "LinearMerge",
    "LocalizeAndStitch",
    "LocalizeAndStitchConfig",
    "MagMax",
    "MagMaxConfig",
    "Mats",
    "MatsConfig",
    "ModelStock",
    "ModelStockConfig",
    "Moe",
    "MoeConfig",
    "MultiSlerp",
    "MultiSlerpConfig",
    "NearSwap",
    "NearSwapConfig",
    "NuSlerp",
    "NuSlerpConfig",
    "OtFusion",
    "OtFusionConfig",
    "Passthrough",
    "PassthroughConfig",
    "Pcb",
    "PcbConfig",
    "ProDistill",
    "ProDistillConfig",
    "Ram",
    "RamConfig",
    "RegMean",
    "RegMeanConfig",
    "RegMeanPlusPlus",
    "RegMeanPlusPlusConfig",
    "Sce",
    "SceConfig",
    "Slerp",
    "SlerpConfig",
    "Surgery",
    "SurgeryConfig",
    "Svc",
    "SvcConfig",
    "Svd",
    "SvdConfig",
    "TaskArithmetic",
    "TaskArithmeticConfig",
    "Ties",
    "TiesConfig",
    "TsvM",
    "TsvMConfig",
    "Twin",
    "TwinConfig",
    "WiseFt",
    "WiseFtConfig",
    "Wudi",
    "WudiConfig",
    "ZipIt",
    "ZipItConfig",
    "merge_low_rank",
]
