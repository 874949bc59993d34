"""Linear layers in bf16 whose weights are cast once more in the backward, for models that are sharded.

Under FSDP a layer's fp32 weights are gathered for its forward, given up after it, and gathered again for its
backward. Autocast would keep a bf16 copy of all of them in between, 2 bytes per parameter on every GPU.
"""
import types

import torch
import torch.nn.functional as F


class RecastLinear(torch.autograd.Function):
    """x (..., D), weight (O, D) in fp32, bias (O,) or None -> (..., O) in bf16: the numbers of autocast."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.dtype = x.dtype
        x = x.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        bias = bias.to(torch.bfloat16) if ctx.has_bias else None
        return F.linear(x, weight.to(torch.bfloat16), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(torch.bfloat16)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.T @ x.flatten(0, -2)).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def forward(self, x):
    """A linear layer's forward, in bf16 where autocast is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, self.weight, self.bias)
    return RecastLinear.apply(x, self.weight, self.bias)


def recast(layer: torch.nn.Module) -> None:
    """Let the linear layers with fp32 weights in a decoder layer keep no bf16 copies."""
    for module in layer.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:
            module.forward = types.MethodType(forward, module)
