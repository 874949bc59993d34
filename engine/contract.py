"""What the loop of an algorithm must do, as checks: an edit that would give a wrong number stops the run with
the line that is missing or too much."""
import torch

from data.errors import RunError
from engine.report import NO_METRICS
from model.build import reshard

OWN = {*NO_METRICS, "loss"}      # what a row of metrics.jsonl holds beside the metrics of an algorithm


def parts_of(values) -> tuple:
    """What stands in step.log for the sum of several averages, or for one."""
    return values if isinstance(values, tuple) else (values,)


def check_new(step, last: int) -> None:
    """RunError where an update is opened that was made already."""
    if 0 < step.index <= last:
        raise RunError(f"update {step.index} was made already; fix: iterate engine.steps once, without a "
                       "loop of your own around it: epochs, max_steps and online num_iterations say how long")


def check_losses(losses: tuple) -> None:
    """RunError where the losses of a micro-batch are not one number per example, response or token."""
    for part in losses:
        if part.ndim == 0:
            raise RunError("step.log got a loss that is one number already, so its mean over micro-batches "
                           "would be wrong; fix: pass the losses per example, response or token, without "
                           "sum() or mean()")
        if part.ndim > 1:
            raise RunError(f"step.log got losses of shape {tuple(part.shape)}, which is one number for every "
                           "pair of two things; fix: give both tensors of the difference or product that "
                           "made them the shape (n,)")


def check_metrics(metrics: dict) -> None:
    """RunError where a metric has a name of the row's own, or is no list of numbers."""
    for name, values in metrics.items():
        if name in OWN:
            raise RunError(f"step.log got a metric {name!r}, which every row has already; fix: choose "
                           "another name")
        for part in parts_of(values):
            if torch.is_tensor(part) and part.ndim != 1:
                raise RunError(f"step.log got {name!r} of shape {tuple(part.shape)}, whose mean over "
                               "micro-batches would be wrong; fix: pass one number per example, response or "
                               "token, (n,), without sum() or mean()")


def check_before_clipping(engine) -> None:
    """RunError where a micro-batch of the open update was not logged, was logged twice, or none of them had a
    backward. After it the weights are sharded, whatever forward came last."""
    step = engine.step
    count = len(step.micro_batches)
    logged = len(step.losses)
    if logged < count:
        raise RunError(f"{count - logged} of the {count} micro-batches of update {step.index} have no loss; "
                       "fix: add the line step.log(losses, metrics) after backward(), for every batch")
    if logged > count:
        raise RunError(f"update {step.index} has {logged} losses of {count} micro-batches, so its gradients "
                       "were added up more than once; fix: iterate the step once")
    reshard(engine.policy)
    trained = [parameter for parameter in engine.policy.parameters() if parameter.requires_grad]
    if all(parameter.grad is None for parameter in trained):
        raise RunError(f"update {step.index} has no gradient; fix: add the line "
                       "(losses.sum() / step.num_examples).backward(), with the count that the loss is a "
                       "mean over, for every batch")
