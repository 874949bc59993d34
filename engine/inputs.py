"""What a run reads before its model, and a dry run instead of it: the tokenizer and the data."""
from typing import Any

from data.store import Together
from engine.prepared import Data, read_data
from engine.score import check_reward_models
from model.load import base_of, check_path, check_rotary, load_tokenizer_for
from rewards.functions import check_rewards


def read_inputs(common, config, kind: str, notice, runs: str | None = None) -> tuple[Any, Data]:
    """(tokenizer, the data). UserError where one of them cannot be read, the reference is not there or a
    reward cannot score the examples. `kind`: the algorithm's DATA; `runs`: the directory of the runs, beside
    which tokens are kept."""
    tokenizer = load_tokenizer_for(common, common.model, notice)
    check_path(config.reference or common.model, "reference")
    data = read_data(common, config, kind, tokenizer, notice, runs)
    if kind == "prompts":
        check_rotary(base_of(common.model), common.max_length)
        check_rewards(config, Together(data.train_set, data.eval_set))
        check_reward_models(config.reward, tokenizer)
    return tokenizer, data


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
