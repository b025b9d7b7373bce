"""Write the YAML files of both folders of MMLU tasks anew: python lm_eval_tasks/generate.py

What all subjects of a folder share is in its _template_yaml.
"""

from pathlib import Path

from lf_hf.runtime.tasks import SUBJECTS

CATEGORIES = ("stem", "other", "social_sciences", "humanities")
ALIASES = {"mmlu_5shot": "mmlu_5shot", "mmlu_sample": "mmlu_sample (smoke test, not MMLU)"}
# Subjects of which lm-eval ships too few questions for mmlu_sample's usual three shots.
FEWER_SHOTS = {"college_chemistry": 1, "college_physics": 2, "formal_logic": 2, "human_aging": 2}


def subject_yaml(group: str, subject: str) -> str:
    """Give the YAML of one subject's task."""
    lines = [
        "include: _template_yaml",
        f"task: {group}_{subject}",
        f"task_alias: {subject}",
        f"tag: {group}_{SUBJECTS[subject]}_tasks",
        f"dataset_name: {subject}",
        "dataset_kwargs:",
        f"  subject: {subject}",
        'description: "The following are multiple choice questions (with answers) about '
        rf'{subject.replace("_", " ")}.\n\n"',
    ]
    if group == "mmlu_sample" and subject in FEWER_SHOTS:
        lines.append(f"num_fewshot: {FEWER_SHOTS[subject]}")
    return "\n".join(lines) + "\n"


def group_yaml(group: str, alias: str, members: list[str]) -> str:
    """Give the YAML of a group whose accuracy counts every question alike."""
    return "\n".join(
        [
            f"group: {group}",
            f"group_alias: {alias}",
            "task:",
            *(f"  - {member}" for member in members),
            "aggregate_metric_list:",
            "  - metric: acc",
            "    weight_by_size: true",
            "metadata:",
            "  version: 1.0",
            "",
        ]
    )


def all_files() -> dict[str, str]:
    """Give every generated file's text by its path below this folder."""
    files = {}
    for group, alias in ALIASES.items():
        categories = [f"{group}_{category}" for category in CATEGORIES]
        files[f"{group}/_{group}.yaml"] = group_yaml(group, alias, categories)
        for category, name in zip(CATEGORIES, categories, strict=True):
            files[f"{group}/_{name}.yaml"] = group_yaml(name, category.replace("_", " "), [f"{name}_tasks"])
        for subject in SUBJECTS:
            files[f"{group}/{group}_{subject}.yaml"] = subject_yaml(group, subject)
    return files


if __name__ == "__main__":
    for name, text in all_files().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
