"""A reward model in the form that AutoModelForSequenceClassification(num_labels=1) loads."""
import copy

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from data.templates import end_with_last_turn
from data.tokenise import end_ids
from model import lora
from model.load import weight_files
from model.state import precision, save_pretrained

HEAD = "score.weight"      # the classifier's name of the value head


def why_no_classifier(lm, merge: bool = False) -> str | None:
    """The reason why `save_classifier` cannot save a reward model on this LM, with `merge` once its adapter
    is merged; None if it can."""
    if lora.settings(lm) and not merge:
        return "with LoRA it takes merge: true"
    known = type(lm.config) in AutoModelForSequenceClassification._model_mapping
    return None if known else f"transformers has no sequence classifier for {lm.config.model_type}"


def save_classifier(lm, tokenizer, state: dict, directory: str) -> None:
    """Write the reward model with the weights `state`, or this rank's share of them, as a sequence
    classifier, which gives the same scores, also of what its tokenizer's chat template renders."""
    if not state:
        return
    tokenizer = with_padding(tokenizer)
    end_with_last_turn(tokenizer)
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    config._attn_implementation = "eager"      # every architecture has it; it is not saved
    text = config.get_text_config()            # in models that read images a part, from which the class reads
    config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    text.vocab_size = max(text.vocab_size, tokenizer.pad_token_id + 1)
    dtype = precision(state)
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    weights = {}
    known = lm.state_dict().keys() | {HEAD}
    for name, wanted in classifier.state_dict().items():
        if name not in known:
            raise KeyError(name)
        tensor = state.get("value_head.weight" if name == HEAD else f"lm.{name}")
        if tensor is None:                     # another rank writes it
            continue
        tensor = tensor.to(dtype)
        added = len(wanted) - len(tensor)
        if added:                              # a new pad token needs an (unused) row in the embedding
            tensor = torch.cat([tensor, tensor.new_zeros(added, *tensor.shape[1:])])
        weights[name] = tensor
    save_pretrained(classifier, weights, directory)
    tokenizer.save_pretrained(directory)


def saved_score(path: str) -> torch.Tensor | None:
    """The head (1, D) in fp32 of the classifier at `path`; None where no safetensors file has one of this
    name and shape."""
    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            if HEAD in weights.keys():
                score = weights.get_tensor(HEAD).float()
                return score if len(score) == 1 else None
    return None


def with_padding(tokenizer):
    """The tokenizer with a pad token that ends no response: the class reads the score at the last token that
    is not padding."""
    tokenizer = copy.deepcopy(tokenizer)
    ends = set(end_ids(tokenizer))
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        added = set(tokenizer.get_added_vocab().values())
        spare = sorted(added - ends - {tokenizer.bos_token_id})
        pad = tokenizer.convert_ids_to_tokens(spare[0]) if spare else "<|pad|>"
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer
