"""AdamW that knows its place in an update, so that a loop with a line too few, or in the wrong place,
stops."""
import torch

from data.errors import RunError
from model.build import reshard


def adamw_arguments(policy, lr: float, weight_decay: float) -> dict:
    """The arguments of AdamW(0.9, 0.999, 1e-8) over the trained weights of a policy; norms and biases are not
    decayed."""
    decayed, plain = [], []
    for parameter in policy.parameters():
        if parameter.requires_grad:
            group = decayed if parameter.ndim > 1 else plain
            group.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0}]
    # fused: one pass over the weights and no temporaries of their size
    return {"params": groups, "lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "fused": True}


class Optimizer(torch.optim.AdamW):
    """The AdamW of a run, with `adamw_arguments` of its policy and configuration."""

    def __init__(self, engine):
        self.engine, config = engine, engine.config
        super().__init__(**adamw_arguments(engine.policy, config.lr, config.weight_decay))

    def check_rates(self) -> None:
        """RunError where a group has got another rate before the first update, which would replace it. Within
        an update any rate may be set."""
        planned = self.engine.config.lr
        for group in self.param_groups:
            if group["lr"] != planned:
                raise RunError(f"a group of the optimizer has lr {group['lr']:g}, which every update "
                               f"replaces by that of the keys lr ({planned:g}), schedule and warmup; fix: "
                               "set it within the update, before optimizer.step()")

    def set_learning_rate(self, rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = rate

    def step(self):
        step = self.engine.step
        if step.index == 0:
            return                                   # nothing is trained there
        if step.is_made:
            raise RunError(f"optimizer.step() was called twice in update {step.index}; "
                           "fix: call it once for each step of engine.steps()")
        if not step.is_clipped:
            raise RunError(f"optimizer.step() came before engine.clip_gradients() in update {step.index}; "
                           "fix: add the line engine.clip_gradients() before optimizer.step()")
        if step.examples:      # where a rollout has fewer prompts than mini-batches, momentum moves nothing
            super().step()
        step.is_made = True
        reshard(self.engine.policy)      # what a forward after the backward has gathered is the old weights

    def zero_grad(self, set_to_none: bool = True) -> None:
        step = self.engine.step
        if step and step.num_yielded and not step.is_made:
            raise RunError(f"optimizer.zero_grad() came before optimizer.step() in update {step.index}, so "
                           "its gradients would be lost; fix: add the line optimizer.step() before it, after "
                           "engine.clip_gradients()")
        super().zero_grad(set_to_none)

    def check_cleared(self) -> None:
        """RunError where an update would add its gradients to those of the update before."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.any():
                    raise RunError(f"the gradients of an earlier update are still there in update "
                                   f"{self.engine.step.index}; fix: add the line optimizer.zero_grad() after "
                                   "optimizer.step()")
