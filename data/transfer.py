"""Tensors from the CPU to a device, without making the host wait for a GPU."""
import torch


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """A CPU tensor on a device; the host does not wait for a GPU to take it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def together_to(tensors: list[torch.Tensor], device) -> list[torch.Tensor]:
    """Tensors of ids or places on a device, in one copy."""
    if device.type == "cpu":
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    parts = to_device(flat, device).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]
