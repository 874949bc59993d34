"""What evaluate.py and sample.py share: their keys, the prompts, and completions with rewards in files that a
rerun continues."""
import itertools
import json
import os
import re
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

from data.command import as_typed
from data.dataset import load_datasets
from data.errors import RunError, UserError
from data.files import SUFFIXES
from engine.advice import advice
from engine.cast import Columns, Lines, cast, show
from engine.claim import LOCK, claim
from engine.command_line import parse_argv
from engine.config import Common, check_output, config_of, hints_of, is_required, read_values
from engine.definition import modules_in
from engine.evaluation import load_frozen, response_scores
from engine.fingerprint import changed, fingerprints
from engine.help import key_lines
from engine.importance import check_engine, other_engine
from engine.logs import Run, write_whole
from engine.options import (
    Count,
    Generation,
    NonNegative,
    Scoring,
    Seed,
    TwoOrMore,
    stop_strings,
    usual_stop,
)
from engine.reward_models import load_off_the_shelf, reward_model_path
from engine.rollout import Rollout, with_completions
from engine.score import decoded, score_rollout
from engine.yaml_file import read_config
from model.check import check_sampling
from model.load import base_of, load_config, load_tokenizer_for
from model.reward_model import is_reward_model
from model.sampler import sample
from rewards.functions import check_rewards, load_reward, score_all
from rewards.verifiers import golds_of, r1_zero, r1_zero_details

DIGESTS = "digests of "                  # how the settings of a file call what a key names
# keys that change no completion and no score
NOT_COMPARED = (
    "output",
    "dump",
    "limit",
    "rollout_batch_size",
    "vllm_memory",
    "vllm_tensor_parallel",
    "min_reward",
    "reward_timeout",
)


@dataclass(kw_only=True)
class Settings(Generation, Scoring):
    """The keys of evaluate.py and sample.py; those of sampling are the online algorithms'."""
    model: str                             # a run, a model directory (an adapter too) or a hub name
    data: str                              # a file, directory or glob, or a hub dataset as name or name:split
    columns: Columns | None = None         # names of columns, ours: the file's, such as {prompt: Question}
    n: Count = 1                           # completions per prompt
    temperature: NonNegative = 1.0         # sampling temperature; 0 = always the likeliest token
    prompt_template: str | None = "auto"   # a name in data/prompts/ or a file with {question}; null = the
    #                                        chat template; auto = the one that a run was trained with, else
    #                                        r1_zero if the model has no chat template, the rows are
    #                                        questions and the reward is r1_zero
    stop: str | list[str] | None = "auto"  # strings that end a completion: </answer>, </s>. A text is split
    #                                        at its commas, and \n in it is a newline; a list, such as
    #                                        ["\n\n", "Question:"], is taken literally. auto = those that a
    #                                        run was trained with, else </answer> with the template r1_zero
    max_completion_length: Count | None = None    # tokens; longer completions are truncated; null = the one
    #                                             that a run was trained with, else 512, or half of
    #                                             max_length if that is less
    chat_template: str | None = None       # a file, or chatml, llama3, mistral, gemma; null = the model's own
    system_prompt: Lines | None = None     # for conversations without a system turn; null = the one that a
    #                                        run was trained with, else the chat template's
    chat_template_kwargs: dict | None = None     # variables of the template, such as {enable_thinking: false}
    limit: Count | None = None             # use only the first rows of data, this many; null = all
    max_length: TwoOrMore | None = None    # tokens of prompt plus completion; null = the model's own limit
    seed: Seed = 0                         # random seed for sampling
    output: str | None = None              # directory of the results; null = runs/<program>/<model>-<data>

    def __post_init__(self):
        if self.stop != "auto":            # auto is resolved when the run's own configuration is known
            super().__post_init__()


# ---- the command line ------------------------------------------------------------------------------------

def read_settings(argv: list[str], kind: type, program: str):
    """MODEL key=value ... -> an instance of `kind`, or None where --help is asked for. UserError for anything
    wrong."""
    first = argv[0] if argv else ""
    is_assignment = re.match(r"[A-Za-z_][\w.-]*=", first)
    if first and not first.startswith("-") and not is_assignment:
        argv = [f"model={first}", *argv[1:]]
    path, given, flags = parse_argv(argv)
    if "help" in flags:
        return None
    if path is not None or "dry-run" in flags:
        word = show(path or "--dry-run")
        raise UserError(f"{word} in the command line is not an argument of {program}; "
                        "fix: write one MODEL and then key=value")
    hints = hints_of(kind)

    def unknown(key, where):
        return UserError(f"unknown key {show(key)} ({where})" + advice(key, hints, program, program))

    values = read_values(given, hints, unknown)
    for field in fields(kind):
        if field.name not in values and is_required(field):
            raise UserError(f"{field.name} is missing in the command line; "
                            f"fix: python {program} MODEL data=... reward=...")
    settings = kind(**values)
    if settings.output is not None:
        check_output(settings.output, "command line")
    if settings.n > 1 and settings.temperature == 0:
        raise UserError(f"n (command line) is {settings.n}, but at temperature 0 all completions of a prompt "
                        "are the same; fix: give n=1 or a temperature above 0")
    settings.check_engine()
    return settings


def help_text(doc: str, kind: type) -> str:
    """A program's description, and every key with its type, range, default and sentence."""
    return "\n".join([as_typed(doc), "keys:", *key_lines(kind)])


def name_of(data: str) -> str:
    """The name of the result files: gsm8k for gsm8k, openai/gsm8k:test and path/to/gsm8k-test.jsonl."""
    path = data if os.path.exists(data) else data.partition(":")[0]
    name = Path(path).name
    while name.lower().endswith(SUFFIXES):
        name = name.rpartition(".")[0]
    return re.sub(r"(?<=.)[-_.]test$", "", name)


def default_output(folder: str, settings) -> str:
    """runs/<folder>/<model>-<data>."""
    parts = [part for part in Path(settings.model).parts if part not in ("/", "..", "runs")]
    stem = "-".join([*parts[-3:], name_of(settings.data)])
    return os.path.join("runs", folder, stem)


# ---- prompts ---------------------------------------------------------------------------------------------

def with_lengths(settings, path: str):
    """The settings with numbers for max_length and max_completion_length, from the model's limit; for a run
    the second one is that of its training."""
    config = load_config(base_of(path)).get_text_config()
    known = getattr(config, "max_position_embeddings", None) or 2 ** 30
    max_length = settings.max_length or known
    if max_length > known:
        raise UserError(f"max_length is {max_length}, but the model {path} knows only {known} positions; "
                        "fix: lower max_length")
    longest = settings.max_completion_length
    if longest is None:
        trained = training_config(settings.model)
        longest = cast(trained.get("max_completion_length", "null"), int | None)
    longest = longest or min(512, max_length // 2)
    return replace(settings, max_length=max_length, max_completion_length=longest)


def load_examples(settings, kind: str, path: str, tokenizer, notice):
    """The first `limit` examples of the data, and its report."""
    hh = training_config(settings.model).get("hh", Common.hh)      # a run's rows are read as it read them
    common = Common(algorithm="", model=path, data=settings.data, columns=settings.columns, hh=hh,
                    seed=settings.seed, max_length=settings.max_length, system_prompt=settings.system_prompt)
    examples, _, reports = load_datasets(
        common, kind, tokenizer, notice,
        settings.train_on, settings.prompt_template, settings.max_completion_length)
    examples = examples[:settings.limit]
    if kind == "prompts" and settings.reward:
        check_rewards(settings, examples)
    return examples, reports["train"]


def load_prompts(settings, path: str, tokenizer, verifies_r1_zero: bool, notice):
    """(examples of kind "prompts", their report, the settings with prompt_template, system_prompt and stop as
    they are used)."""
    trained = training_config(settings.model)
    is_auto = settings.prompt_template == "auto"
    if is_auto:
        settings = replace(settings, prompt_template=trained_template(trained))
    settings = with_system_prompt(settings)
    notices = []
    examples, report = load_examples(settings, "prompts", path, tokenizer, notices.append)

    has_choice = is_auto and "prompt_template" not in trained and not settings.prompt_template
    # a question is a string only where the model has no chat template
    if has_choice and verifies_r1_zero and all(map(is_plain_question, examples)):
        notices = []
        settings = replace(settings, prompt_template="r1_zero")
        examples, report = load_examples(settings, "prompts", path, tokenizer, notices.append)
    if settings.stop == "auto":
        settings = replace(settings, stop=usual_or_trained_stop(settings.prompt_template, trained))
    for text in [*notices, describe_prompts(settings, examples)]:
        notice(text)
    return examples, report, settings


def with_system_prompt(settings):
    """The settings with the system prompt of the run, where they have none: as in training, strings are turns
    of a conversation then. The chat template in its final/ holds the text already."""
    if settings.system_prompt is not None:
        return settings
    text = training_config(settings.model).get("system_prompt", "null")
    return replace(settings, system_prompt=cast(text, Lines | None))


def training_config(model: str) -> dict:
    """The configuration of a run, named as the run, its final/ or one of its checkpoints; {} where it is not
    a run."""
    path = Path(model)
    folders = [path, path.parent]
    if path.parent.name == "checkpoints":
        folders.append(path.parent.parent)
    for folder in folders:
        config = read_config(str(folder))
        if config:
            return config
    return {}


def uses_reference(trained: dict) -> bool:
    """Whether a run of this configuration was trained with the reference that it names; True where its
    algorithm is not here any more."""
    name = trained["algorithm"]
    if name not in modules_in("algorithms"):
        return True
    config_class = config_of(name)
    hints = hints_of(config_class)
    given = {}
    for key in hints.keys() & trained.keys():
        given[key] = trained[key], "config.yaml"
    values = read_values(given, hints, None)
    return config_class(**values).uses_reference()


def trained_template(trained: dict) -> str | None:
    return cast(trained.get("prompt_template", "null"), str | None)


def usual_or_trained_stop(prompt_template: str | None, trained: dict):
    """The run's own stop strings, where it has some or had the same template; else the template's."""
    stop = cast(trained.get("stop", "null"), str | list[str] | None)
    as_trained = "stop" in trained and prompt_template == trained_template(trained)
    if stop or as_trained:
        return stop
    return usual_stop(prompt_template)


def is_plain_question(example) -> bool:
    return example.extras["prompt"] == example.extras["columns"].get("question")


def describe_prompts(settings, examples: list) -> str:
    """The form of the prompts, the stop strings and the limit of completions, in one line."""
    form = "chat template"
    if settings.prompt_template:
        form = f"prompt_template {settings.prompt_template}"
    elif isinstance(examples[0].extras["prompt"], str):
        form = "plain text"
    strings = [repr(string)[1:-1] for string in stop_strings(settings.stop)]
    stop = f", stop {', '.join(strings)}" if strings else ""
    return f"prompts: {form}{stop}; completions of up to {settings.max_completion_length} tokens"


# ---- completions -----------------------------------------------------------------------------------------

def complete(settings, path: str, name: str, notice) -> tuple[list[dict], dict]:
    """(a row for each of the `n` completions of every prompt, the settings they come from). The rows are
    appended to output/<name>_results.jsonl as they come; rows that are there already are not made again."""
    tokenizer = load_tokenizer_for(settings, path, notice)
    settings = with_lengths(settings, path)
    if is_reward_model(path):
        raise UserError(f"model: {settings.model} is a reward model, which writes no text; "
                        "fix: pass a policy, and this one as reward=")
    rewards = load_reward(settings.reward, settings.reward_weights) if settings.reward else []
    reward_paths = {}
    for reward in rewards:
        if reward.path:
            reward_paths[reward.name] = reward_model_path(reward.path, tokenizer, notice)
    verifies_r1_zero = any(reward.function is r1_zero for reward in rewards)
    examples, report, settings = load_prompts(settings, path, tokenizer, verifies_r1_zero, notice)
    used = used_by(settings, path, report)
    batch = max(1, settings.rollout_batch_size // settings.n)
    results = Results(settings.output, name, used, len(examples), settings.n, batch, notice)

    reward_models = {}
    if results.left:
        policy = load_frozen(path, tokenizer, examples, notice)
        for reward, reward_path in reward_paths.items():
            if is_reward_model(reward_path):
                reward_models[reward] = load_frozen(reward_path, tokenizer, examples, notice)
            else:
                reward_models[reward] = load_off_the_shelf(reward_path, tokenizer)
        draw = sampler_of(policy, tokenizer, examples, settings, notice)
    for first, last in results.left:
        rollout = sample_part(draw, policy, tokenizer, examples[first:last], first, settings, results)
        if rewards:
            with results.run.console.cleared():      # a reward may print
                score_part(rollout, rewards, reward_models, tokenizer, settings.reward_timeout)
        results.add(completion_rows(rollout, first, rewards, verifies_r1_zero, tokenizer))
    return results.rows, used


def sampler_of(policy, tokenizer, examples: list, settings, notice):
    """The function that draws completions, with the signature of model.sampler.sample. Another engine gets
    the weights once: they do not change. UserError where it computes another model with them."""
    if not settings.rollout_engine:
        check_sampling(policy, examples, notice)
        return sample
    prompts = [example.prompt for example in examples]
    longest = max(map(len, prompts)) + settings.max_completion_length
    engine = other_engine(policy, tokenizer, settings, longest, settings.seed, settings.output)
    engine.hand_over(policy)
    check_engine(engine, policy, tokenizer, prompts, settings.seed, settings, notice)
    return engine.draw


def sample_part(draw, policy, tokenizer, examples: list, first: int, settings, results) -> Rollout:
    """`n` completions for each of `examples`, which begin at the data's prompt number `first`."""
    prompts = []
    keys = []
    for number, example in enumerate(examples, start=first):
        prompts.append(example.prompt)
        keys.append((settings.seed, number))

    def report(done, total):
        results.show(first * settings.n + done, line=False)

    completions = draw(policy, tokenizer, prompts, keys, settings.n, settings, report)
    rows = range(first, first + len(examples))
    return Rollout(0, rows, list(map(with_completions, examples, completions)))


def score_part(rollout: Rollout, rewards: list, reward_models: dict, tokenizer, timeout: float) -> None:
    def by_model(reward):
        return response_scores(reward_models[reward.name], rollout.examples)

    score_rollout(rollout, rewards, tokenizer, partial(score_all, timeout=timeout), by_model)


def completion_rows(rollout: Rollout, first: int, rewards: list, verifies_r1_zero: bool, tokenizer):
    """A row per completion; `first` is the number of the rollout's first prompt. A reward is None where the
    function returned None."""
    names = ["rewards"] if rewards else []
    if len(rewards) > 1:
        names += [f"rewards/{reward.name}" for reward in rewards]
    rows = []
    for i, example in enumerate(rollout.examples):
        columns = example.extras["columns"]
        golds = golds_of(columns)
        for k, response in enumerate(example.responses):
            text = decoded(tokenizer, response.tokens)
            metrics = {}
            if verifies_r1_zero:
                details = r1_zero_details(text, golds)
                metrics["format_reward"] = float(details["format"])
                metrics["answer_reward"] = float(details["answer"])
            for name in names:
                value = rollout[name][i][k]
                key = "reward" if name == "rewards" else name
                metrics[key] = None if value.isnan() else float(value)
            row = {
                "id": first + i,
                "sample": k,
                "prompt": example.extras["prompt"],
                "generation": text,
                "gold_answer": golds[0] if len(golds) == 1 else golds or None,
                "metrics": metrics,
                "tokens": len(response.tokens),
                "finished": not example.extras["truncated"][k],
            }
            if columns.get("tools"):           # the chat template wrote them into the prompt
                row["tools"] = columns["tools"]
            if isinstance(columns.get("dataset"), str):      # AlpacaEval's parts
                row["dataset"] = columns["dataset"]
            rows.append(row)
    return rows


# ---- files that a rerun continues ------------------------------------------------------------------------

def used_by(settings, path: str, report: dict) -> dict:
    """What the results depend on, with a digest of every file and model that the keys name."""
    used = asdict(settings)
    for key in NOT_COMPARED:
        used.pop(key, None)
    used["model"] = path
    for key, files in fingerprints(used).items():
        used[DIGESTS + key] = files
    used["data_sha256"] = report["sha256"]
    return used


def differ(key: str, before, after) -> bool:
    """Whether a setting, or the digests of what it names, are others than before."""
    if key.startswith(DIGESTS) and before and after:
        return bool(changed(before, after))
    return before != after


def number(value: float) -> str:
    """A number for a table: a float with four digits, a count whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_text(value) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def as_lines(rows: list[dict]) -> str:
    """One line of JSON per row."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines)


class Results:
    """The rows of output/<name>_results.jsonl: `each` for every one of `total` prompts (or pairs), which are
    done in parts of `batch`. A rerun continues an earlier run's rows after its last whole part, if the
    settings are the same: they are kept in output/<name>_settings.json.

    `rows` are those done, `left` the parts to do, as (first, last + 1)."""

    def __init__(self, output: str, name: str, used: dict, total: int, each: int, batch: int, notice):
        self.output = output
        self.path = os.path.join(output, f"{name}_results.jsonl")
        self.run = Run(output)
        self.since = time.perf_counter()
        self.total = total
        self.each = each
        try:
            self.claim_output(f".{name}{LOCK}")
            self.keep_settings(os.path.join(output, f"{name}_settings.json"), used)
            self.rows = self.whole_rows(batch)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"output: {output} cannot be used ({reason}); "
                            "fix: choose another output") from error
        self.first = len(self.rows) // each
        if self.first > total:
            raise UserError(f"output: {output} holds results of {self.first} rows, limit is {total}; "
                            "fix: raise limit, or choose another output")
        if self.first:
            notice(f"{self.path}: {self.first} of {total} rows are done already")
        self.left = [(start, min(start + batch, total)) for start in range(self.first, total, batch)]

    def claim_output(self, lock: str) -> None:
        holder = claim(self.output, lock)
        if holder:
            raise UserError(f"output: {self.output} is in use by {holder}; "
                            "fix: wait for its end, or choose another output")

    def keep_settings(self, path: str, used: dict) -> None:
        """Write the settings; UserError where there are results of other ones."""
        used = json.loads(json.dumps(used))
        old = {}
        if os.path.exists(path):
            old = json.loads(Path(path).read_text(encoding="utf-8"))
        keys = sorted(old.keys() | used.keys())
        differing = [key for key in keys if differ(key, old.get(key), used.get(key))]
        if differing and os.path.exists(self.path):
            named = ", ".join(differing)
            raise UserError(f"output: {self.output} holds results with other settings ({named} differ); "
                            "fix: choose another output, or remove them")
        write_whole(path, as_text(used))

    def whole_rows(self, batch: int) -> list[dict]:
        """The file's rows. If some are missing, it is cut after its last whole part: the rest is then
        computed as it would have been."""
        with open(self.path, "ab+") as file:
            file.seek(0)
            lines = list(itertools.takewhile(is_whole, file))
        if len(lines) < self.total * self.each:
            beyond = len(lines) % (batch * self.each)
            del lines[len(lines) - beyond:]
        os.truncate(self.path, len(b"".join(lines)))
        return list(map(json.loads, lines))

    def add(self, rows: list[dict]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(as_lines(rows))
        except OSError as error:
            raise RunError(f"cannot write {self.path} ({error.strerror}); "
                           "fix: free disk space and run the same command again") from error
        self.rows += rows
        self.show(len(self.rows), line=True)

    def show(self, done: int, line: bool) -> None:
        """Show that `done` rows are done."""
        first = self.first * self.each
        total = self.total * self.each
        self.run.console.count("row", done, total, " rows/s", self.since, first, line)


def is_whole(line: bytes) -> bool:
    return line.startswith(b"{") and line.endswith(b"}\n")
