"""What evaluate.py and sample.py share: their keys, the prompts, and completions with rewards in files that a rerun continues."""
import itertools
import json
import os
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from data.dataset import load_datasets
from data.errors import RunError, UserError
from data.files import SUFFIXES
from engine.advice import advice
from engine.cast import Lines, cast, show
from engine.claim import LOCK, claim
from engine.command_line import parse_argv
from engine.config import Common, check_output, hints_of, is_required, read_values
from engine.directory import read_config
from engine.fingerprint import fingerprints
from engine.help import key_lines
from engine.logs import Run
from engine.options import Count, NonNegative, Sampling, Seed, TwoOrMore, stop_strings, usual_stop
from engine.rollout import Rollout, with_completions
from engine.score import load_frozen, reward_model_path, score_rollout, scores, text_of
from model.load import base_of, load_config, load_tokenizer_for
from model.reward_model import is_reward_model
from model.sampler import sample
from rewards.functions import check_rewards, load_reward, score_all
from rewards.verifiers import golds_of, r1_zero, r1_zero_details

# keys that change no completion and no score
FREE = ("output", "limit", "rollout_batch_size", "min_reward", "reward_timeout")


@dataclass(kw_only=True)
class Settings(Sampling):
    """The keys of evaluate.py and sample.py; those of how completions are drawn are the online algorithms'."""
    model: str                             # a run, a model directory (an adapter too) or a hub name
    data: str                              # a file, or a hub dataset as name or name:split
    n: Count = 1                           # completions per prompt
    temperature: NonNegative = 1.0         # sampling temperature; 0 = always the likeliest token
    prompt_template: str | None = "auto"   # a name in data/prompts/ or a file with {question}; null = the chat template; auto = a run's
    #                                        own, else r1_zero where the model has no chat template, the rows questions and that reward
    stop: str | list[str] | None = "auto"  # strings that end a completion: </answer>, </s>. A text is cut at
    #                                        its commas, and \n in it is a newline; a list, such as
    #                                        ["\n\n", "Question:"], stands as it is. auto = a run's own, else
    #                                        </answer> with the template r1_zero
    max_completion_length: Count | None = None    # tokens; longer completions are cut there; null = 512, or half of max_length
    chat_template: str | None = None       # a file, or chatml, llama3, mistral, gemma; null = the model's own
    system_prompt: Lines | None = None     # of conversations without a system turn; null = the model's own,
    #                                        if a run gave it one
    chat_template_kwargs: dict | None = None     # variables of the template, such as {enable_thinking: false}
    limit: Count | None = None             # use only this many rows of data
    max_length: TwoOrMore | None = None    # tokens, prompt and completion together; null = as many as the model knows
    seed: Seed = 0                         # random seed for sampling
    output: str | None = None              # directory of the results; null = a name in runs/ made of those of model and data

    def __post_init__(self):
        if self.stop != "auto":            # that waits for the run's own
            super().__post_init__()


# ---- the command line -------------------------------------------------------------------------------------------------

def read_settings(argv: list[str], kind: type, program: str):
    """MODEL key=value ... -> an instance of `kind`, or None where --help is asked for. UserError for anything wrong."""
    first = argv[0] if argv else ""
    if first and not first.startswith("-") and not re.match(r"[A-Za-z_][\w.-]*=", first):
        argv = [f"model={first}", *argv[1:]]
    path, given, flags = parse_argv(argv)
    if "help" in flags:
        return None
    if path is not None or "dry-run" in flags:
        raise UserError(f"{show(path or '--dry-run')} in the command line is nothing that {program} knows; "
                        "fix: write one MODEL and then key=value")
    hints = hints_of(kind)

    def unknown(key, where):
        return UserError(f"unknown key {show(key)} ({where})" + advice(key, hints, program, program))

    values = read_values(given, hints, unknown)
    for field in fields(kind):
        if field.name not in values and is_required(field):
            raise UserError(f"{field.name} is missing in the command line; fix: python {program} MODEL data=... reward=...")
    settings = kind(**values)
    if settings.output is not None:
        check_output(settings.output, "command line")
    if settings.n > 1 and settings.temperature == 0:
        raise UserError(f"n (command line) is {settings.n}, but at temperature 0 all completions of a prompt are the same; "
                        "fix: give n=1 or a temperature above 0")
    return settings


def help_text(doc: str, kind: type) -> str:
    """A program's description, and every key with its type, range, default and sentence."""
    return "\n".join([doc, "keys:", *key_lines(kind)])


def name_of(data: str) -> str:
    """What the files of the results are called: gsm8k of gsm8k, of openai/gsm8k:test and of path/to/gsm8k-test.jsonl."""
    name = Path(data if os.path.exists(data) else data.partition(":")[0]).name
    while name.lower().endswith(SUFFIXES):
        name = name.rpartition(".")[0]
    return re.sub(r"(?<=.)[-_.]test$", "", name)


def default_output(folder: str, settings) -> str:
    """runs/<folder>/<model>-<data>."""
    parts = [part for part in Path(settings.model).parts if part not in ("/", "..", "runs")]
    return os.path.join("runs", folder, "-".join([*parts[-3:], name_of(settings.data)]))


# ---- prompts ----------------------------------------------------------------------------------------------------------

def with_lengths(settings, path: str):
    """The settings with numbers for max_length and max_completion_length, from what the model knows."""
    known = getattr(load_config(base_of(path)).get_text_config(), "max_position_embeddings", None) or 2 ** 30
    if settings.max_length and settings.max_length > known:
        raise UserError(f"max_length is {settings.max_length}, but the model {path} knows only {known} positions; fix: lower max_length")
    most = settings.max_length or known
    return replace(settings, max_length=most, max_completion_length=settings.max_completion_length or min(512, most // 2))


def load_examples(settings, kind: str, path: str, tokenizer, notice):
    """The first `limit` examples of the data, and its report."""
    common = Common(algorithm="", model=path, data=settings.data, seed=settings.seed,
                    max_length=settings.max_length, system_prompt=settings.system_prompt)
    examples, _, reports = load_datasets(common, kind, tokenizer, notice, settings.train_on,
                                         settings.prompt_template, settings.max_completion_length)
    examples = examples[:settings.limit]
    if kind == "prompts":
        check_rewards(settings, examples)
    return examples, reports["train"]


def load_prompts(settings, path: str, tokenizer, verifies_r1_zero: bool, notice):
    """(examples of kind "prompts", their report, the settings with prompt_template and stop as they are used)."""
    model = os.path.normpath(settings.model)
    trained = read_config(model) or read_config(os.path.dirname(model)) or {}      # of a run, or its final/: with what it was trained
    if auto := settings.prompt_template == "auto":
        settings = replace(settings, prompt_template=cast(trained.get("prompt_template", "null"), str | None))
    if settings.system_prompt is None:       # strings are turns of a conversation where they were in training
        settings = replace(settings, system_prompt=cast(trained.get("system_prompt", "null"), Lines | None))
    told = []
    examples, report = load_examples(settings, "prompts", path, tokenizer, told.append)
    has_choice = auto and "prompt_template" not in trained and not settings.prompt_template
    # a question is a string only where the model has no chat template
    if has_choice and verifies_r1_zero and all(map(is_plain_question, examples)):
        told, settings = [], replace(settings, prompt_template="r1_zero")
        examples, report = load_examples(settings, "prompts", path, tokenizer, told.append)
    if settings.stop == "auto":
        own = cast(trained.get("stop", "null"), str | list[str] | None)
        own_template = cast(trained.get("prompt_template", "null"), str | None)
        as_trained = "stop" in trained and settings.prompt_template == own_template
        settings = replace(settings, stop=own if own or as_trained else usual_stop(settings.prompt_template))
    plain = isinstance(examples[0].extras["prompt"], str)
    form = f"prompt_template {settings.prompt_template}" if settings.prompt_template else "plain text" if plain else "chat template"
    stop = ", ".join(repr(string)[1:-1] for string in stop_strings(settings.stop))
    for text in [*told, f"prompts: {form}{f', stop {stop}' if stop else ''}"]:
        notice(text)
    return examples, report, settings


def is_plain_question(example) -> bool:
    return example.extras["prompt"] == example.extras["columns"].get("question")


# ---- completions ------------------------------------------------------------------------------------------------------

def complete(settings, path: str, name: str, notice) -> tuple[list[dict], dict]:
    """(a row for every one of `n` completions of every prompt, the settings they come from). The rows are appended to
    output/<name>_results.jsonl as they come; those that it holds already are not made again."""
    tokenizer, settings = load_tokenizer_for(settings, path, notice), with_lengths(settings, path)
    if is_reward_model(path):
        raise UserError(f"model: {settings.model} is a reward model, which writes no text; fix: pass a policy, and this one as reward=")
    rewards = load_reward(settings.reward, settings.reward_weights)
    models = {reward.name: reward_model_path(reward.path, tokenizer, notice) for reward in rewards if reward.path}
    verifies_r1_zero = any(reward.function is r1_zero for reward in rewards)
    examples, report, settings = load_prompts(settings, path, tokenizer, verifies_r1_zero, notice)
    used = used_by(settings, path, report)
    batch = max(1, settings.rollout_batch_size // settings.n)
    results = Results(settings.output, name, used, len(examples), settings.n, batch, notice)
    if results.left:
        policy = load_frozen(path, tokenizer, examples, notice)
        models = {reward: load_frozen(where, tokenizer, examples, notice) for reward, where in models.items()}
    for first, last in results.left:
        part, keys = examples[first:last], [(settings.seed, i) for i in range(first, last)]
        found = sample(policy, tokenizer, [example.prompt for example in part], keys, settings.n, settings,
                       lambda done, _: results.show(first * settings.n + done, line=False))      # noqa: B023
        rollout = Rollout(0, [with_completions(*both) for both in zip(part, found)])
        with results.run.console.cleared():      # a reward may print
            score_rollout(rollout, rewards, tokenizer, partial(score_all, timeout=settings.reward_timeout),
                  lambda reward: scores(models[reward.name], rollout.examples))      # noqa: B023
        results.add(completion_rows(rollout, first, rewards, verifies_r1_zero, tokenizer))
    return results.rows, used


def completion_rows(rollout: Rollout, first: int, rewards: list, verifies_r1_zero: bool, tokenizer) -> list[dict]:
    """A row per completion; `first`: the number of the rollout's first prompt. A reward of None: nothing has judged it."""
    names, rows = [f"rewards/{reward.name}" for reward in rewards] if len(rewards) > 1 else [], []
    for i, example in enumerate(rollout.examples):
        golds = golds_of(example.extras["columns"])
        for k, response in enumerate(example.responses):
            text, metrics = text_of(tokenizer, response), {}
            if verifies_r1_zero:
                details = r1_zero_details(text, golds)
                metrics = {"format_reward": float(details["format"]), "answer_reward": float(details["answer"])}
            for name in ("rewards", *names):
                value = rollout[name][i][k]
                metrics["reward" if name == "rewards" else name] = None if value.isnan() else float(value)
            rows.append({"id": first + i, "sample": k, "prompt": example.extras["prompt"], "generation": text,
                         "gold_answer": golds[0] if len(golds) == 1 else golds or None, "metrics": metrics,
                         "tokens": len(response.tokens), "finished": not example.extras["truncated"][k]})
    return rows


# ---- files that a rerun continues -------------------------------------------------------------------------------------

def used_by(settings, path: str, report: dict) -> dict:
    """What the results depend on, with a digest of every file and model that the keys name."""
    keys = {key: value for key, value in asdict(settings).items() if key not in FREE} | {"model": path}
    digests = {f"digests of {key}": files for key, files in fingerprints(keys).items()}
    return keys | digests | {"data_sha256": report["sha256"]}


class Results:
    """The rows of output/<name>_results.jsonl: `each` for every one of `total` prompts (or pairs), of which `batch` are done at a
    time. What an earlier run has left is continued after its last whole batch, if its settings were the same: they are kept in
    output/<name>_settings.json."""

    def __init__(self, output: str, name: str, used: dict, total: int, each: int, batch: int, notice):
        self.path, known = (os.path.join(output, f"{name}_{what}") for what in ("results.jsonl", "settings.json"))
        self.run, self.since, self.total, self.each = Run(output), time.perf_counter(), total, each
        used = json.loads(json.dumps(used))
        try:
            if holder := claim(output, f".{name}{LOCK}"):
                raise UserError(f"output: {output} is in use by {holder}; "
                                "fix: wait for its end, or choose another output")
            old = json.loads(Path(known).read_text(encoding="utf-8")) if os.path.exists(known) else {}
            differing = sorted(key for key in old.keys() | used.keys() if old.get(key) != used.get(key))
            if os.path.exists(self.path) and differing:
                raise UserError(f"output: {output} holds results with other settings ({', '.join(differing)} differ); "
                                "fix: choose another output, or remove them")
            write(known, json.dumps(used, indent=1, ensure_ascii=False) + "\n")
            self.rows = self.whole_rows(batch)
        except (OSError, ValueError) as error:
            raise UserError(f"output: {output} cannot be used ({getattr(error, 'strerror', None) or error}); "
                            "fix: choose another output") from error
        self.first = len(self.rows) // each
        if self.first > total:
            raise UserError(f"output: {output} holds results of {self.first} rows, limit is {total}; "
                            "fix: raise limit, or choose another output")
        if self.first:
            notice(f"{self.path}: {self.first} of {total} rows are done already")
        self.left = [(i, min(i + batch, total)) for i in range(self.first, total, batch)]

    def whole_rows(self, batch: int) -> list[dict]:
        """The file's rows, cut after the last whole batch if some are missing: the rest is then computed as it would have been."""
        with open(self.path, "ab+") as file:
            file.seek(0)
            lines = list(itertools.takewhile(lambda line: line.startswith(b"{") and line.endswith(b"}\n"), file))
        if len(lines) < self.total * self.each:
            del lines[len(lines) - len(lines) % (batch * self.each):]
        os.truncate(self.path, sum(map(len, lines)))
        return [json.loads(line) for line in lines]

    def add(self, rows: list[dict]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise RunError(f"cannot write {self.path} ({error.strerror}); fix: free disk space and run the same command again") from error
        self.rows += rows
        self.show(len(self.rows), line=True)

    def show(self, done: int, line: bool) -> None:
        """Progress, at `done` rows."""
        first, total = self.first * self.each, self.total * self.each
        self.run.console.count("row", done, total, " rows/s", self.since, first, line)


def write(path: str, text: str) -> None:
    """The file is whole or not there."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".tmp", path)
