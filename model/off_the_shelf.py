"""A reward model that somebody else trained: any sequence classifier with one label, with its own tokenizer
and chat template."""
import torch
from transformers import AutoModelForSequenceClassification

from data.errors import RunError, UserError
from data.messages import unflagged
from data.pack import Example
from model.build import num_ranks, product_precision, shard_over_ranks, this_device
from model.load import (
    CLASSIFIER,
    check_finite,
    first_line,
    is_adapter,
    load_config,
    load_tokenizer,
    unloadable,
)

PADDED = 1.25      # rows are computed together as long as padding makes no more of them than this,
TOGETHER = 8192    # ... and no more tokens


class Classifier:
    """`classifier.of_examples(examples)` -> (S,) fp32: its scores of the examples' responses. Their texts, as
    `decode` makes them of token ids, go through its own chat template, and the scores are those of
    transformers.

    It is frozen, and in bf16 where a run on a GPU is. Under several ranks it is sharded, in so many `copies`
    over all, and each of them computes a share of the scores. UserError where it cannot be loaded."""

    def __init__(self, path: str, decode=None, precision: str = "auto", copies: int = 1):
        self.path, self.decode = path, decode
        self.tokenizer = check_classifier(path)
        device = this_device()
        is_bf16 = device.type == "cuda" and product_precision(precision, device) == "bf16"
        self.tolerance = 5e-2 if is_bf16 else 1e-4      # how far apart two computations of a score may be
        self.model = load_classifier(path, torch.bfloat16 if is_bf16 else torch.float32)
        self.config = self.model.config.get_text_config()
        self.longest = getattr(self.config, "max_position_embeddings", None) or torch.inf
        if num_ranks() > 1:
            shard_over_ranks(self.model, copies)
        else:
            self.model.to(device)

    def of_examples(self, examples: list[Example]) -> torch.Tensor:
        """(S,) fp32: a score for each of the examples' responses."""
        return self.of_rows(self.rows(examples))

    def scores(self, conversations: list[list[dict]]) -> torch.Tensor:
        """(n,) fp32: a score for each conversation."""
        return self.of_rows(self.tokenised(conversations))

    def rows(self, examples: list[Example]) -> list[list[int]]:
        """S rows of its own token ids: a prompt with a response each. RunError where it cannot read one."""
        conversations = []
        for example in examples:
            for response in example.responses:
                conversations.append(conversation(example.extras["prompt"], self.decode(response.tokens)))
        return self.tokenised(conversations)

    def tokenised(self, conversations: list[list[dict]]) -> list[list[int]]:
        try:
            rows = [self.tokenizer.apply_chat_template(turns, return_dict=False) for turns in conversations]
        except Exception as error:  # noqa: BLE001  jinja's, of a template that somebody else wrote
            raise RunError(f"reward: the chat template of {self.path} refuses a conversation "
                           f"({first_line(error)}); fix: another reward model, or prompts in the roles that "
                           "it knows") from error
        longest = max(map(len, rows), default=0)
        if longest > self.longest:
            raise RunError(f"reward: {self.path} reads {self.longest} tokens, and a completion with its "
                           f"prompt has {longest}; fix: lower max_completion_length")
        return rows

    @torch.no_grad()
    def of_rows(self, rows: list[list[int]]) -> torch.Tensor:
        """(n,) fp32: a score for each row of token ids, on every rank. All ranks call it with the same rows:
        each computes as many forwards as the others, since a sharded model needs all of them."""
        world = num_ranks()
        rank = torch.distributed.get_rank() if world > 1 else 0
        groups = together([len(row) for row in rows])
        found = torch.zeros(len(rows), device=this_device())
        for first in range(0, len(groups), world):
            places = groups[first + rank] if first + rank < len(groups) else []
            scores = self.forward([rows[place] for place in places] or [[0]])
            found[places] = scores[:len(places)]
        if world > 1:
            torch.distributed.all_reduce(found)
        return found

    def forward(self, rows: list[list[int]]) -> torch.Tensor:
        """(n,) fp32. Rows are padded on the right, where a causal model does not see it, with the token that
        this model takes for padding; without one, with a token that no row contains."""
        padding = self.config.pad_token_id
        if padding is None:
            used = set().union(*rows)
            padding = next(token for token in range(len(used) + 1) if token not in used)
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), padding)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
            mask[i, :len(row)] = 1
        own, self.config.pad_token_id = self.config.pad_token_id, padding
        try:
            output = self.model(ids.to(this_device()), attention_mask=mask.to(this_device()))
        finally:
            self.config.pad_token_id = own
        return output.logits[:, 0].float()


def conversation(prompt, completion) -> list[dict]:
    """A prompt and its completion, each as text or as messages. Where the prompt ends with the beginning of
    the completion, they are one turn."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else unflagged(prompt)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    first, *rest = unflagged(completion)
    if turns[-1]["role"] == "assistant":
        first = first | {"content": turns.pop()["content"] + first["content"]}
    return [*turns, first, *rest]


def is_classifier(path: str) -> bool:
    """Whether the model at `path` is a sequence classifier; an adapter, which has no config.json, is none."""
    return not is_adapter(path) and architecture(load_config(path)).endswith(CLASSIFIER)


def empty_classifier(path: str):
    """The classifier at `path` without the numbers of its weights."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(load_config(path))


def architecture(config) -> str:
    return (config.architectures or ["model without a class"])[0]


def together(lengths: list[int]) -> list[list[int]]:
    """The places of rows that are computed together: of similar length, the shortest first."""
    groups = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[place]
        joins = groups and length <= PADDED * lengths[groups[-1][0]]
        if joins and length * (len(groups[-1]) + 1) <= TOGETHER:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def check_classifier(path: str):
    """The tokenizer of the classifier at `path`. UserError, before its weights are loaded, where it is no
    classifier, has more than one label or no chat template."""
    try:
        config, tokenizer = load_config(path), load_tokenizer(path)
    except UserError as error:      # it speaks of the key `model`
        raise UserError(str(error).replace("model: ", "reward: ", 1)) from error
    kind = architecture(config)
    if not kind.endswith(CLASSIFIER):
        raise UserError(f"reward: {path} is a {kind}, which gives no score; "
                        "fix: pass a run of algorithm: rm, or a sequence classifier with one label")
    if config.num_labels != 1:
        raise UserError(f"reward: {path} has {config.num_labels} labels and gives no single score; "
                        "fix: pass a classifier with one label")
    if not tokenizer.chat_template:
        raise UserError(f"reward: {path} has no chat template, so nothing says how it reads a "
                        "conversation; fix: save one with its tokenizer")
    return tokenizer


def load_classifier(path: str, dtype: torch.dtype):
    """The classifier at `path`, frozen; UserError where its weights cannot be loaded or are not all there."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, output_loading_info=True)
    except Exception as error:  # noqa: BLE001  somebody else's files: anything may be raised
        raise unloadable(path, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"reward: {path} lacks {len(missing)} weights of a {type(model).__name__} "
                        f"({missing[0]}, ...); fix: pass a complete reward model")
    check_finite(model.named_parameters(), path)
    return model.eval().requires_grad_(False)
