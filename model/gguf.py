"""A GGUF file, llama.cpp's format, becomes an ordinary model directory."""
import contextlib
import importlib.util
import io
import os
import tempfile

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.errors import UserError
from data.tokenise import stop_ids
from model.load import empty_lm, errors_only, first_line

PACKAGES = ("gguf", "accelerate")      # transformers reads the format with these
# Under these names llama.cpp makes every digit a token of its own. transformers does not know them and splits
# as GPT-2 does, which changes the tokens of spaces and line ends before a number.
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
AS_GPT2 = ("gpt-2", "default", "")


def load(file: str, notice) -> tuple:
    """(tokenizer, model) of a GGUF file: weights in fp32, which are exactly the numbers that the file's
    quantised ones stand for, tokenizer with chat template and stop tokens. UserError where a package is
    missing or the file cannot be read."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"model: {file} is a GGUF file, and {missing[0]}, which reads it, is not installed; "
                        f"fix: pip install {' '.join(missing)}")
    try:
        return read(file, notice)
    except Exception as error:  # noqa: BLE001  somebody else's file: anything may be raised
        raise UserError(f"model: {file} cannot be read as a GGUF file ({first_line(error)}); "
                        "fix: get the file again, or pass the original model") from error


def save(tokenizer, lm, directory: str) -> None:
    """Write a model into `directory` as transformers saves one."""
    lm.save_pretrained(directory, max_shard_size="5GB")
    tokenizer.save_pretrained(directory)


def read(file: str, notice) -> tuple:
    """(tokenizer, model in fp32) of a GGUF file."""
    # transformers also reads what lies beside the file, so the file is read from an empty directory
    # it shows a progress bar, and lists every key of the file that it does not use
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, errors_only(), quiet:
        os.symlink(os.path.abspath(file), os.path.join(folder, "model.gguf"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    set_splitting(tokenizer, file, notice)
    lm = plain(loaded, file)
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(tokenizer),
        pad_token_id=tokenizer.pad_token_id)
    return tokenizer, lm


def plain(loaded, file: str):
    """The same weights in a model that can be saved. transformers refuses to save the one that it loaded."""
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict(settings)
    lm = empty_lm(config, file)
    lm.load_state_dict(loaded.state_dict(), assign=True)
    lm.tie_weights()
    return lm


def set_splitting(tokenizer, file: str, notice) -> None:
    """Split text before the merges of a byte-level BPE as the file's tokenizer does."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return                         # sentencepiece, or transformers knows the file's splitting
    name = splitting(file)
    if name in SINGLE_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif name not in AS_GPT2:
        notice(f"{file} splits text as {name}, which is not known here; it is split as GPT-2 does, "
               "so some texts may become other tokens than in the model's training")


def splitting(file: str) -> str:
    """The name that a GGUF file gives to its way of splitting text."""
    import gguf  # optional

    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    return field.contents() if field else ""
