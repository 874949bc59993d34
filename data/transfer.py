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
    sizes = [len(tensor) for tensor in tensors]
    return list(to_device(torch.cat(tensors), device).split(sizes))
