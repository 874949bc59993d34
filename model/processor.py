"""The processor of a model that reads more than text: the files that say how images, video and audio become
its input. Training needs none of them; they are kept beside the weights, since servers load them with the
model."""
import os
from pathlib import Path

from transformers.utils import cached_file

FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
TEMPLATE = "chat_template.jinja"          # the tokenizer writes it
OLD_TEMPLATE = "chat_template.json"       # what a processor had before; it would win over the tokenizer's


def read_files(path: str, config) -> dict[str, bytes]:
    """{name: content} of the processor's files beside the model at `path` (a directory or a hub name), whose
    configuration is given. {} where that is of text alone, or no file can be had."""
    found = {}
    names = (*FILES, OLD_TEMPLATE) if config.sub_configs else ()
    for name in names:
        try:
            file = cached_file(path, name)
        except OSError:                   # the model has no such file
            continue
        found[name] = Path(file).read_bytes()
    return found


def files_of(lm) -> dict[str, bytes]:
    """What `read_files` has found for an LM that was loaded; {} for one that was built."""
    return getattr(lm, "processor_files", {})


def save(lm, directory: str) -> None:
    """Write the processor's files of an LM into a directory with its tokenizer."""
    has_template = os.path.exists(os.path.join(directory, TEMPLATE))
    for name, content in files_of(lm).items():
        if name != OLD_TEMPLATE or not has_template:
            Path(directory, name).write_bytes(content)
