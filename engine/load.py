"""Models and tokenizers from a local directory or the hub; one plain line for whatever cannot be trained."""
import json
import os

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file, logging

from data.errors import UserError

ADAPTER = "adapter_config.json"      # in a directory with a LoRA adapter, in peft's format
MODES = {"do_sample", "num_beams", "use_cache", "return_dict_in_generate"}    # other settings depend on these
logging.disable_progress_bar()       # of loading and saving weights: our console is one progress line


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


def load_lm(path: str, dtype=torch.float32, attn_implementation: str = "segments", **options):
    """A causal LM from a local directory or the hub; UserError for what is not one. `dtype` is fp32 for whatever is trained;
    `options` are more of from_pretrained's."""
    local = os.path.isdir(path)
    if is_adapter(path):
        raise UserError(f"{path} holds a LoRA adapter, not a model; fix: pass its base model, or a run of it with merge: true")
    if not local and (os.path.exists(path) or path.startswith((".", "/")) or path.count("/") > 1):
        raise UserError(f"model: {path} is not a directory with a model; fix: pass a model directory or a hub name owner/name")
    try:
        config = AutoConfig.from_pretrained(path)
        if getattr(config, "quantization_config", None):
            raise UserError(f"model: {path} is quantized and cannot be trained; fix: pass the unquantized model")
        kinds = config.architectures or ["CausalLM"]
        if type(config) not in AutoModelForCausalLM._model_mapping or not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
            raise UserError(f"model: {path} is a {config.model_type} ({kinds[0]}), not a causal language model; fix: pass a causal LM")
        settings, changed = generation_settings(path)
        if changed:
            options["generation_config"] = GenerationConfig(**settings)
        lm, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation,
                                                        output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:      # the last two: sizes differ, a file is cut off
        where = "cannot be loaded" if local else "is neither a local directory nor reachable on the hub"
        raise UserError(f"model: {path} {where} ({first_line(error)}); fix: check the name or the files in it") from error
    if missing := sorted(info["missing_keys"]):      # transformers would train them from random values
        raise UserError(f"model: {path} lacks {len(missing)} weights of a {type(lm).__name__} ({missing[0]}, ...); "
                        "fix: pass a complete causal LM")
    return lm


def generation_settings(path: str) -> tuple[dict, str]:
    """(the generation settings of a model, without what transformers would refuse to save; a sentence about
    what was changed for that, "" if nothing). They stand in generation_config.json, of older models in
    config.json."""
    try:
        file = cached_file(path, "generation_config.json")
    except OSError:                                        # it has none
        file = cached_file(path, "config.json")
    try:
        with open(file, encoding="utf-8") as content:
            given = dict(json.load(content))
    except (OSError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"model: {file} cannot be read ({reason}); fix: correct this file") from error
    if os.path.basename(file) == "config.json":
        given = {key: given[key] for key in given.keys() & vars(GenerationConfig()).keys()}
    if can_be_saved(given):
        return given, ""
    # who gives a temperature and says nothing of do_sample means sampling; who says do_sample: false does not
    choices = [given] if isinstance(given.get("do_sample"), bool) else [given, given | {"do_sample": True}]
    parts = [savable_part(choice) for choice in choices]
    kept = min(parts, key=lambda part: len(given.keys() - part.keys()))
    changes = [f"without {key}: {json.dumps(given[key])}" for key in sorted(given.keys() - kept.keys())]
    if kept.get("do_sample") != given.get("do_sample"):
        changes.insert(0, "with do_sample: true")
    return kept, f"{file} contradicts itself and could not be saved; it is read {', '.join(changes)}"


def savable_part(given: dict) -> dict:
    """Generation settings, one after the other as long as they go together."""
    kept = {}
    for key in sorted(given, key=lambda key: key not in MODES):
        if can_be_saved(kept | {key: given[key]}):
            kept[key] = given[key]
    return kept


def can_be_saved(settings: dict) -> bool:
    """Whether transformers would write these generation settings into a file."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()               # it would warn here, and refuse at the end of a run
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    finally:
        logging.set_verbosity(verbosity)
    return True


def load_tokenizer(path: str):
    """The tokenizer beside a model (beside its base, where an adapter has none); UserError for a name that is neither a directory
    nor on the hub."""
    if is_adapter(path) and not os.path.exists(os.path.join(path, "tokenizer_config.json")):
        path = base_of(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: no tokenizer can be loaded from {path} ({first_line(error)}); "
                        "fix: check the name, or save the tokenizer beside the model") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model: the tokenizer of {path} has no eos token, so no response could end; fix: set eos_token")
    if not tokenizer("a").input_ids:      # transformers makes an empty one where tokenizer.json is missing
        raise UserError(f"model: the tokenizer of {path} has no vocabulary; fix: save tokenizer.json beside the model")
    return tokenizer


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
