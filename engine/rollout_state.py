"""A rollout in a checkpoint: a run that is resumed between two updates goes on with the same completions."""
import os

import numpy as np
import torch
from safetensors.torch import load_file

from data.pack import Example, Response
from engine import checkpoint
from engine.rollout import Rollout

LEFT = "rollout_is_left"      # in trainer.json: the algorithm left the rollout before its last update


def stored(rollout: Rollout) -> dict[str, torch.Tensor]:
    """Tokens, and the numbers that were computed once."""
    responses = []
    for example in rollout.examples:
        responses += example.responses
    lengths = [len(response.tokens) for response in responses]
    tokens = [response.tokens for response in responses]
    trained = [response.trained for response in responses]
    groups = [len(example.responses) for example in rollout.examples]
    tensors = {
        "rows": torch.tensor(rollout.rows),
        "attempts": torch.tensor(rollout.attempts),
        "groups": torch.tensor(groups),
        "lengths": torch.tensor(lengths),
        "tokens": torch.from_numpy(np.concatenate(tokens)),
        "trained": torch.from_numpy(np.concatenate(trained))}
    for name in rollout.kept:
        tensors[f"extras/{name}"] = torch.cat(rollout[name])
    return tensors


def restored(directory: str, number: int, prompts: list[Example]) -> Rollout:
    """The rollout that the checkpoint in `directory` holds, over the rows of `prompts`."""
    tensors = load_file(os.path.join(directory, checkpoint.ROLLOUT))
    responses = []
    sizes = tensors["lengths"].tolist()
    for tokens, trained in zip(tensors["tokens"].split(sizes), tensors["trained"].split(sizes)):
        responses.append(Response(tokens.numpy(), trained.numpy()))
    rows, examples, done = tensors["rows"].tolist(), [], 0
    for row, size in zip(rows, tensors["groups"].tolist()):
        prompt = prompts[row]
        group = responses[done:done + size]
        examples.append(Example(prompt.prompt, group, prompt.where, dict(prompt.extras)))
        done += size
    rollout = Rollout(number, rows, examples)
    rollout.attempts = int(tensors["attempts"])
    for name, values in tensors.items():
        if name.startswith("extras/"):
            is_per_response = len(values) == len(responses)
            sizes = []
            for example in examples:
                sizes.append(len(example.responses) if is_per_response else example.num_trained)
            rollout.once(name.removeprefix("extras/"), values.split, sizes)
    return rollout


def was_left(directory: str | None) -> bool:
    return checkpoint.load_trainer(directory).get(LEFT, False)
