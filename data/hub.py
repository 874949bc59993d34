"""Rows of datasets on the Hugging Face Hub, and the transcripts of Anthropic's HH-RLHF."""
import re

import yaml

from data.errors import UserError, said_first
from data.scored import se_rows, shp_rows

SHORT = {
    "hh": "Anthropic/hh-rlhf",
    "shp": "stanfordnlp/SHP",
    "se": "HuggingFaceH4/stack-exchange-preferences",
    "gsm8k": "openai/gsm8k",
}
SUBSET = {"openai/gsm8k": "main"}      # the one that is meant where none is named: the hub wants one
SHORT_NAME = re.compile(rf"^({'|'.join(SHORT)})(?=[/:]|$)")
ANSWER_WITHIN = 5      # seconds
NAME = r"\w[\w.-]*"      # an owner's, and a repository's
FRONT = re.compile(r"---\r?\n(.*?)\r?\n---", re.DOTALL)      # of a README.md
HUB_NAME = re.compile(rf"(?P<repo>{NAME}/{NAME})"
                      r"(?:/(?P<subset>[\w./-]+?))?(?::(?P<split>[\w.\[\]%:+-]+))?")


def hub_rows(name, kind="pairs", chat=True, seed=0):
    """Yield (where, row) of a hub dataset: "owner/name", "owner/name:split" or "owner/name/subset:split"
    (default split: train).

    hh, shp, se and gsm8k stand for "owner/name" of well-known ones. The subset is a configuration of the
    dataset or, where there is none of that name, a directory in it (HH's "harmless-base"). Rows of shp and se
    are converted for `kind`, their prompts to messages or (`chat` false) text; see `data.scored`, which may
    yield a reason (str) to drop it instead of a row. `where` is "owner/name:split:123", counted from 1.
    Raises UserError when the dataset cannot be loaded or is empty.
    """
    dataset, repo, label, split = _named(name)
    if not len(dataset):
        raise UserError(f"the dataset is empty, no rows in {label}; fix: choose another split")
    if repo == SHORT["shp"]:
        yield from shp_rows(dataset, label, kind, chat, seed)
    elif repo == SHORT["se"]:
        yield from se_rows(dataset, label, kind, chat, seed, test=split == "test")
    else:
        for number, row in enumerate(dataset, 1):
            yield f"{label}:{number}", row


def fingerprint(name):
    """What tells the rows of a hub dataset from those of another version of it: the library's own digest;
    None where it has none."""
    dataset, _, _, split = _named(name)
    digest = getattr(dataset, "_fingerprint", None)
    return digest and f"{digest} {split}"


def _named(name):
    """(rows, "owner/name", the label of its rows, the split that was asked for) of a hub dataset's name."""
    match = HUB_NAME.fullmatch(SHORT_NAME.sub(lambda short: SHORT[short[0]], name, count=1))
    if not match:
        raise UserError(f"{name!r} is neither an existing file nor a hub dataset's name; "
                        "fix: write a file's path or owner/name:split")
    repo, subset = match["repo"], match["subset"] or SUBSET.get(match["repo"])
    split = match["split"] or "train"
    loaded = split
    if repo == SHORT["se"] and split == "test":
        loaded = "train"                   # its only split, which holds our test questions
    dataset = _load(name, repo, subset, loaded)
    label = f"{repo}/{subset}:{split}" if subset else f"{repo}:{split}"
    return dataset, repo, label, split


def _load(name, repo, subset, split):
    """A split of a dataset, from the hub or its cache. UserError, which calls it `name`, if that fails."""
    cause = why_unreachable(repo, "dataset")
    try:
        import datasets  # slow to import and not needed for local files
        if cause:
            datasets.config.HF_HUB_OFFLINE = True      # it has a switch of its own
        if not subset:
            return datasets.load_dataset(repo, split=split)
        try:
            return datasets.load_dataset(repo, subset, split=split)
        except ValueError:
            return datasets.load_dataset(repo, data_dir=subset, split=split)
    except Exception as error:  # noqa: BLE001  offline, not found, gated, unknown split: no common type
        if cause:
            raise UserError(f"{cause}, and {name!r} is neither an existing file nor a dataset in its cache; "
                            "fix: correct the path, or connect to the network") from None
        raise UserError(f"{name!r} is neither an existing file nor a dataset that the hub gives us "
                        f"({type(error).__name__}: {said_first(error)}); "
                        "fix: correct the path or name, or download the file and name it") from None


def front_matter(path) -> dict:
    """What the README.md of a model or dataset says to the hub, between its first lines ---; {} where it says
    nothing, or there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found = yaml.safe_load(FRONT.match(file.read())[1])
    except (OSError, TypeError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def why_unreachable(repo, kind):
    """Why the hub cannot be asked about a "model" or a "dataset", None if it gives any answer. It is
    asked once, for a few seconds, and from then on only its cache is used: its client would try each file for
    half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    try:
        HfApi().repo_info(repo, repo_type=kind, timeout=ANSWER_WITHIN)
    except OfflineModeIsEnabled:
        return "the hub is not asked, since HF_HUB_OFFLINE is set"
    except (HfHubHTTPError, HFValidationError):      # it answers, or would refuse: loading tells why
        return None
    except Exception as error:  # noqa: BLE001  no network: each version has errors of its own
        constants.HF_HUB_OFFLINE = True
        return f"no network: {constants.ENDPOINT} does not answer ({error or type(error).__name__})"
    return None


# ---- HH transcripts: "\n\nHuman: ...\n\nAssistant: ...\n\nHuman: ...\n\nAssistant: ..." ----

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def is_transcript(text):
    return isinstance(text, str) and text.startswith(HUMAN) and ASSISTANT in text


def split_hh(chosen, rejected=None):
    """(prompt, replies) of one transcript, or of a pair that differs in the last reply only; else the reason
    (str) to drop it.

    The prompt runs through the last "\\n\\nAssistant:", so every reply keeps its leading space: nothing is
    stripped.
    """
    prompt = chosen[:chosen.rfind(ASSISTANT) + len(ASSISTANT)]
    transcripts = [chosen] if rejected is None else [chosen, rejected]
    replies = []
    for transcript in transcripts:
        reply = transcript.removeprefix(prompt)
        if not transcript.startswith(prompt) or ASSISTANT in reply:      # `rejected` may have more turns
            return "chosen and rejected do not share their prompt"
        replies.append(reply)
    for reply in replies:
        if HUMAN in reply:
            return "last turn is not the assistant's"
    return prompt, replies


def hh_messages(prompt):
    """A transcript's prompt (as `split_hh` gives it) as messages, each without the white space around it."""
    parts = re.split(r"\n\n(Human|Assistant):", prompt)[1:-2]  # the last marker opens the reply
    messages = []
    for speaker, text in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": text.strip()})
    return messages
