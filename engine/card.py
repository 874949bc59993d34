"""The model card of a run's `final/`: README.md, whose front matter the Hugging Face hub reads.

It holds nothing that depends on the clock or on the run's directory, so that a resumed run writes the same
one.
"""
import os
import shlex
from pathlib import Path

import yaml
from huggingface_hub import try_to_load_from_cache

from data import hub
from data.command import as_typed
from data.errors import printable
from engine.chart import number
from engine.logs import redact
from engine.report import NO_METRICS, PLACES, RunFiles
from model.load import HUB_MODEL
from model.modelscope import PREFIX, as_written

VERSION = Path(__file__).resolve().parents[1] / "VERSION"
LICENSE = ("license", "license_name", "license_link")
LOAD = {
    "transformers": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH)""",
    "peft": """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH)
model.generation_config = GenerationConfig.from_pretrained(PATH)      # its stop tokens, not the base's""",
}


def model_card(run: RunFiles, base: str, is_adapter: bool, is_reward: bool) -> str:
    """The text of the card. `base`: the directory or hub name of the start model; `is_reward`: the model is a
    reward model, whose head lies beside its trunk."""
    algorithm = run.config["algorithm"]
    known = front_matter(base)
    library = "peft" if is_adapter else "transformers"
    head = {"library_name": library, "tags": tags_of(algorithm, is_adapter, is_reward)}
    name = as_written(base)
    origin = name.removeprefix(PREFIX)
    if name == base and os.path.exists(base):
        origin = known.get("base_model")
    if isinstance(origin, str) and HUB_MODEL.fullmatch(origin):
        head["base_model"] = origin
    for key in LICENSE:
        if isinstance(known.get(key), str):
            head[key] = known[key]
    if not is_reward:
        head["pipeline_tag"] = "text-generation"
    if "license" in head:
        license_line = f"The licence of the start model is {plain(head['license'])}."
    else:
        license_line = "The start model's files name no licence; see where it comes from."
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {plain(name)}, trained with {algorithm}",
        license_line,
        how_to_load(library, is_reward),
        "## Data", data_table(run),
        "## Metrics", metrics_table(run),
        "## How to repeat it", indented(command_of(run)), configuration(run),
        versions_line(run),
    ]
    return redact("\n\n".join(parts) + "\n")


def tags_of(algorithm: str, is_adapter: bool, is_reward: bool) -> list[str]:
    tags = ["minimal-llm-alignment", algorithm]
    if is_adapter:
        tags.append("lora")
    if is_reward:
        tags.append("reward-model")
    return tags


def how_to_load(library: str, is_reward: bool) -> str:
    if is_reward:
        return ("A reward model: the trunk, and its head in `value_head.safetensors`. The run's folder "
                "`classifier/`, where there is one, loads with `AutoModelForSequenceClassification`.")
    return indented(LOAD[library])


def front_matter(base: str) -> dict:
    """What the card of a model says in its front matter; {} where it has none on this machine."""
    path = os.path.join(base, "README.md")
    try:
        if not os.path.exists(base):
            path = try_to_load_from_cache(base, "README.md")
    except ValueError:      # not the name of a model
        return {}
    return hub.front_matter(path)


def data_table(run: RunFiles) -> str:
    """The files of training and held-out rows with their digests."""
    lines = ["| rows | file | read | used | sha256 |", "|---|---|---:|---:|---|"]
    for split, title in (("train", "training"), ("eval", "held out")):
        data = run.data(split)
        if data:
            cells = [title, f"`{plain(data['source'])}`", data.get("read"), data.get("used"),
                     f"`{data['sha256']}`"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def metrics_table(run: RunFiles) -> str:
    """The first and the last held-out row, else those of training."""
    rows = run.held_out or run.train
    if not rows:
        return "None were logged."
    first, last = rows[0], rows[-1]
    kind = "Held-out" if run.held_out else "Training"
    made = run.train[-1]["step"] if run.train else "?"
    lines = [f"{kind} rows. The model here is that after update {made}.", "",
             f"| metric | step {first['step']} | step {last['step']} |", "|---|---:|---:|"]
    for name in last:
        before, after = first.get(name), last[name]
        if name not in NO_METRICS and before is not None and after is not None:
            lines.append(f"| {plain(name)} | {number(before)} | {number(after)} |")
    return "\n".join(lines)


def command_of(run: RunFiles) -> str:
    """The command of the run without what says where it lies."""
    words = shlex.split(run.started.get("command", ""))[2:]
    kept = []
    for word, previous in zip(words, ["", *words]):
        names_place = word.removeprefix("--").split("=")[0] in PLACES
        is_its_value = previous in [f"--{key}" for key in PLACES]
        if not names_place and not is_its_value:
            kept.append(word)
    return as_typed(shlex.join(["python", "train.py", *kept]))


def configuration(run: RunFiles) -> str:
    values = []
    for key, value in run.config.items():
        if key not in PLACES:
            values.append(f"{key}: {value}")
    return "Every value of the configuration:\n\n" + indented("\n".join(values))


def versions_line(run: RunFiles) -> str:
    versions = run.started.get("versions") or {}
    if VERSION.is_file():      # not in a copy of the sources alone
        versions = {"minimal-llm-alignment": VERSION.read_text(encoding="utf-8").strip()} | versions
    shown = [f"{name} {version}" for name, version in versions.items()]
    return f"Made with {', '.join(shown)}."


def plain(text: str) -> str:
    """A text on one line that neither ends a cell nor a span of code."""
    return printable(str(text)).replace("`", "'").replace("|", "/")


def indented(text: str) -> str:
    """A block of code: no text in it can end it."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
