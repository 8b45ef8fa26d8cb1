"""The papers of the methods, by arXiv id, for model cards. A config names its own in `papers`; an id that is not in this table is
cited by its address alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .config import MergeConfig
from .registry import get_merge_method


@dataclass(frozen=True)
class Paper:
    """What is cited.

    Args:
        title (`str`): Its title.
        authors (`str`, *optional*): Their names, with commas in between; the first one's surname where not all are known here.
        year (`int`): Of the first version.
        complete (`bool`): Whether those are all authors.
    """

    title: str
    authors: str | None
    year: int
    complete: bool = True

    @property
    def first_surname(self) -> str | None:
        return self.authors.split(",")[0].split()[-1] if self.authors is not None else None


PAPERS: dict[str, Paper] = {
    "1412.6550": Paper(
        "FitNets: Hints for Thin Deep Nets",
        "Adriana Romero, Nicolas Ballas, Samira Ebrahimi Kahou, Antoine Chassang, Carlo Gatta, Yoshua Bengio",
        2014,
    ),
    "1612.01474": Paper(
        "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
        "Balaji Lakshminarayanan, Alexander Pritzel, Charles Blundell",
        2016,
    ),
    "1910.05653": Paper(
        "Model Fusion via Optimal Transport",
        "Sidak Pal Singh, Martin Jaggi",
        2019,
    ),
    "2109.01903": Paper(
        "Robust fine-tuning of zero-shot models",
        "Mitchell Wortsman, Gabriel Ilharco, Jong Wook Kim, Mike Li, Simon Kornblith, Rebecca Roelofs, Raphael Gontijo-Lopes, Hannaneh Hajishirzi, Ali Farhadi, Hongseok Namkoong, Ludwig Schmidt",
        2021,
    ),
    "2111.09832": Paper(
        "Merging Models with Fisher-Weighted Averaging",
        "Michael Matena, Colin Raffel",
        2021,
    ),
    "2203.05482": Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
        "Mitchell Wortsman, Gabriel Ilharco, Samir Yitzhak Gadre, Rebecca Roelofs, Raphael Gontijo-Lopes, Ari S. Morcos, Hongseok Namkoong, Ali Farhadi, Yair Carmon, Simon Kornblith, Ludwig Schmidt",
        2022,
    ),
    "2209.04836": Paper(
        "Git Re-Basin: Merging Models modulo Permutation Symmetries",
        "Samuel K. Ainsworth, Jonathan Hayase, Siddhartha Srinivasa",
        2022,
    ),
    "2212.04089": Paper(
        "Editing Models with Task Arithmetic",
        "Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh Hajishirzi, Ali Farhadi",
        2022,
    ),
    "2212.09849": Paper(
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "Xisen Jin, Xiang Ren, Daniel Preotiuc-Pietro, Pengxiang Cheng",
        2022,
    ),
    "2305.03053": Paper(
        "ZipIt! Merging Models from Different Tasks without Training",
        "George Stoica, Daniel Bolya, Jakob Bjorner, Pratik Ramesh, Taylor Hearn, Judy Hoffman",
        2023,
    ),
    "2306.01708": Paper(
        "TIES-Merging: Resolving Interference When Merging Models",
        "Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal",
        2023,
    ),
    "2310.02575": Paper(
        "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
        "Enneng Yang, Zhenyi Wang, Li Shen, Shiwei Liu, Guibing Guo, Xingwei Wang, Dacheng Tao",
        2023,
    ),
    "2311.03099": Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li",
        2023,
    ),
    "2312.04339": Paper(
        "Merging by Matching Models in Task Parameter Subspaces",
        "Derek Tam, Mohit Bansal, Colin Raffel",
        2023,
    ),
    "2312.06795": Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "MohammadReza Davari, Eugene Belilovsky",
        2023,
    ),
    "2402.02705": Paper(
        "Representation Surgery for Multi-Task Model Merging",
        "Enneng Yang, Li Shen, Zhenyi Wang, Guibing Guo, Xiaojun Chen, Xingwei Wang, Dacheng Tao",
        2024,
    ),
    "2403.07816": Paper(
        "Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM", "Sukhbaatar", 2024, complete=False
    ),
    "2403.19522": Paper(
        "Model Stock: All we need is just a few fine-tuned models",
        "Dong-Hwan Jang, Sangdoo Yun, Dongyoon Han",
        2024,
    ),
    "2405.07813": Paper(
        "Localizing Task Information for Improved Model Merging and Compression",
        "Ke Wang, Nikolaos Dimitriadis, Guillermo Ortiz-Jimenez, François Fleuret, Pascal Frossard",
        2024,
    ),
    "2406.11617": Paper(
        "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Pala Tej Deep, Rishabh Bhardwaj, Soujanya Poria",
        2024,
    ),
    "2406.15479": Paper(
        "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging", "Lu", 2024, complete=False
    ),
    "2407.06322": Paper(
        "MagMax: Leveraging Model Merging for Seamless Continual Learning",
        "Daniel Marczak, Bartłomiej Twardowski, Tomasz Trzciński, Sebastian Cygert",
        2024,
    ),
    "2408.07990": Paper("FuseChat: Knowledge Fusion of Chat Models", "Wan", 2024, complete=False),
    "2408.13656": Paper(
        "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic",
        "Yifei He, Yuzheng Hu, Yong Lin, Tong Zhang, Han Zhao",
        2024,
    ),
    "2410.01483": Paper(
        "Foldable SuperNets: Scalable Merging of Transformers with Different Initializations and Tasks",
        "Edan Kinderman, Itay Hubara, Haggai Maron, Daniel Soudry",
        2024,
    ),
    "2410.02396": Paper("Parameter Competition Balancing for Model Merging", "Du", 2024, complete=False),
    "2410.19735": Paper(
        "Model Merging with SVD to Tie the KnOTS",
        "George Stoica, Pratik Ramesh, Boglarka Ecsedi, Leshem Choshen, Judy Hoffman",
        2024,
    ),
    "2412.00081": Paper(
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        "Antonio Andrea Gargiulo, Donato Crisostomi, Maria Sofia Bucarelli, Simone Scardapane, Fabrizio Silvestri, Emanuele Rodolà",
        2024,
    ),
    "2502.04959": Paper(
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "Daniel Marczak, Simone Magistri, Sebastian Cygert, Bartłomiej Twardowski, Andrew D. Bagdanov, Joost van de Weijer",
        2025,
    ),
    "2502.12706": Paper(
        "Scalable Model Merging with Progressive Layer-wise Distillation",
        "Jing Xu, Jiazheng Li, Jingzhao Zhang",
        2025,
    ),
    "2503.08099": Paper(
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        "Cheng",
        2025,
        complete=False,
    ),
    "2505.19892": Paper(
        "Unifying Multimodal Large Language Model Capabilities and Modalities via Model Merging",
        "Wei",
        2025,
        complete=False,
    ),
    "2508.03121": Paper(
        "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging",
        "Nguyen",
        2025,
        complete=False,
    ),
    "2509.17786": Paper(
        "Accurate and Efficient Low-Rank Model Merging in Core Space", "Panariello", 2025, complete=False
    ),
    "2601.13572": Paper("Behavior Knowledge Merge in Reinforced Agentic Models", "Yuan", 2026, complete=False),
    "2602.05536": Paper(
        "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", None, 2026, complete=False
    ),
    "2603.02945": Paper(
        "ACE-Merging: Data-Free Model Merging with Adaptive Covariance Estimation", "Xu", 2026, complete=False
    ),
    "2603.04972": Paper(
        "Functionality-Oriented LLM Merging on the Fisher--Rao Manifold", "Wang", 2026, complete=False
    ),
    "2606.07289": Paper(
        "Closed-Form Spectral Regularization for Multi-Task Model Merging", "Wei", 2026, complete=False
    ),
}


def papers_of(config: MergeConfig) -> list[str]:
    """The arXiv ids of every method that a recipe uses, each once: its own, its rules', its start's and its further steps'."""
    ids = list(config.papers)
    for rule in config.rules:
        if "merge_type" in rule:
            ids += get_merge_method(rule["merge_type"]).config_cls.papers
    start = [config.start_config()] if hasattr(config, "start_config") else []
    for inner in [*start, *config.inner_recipes(), *config.next_recipes()]:
        ids += papers_of(inner)
    if config.align == "git_rebasin":
        ids.append("2209.04836")
    if getattr(config, "fit_heads", False):
        ids.append("2402.02705")
    return list(dict.fromkeys(ids))


def bibtex(ids: Iterable[str]) -> str:
    """BibTeX entries of papers, by arXiv id."""
    return "\n\n".join(_entry(one) for one in ids)


def _entry(arxiv_id: str) -> str:
    paper = PAPERS.get(arxiv_id)
    fields = {"eprint": arxiv_id, "archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{arxiv_id}"}
    if paper is None:
        return _format(f"arxiv{arxiv_id}", {"title": f"arXiv:{arxiv_id}"} | fields)
    known = {"title": f"{{{paper.title}}}"}
    if paper.authors is not None:
        known["author"] = paper.authors.replace(", ", " and ") + ("" if paper.complete else " and others")
    name = (paper.first_surname or "arxiv").lower()
    return _format(f"{name}{paper.year}_{arxiv_id.replace('.', '_')}", known | {"year": str(paper.year)} | fields)


def _format(key: str, fields: dict[str, str]) -> str:
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{key},\n{lines}\n}}"
