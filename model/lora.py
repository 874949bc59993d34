"""LoRA: small trained matrices beside the frozen linear layers of a causal LM, through `peft` and in its file
format.

peft's PeftModel puts them into the LM itself, so a `Policy` works on the LM unchanged and the wrapper is not
kept. The matrices are fp32; the frozen weights need not be: they may be bf16, or 4-bit (QLoRA).
"""
import contextlib
import copy
import importlib.util
import os
import re
import warnings

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from data.errors import RunError, UserError
from model import processor
from model.keys import ModelKeys
from model.load import (
    ADAPTER,
    MOST,
    check_finite,
    empty_lm,
    first_line,
    load_config,
    load_lm,
    text_part,
    unloadable,
)
from model.state import each_once, inside_lm, written

PREFIX = "base_model.model."         # peft's names in files begin so: it names weights inside its PeftModel
# each of peft's wrappers around a module has one of these: of an adapter, a copy, an adapter of some tokens
WRAPPERS = "base_layer", "modules_to_save", "token_adapter"


def library():
    """The optional package peft, which takes a second to import."""
    try:
        import peft
        return peft
    except ImportError as error:
        raise UserError("lora_r: LoRA needs the package peft, which is not installed; "
                        "fix: pip install peft") from error


def settings(lm):
    """The LoraConfig of the adapter in an LM, or None."""
    return getattr(lm, "peft_config", {}).get("default")


def new_settings(keys, lm):
    """The LoraConfig that the configuration's lora_ keys ask for."""
    return library().LoraConfig(
        r=keys.lora_r, lora_alpha=keys.lora_alpha or 2 * keys.lora_r, lora_dropout=keys.lora_dropout,
        target_modules=in_text_part(lm, target_names(lm, keys.lora_targets)), task_type="CAUSAL_LM")


def saved_settings(path: str, keys):
    """The LoraConfig in the adapter directory `path`. Dropout is no part of an adapter: the configuration
    says it."""
    peft = library()
    try:
        found = peft.PeftConfig.from_pretrained(path)
    except Exception as error:  # noqa: BLE001  somebody else's file
        said = first_line(error)
        raise UserError(f"model: {path}/{ADAPTER} cannot be read ({said}); fix: check the file") from error
    if found.peft_type != "LORA":
        raise UserError(f"model: {path} holds a {found.peft_type} adapter; fix: pass a LoRA adapter")
    if not isinstance(found.r, int) or not 0 < found.r <= MOST:         # peft would take memory for any rank
        raise UserError(f"model: r is {found.r} in {path}/{ADAPTER}; fix: check the file")
    found.inference_mode = False
    found.lora_dropout = keys.lora_dropout
    return found


def linear_layers(lm) -> dict:
    """Name -> module of the linear layers of an LM's text part, without the head."""
    head = lm.get_output_embeddings()
    inside = set(text_part(lm).modules())
    layers = {}
    for name, module in lm.named_modules():
        if module in inside and module is not head and is_linear(module):
            layers[name] = module
    return layers


@torch.no_grad()
def is_linear(module) -> bool:
    """Whether a module computes what a linear layer does; some routers are subclasses of nn.Linear that
    return more."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    kind = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__module__.startswith("bitsandbytes"):
        return True
    row = torch.randn(1, module.in_features).to(module.weight)
    output = module(row)
    if not torch.is_tensor(output):
        return False
    expected = nn.functional.linear(row, module.weight, module.bias)
    return output.is_meta or torch.allclose(output, expected, rtol=1e-3, atol=1e-5)


def in_text_part(lm, names: list[str]) -> list[str] | str:
    """peft's target_modules for linear layers with these last names: in an LM that reads more than text, a
    pattern that only names of its text part match."""
    text = text_part(lm)
    if text is lm:
        return names
    prefix = next(name for name, module in lm.named_modules() if module is text)
    return rf"{re.escape(prefix)}\..*\b({'|'.join(names)})"


def state_space_outputs(lm) -> set[str]:
    """The names of the layers behind a state space (Mamba): fused kernels read their weight and would pass an
    adapter by."""
    names = set()
    for module in lm.modules():
        if hasattr(module, "A_log") and hasattr(module, "D"):
            names.update({"out_proj"} & dict(module.named_children()).keys())
    return names


def left_out(lm) -> str | None:
    """A sentence about the matrices that an adapter on all linear layers does not reach; None where there are
    none."""
    missed = state_space_outputs(lm)
    for name, parameter in lm.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            missed.add(name.rpartition(".")[2])
    reached = set(found_in(lm)["lora_targets"].split(", "))
    for module in lm.modules():
        if hasattr(module, "lora_A") and hasattr(module, "parameter_name"):
            reached.add(module.parameter_name)
    missed -= reached
    if not missed:
        return None
    return (f"lora: the adapter is on {', '.join(sorted(reached))}; {', '.join(sorted(missed))} (experts in "
            "one tensor, outputs of state spaces) stay as they are")


def last_name(name: str) -> str:
    """The last part of a module's name, with its list's where that is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def target_names(lm, wanted: str) -> list[str]:
    """The last parts of the names of the linear layers that get an adapter: of all, or those in a
    comma-separated list."""
    linear = {last_name(name) for name in linear_layers(lm)}
    if wanted == "all-linear":
        return sorted(linear - state_space_outputs(lm))
    names = {name.strip() for name in wanted.split(",")}
    if not names <= linear:
        missing = ", ".join(sorted(names - linear))
        raise UserError(f"lora_targets: this model has no linear layers {missing} outside its head; "
                        f"fix: choose from {', '.join(sorted(linear))}")
    return sorted(names)


def attach(lm, adapter, seed: int = 0):
    """Freeze an LM and put a fresh adapter with the settings `adapter` into it, which changes no output yet.
    Returns peft's PeftModel around the LM."""
    peft = library()
    adapter.base_model_name_or_path = None         # else peft warns where another path names the same base
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)     # peft reads a deprecated property of transformers
        try:
            model = peft.get_peft_model(lm, adapter)
        except Exception as error:  # noqa: BLE001  the settings may be somebody else's
            raise UserError(f"model: this adapter cannot be put into the model ({first_line(error)}); "
                            f"fix: check {ADAPTER}, or the lora_ keys") from error
    for parameter in lm.parameters():
        if parameter.requires_grad:              # peft leaves modules_to_save in the base's precision
            parameter.data = parameter.data.float()
    for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        if any(hasattr(module, name) for name in WRAPPERS):
            raise UserError("model: this adapter changes the embedding or the head; "
                            "fix: pass an adapter of the layers between them")
    lm.eval()
    return model


def attach_saved(lm, path: str, keys=None, check: bool = False) -> None:
    """Put the adapter in the directory `path` into its base model; with `check` the lora_ keys, where given,
    must be its own."""
    keys = keys or ModelKeys()
    adapter = saved_settings(path, keys)
    asked = asked_of(keys, lm) if check and keys.lora_r else {}
    try:
        weights = library().utils.load_peft_weights(path, device="cpu")
    except Exception as error:  # noqa: BLE001  somebody else's file
        raise unloadable(path, error) from error
    check_finite(weights.items(), path)
    model = attach(lm, adapter)
    try:
        result = library().set_peft_model_state_dict(model, weights)
    except Exception as error:  # noqa: BLE001  as above
        raise UserError(f"model: the adapter does not fit its base model ({first_line(error)}); "
                        f"fix: check {ADAPTER}") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = trained & set(result.missing_keys) | set(result.unexpected_keys)
    if wrong:
        raise UserError(f"model: the adapter's weights and its {ADAPTER} disagree "
                        f"({min(wrong).removeprefix(PREFIX)}); fix: pass a whole adapter")
    found = found_in(lm)
    for key, value in asked.items():
        if value != found[key]:
            raise UserError(f"{key}: the adapter {path} has {found[key]}, not {value}; "
                            "fix: remove the lora_ keys, or start from its base model")


def asked_of(keys, lm) -> dict:
    """The adapter that the lora_ keys ask for."""
    alpha = keys.lora_alpha or 2 * keys.lora_r
    names = target_names(lm, keys.lora_targets)
    return {"lora_r": keys.lora_r, "lora_alpha": alpha, "lora_targets": ", ".join(names)}


def found_in(lm) -> dict:
    """The adapter in an LM, described as `asked_of` does."""
    adapter = settings(lm)
    names = set()
    for name, module in lm.named_modules():
        # peft adds the experts by itself, by the names of their parameters
        if hasattr(module, "lora_A") and not hasattr(module, "parameter_name"):
            names.add(last_name(name))
    return {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_targets": ", ".join(sorted(names))}


@contextlib.contextmanager
def disabled(lm):
    """The LM without its adapter."""
    # PeftModel.disable_adapter does the same after a survey of all layers, which takes four times as long
    tuner_layer = library().tuners.tuners_utils.BaseTunerLayer
    layers = [module for module in lm.modules() if isinstance(module, tuner_layer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def dropouts(lm) -> list[nn.Module]:
    """The dropout modules of the adapter in an LM; none where lora_dropout is 0."""
    found = []
    for module in lm.modules():
        for layer in getattr(module, "lora_dropout", {}).values():
            if isinstance(layer, nn.Dropout):
                found.append(layer)
    return found


def save(lm, state: dict, directory: str) -> None:
    """The adapter with the weights of `state`, by their names inside the LM, in peft's format, and beside it
    the generation settings: its stop tokens may be others than the base model's. PeftModel would also write
    a README.md, a base path that holds in this directory only, and target_modules in another order each
    time."""
    weights = library().get_peft_model_state_dict(lm, state, save_embedding_layers=False)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in written(weights).items()}
    save_file(tensors, os.path.join(directory, "adapter_model.safetensors"), {"format": "pt"})
    saved = copy.copy(settings(lm))
    saved.inference_mode = True
    base = lm.name_or_path
    saved.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    if not isinstance(saved.target_modules, str):
        saved.target_modules = sorted(saved.target_modules)
    saved.save_pretrained(directory)
    lm.generation_config.save_pretrained(directory)


def merged(lm, state: dict):
    """A plain LM, on the CPU, that has the policy's weights `state` (by their names inside the policy) added
    to its own, and the new state. A state without numbers (a trial's) gives an LM without them. RunError
    where that fails."""
    try:
        adapter = copy.deepcopy(settings(lm))
        is_empty = any(tensor.is_meta for tensor in state.values())
        base = base_in_fp32(lm, is_empty)
        if is_empty:
            adapter.init_lora_weights = True      # others, such as PiSSA's, read the base's numbers
        model = attach(base, adapter)
        base.load_state_dict(inside_lm(state), strict=False)
        plain = model.merge_and_unload()
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise RunError(f"the adapter cannot be merged into {lm.name_or_path} ({first_line(error)}); "
                       "fix: run the same command again with merge=false, or with more memory") from error
    plain.generation_config = lm.generation_config
    plain.processor_files = processor.files_of(lm)
    weights = each_once(torch.Tensor.detach, plain.state_dict(keep_vars=True))
    others = {name: tensor for name, tensor in state.items() if not name.startswith("lm.")}
    return plain, {f"lm.{name}": tensor for name, tensor in weights.items()} | others


def base_in_fp32(lm, empty: bool):
    """The LM's base model once more: what is in memory may be rounded to bf16 or 4 bits. An `empty` one has
    no numbers."""
    if not empty:
        return load_lm(lm.name_or_path).eval()
    return empty_lm(load_config(lm.name_or_path), lm.name_or_path)


def quantization(keys, device, dtype) -> dict:
    """What `from_pretrained` needs to load the weights in 4 bits, computing in `dtype`; nothing where that is
    not asked for."""
    if not keys.load_in_4bit:
        return {}
    if device.type != "cuda":
        raise UserError("load_in_4bit: this machine has no CUDA GPU, which bitsandbytes needs; "
                        "fix: load_in_4bit=false")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit: the package bitsandbytes is not installed; "
                        "fix: pip install bitsandbytes, or load_in_4bit=false")
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype)
    return {"device_map": {"": device}, "quantization_config": four_bits}
