"""Talk to a model: `python chat.py runs/tiny-dpo`, or through a pipe:
`echo "Tom has 3 pens. How many?" | python chat.py MODEL`.

MODEL is a run (its final model, else its newest whole checkpoint), a model directory (an adapter too) or a
hub name. One line is one turn; an empty line starts a new conversation. Without a chat template every line is
completed as plain text. Several models each answer every line, under their names and in their own
conversations: `python chat.py example/tiny/model runs/tiny-dpo`.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the program without a traceback; `run_program` handles it afterwards
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import sys

import torch
from transformers import TextStreamer
from transformers.utils import logging

from data.errors import UserError, notice, printable, run_program
from data.tokenise import Tokeniser, stop_ids
from engine.cast import read_mapping
from engine.checkpoint import model_path
from model import lora
from model.load import base_of, first_line, is_adapter, load_lm, load_tokenizer_for
from model.reward_model import is_reward_model


class Streamer(TextStreamer):
    """Prints a model's text as it comes, without the control characters that a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


class Speaker:
    """A model and its conversation so far."""

    def __init__(self, name: str, settings):
        path = model_path(name, notice)
        if is_reward_model(path):
            raise UserError(f"model: {name} is a reward model, which writes no text; fix: pass a policy")
        self.name = name
        self.tokenizer = load_tokenizer_for(settings, path, notice)
        self.tokeniser = Tokeniser(self.tokenizer)
        self.stops = stop_ids(self.tokenizer)
        self.messages = []
        self.lm = load_lm(base_of(path), "auto").eval()
        if is_adapter(path):
            lora.attach_saved(self.lm, path)
        self.lm.to("cuda" if torch.cuda.is_available() else "cpu")

    def answer(self, text: str, **options) -> None:
        """Write the answer to one line, token by token."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.messages if self.tokenizer.chat_template else text
        ids = torch.tensor([self.tokeniser.prompt_ids(prompt)], device=self.lm.device)
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            output = self.lm.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=self.stops,
                                      pad_token_id=self.stops[0], streamer=streamer, **options)
        except BrokenPipeError:
            raise
        except Exception as error:  # noqa: BLE001  somebody else's files, generation_config.json among them
            raise UserError(f"model: {self.name} cannot write an answer ({first_line(error)}); "
                            "fix: check its generation_config.json, or start a new conversation") from error
        reply = self.tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": reply})


def main(argv: list[str]) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", nargs="+")
    parser.add_argument("--temperature", type=float, default=0.7,
                        help="0 is greedy, 1 samples as training does (default: 0.7)")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--chat-template",
                        help="a file, or chatml, llama3, mistral, gemma (default: the model's own)")
    parser.add_argument("--system-prompt", help="starts every conversation")
    parser.add_argument("--chat-template-kwargs", type=read_mapping,
                        help="such as '{enable_thinking: false}'")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    speakers = [Speaker(name, args) for name in args.model]
    if args.seed is not None:
        torch.manual_seed(args.seed)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature, "top_p": 1.0, "top_k": 0}
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):      # both are ways to end a conversation
        talk(speakers, options)


def talk(speakers: list[Speaker], options: dict) -> None:
    """One turn per line of the standard input, until it ends."""
    interactive = sys.stdin.isatty()
    while True:
        print("> " if interactive else "", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise UserError(f"the text is not UTF-8 (byte 0x{byte:02x}) in the standard input; "
                            "fix: iconv -f <its encoding> -t UTF-8") from error
        if not line:
            break
        text = line.rstrip("\n").encode(errors="replace").decode()      # half a surrogate cannot be tokenised
        for speaker in speakers:
            if not text.strip():
                speaker.messages = []
                continue
            if len(speakers) > 1:
                print(printable(f"[{speaker.name}]"), end=" ", flush=True)
            speaker.answer(text, **options)


if __name__ == "__main__":
    run_program(main)
