"""Models and tokenizers from a local directory or the hub; one plain line for whatever cannot be trained."""
import json
import os

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from data.errors import UserError

ADAPTER = "adapter_config.json"      # in a directory with a LoRA adapter, in peft's format
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
        lm, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attn_implementation,
                                                        output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:      # the last two: sizes differ, a file is cut off
        where = "cannot be loaded" if local else "is neither a local directory nor reachable on the hub"
        raise UserError(f"model: {path} {where} ({first_line(error)}); fix: check the name or the files in it") from error
    if missing := sorted(info["missing_keys"]):      # transformers would train them from random values
        raise UserError(f"model: {path} lacks {len(missing)} weights of a {type(lm).__name__} ({missing[0]}, ...); "
                        "fix: pass a complete causal LM")
    return lm


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
