"""Models and tokenizers from a local directory or the hub; one plain line where one cannot be trained."""
import contextlib
import difflib
import glob
import json
import os
import re
from pickle import UnpicklingError

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file, logging

from data.errors import UserError
from data.files import SUFFIXES, kind_of
from data.hub import NAME, why_unreachable
from data.templates import set_template
from model import modelscope, processor

CLASSIFIER = "ForSequenceClassification"      # how the names of such classes end
RUNS = "runs"                        # where runs are by default; no owner of models is meant by it
HUB_MODEL = re.compile(f"({NAME}/)?{NAME}")
# endings of files that are no models
FILES = (*SUFFIXES, ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".yml", ".yaml", ".py")
MOST_NAMED = 20      # runs in an error
ADAPTER = "adapter_config.json"      # in a directory with a LoRA adapter, in peft's format
MODES = {"do_sample", "num_beams", "use_cache", "return_dict_in_generate"}    # other settings depend on these
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
COUNTS = re.compile(r"\w*(layers?|experts?|blocks|labels)")     # keys of config.json that count modules
MOST = 10_000                        # limit of these counts; the largest models have hundreds
# as safetensors names them
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
logging.disable_progress_bar()       # our console shows the progress


def is_gguf(path: str) -> bool:
    return path.lower().endswith(".gguf") and os.path.isfile(path)


def is_adapter(path: str) -> bool:
    return os.path.isfile(os.path.join(path, ADAPTER))


def base_of(path: str) -> str:
    """The model that the adapter in the directory `path` belongs to; a path that is no adapter as it is."""
    if not is_adapter(path):
        return path
    file = os.path.join(path, ADAPTER)
    try:
        with open(file) as content:
            base = json.load(content)["base_model_name_or_path"]
    except (OSError, ValueError, LookupError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise UserError(f"model: {file} names no base model; fix: set base_model_name_or_path in it")
    if os.path.isabs(base) and not os.path.isdir(base):
        raise UserError(f"model: {base}, the base model of the adapter {path}, is not there; "
                        f"fix: correct base_model_name_or_path in {file}")
    return base


def check_name(name: str, key: str = "model") -> None:
    """UserError where there is no directory `name` and it cannot be, or be asked for as, a model on the
    hub."""
    check_path(name, key)
    if name.startswith(modelscope.PREFIX):
        return                           # `engine.checkpoint.model_path` asks for it
    cached = os.path.isdir(name) or isinstance(try_to_load_from_cache(name, "config.json"), str)
    cause = None if cached else why_unreachable(name, "model")
    if cause:
        hint = "" if "/" in name else held(RUNS, "")
        raise UserError(f"{key}: {cause}, and {name} is neither a local directory nor in its cache{hint}; "
                        "fix: correct the name, or connect to the network")


def check_path(name: str, key: str = "model") -> None:
    """UserError where a model's name can only be a local directory, and there is none: the hub is not
    asked."""
    if name.startswith(modelscope.PREFIX):
        return modelscope.check_form(name, key)
    folder = os.path.dirname(name) or "."
    is_local = not HUB_MODEL.fullmatch(name) or name.lower().endswith(FILES) or folder == RUNS
    if os.path.isdir(name) or not (is_local or os.path.exists(name)):
        return
    if is_gguf(name):                    # it will be converted
        return
    if os.path.exists(name):
        raise UserError(f"{key}: {name} is a file, not a directory with a model; "
                        "fix: pass a model directory or a hub name owner/name")
    hint = held(folder, os.path.basename(name))
    kind = "file" if name.lower().endswith(FILES) else "directory"
    raise UserError(f"{key}: there is no {kind} {name}{hint}; "
                    "fix: correct the path, or pass a hub name owner/name")


def held(folder: str, name: str) -> str:
    """" (runs holds a, b)": the models in a folder, of another one than the runs' those with a similar
    `name`; "" where there are none."""
    others = sorted(glob.glob(os.path.join(glob.escape(folder), "*", "config.*")))      # runs and models
    names = list(dict.fromkeys(os.path.basename(os.path.dirname(other)) for other in others))
    shown = names[:MOST_NAMED] if folder == RUNS else difflib.get_close_matches(name, names)
    more = " ..." if folder == RUNS and len(names) > MOST_NAMED else ""
    return f" ({folder} holds {', '.join(shown)}{more})" if shown else ""


def load_lm(path: str, dtype=torch.float32, needs_head: bool = True, **options):
    """A causal LM from a local directory or the hub, with the attention that transformers chooses; UserError
    for what is not one. `dtype` is fp32 for weights that are trained; `options` are more of
    from_pretrained's. Only its text part has gradients. Without `needs_head` a sequence classifier is taken,
    too: its trunk, under a head of random numbers."""
    if is_adapter(path):
        raise UserError(f"{path} holds a LoRA adapter, not a model; "
                        "fix: pass its base model, or a run of it with merge: true")
    config = load_config(path)
    loader = lm_class(config, path, needs_head)
    settings, changed = generation_settings(path)
    if changed:
        options["generation_config"] = GenerationConfig(**settings)
    try:
        lm, info = loader.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
        lm.processor_files = processor.read_files(path, config)
    except Exception as error:  # noqa: BLE001  somebody else's files: anything may be raised
        raise unloadable(path, error) from error
    missing = info["missing_keys"]
    if not needs_head:
        missing = missing - names_of(lm, lm.get_output_embeddings())
    missing = sorted(missing)
    if missing:                                  # transformers would train them from random values
        kind = type(lm).__name__
        raise UserError(f"model: {path} lacks {len(missing)} weights of a {kind} ({missing[0]}, ...); "
                        "fix: pass a complete causal LM")
    check_finite(lm.named_parameters(), path)
    freeze_other_parts(lm)
    return lm


def names_of(lm, module) -> set[str]:
    """The names in an LM of the weights of one of its modules."""
    weights = {id(weight) for weight in module.parameters()}
    return {name for name, weight in lm.named_parameters() if id(weight) in weights}


def weight_files(path: str) -> list[str]:
    """The safetensors files of the model at `path`; an exception where the hub's cache has none of its
    files."""
    folder = os.path.dirname(cached_file(path, "config.json"))
    return sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")))


def stored_dtype(path: str) -> torch.dtype | None:
    """The dtype that all weights of the model at `path` have in its safetensors files; None where they have
    several, or other files."""
    try:
        dtypes = set()
        for file in weight_files(path):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():
                    dtypes.add(weights.get_slice(name).get_dtype())
    except Exception:  # noqa: BLE001  somebody else's files; the loader says what is wrong with them
        return None
    return STORED.get(dtypes.pop()) if len(dtypes) == 1 else None


def lm_class(config, path: str, needs_head: bool = True):
    """The class that loads a causal LM with this configuration: the one that the checkpoint names where it
    reads more than text (`...ForConditionalGeneration`). UserError for what is no causal LM, nor, without
    `needs_head`, a sequence classifier, or is quantized."""
    if getattr(config, "quantization_config", None):
        raise UserError(f"model: {path} is quantized and cannot be trained; fix: pass the unquantized model")
    kinds = config.architectures
    kinds = kinds if kinds and isinstance(kinds, list) else ["CausalLM"]
    reads_more = kinds[0].endswith("ForConditionalGeneration")
    is_causal = any("CausalLM" in kind or "LMHead" in kind for kind in kinds)
    if not needs_head and kinds[0].endswith(CLASSIFIER):
        is_causal = True
    if reads_more and not config.is_encoder_decoder and hasattr(transformers, kinds[0]):
        return getattr(transformers, kinds[0])
    if is_causal and type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    raise UserError(f"model: {path} is a {config.model_type} ({kinds[0]}), not a causal language model; "
                    "fix: pass a causal LM")


def new_lm(config, path: str, dtype=torch.float32):
    """An LM of this configuration as it is before training; UserError where it cannot be built."""
    loader = lm_class(config, path)
    from_config = loader.from_config if loader is AutoModelForCausalLM else loader._from_config
    try:
        lm = from_config(config, dtype=dtype)
    except Exception as error:  # noqa: BLE001  somebody else's file: anything may be raised
        raise unloadable(path, error) from error
    freeze_other_parts(lm)
    return lm.eval()


def empty_lm(config, path: str, dtype=torch.float32):
    """The LM of a configuration without the numbers of its weights."""
    with torch.device("meta"):
        return new_lm(config, path, dtype)


def text_part(lm):
    """The module inside an LM that reads text: the LM itself, unless it reads images or audio, too."""
    if lm.config.get_text_config() is lm.config:
        return lm
    return lm.get_decoder()


def lacks_processor(lm) -> bool:
    """Whether an LM reads more than text, and the files that say how were not there."""
    return text_part(lm) is not lm and not processor.files_of(lm)


def check_rotary(path: str, max_length: int) -> None:
    """UserError where the rotary embedding of the model at `path` is another one in longer rows: a completion
    that grows past this length would be sampled with other log-probs than it is trained with."""
    rotary = getattr(load_config(path).get_text_config(), "rope_parameters", None) or {}
    length = rotary.get("original_max_position_embeddings", max_length)
    if rotary.get("rope_type") == "longrope" and length < max_length:
        raise UserError(f"max_length is {max_length}, but the rotary embedding of {path} changes after "
                        f"{length} tokens (longrope), in the middle of a completion; "
                        f"fix: max_length={length}")


def freeze_other_parts(lm) -> None:
    """Train only the text part and the head of an LM that reads more than text."""
    text = text_part(lm)
    if text is lm:
        return
    parts = [text, lm.get_input_embeddings(), lm.get_output_embeddings()]
    lm.requires_grad_(False)
    for part in parts:
        for parameter in part.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def generation_settings(path: str) -> tuple[dict, str]:
    """(the generation settings of a model, without those that transformers would refuse to save; a sentence
    about what was changed for that, "" if nothing). They are in generation_config.json, for older models in
    config.json."""
    try:
        file = cached_file(path, "generation_config.json")
    except OSError:                                        # it has none
        file = cached_file(path, "config.json")
    given = read_object(file)
    if os.path.basename(file) == "config.json":
        given = {key: given[key] for key in given.keys() & vars(GenerationConfig()).keys()}
    if can_be_saved(given):
        return given, ""
    # a temperature without do_sample means sampling; with do_sample: false it does not
    choices = [given] if isinstance(given.get("do_sample"), bool) else [given, given | {"do_sample": True}]
    parts = [savable_part(choice) for choice in choices]
    kept = min(parts, key=lambda part: len(given.keys() - part.keys()))
    changes = [f"without {key}: {json.dumps(given[key])}" for key in sorted(given.keys() - kept.keys())]
    if kept.get("do_sample") != given.get("do_sample"):
        changes.insert(0, "with do_sample: true")
    return kept, f"{file} contradicts itself and could not be saved; it is read {', '.join(changes)}"


def savable_part(given: dict) -> dict:
    """The generation settings that can be saved together: each one is kept if it fits those before it."""
    kept = {}
    for key in sorted(given, key=lambda key: key not in MODES):
        if can_be_saved(kept | {key: given[key]}):
            kept[key] = given[key]
    return kept


def can_be_saved(settings: dict) -> bool:
    """Whether transformers would write these generation settings into a file."""
    try:
        with errors_only():                     # it would warn here, and refuse at the end of a run
            GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


@contextlib.contextmanager
def errors_only():
    """transformers says nothing less than an error while this lasts."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_config(path: str):
    """The configuration of a model; UserError where there is none, or no model could be built from it."""
    check_name(path)
    try:
        check_settings(path)
        return AutoConfig.from_pretrained(path)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  as above
        raise unloadable(path, error) from error


def check_settings(path: str) -> None:
    """UserError where a settings file of the model at `path` is no JSON object (transformers ignores some of
    these in silence), or where it asks for a billion layers: transformers makes lists of that length when it
    only reads the file."""
    values = {}
    if os.path.isdir(path):
        for name in SETTINGS:
            file = os.path.join(path, name)
            found = read_object(file) if os.path.isfile(file) else {}
            values = found if name == "config.json" else values
    else:
        try:
            values, _ = PreTrainedConfig.get_config_dict(path)
        except Exception:  # noqa: BLE001  no such name, or no answer: loading will say which
            return
    check_counts(values, os.path.join(path, "config.json"))


def read_object(file: str) -> dict:
    try:
        with open(file, encoding="utf-8") as content:
            found = json.load(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model: {file} cannot be read ({first_line(error)}); fix: check the file") from error
    if not isinstance(found, dict):
        raise UserError(f"model: {file} holds {kind_of(found)} instead of an object; fix: check the file")
    return found


def check_counts(values: dict, file: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            check_counts(value, file)
        elif isinstance(value, int) and COUNTS.fullmatch(key) and value > MOST:
            raise UserError(f"model: {key} is {value} in {file}, more than {MOST}; fix: check the file")


def check_finite(tensors, path: str) -> None:
    """UserError where one of the (name, tensor) pairs of the model at `path` holds NaN or infinity."""
    for name, tensor in tensors:
        can_tell = tensor.is_floating_point() and tensor.itemsize > 1      # not of floats of 8 bits
        if can_tell and not is_finite(tensor):
            kind = "NaN" if tensor.isnan().any() else "infinity"
            raise UserError(f"model: {path} holds {kind} in {name}; "
                            "fix: pass a model (or resume from a checkpoint) whose weights are all finite")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; without a copy of it."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def unloadable(path: str, error: Exception) -> UserError:
    if isinstance(error, UnpicklingError):
        return UserError(f"model: the weights in {path} are a pickle that asks for more than tensors, so it "
                         "may hold code and is not loaded; fix: save them as safetensors")
    where = "is neither a local directory nor reachable on the hub"
    if os.path.isdir(path):
        where = "cannot be loaded"
    return UserError(f"model: {path} {where} ({first_line(error)}); fix: check the name or the files in it")


def load_tokenizer(path: str):
    """The tokenizer beside a model (beside its base, where an adapter has none); UserError for a name that is
    neither a directory nor on the hub."""
    if is_adapter(path) and not os.path.exists(os.path.join(path, "tokenizer_config.json")):
        path = base_of(path)
    is_run = os.path.isfile(os.path.join(path, "config.yaml"))
    if is_run and not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
        raise UserError(f"model: {path} is a run without a whole final/ or checkpoint; "
                        "fix: let it end, or pass another model")
    check_name(path)
    if os.path.isfile(os.path.join(path, "config.json")):
        load_config(path)                  # the tokenizer reads it too, and would be blamed
    else:
        check_settings(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        empty = not tokenizer("a").input_ids      # transformers makes an empty one without tokenizer.json
    except Exception as error:  # noqa: BLE001  as above
        raise UserError(f"model: no tokenizer can be loaded from {path} ({first_line(error)}); "
                        "fix: check the name, or save the tokenizer beside the model") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of {path} has no eos token, so no response could end; "
                        "fix: set eos_token")
    if empty:
        raise UserError(f"model: the tokenizer of {path} has no vocabulary; "
                        "fix: save tokenizer.json beside the model")
    tokenizer.model_stops = model_stops(path, tokenizer)
    if hasattr(tokenizer, "legacy"):
        # Llama's; transformers does not save it, and without it texts are cut otherwise
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer


def model_stops(path: str, tokenizer) -> list[int]:
    """The ids at which the model at `path` stops by its generation settings: GLM ends a turn with the token
    that begins the user's. Others than added tokens do not count: where config.json names no eos, its class
    gives the id of one that is text in this tokenizer."""
    if is_adapter(path) and not os.path.exists(os.path.join(path, "generation_config.json")):
        path = base_of(path)
    try:
        settings, _ = generation_settings(path)
    except OSError:                        # a tokenizer without a model
        return []
    found = settings.get("eos_token_id")
    found = found if isinstance(found, list) else [found]
    known = tokenizer.added_tokens_decoder
    return [token for token in found if isinstance(token, int) and token in known]


def load_tokenizer_for(settings, path: str, notice):
    """The tokenizer at `path` with the chat template that the keys of `settings` ask for."""
    tokenizer = load_tokenizer(path)
    set_template(tokenizer, settings, notice)
    return tokenizer


def first_line(error: Exception) -> str:
    """What a library said, on one line; with the error's name where the text alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = text if len(text) <= 300 else text[:297] + "..."
    says_enough = isinstance(error, (OSError, ValueError, RuntimeError, SafetensorError))
    if text and (says_enough or type(error) is Exception):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
