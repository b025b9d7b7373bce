"""`lm_eval --model fused`, what it records, and the task folders against lm-eval's own. Refusals: test_bad_input.py."""

import functools
import hashlib
import itertools
import json
import logging
import runpy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lm_eval.tasks
import peft
import pytest
import torch
import yaml
from builders import make_point
from conftest import QUICK, make_llama, make_tokenizer
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_models import auto_class
from transformers import AutoModelForCausalLM, AutoTokenizer

import lf_hf
from lf_hf import FusedLlamaForCausalLM, FusionConfig
from lf_hf.evaluate.evaluation import Evaluation
from lf_hf.evaluate.lm_eval_model import FusedLM
from lf_hf.evaluate.points import DENSE, Score
from lf_hf.evaluate.tables import results_rows
from lf_hf.runtime.tasks import SUBJECTS
from lf_hf.text.mmlu import bundled_questions, format_question, read_csv_questions

PAIRS = [("layer model neuron", " weight"), ("fuse match row", " column"), ("token state", " train small")]


def make_lm(pretrained: Any, **kwargs: Any) -> FusedLM:
    return FusedLM(pretrained, device="cpu", **kwargs)


def loglikelihoods(lm: HFLM) -> list[float]:
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]


def layers_of(lm: FusedLM) -> tuple[int, int]:
    """As results have them: of the base, and of the fused model."""
    said = lm.get_model_info()["fusion"]
    return said["layers_before"], said["layers_after"]


def test_fusing_while_loading_equals_fusing_saving_and_loading(base: str, text: Path, tmp_path: Path) -> None:
    config = FusionConfig(num_fusions=2, perplexity_tokens=100)
    FusedLlamaForCausalLM.from_pretrained_fused(base, config, calibration=str(text)).save_pretrained(tmp_path)
    lm = make_lm(base, num_fusions="2", calibration=str(text), perplexity_tokens="100")
    loaded = make_lm(str(tmp_path))
    assert loglikelihoods(lm) == loglikelihoods(loaded)
    info, again = (either.get_model_info()["fusion"] | {"seconds": 0} for either in (lm, loaded))
    assert json.loads(json.dumps(info)) == info == again and info["config"] == config.to_dict()
    assert [layer["layers"] for layer in info["fused_layers"]] == [[2, 3, 4]] and layers_of(lm) == (5, 3)
    assert info["layers_removed_fraction"] == pytest.approx(2 / 5)
    before, after = info["parameters_before"], info["parameters_after"]
    assert (before, after) == (make_llama().num_parameters(), lm.model.num_parameters())
    assert info["parameters_removed_fraction"] == pytest.approx(1 - after / before)
    assert "text.txt" in json.dumps(info["calibration"])
    assert [judged["tokens"] for judged in info["perplexities"]] == [100, 100]


def test_a_budget_and_a_healing_after_it_with_a_tokenizer_from_elsewhere(base: str, text: Path, tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    settings = {"method": "truncate", "max_divergence": "1e9", "calibration_length": "32", "calibration_tokens": "1024"}
    settings |= {"heal_tokens": "1024", "perplexity_tokens": "50", "calibration": str(text)}
    lm = make_lm(str(tmp_path), tokenizer=base, **settings)
    said = lm.get_model_info()["fusion"]
    assert said["healed"]["steps"] == 1 and said["budget"]["allowed"] == 1e9 and layers_of(lm) == (5, 1)
    assert len(loglikelihoods(lm)) == len(PAIRS)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral3"])
def test_other_families_are_fused_and_opened(model_type: str, family_base: Callable[..., Path], tmp_path: Path) -> None:
    while_loading = make_lm(family_base(model_type), fused_dir=str(tmp_path), **QUICK)
    opened = make_lm(str(tmp_path))
    stock = HFLM(auto_class(model_type).from_pretrained(tmp_path), tokenizer=str(tmp_path), device="cpu")
    assert loglikelihoods(while_loading) == loglikelihoods(opened) == loglikelihoods(stock)
    assert layers_of(while_loading) == layers_of(opened) == (6, 5)


@pytest.mark.parametrize("fusing", [True, False])
def test_arguments_of_transformers_and_lm_eval_pass(fusing: bool, base: str, fused: Path) -> None:
    given = f"pretrained={fused}"
    if fusing:
        given = f"pretrained={base},target_layers=4,method=truncate,perplexity_tokens=0"
    given += ",dtype=bfloat16,attn_implementation=eager,low_cpu_mem_usage=True,use_cache=False,weights_only=True"
    given += ",max_length=64,logits_cache=0,add_bos_token=True"
    options = {"device": "cpu", "batch_size": "auto:2", "max_batch_size": 2}
    lm = FusedLM.create_from_arg_string(given, options)
    assert lm.model.config._attn_implementation == "eager" and lm.model.config.use_cache is False
    assert (lm.model.dtype, lm.max_length, lm.add_bos_token) == (torch.bfloat16, 64, True)
    assert len(loglikelihoods(lm)) == len(PAIRS)
    # Placed by accelerate, on the one device that there is.
    placed = make_lm(base, **QUICK, max_cpu_memory="4GiB")
    assert loglikelihoods(placed) == loglikelihoods(make_lm(fused)) == loglikelihoods(make_lm(Path(base), **QUICK))
    with pytest.raises(ValueError, match=r"are free on cpu, and .* takes .* there at least"):
        make_lm(base, **QUICK, max_cpu_memory="1MiB")


def test_peft_adapter(fused: Path, base: str, tmp_path: Path) -> None:
    """Of the fused model; one that was trained on the base would be put onto other layers."""
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    adapter = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model, adapter).save_pretrained(str(tmp_path))
    plain, adapted = make_lm(fused), make_lm(fused, peft=str(tmp_path))
    assert loglikelihoods(plain) != loglikelihoods(adapted)
    assert adapted.get_model_info()["fusion"] == plain.get_model_info()["fusion"]
    assert adapted.config.num_hidden_layers == 4
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(str(tmp_path / "base's"))
    for pretrained, settings in ((fused, {}), (base, QUICK)):
        with pytest.raises(ValueError, match=r"peft=.* was trained on .*, the base, whose layers have other numbers"):
            make_lm(pretrained, peft=str(tmp_path / "base's"), **settings)


def test_a_model_instead_of_a_name(fused: Path) -> None:
    model = FusedLlamaForCausalLM.from_pretrained(fused)
    lm = make_lm(model, tokenizer=AutoTokenizer.from_pretrained(fused))
    model.tokenizer = lm.tokenizer  # as of one that was fused in this process
    assert loglikelihoods(make_lm(model)) == loglikelihoods(lm)
    assert loglikelihoods(lm) == loglikelihoods(make_lm(fused))
    assert layers_of(lm) == (5, 4)
    with pytest.raises(ValueError, match="must be the folder or hub name of a checkpoint, got FusedLlamaForCausalLM"):
        make_lm(model, num_fusions=1)
    with pytest.raises(ValueError, match="`pretrained` is a 'llama' model that is not fused"):
        make_lm(make_llama())


CHOICES = ["layer", "a deep model of rows", "head state", "fuse"]  # of different lengths, so that metrics differ
LM_EVALS = Path(lm_eval.tasks.__file__).parent
MEAN = "depth_pruning::mean"
MEMBERS = "arc_easy arc_challenge hellaswag winogrande boolq piqa openbookqa race rte".split()
FOLDERS = "arc hellaswag winogrande super_glue/boolq piqa openbookqa race glue/rte gsm8k".split()
TEXT = "question ctx_a ctx_b activity_label passage goal question_stem article sentence1 sentence2 option1".split()


def row(number: int) -> dict[str, Any]:
    """What each of the data sets has in a row, in the form that it has on the hub."""
    letter, asked = "ABCD"[number % 4], f"layer model {number}"
    row: dict[str, Any] = dict.fromkeys(TEXT, asked)
    row |= {"sentence": f"{asked} _ is large.", "option2": "row", "endings": CHOICES}
    row |= {"answerKey": letter, "choices": {"text": CHOICES, "label": [*"ABCD"]}, "sol1": "layer", "sol2": "a row"}
    problems = repr([{"question": f"Row {number}", "options": CHOICES, "answer": letter}])
    return row | {"problems": problems, "label": number % 2, "answer": f"{1 + number % 2}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Serve cais/mmlu from the CSV release where it is there, and a few rows of those of depth_pruning."""

    @functools.cache
    def load_dataset(path: str, name: str = "") -> datasets.DatasetDict:
        if path != "cais/mmlu":
            rows = datasets.Dataset.from_list([row(number) for number in range(8)])
            return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
        folder = request.getfixturevalue("mmlu_dir")
        splits = {}
        for split in ("test", "dev"):
            rows = [asdict(q) | {"subject": name} for q in read_csv_questions(folder, split, name)]
            splits[split] = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)
    # lm-eval compiles a template for every prompt; kept, 14,042 questions take seconds instead of minutes.
    monkeypatch.setattr(utils.env, "from_string", functools.cache(utils.env.from_string))


@functools.cache
def lm_evals_own() -> TaskManager:
    return TaskManager(include_path=str(LM_EVALS / "mmlu" / "default"), include_defaults=False)


@functools.cache
def their_mmlu() -> dict[str, Any]:
    return dict(lm_evals_own().load("mmlu"))


def ours(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(lf_hf.tasks_path()), include_defaults=False, metadata=metadata)


def all_requests(task: Any, num_fewshot: int | None = None, *, every: int = 1) -> Iterator[tuple[Any, ...]]:
    """All that reaches a model: context and continuation, in order, for each choice of one in `every` questions."""
    if num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)
    for number, doc in itertools.islice(enumerate(task.eval_docs), None, None, every):
        context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot)
        for instance in task.construct_requests(doc, context, metadata=(task.config.task, number, 1)):
            yield instance.request_type, instance.arguments


@pytest.mark.usefixtures("hub")
def test_requests_equal_those_of_mmlu(mmlu_dir: Path) -> None:
    theirs = their_mmlu()["tasks"]
    tasks = ours(mmlu_dir=str(mmlu_dir), pretrained="base", num_fusions=4, seed=0).load("mmlu_5shot")["tasks"]
    assert tasks.keys() == {f"mmlu_5shot_{subject}" for subject in SUBJECTS}
    assert sum(len(task.eval_docs) for task in tasks.values()) == 14042
    from_hub = ours().load(["mmlu_5shot_anatomy", "mmlu_5shot_virology"])["tasks"]
    for name, task in [*tasks.items(), *from_hub.items()]:
        own = theirs[name.replace("mmlu_5shot", "mmlu")]
        assert len(task.eval_docs) == len(own.eval_docs)
        assert list(all_requests(task, every=20)) == list(all_requests(own, num_fewshot=5, every=20))


class HashLM(LM):
    """Answers by a hash of the request: the same for the same text, otherwise as good as random."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        digests = (hashlib.sha256(repr(request.arguments).encode()).digest() for request in requests)
        return [(-float(digest[0]) - digest[1] / 256, False) for digest in digests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return ["It is #### 2"] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
        pytest.fail("a perplexity was asked for")


@pytest.mark.usefixtures("hub")
def test_sample_asks_the_last_question_and_not_calibrations_and_says_that_it_is_not_mmlu() -> None:
    loaded, theirs = ours(pretrained="base", num_fusions=4).load("mmlu_sample"), their_mmlu()["group_map"]
    tasks = loaded["tasks"]
    assert loaded["group_map"] == {
        group.replace("mmlu", "mmlu_sample"): [child.replace("mmlu", "mmlu_sample") for child in children]
        for group, children in theirs.items()
    }
    assert "not MMLU" in loaded["groups"]["mmlu_sample"].alias
    assert tasks.keys() == {f"mmlu_sample_{subject}" for subject in SUBJECTS}
    for subject, (calibration, *others) in bundled_questions().items():
        task = tasks[f"mmlu_sample_{subject}"]
        *shots, asked = [question for question in others if question != calibration and len(question.choices) == 4]
        contexts, choices = zip(*(arguments for _, arguments in all_requests(task)), strict=True)
        prompts = [f"{format_question(shot)} {'ABCD'[shot.answer]}" for shot in shots]
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        assert set(contexts) == {"\n\n".join([about, *prompts, format_question(asked)])}
        assert choices == (" A", " B", " C", " D")
        assert task.doc_to_target(task.eval_docs[0]) == asked.answer
        assert len(shots) == task.config.num_fewshot
        assert calibration.question not in contexts[0]
        assert task.config.metadata["purpose"] == "smoke test, not MMLU"


def test_folders_hold_what_the_generator_writes() -> None:
    folder = lf_hf.tasks_path()
    expected = runpy.run_path(str(folder / "generate.py"))["all_files"]()
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.glob("mmlu_*/*.yaml")} == expected


@pytest.mark.usefixtures("hub")
def test_a_sweep_shows_each_accuracy_their_mean_and_what_is_left_of_the_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs_at = [str(LM_EVALS / folder) for folder in FOLDERS]
    manager = TaskManager(include_path=[str(lf_hf.tasks_path()), *theirs_at], include_defaults=False)
    monkeypatch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: manager)
    loaded = manager.load("depth_pruning")
    assert loaded["group_map"] == {"depth_pruning": [MEAN, *MEMBERS, "gsm8k"], MEAN: MEMBERS}
    shots = {name: task.config.num_fewshot for name, task in loaded["tasks"].items()}
    assert shots == dict.fromkeys(MEMBERS, 0) | {"gsm8k": 5}

    monkeypatch.setattr("lf_hf.evaluate.evaluation.HFLM", lambda *_, **__: HashLM())
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    scores = Evaluation(["depth_pruning"]).scores(model, model)
    theirs = evaluate(HashLM(), manager.load([*MEMBERS, "gsm8k"]), bootstrap_iters=0, log_samples=False)["results"]
    expected = {name: theirs[name]["acc,none"] for name in MEMBERS}
    for name in ("arc_challenge", "hellaswag", "openbookqa"):
        assert theirs[name]["acc_norm,none"] != expected[name]
        expected[name] = theirs[name]["acc_norm,none"]
    mean = statistics.fmean(expected.values())
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {MEAN: mean} | expected | {"gsm8k": theirs["gsm8k"]["exact_match,strict-match"]}
    )

    base = replace(make_point(DENSE, 0, 0.0), scores=scores)
    halved = {MEAN: replace(scores[MEAN], value=mean / 2, stderr=None)}
    head, first, second = results_rows([base, replace(make_point("refit", 4, 0.0), scores=halved)])
    column = head.index(MEAN)
    assert first[column].startswith(f"{mean:.4f} ± ") and second[column] == f"{mean / 2:.4f} (50.0%)"


QUESTIONS = ["layer model", "neuron weight fuse", "match row column", "head state"]
LENGTH = 6  # tokens of an answer
WRITING: dict[str, Any] = {
    "task": "writing",
    "unsafe_code": True,
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["</s>"], "max_gen_toks": LENGTH, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "lowered", "filter": [{"function": "lowercase"}, {"function": "take_first"}]},
    ],
}
MakeTasks = Callable[..., None]


@pytest.fixture
def make_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeTasks:
    """Make tasks of these questions and some answers, and groups; no others are there."""

    def make(answers: Sequence[str], *tasks: dict[str, Any]) -> None:
        rows = [json.dumps({"question": q, "answer": a}) for q, a in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
        asked = {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
        for number, task in enumerate(tasks):
            content = task if "group" in task else data | asked | task
            (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(content))
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        monkeypatch.setattr("lf_hf.evaluate.evaluation.TaskManager", lambda **_: manager)

    return make


def test_the_share_of_answers_written_as_wanted(make_tasks: MakeTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_llama()
    tokenizer = make_tokenizer()
    answers = []
    for question in QUESTIONS:
        prompt = tokenizer(question, return_tensors="pt")["input_ids"]
        written = model.generate(prompt, max_new_tokens=LENGTH, do_sample=False)[0, prompt.shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True))
    make_tasks([*answers[:3], "something else"], WRITING)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match=r"The task writing runs programs .* set HF_ALLOW_CODE_EVAL=1"):
        Evaluation(["writing"])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    [(name, score)] = Evaluation(["writing"], batch_size=2).scores(model, tokenizer).items()
    assert name == "writing" and score.stderr is not None
    assert score == Score("exact_match (strict)", 0.75, score.stderr, higher_is_better=True)


def test_a_tag_shows_its_tasks_and_a_group_its_own_figure_or_else_its_tasks(make_tasks: MakeTasks) -> None:
    choosing = {"output_type": "multiple_choice", "doc_to_choice": ["model", "row"]}
    names = {"lone": ["tagged"], "other": ["tagged"], "part": [], "piece": []}
    tasks = [choosing | {"task": name, "tag": tags} for name, tags in names.items()]
    groups: list[dict[str, Any]] = [{"group": "silent", "task": ["part"]}]
    groups += [{"group": "group", "task": ["piece"], "aggregate_metric_list": [{"metric": "acc"}]}]
    make_tasks(["model"] * 4, *tasks, *groups)
    scores = Evaluation(["silent", "group", "tagged"]).scores(make_llama(), make_tokenizer())
    assert list(scores) == ["part", "group", "lone", "other"]
