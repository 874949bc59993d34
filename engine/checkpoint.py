"""Sealed directories: a checkpoint is whole or it is ignored.

Files are written to a temporary directory beside their place, synced, sealed by `manifest.json` (size and sha256 of every file,
written last) and renamed. A reader trusts only a directory whose manifest holds. Weights and optimizer state are safetensors,
the rest is JSON: loading never unpickles.
"""
import copy
import json
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
from engine.ranks import distributed

MANIFEST = "manifest.json"
WEIGHTS = ".safetensors"
ROLLOUT = "rollout.safetensors"              # of a checkpoint between two updates of the same rollout
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


def read_manifest(directory: str) -> dict[str, tuple[int, str]] | None:
    """{file: (bytes, sha256)} of a sealed directory; None if there is no such manifest."""
    try:
        with open(os.path.join(directory, MANIFEST)) as file:
            return {name: (entry["bytes"], entry["sha256"]) for name, entry in json.load(file).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):     # a flipped bit can leave valid JSON of another shape
        return None


def broken(directory: str, ending: str = "") -> str | None:
    """What is wrong with a sealed directory (with those of its files that have this ending), naming the file; None if it is whole."""
    manifest = read_manifest(directory)
    if manifest is None:
        return f"{os.path.join(directory, MANIFEST)} is missing or unreadable"
    for name, (size, digest) in manifest.items():
        path = os.path.join(directory, name)
        if not name.endswith(ending):
            continue
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


def finished(run_directory: str) -> bool:
    """Whether a run has its final model. Its other files are the user's: to edit or add one makes no run unfinished."""
    return weights_fault(os.path.join(run_directory, "final")) is None


def weights_fault(directory: str) -> str | None:
    """What is wrong with the weights of a sealed directory; None if they are whole, whatever became of its other files."""
    if os.path.isfile(os.path.join(directory, MANIFEST)):
        return broken(directory, WEIGHTS)
    held = os.listdir(directory) if os.path.isdir(directory) else []
    return None if any(name.endswith(WEIGHTS) for name in held) else f"{directory} holds no weights"


def model_path(name: str, notice) -> str:
    """The directory with the model of a run: its `final/`, else its newest whole checkpoint; any other name as it is. A notice
    says where it is not the final model as the run wrote it."""
    final = os.path.join(name, "final")
    fault = weights_fault(final)
    if fault is None:
        if edited := broken(final):
            notice(f"{final} is not as the run wrote it ({edited}); it is used as it is")
        return final
    path = newest(name, notice)
    if path:
        why = fault if os.path.isdir(final) else "this run has no final model"
        notice(f"{why}; {path} is used instead")
    return path or name


def set_aside(directory: str) -> str | None:
    """Where files of a sealed directory were edited, added or damaged, move it out of the way of its successor; -> its new path."""
    if not os.path.isdir(directory):
        return None
    added = set(files_in(directory)) - {MANIFEST, *(read_manifest(directory) or {})}
    if not added and broken(directory) is None:
        return None
    number = 1
    while os.path.exists(f"{directory}-{number}"):
        number += 1
    os.rename(directory, f"{directory}-{number}")
    return f"{directory}-{number}"


def files_in(directory: str) -> list[str]:
    """The paths, relative to it, of the files in a directory and in its subdirectories."""
    found = []
    for folder, _, names in os.walk(directory):
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)


def tidy(run_directory: str) -> None:
    """Remove what an interrupted save left behind. Where it had moved the old directory away and not yet put the new one in its
    place, the old one comes back."""
    for folder in (run_directory, os.path.join(run_directory, "checkpoints")):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        for name in names:
            target, mark, _ = name.partition(".tmp-")
            path = os.path.join(folder, name)
            if mark and name.endswith("-old") and not os.path.exists(os.path.join(folder, target)):
                os.rename(path, os.path.join(folder, target))
            elif mark:
                shutil.rmtree(path, ignore_errors=True)
            elif name.endswith(".tmp"):
                os.remove(path)


def clean(run_directory: str, keep: int) -> None:
    """Remove what an interrupted save left behind, and all but the newest `keep` checkpoints."""
    tidy(run_directory)
    for path in checkpoints(run_directory)[:-keep]:
        remove(path)


def remove(path: str) -> None:
    """Remove a checkpoint: in one rename it is none any more, whenever the process dies."""
    leftover = f"{path}.tmp-{secrets.token_hex(4)}"
    os.rename(path, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


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

    if distributed()[0] == 0:
        write_sealed(directory, write)


def load_optimizer(directory: str, policy, optimizer) -> None:
    """Put the saved moments back beside the parameters, sharded as those are."""
    moments = load_file(os.path.join(directory, "optimizer.safetensors"))
    for name, parameter in policy.named_parameters():
        state = {key: moments[f"{name}:{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{key}" in moments}
        for key in state.keys() - {"step"}:
            moved = state[key].to(parameter.device)
            state[key] = distribute_tensor(moved, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else moved
        if state:
            state["step"] = state["step"].to(parameter.device)       # the fused AdamW keeps it there
            optimizer.state[parameter] = state


def load_trainer(directory: str) -> dict:
    with open(os.path.join(directory, "trainer.json")) as file:
        return json.load(file)
