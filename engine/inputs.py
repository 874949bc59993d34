"""What a run reads before its model, and a dry run instead of it: the tokenizer and the data."""
from typing import Any

from data.errors import UserError
from data.store import Together
from engine.checkpoint import model_path
from engine.prepared import Data, read_data
from engine.ranks import from_main
from engine.reward_models import check_reward_models
from model.build import check_ids
from model.load import base_of, check_path, check_rotary, load_config, load_tokenizer, load_tokenizer_for
from rewards.functions import check_rewards


def read_inputs(common, config, kind: str, notice, runs: str | None = None) -> tuple[Any, Data]:
    """(tokenizer, the data). UserError where one of them cannot be read, the reference is not there or a
    reward cannot score the examples. `kind`: the algorithm's DATA; `runs`: the directory of the runs, beside
    which tokens are kept."""
    tokenizer = load_tokenizer_for(common, common.model, notice)
    check_path(config.reference or common.model, "reference")
    for key, path in config.frozen_models().items():
        check_frozen(key, path, common.model, tokenizer, notice)
    data = read_data(common, config, kind, tokenizer, notice, runs)
    rows = num_rows(common.model)
    for examples in (data.train_set, data.eval_set):
        check_ids(examples, rows, tokenizer)
    if kind == "prompts":
        check_rotary(base_of(common.model), common.max_length)
        if config.uses_reward():
            check_rewards(config, Together(data.train_set, data.eval_set))
            check_reward_models(config.reward, tokenizer)
    return tokenizer, data


def check_frozen(key: str, name: str, model: str, tokenizer, notice) -> None:
    """UserError where the model that the configuration names under `key` is not there, has another tokenizer
    than the run, or a head with fewer rows than that of `model`, which the run starts from."""
    check_path(name, key)
    path = from_main(model_path, name, notice)
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{key}: {name} has another tokenizer than the model {model}, so that their "
                        f"probabilities are of different tokens; fix: give a {key} with the same tokenizer")
    rows, needed = num_rows(path), num_rows(model)
    if rows < needed:
        raise UserError(f"{key}: {name} knows {rows} tokens, the model {model} {needed}; "
                        f"fix: give a {key} with at least as many")


def num_rows(path: str) -> int:
    """The rows of the head of the model at `path`, which may be more than its tokenizer has tokens."""
    return load_config(base_of(path)).get_text_config().vocab_size


def marked(example, tokenizer, most: int | None = None) -> list[str]:
    """Prompt and responses as text, runs of trained tokens between [[ and ]]; in a text longer than `most`
    characters the middle is left out."""
    texts = [("prompt", tokenizer.decode(example.prompt))]
    for response in example.responses:
        texts.append(("response", marked_text(response, tokenizer)))
    lines = []
    for name, text in texts:
        if most and len(text) > most:
            text = f"{text[:most // 2]} … {text[-most // 2:]}"
        lines.append(f"{name:<9} {text!r}")
    return lines


def marked_text(response, tokenizer) -> str:
    text = ""
    start = 0
    count = len(response.tokens)
    for end in range(1, count + 1):
        if end < count and response.trained[end] == response.trained[start]:
            continue
        piece = tokenizer.decode(response.tokens[start:end])
        text += f"[[{piece}]]" if response.trained[start] else piece
        start = end
    return text
