"""The sentence with which a run begins: what is trained on what, for how long, and where."""
import torch

from engine.forecast import size_of
from engine.plan import Plan
from model.modelscope import as_written


def opening(common, config, policy, train_set, eval_set, kind: str, made: int, world: int) -> str:
    """`dpo trains all 803K parameters of example/tiny/model on 2,000 examples (200 held out): 63 updates, in
    fp32 on the CPU with 2 threads`. `kind`: the algorithm's DATA; `made`: updates of before a resume."""
    model = as_written(common.model)
    is_online = kind == "prompts"
    total = planned_updates(common, config, len(train_set))
    rows = f"{len(train_set):,} {'prompts' if is_online else 'examples'}"
    held_out = f" ({len(eval_set):,} held out)" if len(eval_set) else ""
    updates = f"{total:,} update{'s' if total > 1 else ''}" + (f", {made:,} of them made" if made else "")
    return (f"{common.algorithm} trains {parameters_of(policy)} of {model} on {rows}{held_out}: "
            f"{updates}, in {policy.precision} on {place(policy.device, world)}")


def planned_updates(common, config, count: int) -> int:
    """The updates of a run on `count` rows, of which an online run may make several from each rollout."""
    _, passes, updates_per_pass = config.rollout_shape()
    return Plan(common, count, passes * updates_per_pass).total


def parameters_of(policy) -> str:
    """`all 803K parameters`, `1.08M of 495M parameters`."""
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    heads = size_of(policy) - size_of(policy.lm)
    total = policy.lm.num_parameters() + heads       # it counts weights of 4 bits as what they are
    if trained == total:
        return f"all {short(total)} parameters"
    return f"{short(trained)} of {short(total)} parameters"


def place(device: torch.device, world: int) -> str:
    if device.type == "cuda":
        return f"{world} GPUs" if world > 1 else torch.cuda.get_device_name(device)
    if world > 1:
        return f"{world} processes of the CPU"
    threads = torch.get_num_threads()
    return f"the CPU with {threads} thread{'s' if threads > 1 else ''}"


def short(count: int) -> str:
    """`803K`, `135M`, `7.62B`."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            number = count / unit
            return f"{number:.3g}{letter}" if number < 999.5 else f"{number:.0f}{letter}"
    return str(count)
