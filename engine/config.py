"""Configuration: defaults < YAML file < command line, flat keys, every value cast by its field's type."""
import glob
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import yaml

from data.errors import UserError
from engine.advice import advice, is_secret, nested_advice, same
from engine.cast import Columns, Lines, Name, cast, nearest, ranges_of, show
from engine.command_line import parse_argv
from engine.definition import class_of, defines, modules_in
from engine.options import (
    Count,
    NonNegative,
    Options,
    Positive,
    Range,
    Seed,
    Share,
    TwoOrMore,
    Whole,
)
from engine.trackers import check_trackers
from engine.yaml_file import Nested, read_yaml

ROOT = Path(__file__).resolve().parents[1]
Warmup = Annotated[NonNegative, Range("a share below 1 or a whole number of updates",
                                      lambda x: x < 1 or x == int(x))]


@dataclass
class Common:
    """The keys of every algorithm. `python train.py --help` prints the comments."""
    algorithm: Name                        # a file in algorithms/, such as sft or dpo
    model: str                             # start model: a directory, a name on the Hugging Face hub, or
    #                                        modelscope:owner/name; its tokenizer is used
    data: str | list                       # training data: a file, directory or glob (data/local.py), a hub
    #                                        dataset as name, name:split or name/subset:split, or a list of
    #                                        these (data/sources.py)
    eval_data: str | list | None = None    # evaluation data, in the same forms as data
    eval_fraction: Share = 0.0             # share of data held out for evaluation; not with eval_data
    columns: Columns | None = None         # names of columns, ours: the file's, such as {prompt: Question},
    #                                        in all data that have no columns of their own
    output: str | None = None              # the run's directory; null = runs/<name of the YAML file>
    truncate: Literal["none", "prompt"] = "none"     # examples over max_length: none = drop them, prompt =
    #                                        keep the end of the prompt
    hh: Literal["messages", "text"] = "messages"     # HH transcripts: as chat messages where there is a
    #                                        template, or as raw text
    chat_template: str | None = None       # a file, or chatml, llama3, mistral, gemma; null = the tokenizer's
    system_prompt: Lines | None = None     # system turn of conversations that have none; prompts that are
    #                                        strings become conversations then
    chat_template_kwargs: dict | None = None     # variables of the template, such as {enable_thinking: false}
    seed: Seed = 0                         # random seed for data order, sampling and new weights
    shuffle: bool = True                   # false = the order of the file
    batch_size: Count = 32                 # examples per update, over all devices (online: prompts per
    #                                        rollout)
    micro_batch_tokens: TwoOrMore = 8192   # tokens per forward on one device; affects memory and speed, not
    #                                        the result
    max_length: TwoOrMore = 1024           # limit in tokens for a prompt with one response
    share_prompt: Literal["auto", "true", "false"] = "auto"    # compute a prompt once for all its responses,
    #                                        and once what all prompts of a micro-batch begin with
    epochs: Count = 1                      # passes over data
    max_steps: Count | None = None         # number of updates; wins over epochs
    lr: Positive = 1e-6                    # peak learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"    # lr after the warmup; linear and cosine
    #                                        end at 0
    warmup: Warmup = 0.1                   # below 1: share of all updates; from 1: number of updates
    weight_decay: NonNegative = 0.0        # AdamW's weight decay, decoupled from the gradient
    max_grad_norm: Positive = 1.0          # gradients are scaled down to this norm
    precision: Literal["auto", "fp32", "bf16"] = "auto"    # matmul precision; auto = bf16 on CUDA, else fp32
    attn_implementation: Literal["auto", "segments", "varlen", "dense", "plain"] = "auto"    # segments: flat
    #                                        rows, memory linear in the length; varlen: the same, one call
    #                                        per layer; dense: a (T, T) mask; plain: a row per response, for
    #                                        every LM; auto: varlen on CUDA in bf16, else segments, if exact,
    #                                        else plain
    compile: Literal["auto", "true", "false"] = "auto"    # decoder layers by torch.compile (with varlen);
    #                                        auto = on CUDA, in runs of 200 updates or more
    router_aux_loss_coef: NonNegative | None = None    # weight of the load-balancing loss of a mixture of
    #                                        experts; null = as its configuration says
    lora_r: Whole = 0                      # LoRA rank (8-64); 0 = full fine-tuning
    lora_alpha: Positive | None = None     # LoRA scale is lora_alpha / lora_r; null = 2 * lora_r
    lora_dropout: Share = 0.0              # LoRA dropout (sft and dft only)
    lora_targets: str = "all-linear"       # layers that get an adapter: all linear ones but the head, or
    #                                        names such as q_proj,v_proj
    load_in_4bit: bool = False             # QLoRA: frozen weights in 4 bits, through bitsandbytes (CUDA)
    merge: bool = False                    # true = final/ is a plain model with the adapter added; false =
    #                                        final/ is the adapter
    gradient_checkpointing: bool = False   # recompute layers in backward: less memory, slower
    replicate: Count = 1                   # copies of the sharded model, such as one per machine; 1 = one
    #                                        over all devices
    deterministic: bool = False            # bit-identical reruns on CUDA too, slower
    eval_every: Count | None = None        # updates between evaluations; null = ten times per run
    save_every: Count | None = 500         # updates between checkpoints; null = only when a signal stops
    #                                        the run
    save_dtype: Literal["fp32", "bf16"] = "fp32"     # dtype of final/; checkpoints are always fp32
    keep: TwoOrMore = 2                    # newest checkpoints that stay on disk
    resume: str = "auto"                   # auto = continue an unfinished run in output, never, or a
    #                                        checkpoint's directory
    log_every: Count = 1                   # updates between lines of metrics
    sample_every: Count | None = None      # updates between responses in samples.jsonl; null = none offline,
    #                                        online ten times in a run
    report_to: str | list[str] | None = None     # trackers that get the rows of metrics.jsonl, too: one or
    #                                        more of tensorboard, wandb, swanlab, trackio
    quiet: bool = False                    # no progress bar and no lines of updates: only notices, warnings
    #                                        and the summary
    show_samples: bool = False             # print these responses, online with their rewards


class RunConfig(NamedTuple):
    """What `load_config` returns."""
    common: Common
    config: Options          # instance of the algorithm's Config
    sources: dict[str, str]  # key -> "default", "example/x.yml:3" or "command line"
    flags: set[str]          # "dry-run" and "debug", as far as given
    stem: str = ""           # the run's default name: x for x.yml and for runs/x/config.yaml


def load_config(argv: list[str]) -> RunConfig:
    """Read the command line (without the program's name) and the YAML file it names. UserError for anything
    wrong."""
    return load_parsed(*parse_argv(argv))


def load_parsed(path: str | None, overrides: dict, flags: set[str]) -> RunConfig:
    """The same for what `parse_argv` returns."""
    if path is None:
        raise UserError("no config file in the command line; fix: python train.py example/tiny-dpo.yml")
    given = read_given(path, overrides)
    name = algorithm_of(given, path)
    config_class = config_of(name)
    own_hints = hints_of(config_class)
    hints = hints_of(Common) | own_hints
    values = read_values(given, hints, lambda key, where: unknown_key(key, where, name, hints))
    for field in fields(Common) + fields(config_class):
        if field.name not in values and is_required(field):
            raise UserError(f"{field.name} is missing in {path}; "
                            f"fix: add the line '{field.name}: ...' (explained by --help)")
    own_values = {key: values.pop(key) for key in own_hints if key in values}
    sources = {}
    for key in hints:
        sources[key] = given[key][1] if key in given else "default"
    common = Common(**values)
    check_common(common, sources)
    config = make_config(config_class, own_values, common, sources)
    check_dropout(common, config, sources)
    return RunConfig(common, config, sources, flags, stem_of(path))


def read_given(path: str | None, overrides: dict) -> dict[str, tuple]:
    """{key: (value, where)} of the YAML file and the command line."""
    given = read_yaml(path) if path else {}
    hints = hints_of(Common)
    for key, (value, where) in given.items():
        if isinstance(value, Nested):
            takes_it = value.mapping is not None and hints.get(key) in (dict | None, Columns | None)
            if not takes_it:
                raise nested(key, where, value.names)
        elif isinstance(value, list) and key not in hints and key not in all_keys():
            raise nested(key, where)
    return given | overrides


def read_values(given: dict, hints: dict, unknown) -> dict:
    """The values of `given`, {key: (text, where)}, cast to the types in `hints` and within their ranges.
    UserError; for a key that is not in `hints` the one that `unknown(key, where)` returns."""
    values = {}
    for key, (text, where) in given.items():
        if key not in hints:
            raise unknown(key, where)
        values[key] = read_value(key, text, where, hints[key])
    return values


def read_value(key: str, text, where: str, kind):
    if text is None:
        value = "true" if kind is bool else "VALUE"
        raise UserError(f"--{key} ({where}) has no value; fix: write {key}={value}")
    if isinstance(text, list) and not {list, list[str]}.intersection(get_args(kind)):
        raise nested(key, where)
    if isinstance(text, Nested):
        text = text.mapping
    try:
        value = cast(text, kind)
    except ValueError as error:
        raise UserError(f"{key} ({where}) is {show(text)}; fix: give {error}") from None
    for wanted, test in ranges_of(kind):
        if value is not None and not test(value):
            raise UserError(f"{key} ({where}) is {value}; fix: give {wanted}")
    return value


def hints_of(config_class: type) -> dict[str, Any]:
    """The type of every field, with its ranges."""
    hints = get_type_hints(config_class, include_extras=True)
    return {field.name: hints[field.name] for field in fields(config_class)}


def is_required(field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def stem_of(path: str) -> str:
    file = Path(path)
    return file.resolve().parent.name if file.name == "config.yaml" else file.stem


# ---- algorithms

def algorithm_names() -> list[str]:
    """The files in algorithms/ with a Config; others are helpers, or not finished."""
    return [name for name in modules_in("algorithms") if defines(f"algorithms.{name}", "Config")]


def config_of(algorithm: str) -> type[Options]:
    """The Config of algorithms/<algorithm>.py, without the rest of the file: torch is not imported."""
    file = f"algorithms/{algorithm}.py"
    try:
        found = class_of(f"algorithms.{algorithm}", "Config")
    except SyntaxError as error:
        where = f"{error.filename}:{error.lineno}"
        raise UserError(f"{where} is not Python ({error.msg}); fix: correct the file") from error
    except AttributeError as error:
        raise UserError(f"{file} has no class Config; "
                        "fix: add one, a dataclass with the algorithm's keys") from error
    if "__dataclass_fields__" not in vars(found):
        raise UserError(f"Config in {file} is no dataclass; fix: write @dataclass above it")
    if not issubclass(found, Options):
        raise UserError(f"Config in {file} lacks what the engine asks every algorithm; "
                        "fix: write class Config(Options), and from engine.options import Options")
    for field in fields(found):
        if field.name in Common.__annotations__:
            raise UserError(f"Config in {file} has the key {field.name}, which every algorithm has; "
                            "fix: give it another name")
    return found


def all_configs() -> dict[str, type[Options]]:
    """The Config of every algorithm; a file that cannot be read does not stop another one's run."""
    configs = {}
    for name in algorithm_names():
        try:
            configs[name] = config_of(name)
        except Exception:  # noqa: BLE001  statements of the user's file run: anything may be raised
            continue
    return configs


def all_keys() -> set[str]:
    keys = set(hints_of(Common))
    for config_class in all_configs().values():
        keys.update(hints_of(config_class))
    return keys


def algorithm_of(given: dict, path: str | None) -> str:
    """The algorithm that the configuration names. UserError where algorithms/ has no such file."""
    name, where = given.get("algorithm", ("", path))
    if isinstance(name, list):
        raise nested("algorithm", where)
    if name in modules_in("algorithms"):
        return name
    if not name:
        for key, (_, place) in given.items():
            if same(key, ["algorithm"], ""):
                raise UserError(f"unknown key {show(key)} ({place}); fix: write algorithm")
    known = algorithm_names()
    state = show(name) if name else "missing"
    fix = nearest(name or "", known) or "one of them"
    raise UserError(f"algorithm ({where}) is {state}, algorithms/ holds {', '.join(known)}; fix: give {fix}")


# ---- what is wrong

def nested(key: str, where: str, names: tuple | list = ()) -> UserError:
    """`names`: the dotted names of the values below the key."""
    return UserError(f"nested value of {show(key)} in {where}{nested_advice(key, names, all_keys())}")


def unknown_key(key: str, where: str, algorithm: str, known) -> UserError:
    """For a secret (its value is never echoed), another algorithm's key, another project's name, or a
    misspelling."""
    if is_secret(key):
        return UserError(f"{show(key)} ({where}) is a secret, which must not be in a config; "
                         "fix: remove it and set the environment variable HF_TOKEN")
    configs = all_configs()
    users = [name for name in configs if key in hints_of(configs[name])]
    fault = f"unknown key {show(key)} ({where})"
    if users:
        fault = f"{key} ({where}) is used by {', '.join(users)}, not by {algorithm}"
    return UserError(fault + advice(key, known, algorithm))


def make_config(config_class: type, values: dict, common: Common, sources: dict[str, str]) -> Options:
    """The checked Config. Its own errors begin with a key: the key's place is added."""
    try:
        config = config_class(**values)
        config.check(common)
        return config
    except UserError as error:
        key, _, rest = str(error).partition(" ")
        if key not in sources:
            raise
        raise UserError(f"{key} ({sources[key]}) {rest}") from None


def check_common(common: Common, sources: dict[str, str]) -> None:
    if common.output is not None:
        check_output(common.output, sources["output"])
    if common.eval_data is not None and common.eval_fraction > 0:
        raise UserError(f"eval_fraction ({sources['eval_fraction']}) cannot be used with eval_data; "
                        "fix: remove one of them")
    check_trackers(common.report_to, sources["report_to"])
    check_lora(common, sources)


def check_output(output: str, where: str) -> None:
    """Refuse a directory that no run may be written into. Whether it is empty or a run is checked
    elsewhere."""
    refused = Path(output).resolve() in (ROOT, *ROOT.parents, Path(os.path.expanduser("~")))
    for part in Path(output).parts:
        if part == ".." or part.startswith("~") or len(os.fsencode(part)) > 255:
            refused = True
    if refused:
        raise UserError(f"output ({where}) is {show(output)}; fix: write a path such as runs/my-run, without "
                        "'..' and '~', with names of at most 255 bytes, and not the home directory, the "
                        "repository or a directory above it")


def check_lora(common: Common, sources: dict[str, str]) -> None:
    """Refuse keys of LoRA where nothing is LoRA: neither `lora_r` is given nor is the start model an adapter
    or a run with one."""
    if common.lora_r > 0:
        return
    needing_r = ["lora_alpha", "lora_targets"]
    if not has_adapter(common.model):
        needing_r += ["lora_dropout", "load_in_4bit", "merge"]
    for key in needing_r:
        if getattr(common, key) != getattr(Common, key):
            raise UserError(f"{key} ({sources[key]}) belongs to LoRA, which lora_r turns on; "
                            f"fix: add lora_r: 16, or remove {key}")


def has_adapter(model: str) -> bool:
    for folder in ("", "final", "checkpoints/*"):
        if glob.glob(os.path.join(glob.escape(model), folder, "adapter_config.json")):
            return True
    return False


def check_dropout(common: Common, config: Options, sources: dict[str, str]) -> None:
    if common.lora_dropout > 0 and not config.allows_dropout:
        raise UserError(f"lora_dropout ({sources['lora_dropout']}) acts in algorithms with allows_dropout = "
                        f"True only: {common.algorithm} compares log-probs, which dropout makes random; "
                        "fix: remove it")


# ---- writing it back

class Dumper(yaml.SafeDumper):
    """Texts of several lines as "one\\ntwo", on one line."""

    def represent_str(self, text):
        return self.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\n" in text else None)


Dumper.add_representer(str, Dumper.represent_str)


def dump(value, **options) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf, **options)


def as_yaml(common: Common, config: Options) -> str:
    """The resolved configuration as flat YAML, one key per line, that `load_config` reads back to equal
    values."""
    return dump(asdict(common) | asdict(config))


def describe(run_config: RunConfig) -> list[str]:
    """Lines "key = value   (where it comes from)" for --dry-run."""
    lines = []
    for key, value in (asdict(run_config.common) | asdict(run_config.config)).items():
        shown = dump([value], default_flow_style=True).strip()[1:-1]
        lines.append(f"{f'{key} = {shown}':<40}   ({run_config.sources[key]})")
    return lines
