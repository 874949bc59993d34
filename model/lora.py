"""LoRA: small trained matrices beside the frozen linear layers of a causal LM, through `peft` and in its file format.

They are put into the LM itself, so a `Policy` works on it unchanged. The matrices are fp32; the frozen weights need not be:
they may be bf16, or 4-bit (QLoRA).
"""
import contextlib
import copy
import importlib.util
import os

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from data.errors import UserError
from model.load import ADAPTER, MOST, check_finite, first_line, load_lm, unloadable

PREFIX = "base_model.model."         # peft's names in files, relative to its wrapper around the LM


def library():
    """The optional package peft, which takes a second to import."""
    try:
        import peft
        return peft
    except ImportError as error:
        raise UserError("lora_r: LoRA needs the package peft, which is not installed; fix: pip install peft") from error


def settings(lm):
    """The LoraConfig of the adapter in an LM, or None."""
    return getattr(lm, "peft_config", {}).get("default")


def new_settings(config, lm):
    """The LoraConfig that the configuration's lora_ keys ask for."""
    return library().LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha or 2 * config.lora_r, lora_dropout=config.lora_dropout,
                                target_modules=target_names(lm, config.lora_targets), task_type="CAUSAL_LM")


def saved_settings(path: str, config):
    """The LoraConfig in the adapter directory `path`. Dropout is no part of an adapter: the configuration's holds."""
    peft = library()
    try:
        found = peft.PeftConfig.from_pretrained(path)
    except Exception as error:  # noqa: BLE001  somebody else's file
        raise UserError(f"model: {path}/{ADAPTER} cannot be read ({first_line(error)}); fix: check the file") from error
    if found.peft_type != "LORA":
        raise UserError(f"model: {path} holds a {found.peft_type} adapter; fix: pass a LoRA adapter")
    if not isinstance(found.r, int) or not 0 < found.r <= MOST:         # peft would take memory for any rank
        raise UserError(f"model: r is {found.r} in {path}/{ADAPTER}; fix: check the file")
    found.inference_mode, found.lora_dropout = False, config.lora_dropout
    return found


def linear_layers(lm) -> dict:
    """Name -> module of an LM's linear layers, without the head."""
    return {name: module for name, module in lm.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not lm.get_output_embeddings()}


def target_names(lm, wanted: str) -> list[str]:
    """The last parts of the names of the linear layers that get an adapter: of all, or those in a comma-separated list."""
    linear = {name.rpartition(".")[2] for name in linear_layers(lm)}
    if wanted == "all-linear":
        return sorted(linear)
    names = {name.strip() for name in wanted.split(",")}
    if not names <= linear:
        raise UserError(f"lora_targets: this model has no linear layers {', '.join(sorted(names - linear))} outside its head; "
                        f"fix: choose from {', '.join(sorted(linear))}")
    return sorted(names)


def attach(lm, adapter, seed: int = 0, weights: dict | None = None):
    """Freeze an LM and put the adapter of a LoraConfig into it: a fresh one, which changes nothing yet, or one with `weights`, by
    their names inside the LM. Returns peft's tuner."""
    peft = library()
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            tuner = peft.LoraModel(lm, adapter, "default")
        except Exception as error:  # noqa: BLE001  the settings may be somebody else's
            raise UserError(f"model: this adapter cannot be put into the model ({first_line(error)}); "
                            f"fix: check {ADAPTER}, or the lora_ keys") from error
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()          # peft makes them in the precision of the weights beside them
    if any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save")
           for module in (lm.get_input_embeddings(), lm.get_output_embeddings())):
        raise UserError("model: this adapter changes the embedding or the head; fix: pass an adapter of the layers between them")
    if weights is not None:
        try:
            result = peft.set_peft_model_state_dict(lm, weights)
        except Exception as error:  # noqa: BLE001  as above
            raise UserError(f"model: the adapter does not fit its base model ({first_line(error)}); fix: check {ADAPTER}") from error
        lacking = {name for name, parameter in lm.named_parameters() if parameter.requires_grad} & set(result.missing_keys)
        if lacking or result.unexpected_keys:
            raise UserError(f"model: the adapter's weights and its {ADAPTER} disagree ({sorted(lacking | set(result.unexpected_keys))[0]}"
                            "); fix: pass a whole adapter")
    lm.eval()
    return tuner


def attach_saved(lm, path: str, config, check: bool) -> None:
    """Put the adapter in the directory `path` into its base model; with `check` the lora_ keys, where given, must be its own."""
    adapter = saved_settings(path, config)
    if check and config.lora_r:
        asked = {"lora_r": config.lora_r, "lora_alpha": config.lora_alpha or 2 * config.lora_r,
                 "lora_targets": ", ".join(target_names(lm, config.lora_targets))}
    try:
        weights = library().utils.load_peft_weights(path, device="cpu")
    except Exception as error:  # noqa: BLE001  as above
        raise unloadable(path, error) from error
    check_finite(weights.items(), path)
    attach(lm, adapter, weights={name.removeprefix(PREFIX): tensor for name, tensor in weights.items()})
    if check and config.lora_r:
        adapted = {name.rpartition(".")[2] for name, module in lm.named_modules() if hasattr(module, "lora_A")}
        found = {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_targets": ", ".join(sorted(adapted))}
        for key in asked:
            if asked[key] != found[key]:
                raise UserError(f"{key}: the adapter {path} has {found[key]}, not {asked[key]}; fix: remove the lora_ keys, "
                                "or start from its base model")


@contextlib.contextmanager
def disabled(lm):
    """The LM without its adapter."""
    layers = [module for module in lm.modules() if isinstance(module, library().tuners.tuners_utils.BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True           # enable_adapters() would switch requires_grad off, too
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def dropouts(lm) -> list[nn.Module]:
    """The dropout modules of the adapter in an LM; none where lora_dropout is 0."""
    layers = (layer for module in lm.modules() if hasattr(module, "lora_dropout") for layer in module.lora_dropout.values())
    return [layer for layer in layers if isinstance(layer, nn.Dropout)]


def written(state: dict) -> dict:
    """The tensors of a state that are written to a file: all of them, or none of a trial's, which have no
    numbers."""
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def save(lm, state: dict, directory: str) -> None:
    """The adapter with the weights of `state`, by their names inside the LM, in peft's format."""
    weights = library().get_peft_model_state_dict(lm, state, save_embedding_layers=False)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in written(weights).items()}
    save_file(tensors, os.path.join(directory, "adapter_model.safetensors"), {"format": "pt"})
    saved, base = copy.copy(settings(lm)), lm.name_or_path
    saved.inference_mode = True
    saved.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    if not isinstance(saved.target_modules, str):
        saved.target_modules = sorted(saved.target_modules)         # a set has another order in every process
    saved.save_pretrained(directory)


def merged(lm, state: dict):
    """A plain LM, on the CPU, with the adapter's weights in `state` added to its own. The base is read again
    in fp32: what is in memory may be rounded to bf16 or 4 bits. Given a `state` on the meta device, which has
    no numbers, the LM is there, too."""
    if any(tensor.is_meta for tensor in state.values()):
        config = AutoConfig.from_pretrained(lm.name_or_path)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        base = load_lm(lm.name_or_path)
    base.eval()
    return attach(base, copy.deepcopy(settings(lm)), weights=state).merge_and_unload()


def quantization(config, device, dtype) -> dict:
    """What `from_pretrained` needs to load the weights in 4 bits, computing in `dtype`; nothing where that is not asked for."""
    if not config.load_in_4bit:
        return {}
    if device.type != "cuda":
        raise UserError("load_in_4bit: this machine has no CUDA GPU, which bitsandbytes needs; fix: load_in_4bit=false")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit: the package bitsandbytes is not installed; fix: pip install bitsandbytes, or load_in_4bit=false")
    return {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}
