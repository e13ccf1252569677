"""The recipe of launch/compare.py: systems, and how they are sampled, measured and judged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from drpo.config import Section, key, refuse, refuse_changed, setting
from eval.comparing.systems import measures_of
from eval.completions.recipe import CompleteRecipe
from eval.completions.rows import REFERENCE, is_built_in
from eval.judging.judge_systems import JudgeRecipe

REWARD_MODEL = "reward_model"
OWN_COMPLETE_KEYS = (
    "run_dir",
    "policy",
    "system",
    "reference",
    "null_response",
    "perplexity_policy",
    "imported",
)
OWN_JUDGE_KEYS = ("run_dir", "completions", "system", "baseline", "num_prompts")
MAX_NAME = 200
"Bytes: the names of folders have at most 255."


@dataclass(frozen=True)
class SystemConfig(Section):
    """A row of the table: a method, a setting of it or a step of its training, with one checkpoint for each seed."""

    name: str = ""
    """Its name in tables."""
    policies: list[str] = field(default_factory=list)
    """Folders or hub ids of the policies, one for each training seed."""
    completions: list[str] = field(default_factory=list)
    """In place of policies: files with responses of a system of this name, one for each run."""
    method: str | None = None
    """Rows of one method are joined by a line in plots; null: the name."""
    setting: float | None = None
    """A number that was varied, such as beta: rows of one method with different ones become a curve."""
    kl_references: list[str] = field(default_factory=list)
    """In place of kl_reference: the reference of each of the policies, in their order."""

    def check(self) -> None:
        rule = f"or {key('completions')} must be given, and not both"
        refuse(bool(self.policies) == bool(self.completions), "policies", rule)
        paths = self.policies or self.completions
        name = "policies" if self.policies else "completions"
        rule = f"({len(self.kl_references)}) must be as many as {key('policies')} ({len(self.policies)})"
        refuse(len(self.kl_references) not in (0, len(self.policies)), "kl_references", rule)
        for path in paths:
            rule = f"names {path} twice; each is to be a run of its own, with a training seed"
            refuse(paths.count(path) > 1, name, rule)


@dataclass(frozen=True)
class CompareRecipe(Section):
    """Several systems on the same held-out prompts."""

    run_dir: str = "runs/compare"
    """Folder of the results."""
    title: str | None = None
    """Headline of the report; null: made from the task and the systems."""
    systems: list[SystemConfig] = field(default_factory=list)
    """The rows of the table; each has name, policies (one for each training seed) or completions (files), and may have
    method, setting and kl_references."""
    baseline: str = REFERENCE
    """What every system is judged against: reference (the dataset's own responses), or the name of a system."""
    complete: CompleteRecipe = field(default_factory=CompleteRecipe)
    """How the policies are asked: the keys of launch/complete.py."""
    kl_reference: str | None = None
    """The policy that KL is measured to, folder, hub id or GGUF file; null: no KL."""
    reward_model: str | None = None
    """Folder or hub id of a reward model that scores all responses; null: none."""
    reward_functions: dict[str, str] = field(default_factory=dict)
    """Further scores of the responses: name -> module:function."""
    pairs: Literal["baseline", "all", "none"] = "baseline"
    """What is judged: every system against the baseline; also every two systems against each other, for the ranking;
    or nothing, regardless of `judging`."""
    judging: JudgeRecipe = field(default_factory=JudgeRecipe)
    """How it is judged: the keys of launch/judge.py. Its store is verdicts.sqlite in run_dir, or the one of another
    comparison whose answers are to count here."""
    setting_name: str = "setting"
    """What the systems' `setting` is: beta, learning rate, step, ..."""
    num_examples: int = setting(500, ge=0)
    """The report shows the responses to so many prompts; all are in the completions."""

    def check(self) -> None:
        names = [system.name for system in self.systems]
        self._check_names(names)
        if self.systems:
            rule = f"must be {REFERENCE} or one of {', '.join(names)}, got {self.baseline}"
            refuse(self.baseline not in (*names, REFERENCE), "baseline", rule)
        rule = "is set by the comparison itself; leave it out"
        refuse_changed(self.complete, OWN_COMPLETE_KEYS, rule, "complete.")
        refuse_changed(self.judging, OWN_JUDGE_KEYS, rule, "judging.")
        if self.pairs != "none":
            self._refuse_unequal_rivals()
        columns = {REWARD_MODEL} | {measure.key for measure in measures_of(self.baseline, True, True, ())}
        for name in self.reward_functions:
            rule = "is the name of a column, or none; choose another"
            refuse(name in columns or not name.strip(), f"reward_functions.{name}", rule)

    def _check_names(self, names: Sequence[str]) -> None:
        """Raise ConfigError for names that are not distinct, in a table or as folders."""
        for index, name in enumerate(names):
            place = f"systems[{index}].name"
            refuse(not name.strip() or is_built_in(name), place, f"cannot be {name!r}; choose another")
            is_visible = name.isprintable() and len(name.encode()) <= MAX_NAME
            refuse(not is_visible, place, f"must be at most {MAX_NAME} bytes, all visible, got {name[:40]!r}")
            refuse(name in names[:index], place, f"must differ from the other names, got {name!r} twice")
        # Some file systems ignore case.
        folders = {slug(name).casefold() for name in (*names, REFERENCE)}
        rule = f"are too much alike, or like {REFERENCE}, for the names of folders: {', '.join(names)}"
        refuse(len(folders) < len(names) + 1, "systems", rule)

    def _refuse_unequal_rivals(self) -> None:
        """Raise ConfigError unless run i of each system can meet run i of the baseline, or its only run."""
        num_runs = {system.name: len(system.policies or system.completions) for system in self.systems}
        rivals = num_runs.pop(self.baseline, 1)
        for name, number in num_runs.items():
            rule = (
                f"must have one run, or as many as every system, to be the same for all: {self.baseline} has {rivals} "
                f"runs and {name} has {number}"
            )
            refuse(rivals > 1 and number != rivals, "baseline", rule)

    def folder_of(self, name: str, index: int) -> Path:
        """Return the folder with the completions of a run."""
        return Path(self.run_dir) / "completions" / f"{slug(name)}_{index}"

    @property
    def store(self) -> Path:
        """Path of the stored answers of a paid judge, to all questions of the comparison."""
        return Path(self.judging.store or Path(self.run_dir) / "verdicts.sqlite")


def slug(name: str) -> str:
    """Return a form of the name that is valid in any file system."""
    return re.sub(r"[^\w.]+", "_", name).strip("_.") or "_"
