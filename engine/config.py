"""Configuration: defaults < YAML file < command line, flat keys, every value cast by its field's type.

    python train.py example/tiny-dpo.yml [key=value ...] [--dry-run] [--debug] [--help]

key=value, --key=value, --key value and --overrides key=value ... mean the same. --dry-run prints the resolved
configuration and does not train; --debug shows an error's traceback. Values are read as text and cast here:
YAML would make 5e-7 a string and `no` a bool.
"""
import difflib
import glob
import importlib
import inspect
import json
import math
import os
import pkgutil
import re
import sys
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NewType, Union, get_args, get_origin, get_type_hints

import yaml

from data.errors import UserError
from data.sources import read_sources
from engine.advice import SECRET, advice, is_secret, nested_advice, same
from engine.definition import class_of

Lines = NewType("Lines", str)      # text of one or more lines


@dataclass
class Common:
    """The keys every algorithm shares. The comments are what `python train.py --help` prints."""
    algorithm: str                         # a file in algorithms/, such as sft or dpo
    model: str                             # start model: a directory or a name on the Hugging Face hub; its tokenizer is used
    data: str | list                       # training data: a file, a hub dataset as name or name:split, or a list (data/sources.py)
    eval_data: str | list | None = None    # evaluation data, in the same forms as data
    eval_fraction: float = 0.0             # share of data held out for evaluation; not together with eval_data
    output: str | None = None              # the run's directory; null = runs/<name of the YAML file>
    truncate: Literal["none", "prompt"] = "none"     # examples over max_length: none = drop, prompt = keep the prompt's end
    hh: Literal["messages", "text"] = "messages"     # HH transcripts: as chat messages where there is a template, or raw text
    chat_template: str | None = None       # a file, or chatml, llama3, mistral, gemma; null = the tokenizer's
    system_prompt: Lines | None = None     # of conversations without a system turn; strings become these then
    chat_template_kwargs: dict | None = None     # variables of the template, such as {enable_thinking: false}
    seed: int = 0                          # of data order, sampling and initialisation
    shuffle: bool = True                   # false = the order of the file
    batch_size: int = 32                   # examples per update, over all devices (online: prompts per rollout)
    micro_batch_tokens: int = 8192         # tokens per forward on one device: memory and speed, not the result
    max_length: int = 1024                 # tokens, a prompt and one response together
    share_prompt: Literal["auto", "true", "false"] = "auto"    # compute a prompt once for all its responses
    epochs: int = 1                        # passes over data
    max_steps: int | None = None           # number of updates; wins over epochs
    lr: float = 1e-6                       # peak learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"    # of lr after the warmup; linear and cosine end at 0
    warmup: float = 0.1                    # below 1: share of all updates; from 1: number of updates
    weight_decay: float = 0.0              # AdamW's, decoupled from the gradient
    max_grad_norm: float = 1.0             # gradients are scaled down to this norm
    precision: Literal["auto", "fp32", "bf16"] = "auto"        # of the arithmetic; auto = bf16 on CUDA, fp32 on CPU
    attn_implementation: Literal["segments", "dense"] = "segments"    # segments: memory linear in length; dense: a (T, T) mask
    lora_r: int = 0                        # rank of LoRA's matrices, which are all that is trained (8 to 64); 0 = every weight is
    lora_alpha: float | None = None        # their output is scaled by lora_alpha / lora_r; null = 2 * lora_r
    lora_dropout: float = 0.0              # of their input while training; sft and dft only
    lora_targets: str = "all-linear"       # layers with them: all linear ones but the head, or names such as q_proj,v_proj
    load_in_4bit: bool = False             # QLoRA: the frozen weights in 4 bits, through bitsandbytes (CUDA)
    merge: bool = False                    # true = final/ is a plain model with the adapter added; false = it is the adapter
    gradient_checkpointing: bool = False   # recompute layers in backward: less memory, slower
    deterministic: bool = False            # bit-identical reruns on CUDA too, slower
    eval_every: int | None = None          # updates between evaluations; null = ten times per run
    save_every: int | None = 500           # updates between checkpoints; null = only when a signal stops the run
    save_dtype: Literal["fp32", "bf16"] = "fp32"     # dtype of final/; checkpoints are always fp32
    keep: int = 2                          # newest checkpoints that stay on disk
    resume: str = "auto"                   # auto = continue an unfinished run in output, never, or a checkpoint's directory
    log_every: int = 1                     # updates between lines of metrics
    sample_every: int | None = None        # updates between printed sample responses; null = none


class Run(NamedTuple):
    """What `load_config` returns; `common` and `config` are None where "help" is in `flags`."""
    common: Common
    config: Any              # instance of the algorithm's Config
    sources: dict[str, str]  # key -> "default", "example/x.yml:3" or "command line"
    flags: set[str]          # of "help", "dry-run", "debug"
    stem: str = ""           # the run's default name: of x.yml and of runs/x/config.yaml it is x


ROOT = Path(__file__).resolve().parents[1]
YAML = (".yml", ".yaml")
FLAGS = {"--help": "help", "-h": "help", "--dry-run": "dry-run", "--debug": "debug"}
BOOL = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NUMBER = re.compile(r"-\.?\d")         # how a negative one begins
REFERS = re.compile(r"\$\{(\w+)[\w.]*\}")     # ${exp_name} stands for that key's value in other projects
RANGES = [    # what a number must be, its test, the keys; None passes
    ("a number above 0", lambda x: x > 0, "lr max_grad_norm lora_alpha beta desirable_weight undesirable_weight temperature epsilon "
     "epsilon_high cliprange cliprange_value reward_timeout"),
    ("a number of 0 or more", lambda x: x >= 0, "weight_decay warmup rpo_alpha cpo_alpha simpo_gamma center_rewards_coefficient kl_coef "
     "vf_coef"),
    ("a number above 0, up to 1", lambda x: 0 < x <= 1, "top_p gamma"),
    ("a number from 0 to 1", lambda x: 0 <= x <= 1, "lam"),
    ("a share below 1 or a whole number of updates", lambda x: x < 1 or x == int(x), "warmup"),
    ("a share from 0 to below 1", lambda x: 0 <= x < 1, "eval_fraction lora_dropout"),
    ("a share from 0 to 0.5", lambda x: 0 <= x <= 0.5, "label_smoothing"),
    ("a whole number of 0 or more", lambda x: x >= 0, "lora_r top_k max_resample_times soft_overlong_cache num_sample_generations"),
    ("a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32, "seed"),
    ("1 or more", lambda x: x >= 1, "batch_size epochs max_steps eval_every save_every log_every sample_every num_iterations "
     "num_mini_batches num_ppo_epochs rollout_batch_size max_completion_length n limit"),
    ("2 or more", lambda x: x >= 2, "micro_batch_tokens max_length keep num_generations"),
]

ALIASES = {"local_rollout_forward_batch_size": "rollout_batch_size"}      # TRL's names of keys that mean the same here


def load_config(argv: list[str]) -> Run:
    """Read the command line (without the program's name) and the YAML file it names. UserError for anything wrong."""
    path, overrides, flags = parse_argv(argv)
    if "help" in flags:
        return Run(None, None, {}, flags)
    if path is None:
        raise UserError("no config file in the command line; fix: python train.py example/tiny-dpo.yml")
    given, known = read_yaml(path) | overrides, algorithm_names()
    name, where = given.get("algorithm", ("", path))
    if isinstance(name, list):
        raise nested("algorithm", where)
    if name not in known:
        raise no_algorithm(name or "", where, given, known)
    config_class = config_of(name)
    hints = get_type_hints(Common) | get_type_hints(config_class)
    all_fields = fields(Common) + fields(config_class)
    assert len(hints) == len(all_fields), f"{config_class} repeats a key of Common"
    # grpo needs no reference then, where others would divide by 0 or learn nothing; reinforce_pp needs no group
    allowed = {"grpo": ("beta", 0), "reinforce_pp": ("num_generations", 1)}.get(name)
    values = read_values(given, hints, lambda key, where: unknown_key(key, where, name, hints), allowed)
    for field in all_fields:
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{field.name} is missing in {path}; fix: add the line '{field.name}: ...' (explained by --help)")
    config = config_class(**{key: values.pop(key) for key in get_type_hints(config_class) if key in values})
    common = Common(**values)
    sources = {key: given[key][1] if key in given else "default" for key in hints}
    if common.output is not None:
        check_output(common.output, sources["output"])
    if common.eval_data is not None and common.eval_fraction > 0:
        raise UserError(f"eval_fraction ({sources['eval_fraction']}) cannot be used with eval_data; fix: remove one of them")
    if getattr(config, "num_mini_batches", 1) > common.batch_size:
        raise UserError(f"num_mini_batches ({sources['num_mini_batches']}) is {config.num_mini_batches}, more than the "
                        f"{common.batch_size} prompts of a rollout; fix: raise batch_size")
    check_lora(common, sources)
    stem = Path(path).resolve().parent.name if Path(path).name == "config.yaml" else Path(path).stem
    return Run(common, config, sources, flags, stem)


def no_algorithm(name: str, where: str, given: dict, known: list[str]) -> UserError:
    """For an algorithm that is missing, has another project's name for `algorithm`, or is none of the `known`
    ones."""
    other = next((key for key in given if same(key, ["algorithm"], "")), None)
    if not name and other:
        return UserError(f"unknown key {show(other)} ({given[other][1]}); fix: write algorithm")
    state = show(name) if name else "missing"
    return UserError(f"algorithm ({where}) is {state}, algorithms/ holds {', '.join(known)}; "
                     f"fix: give {nearest(name, known) or 'one of them'}")


def parse_argv(argv: list[str]) -> tuple[str | None, dict[str, tuple[str | None, str]], set[str]]:
    """-> (path of the YAML file or None, {key: (text, "command line")}, flags). The text of a `--key` without
    a value is None."""
    path, overrides, flags, words = None, {}, set(), list(argv)
    while words:
        word = words.pop(0)
        assignment = re.fullmatch(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", word, re.DOTALL)
        option = re.fullmatch(r"--([A-Za-z_][\w.-]*)", word)
        if word in FLAGS:
            flags.add(FLAGS[word])
        elif word == "--overrides":    # which needs no handling: key=value words follow
            continue
        elif assignment or option and not nearest(option[1], FLAGS.values()):
            key, text = assignment.groups() if assignment else (option[1], value_of(words))
            key = name_of(key)
            if key in overrides:
                print(f"note: {key} is given more than once on the command line; the last one is used", file=sys.stderr)
            overrides[key] = text, "command line"
        elif not word.startswith("-") and (word.endswith(YAML) or os.path.exists(word)):
            if path is not None:
                raise UserError(f"two config files in the command line, {show(path)} and {show(word)}; fix: give one")
            path = word
        else:
            name = word.lstrip("-").replace("-", "_")
            flag, form = nearest(name, FLAGS.values()), f"{name}=VALUE" if name.isidentifier() else "key=value, such as lr=2e-5"
            raise UserError(f"{show(word)} in the command line is neither a .yml file nor key=value; "
                            f"fix: write {f'--{flag}' if flag else form}")
    return path, overrides, flags


def value_of(words: list[str]) -> str | None:
    """Take the value of a `--key` off the words that follow it. None where the next word is none: an option,
    key=value or the YAML file."""
    following = words[0] if words else "-"
    is_option = following.startswith("-") and not NUMBER.match(following)
    is_other = re.match(r"[A-Za-z_][\w.-]*=", following) or following.endswith(YAML)
    return None if is_option or is_other else words.pop(0)


def name_of(key: str) -> str:
    """A key as it is called here: with _ for -, and ours for an alias."""
    key = key.replace("-", "_")
    return ALIASES.get(key, key)


def read_values(given: dict, hints: dict, unknown, allowed: tuple | None = None) -> dict:
    """The values of `given`, {key: (text, where)}, cast to the types in `hints` and within RANGES; the pair (key, value) `allowed` is
    outside them. UserError; of a key that is not in `hints` the one that `unknown(key, where)` returns."""
    values = {}
    for key, (text, where) in given.items():
        if key not in hints:
            raise unknown(key, where)
        if text is None:
            value = "true" if hints[key] is bool else "VALUE"
            raise UserError(f"--{key} ({where}) has no value; fix: write {key}={value}")
        if isinstance(text, list) and not {list, list[str]} & {*get_args(hints[key])}:
            raise nested(key, where)
        try:
            values[key] = cast(text, hints[key])
        except ValueError as error:
            raise UserError(f"{key} ({where}) is {show(text)}; fix: give {error}") from None
    for wanted, test, keys in RANGES:
        for key in keys.split():
            if values.get(key) is not None and (key, values[key]) != allowed and not test(values[key]):
                raise UserError(f"{key} ({given[key][1]}) is {values[key]}; fix: give {wanted}")
    return values


def read_yaml(path: str) -> dict[str, tuple[str, str]]:
    """A flat YAML mapping as {key: (text as written, or data's list of sources, "path:line")}. Nothing is constructed, so no YAML
    tag can run code."""
    file = Path(path)
    if not file.is_file():
        others = {p.name: p for folder in (Path("example"), file.parent) for p in folder.glob("*.y*ml")}
        near = others.get(nearest(file.name, others))
        raise UserError(f"config file {show(path)} {'is a directory' if file.is_dir() else 'does not exist'}; "
                        f"fix: {f'python train.py {near}' if near else 'give the path of a .yml file'}")
    try:
        raw = file.read_bytes()
        content = text = raw.decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; fix: check its permissions") from None
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise UserError(f"text that is not UTF-8 in {path}:{line}; fix: save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise syntax_error(error, path, text) from None
    except RecursionError:
        raise UserError(f"deeply nested values in {path}; fix: keys are flat, write one 'key: value' per line") from None
    if root is None or root.value == "":    # the second: only '---'
        raise UserError(f"empty config file {path}; fix: add lines such as 'algorithm: dpo'")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} is not a mapping; fix: write 'key: value' lines, with a space after the colon")
    found = {}
    for key_node, value_node in root.value:
        key, where = key_node.value, f"{path}:{key_node.start_mark.line + 1}"
        key = name_of(key) if isinstance(key_node, yaml.ScalarNode) else key
        if key in ("data", "eval_data") and isinstance(value_node, yaml.SequenceNode):
            text = read_sources(value_node, key, path)
        elif not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"nested value of {show(str(key))} in {where}; "
                            "fix: keys are flat, write one 'key: value' per line")
        elif is_list_of_texts(value_node) and key in all_keys():      # some keys take one
            text = [node.value for node in value_node.value]
        elif isinstance(value_node, yaml.MappingNode) and get_type_hints(Common).get(key) == dict | None:
            start, end = value_node.start_mark, value_node.end_mark
            # `cast` reads it, with numbers and booleans
            text = " " * start.column + content[start.index:end.index]
        elif not isinstance(value_node, yaml.ScalarNode):
            raise nested(key, where, leaves(value_node))
        else:
            text = "" if (value_node.value, value_node.style) == ("~", None) else value_node.value    # ~ is YAML's null
        if key in found:
            raise UserError(f"duplicate key {show(key)} in {where}, first in {found[key][1]}; fix: remove one")
        found[key] = text, where
    check_references(found)
    return found


def is_list_of_texts(node: yaml.Node) -> bool:
    is_list = isinstance(node, yaml.SequenceNode)
    return is_list and all(isinstance(item, yaml.ScalarNode) for item in node.value)


def nested(key: str, where: str, names: tuple = ()) -> UserError:
    """`names`: the dotted names of the values below the key."""
    return UserError(f"nested value of {show(key)} in {where}{nested_advice(key, names, all_keys())}")


def check_references(found: dict) -> None:
    """UserError where a value holds ${other key}."""
    for key, (text, where) in found.items():
        other = REFERS.search(text) if isinstance(text, str) else None
        if other and name_of(other[1]) in found:
            raise UserError(f"{key} ({where}) is {show(text)}, but the value of {other[1]} is not put there; "
                            "fix: write the value itself")


def leaves(node: yaml.Node) -> list[str]:
    """The dotted names of the scalars below a YAML node: ["optim.lr"] of {optim: {lr: 1}}; [] of a scalar."""
    names = []
    if isinstance(node, yaml.SequenceNode):
        for element in node.value:
            names += leaves(element)
    for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else []:
        below = leaves(value_node)
        names += [f"{key_node.value}.{name}" for name in below] or [str(key_node.value)]
    return names


def syntax_error(error: yaml.YAMLError, path: str, text: str) -> UserError:
    """PyYAML's error in one line: file:line:column, what, the offending line and a hint."""
    if isinstance(error, yaml.reader.ReaderError):
        return UserError(f"control character in {path}:{text.count(chr(10), 0, error.position) + 1}; fix: remove it")
    lines, mark = text.splitlines() + [""], error.problem_mark
    if error.context == "while scanning a simple key":    # the problem's mark is already on the next line
        mark = error.context_mark
    unspaced = [i for i in (mark.line, mark.line - 1) if re.match(r"\s*[\w-]+:[^\s:/]", lines[max(i, 0)])]
    hint = (f"put a space after the colon in line {unspaced[0] + 1}" if unspaced
            else "replace the tab by spaces" if "\t" in lines[mark.line] else "put unusual values in quotes")
    near = "a line with a secret" if SECRET.search(lines[mark.line]) else show(lines[mark.line].strip())
    return UserError(f"invalid YAML in {path}:{mark.line + 1}:{mark.column + 1}: {error.problem} in {near}; fix: {hint}")


def algorithm_names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(importlib.import_module("algorithms").__path__) if m.name[0] != "_")


def config_of(algorithm: str) -> type:
    """The Config of algorithms/<algorithm>.py, without the rest of the file: torch is not imported."""
    try:
        found = class_of(f"algorithms.{algorithm}", "Config")
        if not is_dataclass(found):
            raise UserError(f"Config in algorithms/{algorithm}.py is no dataclass; "
                            "fix: write @dataclass above it")
        return found
    except SyntaxError as error:
        where = f"{error.filename}:{error.lineno}"
        raise UserError(f"{where} is not Python ({error.msg}); fix: correct the file") from error
    except AttributeError as error:
        raise UserError(f"algorithms/{algorithm}.py has no class Config; "
                        "fix: add one, a dataclass with the algorithm's keys") from error


def all_keys() -> set[str]:
    """Every key of every algorithm."""
    keys = {field.name for field in fields(Common)}
    for name in algorithm_names():
        keys |= {field.name for field in fields(config_of(name))}
    return keys


def unknown_key(key: str, where: str, algorithm: str, known) -> UserError:
    """For a secret (its value is never echoed), another algorithm's key, another project's name, or a misspelling."""
    if is_secret(key):
        return UserError(f"{show(key)} ({where}) is a secret, which must not be in a config; "
                         "fix: remove it and set the environment variable HF_TOKEN")
    users = [name for name in algorithm_names() if key in get_type_hints(config_of(name))]
    fault = f"unknown key {show(key)} ({where})"
    if users:
        fault = f"{key} ({where}) is used by {', '.join(users)}, not by {algorithm}"
    return UserError(fault + advice(key, known, algorithm))


def cast(text: str, kind) -> Any:
    """`text` as `kind`: str, int, float, bool, Literal, or one of these `| None`, or `str | list[str]`.
    ValueError says what is expected."""
    if list[str] in get_args(kind):
        return cast_texts(text)
    if isinstance(text, list):      # read_sources has cast it
        return text
    word = text.strip().lower()
    if NoneType in get_args(kind):
        if word in ("", "null", "none"):
            return None
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]             # of str | list a list is read elsewhere
    choices = BOOL if kind is bool else {str(choice).lower(): choice for choice in get_args(kind)}    # of a Literal
    if choices:
        if word in choices:
            return choices[word]
        raise ValueError(f"{nearest(word, choices) or 'one'} (choices: {', '.join(choices)})")
    if kind is str:
        if word and text.isprintable():
            return text
        raise ValueError("text on one line, without control characters")
    if kind is Lines:
        if word and text.replace("\n", "").isprintable():
            return text.strip("\n")
        raise ValueError("text without control characters")
    if kind is dict:
        return read_mapping(text)
    assert kind in (int, float), f"a config field cannot have the type {kind}"
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (kind is int and (number % 1 or abs(number) > 2**53)):    # above, a float loses digits
        raise ValueError("a whole number" if kind is int else "a number such as 2e-5")
    return kind(number)


def cast_texts(value: str | list[str]) -> str | list[str] | None:
    """A list of texts, or one text, as it stands; None of "null". On the command line ["a", "b"], with the
    quotes, is a list: [a] is a text."""
    if isinstance(value, str) and re.fullmatch(r"""\s*\[\s*["'].*["']\s*,?\s*\]\s*""", value, re.DOTALL):
        try:
            value = yaml.load(value, yaml.BaseLoader)
        except yaml.YAMLError:
            raise ValueError('a list such as ["one", "two"], with every text in quotes') from None
    if value == [] or (isinstance(value, str) and value.strip(" ").lower() in ("", "null", "none")):
        return None
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError('a list of texts that are not empty, such as ["one", "two"]')
    return value


def read_mapping(text: str) -> dict:
    """A YAML mapping of names to values that JSON knows. ValueError says what is expected."""
    try:
        values = yaml.safe_load(text)
        names = [isinstance(name, str) and name.isidentifier() for name in values]
        json.dumps(values, allow_nan=False)
        if isinstance(values, dict) and all(names):
            return values
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        pass
    raise ValueError("a mapping such as {enable_thinking: false}")


def check_output(output: str, where: str):
    """Refuse a directory that no run may be written into. Whether it is empty or a run is checked elsewhere."""
    if (any(part == ".." or part.startswith("~") or len(os.fsencode(part)) > 255 for part in Path(output).parts)
            or Path(output).resolve() in (ROOT, *ROOT.parents, Path(os.path.expanduser("~")))):
        raise UserError(f"output ({where}) is {show(output)}; fix: write a path such as runs/my-run, without '..' and '~', with "
                        "names of at most 255 bytes, and not the home directory, the repository or a directory above it")


def check_lora(common: Common, sources: dict[str, str]):
    """Refuse keys of LoRA where nothing is LoRA: neither `lora_r` is given nor is the start model an adapter or a run with one."""
    folders = (os.path.join(glob.escape(common.model), folder) for folder in ("", "final", "checkpoints/*"))
    continued = any(glob.glob(os.path.join(folder, "adapter_config.json")) for folder in folders)
    needing_r = ["lora_alpha", "lora_targets"] + ([] if continued else ["lora_dropout", "load_in_4bit", "merge"])
    for key in needing_r if common.lora_r == 0 else []:
        if getattr(common, key) != getattr(Common, key):
            raise UserError(f"{key} ({sources[key]}) belongs to LoRA, which lora_r turns on; fix: add lora_r: 16, or remove {key}")
    if common.lora_dropout > 0 and common.algorithm not in ("sft", "dft"):
        raise UserError(f"lora_dropout ({sources['lora_dropout']}) acts in sft and dft only: {common.algorithm} compares log-probs, "
                        "which dropout makes random; fix: remove it")


def nearest(name: str, names) -> str | None:
    return next(iter(difflib.get_close_matches(name.lower(), list(names), 1)), None)


def show(text: str) -> str:
    """`text` for a message: quoted, on one line, short, without anything that looks like an access token."""
    text = re.sub(r"hf_\w{16,}", "hf_...", str(text))
    return repr(text if len(text) <= 80 else text[:77] + "...")


class Dumper(yaml.SafeDumper):
    """Texts of several lines as "one\\ntwo", on one line."""

    def represent_str(self, text):
        return self.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\n" in text else None)


Dumper.add_representer(str, Dumper.represent_str)


def dump(value, **options) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf, **options)


def as_yaml(common: Common, config) -> str:
    """The resolved configuration as flat YAML, one key per line, that `load_config` reads back to equal values."""
    return dump(asdict(common) | asdict(config))


def describe(run: Run) -> list[str]:
    """Lines "key = value   (where it comes from)" for --dry-run."""
    pairs = [(key, dump([value], default_flow_style=True).strip()[1:-1])
             for key, value in (asdict(run.common) | asdict(run.config)).items()]
    return [f"{f'{key} = {value}':<40}   ({run.sources[key]})" for key, value in pairs]


def help_text() -> str:
    """The usage, and every key with its type, default and comment as they stand in the source."""
    text, algorithms = __doc__, {f"keys of {name}": config_of(name) for name in algorithm_names()}
    for title, cls in {"common keys": Common, **algorithms}.items():
        source = "".join(inspect.getsource(part) for part in reversed(cls.__mro__[:-1]))
        text += "\n".join(["", f"{title}:", *re.findall(r"^    (?:\w+: | +#).*", source, re.MULTILINE), ""])
    return text
