"""Sealed directories: a checkpoint is whole or it is ignored.

Files are written to a temporary directory beside their place, synced, sealed by `manifest.json` (size and sha256 of every file,
written last) and renamed. A reader trusts only a directory whose manifest holds. Weights and optimizer state are safetensors,
the rest is JSON: loading never unpickles.
"""
import copy
import json
import math
import os
import secrets
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForSequenceClassification

from data.errors import RunError
from data.files import sha256
from data.tokenise import stop_ids
from engine import lora
from engine.model import VALUE_HEAD
from engine.ranks import distributed, from_main, sum_over_ranks

MANIFEST = "manifest.json"
ROLLOUT = "rollout.safetensors"              # of a checkpoint between two updates of the same rollout
MOMENTS = "exp_avg", "exp_avg_sq"            # of AdamW
CRITIC = "critic.safetensors"                # of a checkpoint of a policy with a critic: its trained weights


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(directory: str, write) -> None:
    """Call `write(temporary directory)`, seal what it wrote and move it to `directory` in one rename. RunError when the disk
    refuses; what stood at `directory` before stays until its replacement is complete."""
    directory = os.path.normpath(directory)
    temporary = f"{directory}.tmp-{secrets.token_hex(4)}"       # not the process's number: containers share disks, and number 1
    try:
        os.makedirs(temporary)
        write(temporary)
        files = sorted(os.listdir(temporary))
        for name in files:
            os.chmod(os.path.join(temporary, name), 0o644)     # safetensors writes 0600: unreadable for another user's server
            sync(os.path.join(temporary, name))
        manifest = {name: {"bytes": os.path.getsize(os.path.join(temporary, name)),
                           "sha256": sha256(os.path.join(temporary, name))} for name in files}
        with open(os.path.join(temporary, MANIFEST), "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        sync(temporary)
        if os.path.isdir(directory):
            os.rename(directory, f"{temporary}-old")
        os.rename(temporary, directory)
        sync(os.path.dirname(directory) or ".")
        shutil.rmtree(f"{temporary}-old", ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:     # a full disk is any of the three, depending on the writer
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"cannot write {directory} ({str(error).splitlines()[0]}); earlier checkpoints are untouched; "
                       "fix: free disk space and run the same command again") from error


def broken(directory: str) -> str | None:
    """What is wrong with a sealed directory, naming the file; None if it is whole."""
    try:
        with open(os.path.join(directory, MANIFEST)) as file:
            manifest = [(name, entry["bytes"], entry["sha256"]) for name, entry in json.load(file).items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):     # a flipped bit can leave valid JSON of another shape
        return f"{os.path.join(directory, MANIFEST)} is missing or unreadable"
    for name, size, digest in manifest:
        path = os.path.join(directory, name)
        if not os.path.isfile(path):
            return f"{path} is missing"
        if os.path.getsize(path) != size:
            return f"{path} has {os.path.getsize(path)} bytes instead of {size}"
        if sha256(path) != digest:
            return f"{path} is damaged (its sha256 differs from the manifest)"
    return None


def checkpoints(run_directory: str) -> list[str]:
    """Paths of a run's checkpoints, oldest first, whole or not."""
    folder = os.path.join(run_directory, "checkpoints")
    names = [name for name in os.listdir(folder) if name.startswith("step-") and name[5:].isdigit()] if os.path.isdir(folder) else []
    return sorted((os.path.join(folder, name) for name in names), key=step_of)


def step_of(path: str) -> int:
    return int(path.rpartition("step-")[2])


def newest(run_directory: str, notice) -> str | None:
    """The newest whole checkpoint; broken ones are passed over with a notice that names the bad file."""
    for path in reversed(checkpoints(run_directory)):
        fault = broken(path)
        if fault is None:
            return path
        notice(f"checkpoint ignored: {fault}")
    return None


def model_path(name: str, notice) -> str:
    """The directory with the model of a run: its `final/`, else its newest whole checkpoint; any other name as it is."""
    final = os.path.join(name, "final")
    if broken(final) is None:
        return final
    return newest(name, notice) or name


def clean(run_directory: str, keep: int | None = None, after: float = math.inf) -> None:
    """Remove what an interrupted save left behind; given `keep`, all but the newest checkpoints; given `after`, those of later
    steps: a run that goes on from an earlier one does them again, and `keep` must not count the broken ones among them."""
    for folder in (run_directory, os.path.join(run_directory, "checkpoints")):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if ".tmp-" in name:
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    found = checkpoints(run_directory)
    for path in (found[:-keep] if keep else []) + [path for path in found if step_of(path) > after]:
        shutil.rmtree(path, ignore_errors=True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU of rank 0; a sharded one is gathered from all ranks first (a collective call). None on the other
    ranks: eight processes of one machine need not hold eight copies of a model."""
    tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
    return tensor.cpu() if distributed()[0] == 0 else None


def model_state(policy) -> dict:
    """The policy's weights as saved: whole, on rank 0 (gathering them is a collective call), in training precision; of a policy
    with an adapter the trained ones."""
    if lora.settings(policy.lm):
        return {name: whole(parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return {name: whole(parameter) for name, parameter in policy.state_dict().items()}


def merged(lm, state: dict):
    """The LM with its adapter merged into it, and its weights by the names of `model_state`."""
    plain = lora.merged(lm, {name.removeprefix("lm."): tensor for name, tensor in state.items() if name.startswith("lm.")})
    plain.generation_config = lm.generation_config
    head = {name: tensor for name, tensor in state.items() if not name.startswith("lm.")}
    return plain, {f"lm.{name}": tensor for name, tensor in plain.state_dict().items()} | head


def save_model(lm, tokenizer, state: dict, directory: str) -> None:
    """The LM as transformers saves it, or its adapter as peft does, a reward model's head beside it, and the tokenizer."""
    weights = {name.removeprefix("lm."): tensor for name, tensor in state.items() if name.startswith("lm.")}
    if lora.settings(lm):
        lora.save(lm, weights, directory)
    else:
        lm.save_pretrained(directory, state_dict=weights, max_shard_size="5GB")
    if "value_head.weight" in state:
        save_file({"v_head.summary.weight": state["value_head.weight"]}, os.path.join(directory, VALUE_HEAD))
    tokenizer.save_pretrained(directory)


def why_no_classifier(lm) -> str | None:
    """The reason why `save_classifier` cannot save a reward model on this LM; None if it can."""
    if lora.settings(lm):
        return "with LoRA it takes merge: true"
    known = type(lm.config) in AutoModelForSequenceClassification._model_mapping
    return None if known else f"transformers has no sequence classifier for {lm.config.model_type}"


def save_classifier(lm, tokenizer, state: dict, directory: str) -> None:
    """A reward model in the form that AutoModelForSequenceClassification(num_labels=1) loads, with the same scores.

    That class reads the score at the last token that is not `pad_token_id`, so padding must not be a stop token."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stop_ids(tokenizer):
        spare = sorted(set(tokenizer.get_added_vocab().values()) - set(stop_ids(tokenizer)) - {tokenizer.bos_token_id})
        tokenizer.add_special_tokens({"pad_token": tokenizer.convert_ids_to_tokens(spare[0]) if spare else "<|pad|>"})
    config = copy.deepcopy(lm.config)
    config.num_labels, config.pad_token_id, config._attn_implementation = 1, tokenizer.pad_token_id, "sdpa"
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, tokenizer.pad_token_id + 1)
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    weights = {name: state[f"lm.{name}"] for name in classifier.state_dict() if name != "score.weight"}
    for name, tensor in weights.items():
        if added := len(classifier.state_dict()[name]) - len(tensor):      # the embedding: a new pad token needs a row, of whatever
            weights[name] = torch.cat([tensor, tensor.new_zeros(added, *tensor.shape[1:])])
    classifier.save_pretrained(directory, state_dict=weights | {"score.weight": state["value_head.weight"]}, max_shard_size="5GB")
    tokenizer.save_pretrained(directory)


def save_checkpoint(directory: str, policy, tokenizer, optimizer, trainer: dict, stored: dict) -> None:
    """Model, tokenizer, optimizer state (by parameter name, so any world size can load it), `trainer.json` and, if there are any, the
    tensors `stored` of a rollout."""
    weights = model_state(policy)
    moments = {f"{name}:{key}": whole(value) for name, parameter in policy.named_parameters()
               for key, value in optimizer.state.get(parameter, {}).items()}

    def write(temporary):
        save_model(policy.lm, tokenizer, weights, temporary)
        if critic := {name: tensor for name, tensor in weights.items() if name.startswith("critic_")}:
            save_file(critic, os.path.join(temporary, CRITIC))
        save_file(moments, os.path.join(temporary, "optimizer.safetensors"))
        if stored:
            save_file(stored, os.path.join(temporary, ROLLOUT))
        with open(os.path.join(temporary, "trainer.json"), "w") as file:
            json.dump(trainer, file)

    # the others wait: after a signal torchrun would end rank 0 as soon as one of them leaves, and a full disk ends them all
    from_main(write_sealed, directory, write)


def load_optimizer(directory: str, policy, optimizer) -> None:
    """Put the saved moments back beside the parameters, sharded as those are: every rank cuts its part out of the file, so
    none waits for another. RunError on every rank where they do not fit the parameters or hold impossible numbers."""
    parameters, loaded = trained(policy), {}
    for name, state in fitting_moments(directory, parameters).items():
        parameter = parameters[name]
        for key, tensor in state.items():
            tensor = tensor.to(parameter.device)                   # the step too: the fused AdamW keeps it there
            if key in MOMENTS and isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)     # None: not a collective
            state[key] = loaded[f"{name}:{key}"] = tensor
        optimizer.state[parameter] = state
    check_numbers(directory, parameters | loaded)


def trained(policy) -> dict:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def fitting_moments(directory: str, parameters: dict) -> dict:
    """By a parameter's name its saved {"step", "exp_avg", "exp_avg_sq"}, on the CPU; without parameters that never had a
    gradient, such as the LM head of a reward model. RunError where the file does not fit the parameters."""
    path = os.path.join(directory, "optimizer.safetensors")

    def refuse(fault):
        raise RunError(f"{path} {fault}, so the run cannot go on from it; fix: {instead_of(directory)}")

    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        refuse(f"cannot be read ({str(error).splitlines()[0]})")
    states = {}
    for key, tensor in saved.items():
        name, _, kind = key.rpartition(":")
        if name not in parameters or kind not in ("step", *MOMENTS):
            refuse(f"holds {key}, which belongs to no trained weight of this model")
        shape = tuple(parameters[name].shape) if kind in MOMENTS else ()
        if tuple(tensor.shape) != shape:
            refuse(f"holds {key} of shape {list(tensor.shape)} instead of {list(shape)}")
        states.setdefault(name, {})[kind] = tensor
    for name, state in states.items():
        for kind in ("step", *MOMENTS):
            if kind not in state:
                refuse(f"lacks {name}:{kind}")
    if not states:
        refuse("holds no moments")
    return states


def check_numbers(directory: str, tensors: dict) -> None:
    """RunError, on every rank, where one of a checkpoint's tensors, by name, is not finite, or a mean of squares is negative.
    Each rank looks at its own part."""
    if not tensors:
        return
    bad = []
    for name, tensor in tensors.items():
        part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        negative = name.endswith(":exp_avg_sq") and (part < 0).any()
        bad.append(float(negative or not part.isfinite().all()))
    for name, count in zip(tensors, sum_over_ranks(bad, part.device)):
        if count:
            kind = "negative or not finite" if name.endswith(":exp_avg_sq") else "not finite"
            raise RunError(f"checkpoint {directory}: {name} holds numbers that are {kind}, so the run cannot go on from "
                           f"it; fix: {instead_of(directory)}")


def instead_of(directory: str) -> str:
    """The fix where a run cannot go on from the checkpoint in `directory`."""
    run = os.path.dirname(os.path.dirname(os.path.normpath(directory)))
    others = [path for path in checkpoints(run) if path != os.path.normpath(directory)]
    if others:
        return f"resume from another checkpoint (resume={others[-1]})"
    return "start again in another output"


def load_trainer(directory: str) -> dict:
    with open(os.path.join(directory, "trainer.json")) as file:
        return json.load(file)
