"""Talk to a model: `python chat.py runs/tiny-dpo`, or through a pipe:
`echo "Tom has 3 pens and buys 4 more. How many now?" | python chat.py MODEL`.

MODEL is a run (its final model, else its newest whole checkpoint), a model directory (an adapter too) or a
hub name. One line is one turn; an empty line starts a new conversation. Without a chat template every line is
completed as plain text. A run that was trained with a prompt_template gets every line in it, as a question of
its own, unless an option of the chat template is given; the run's stop strings end an answer. Several models
each answer every line, under their names and in their own conversations:
`python chat.py example/tiny/model runs/tiny-dpo`. Options may also be written as `temperature=0`.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the program without a traceback; `run_program` handles it afterwards
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import os
import sys

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.utils import logging

from data.command import as_typed
from data.errors import UserError, notice, printable, run_program
from data.tokenise import Tokeniser, stop_ids
from engine.cast import nearest, read_mapping, show
from engine.checkpoint import model_path
from engine.greeting import form_of_questions, questions, usual_temperature
from engine.opening import short
from model import lora
from model.completions import Stops
from model.load import base_of, first_line, is_adapter, load_lm, load_tokenizer_for
from model.reward_model import is_reward_model


class Streamer(TextStreamer):
    """Prints a model's text as it comes, without the control characters that a terminal would obey."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)


class Ending(StoppingCriteria):
    """Ends a completion, the tokens from `start` on, where training's sampler would."""

    def __init__(self, stops: Stops, start: int):
        self.stops, self.start = stops, start

    def __call__(self, ids, scores, **options):
        completion = ids[0, self.start:]
        return torch.tensor([self.stops(completion)], device=ids.device)


class Speaker:
    """A model and its conversation so far."""

    def __init__(self, name: str, settings):
        path = model_path(name, notice)
        if is_reward_model(path):
            raise UserError(f"model: {name} is a reward model, which writes no text; fix: pass a policy")
        self.name = name
        self.tokenizer = load_tokenizer_for(settings, path, notice)
        self.tokeniser = Tokeniser(self.tokenizer)
        self.ids = stop_ids(self.tokenizer)
        self.template, strings = form_of_questions(name, settings)
        self.stops = Stops(self.tokenizer, strings)
        self.messages = []
        self.lm = load_lm(base_of(path), "auto").eval()
        if is_adapter(path):
            lora.attach_saved(self.lm, path)
        self.lm.to("cuda" if torch.cuda.is_available() else "cpu")
        self.temperature = settings.temperature
        if self.temperature is None:
            self.temperature = usual_temperature(name)
        self.options = {"max_new_tokens": settings.max_new_tokens, "do_sample": False}
        if self.temperature > 0:
            self.options |= {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}

    def autocast(self):
        """An adapter's weights are in fp32, its base model's as stored: products are computed in the base's
        dtype, as on a GPU in training. Other models have one dtype."""
        is_mixed = lora.settings(self.lm) is not None and self.lm.dtype != torch.float32
        return torch.autocast(self.lm.device.type, self.lm.dtype, enabled=is_mixed)

    def introduction(self) -> str:
        """`runs/tiny-dpo: 822K parameters, answers sampled at temperature 0.7`."""
        way = "greedy answers"
        if self.temperature > 0:
            way = f"answers sampled at temperature {self.temperature:g}"
        return f"{self.name}: {short(self.lm.num_parameters())} parameters, {way}"

    def answer(self, text: str) -> None:
        """Write the answer to one line, token by token."""
        self.messages.append({"role": "user", "content": text})
        prompt = self.messages if self.tokenizer.chat_template else text
        if self.template:
            prompt = self.template.replace("{question}", text)
        ids = torch.tensor([self.tokeniser.prompt_ids(prompt)], device=self.lm.device)
        ending = Ending(self.stops, ids.shape[1])
        streamer = Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            with self.autocast():
                output = self.lm.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=self.ids,
                                          pad_token_id=self.ids[0], streamer=streamer,
                                          stopping_criteria=StoppingCriteriaList([ending]), **self.options)
        except BrokenPipeError:
            raise
        except Exception as error:  # noqa: BLE001  somebody else's files, generation_config.json among them
            raise UserError(f"model: {self.name} cannot write an answer ({first_line(error)}); "
                            "fix: check its generation_config.json, or start a new conversation") from error
        reply = self.tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": reply})


KEYS = ("temperature", "max-new-tokens", "seed", "chat-template", "system-prompt", "chat-template-kwargs")


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    program = as_typed("python chat.py")
    parser = argparse.ArgumentParser(prog=program, description=as_typed(__doc__), formatter_class=raw)
    parser.add_argument("model", nargs="+")
    parser.add_argument("--temperature", type=float,
                        help="0 is greedy, 1 samples as training does (default: 0 for runs that a verifier "
                             "has trained, else 0.7)")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--chat-template",
                        help="a file, or chatml, llama3, mistral, gemma (default: the model's own)")
    parser.add_argument("--system-prompt", help="starts every conversation")
    parser.add_argument("--chat-template-kwargs", type=read_mapping,
                        help="such as '{enable_thinking: false}'")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def with_dashes(argv: list[str]) -> list[str]:
    """The words with key=value as --key=value. UserError for an unknown key."""
    words = []
    for word in argv:
        key, equals, value = word.partition("=")
        option = key.replace("_", "-")
        is_key = key.replace("-", "_").isidentifier() and not word.startswith("-")
        if equals and is_key and not os.path.exists(word):
            if option not in KEYS:
                fix = nearest(option, KEYS) or f"one of {', '.join(KEYS)}"
                raise UserError(f"unknown key {show(key)} (command line); fix: write {fix}")
            word = f"--{option}={value}"
        words.append(word)
    return words


def main(argv: list[str]) -> None:
    args = parser().parse_args(with_dashes(argv))
    logging.set_verbosity_error()
    speakers = [Speaker(name, args) for name in args.model]
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if sys.stdin.isatty():
        greet(speakers)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):      # both are ways to end a conversation
        talk(speakers)


def greet(speakers: list[Speaker]) -> None:
    """Who answers, what can be asked, and how to leave."""
    asked = []
    for speaker in speakers:
        print(printable(speaker.introduction()))
        asked = asked or questions(speaker.name)
    for question in asked:
        print(printable(f"try: {question}"))
    print("An empty line starts a new conversation; Ctrl-D leaves.")


def read_line() -> str:
    """The next line with its end; "" behind the last one."""
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its arrow keys and history
    try:
        return input("> ") + "\n"
    except EOFError:
        print()
        return ""


def talk(speakers: list[Speaker]) -> None:
    """One turn per line of the standard input, until it ends."""
    while True:
        try:
            line = read_line()
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
            speaker.answer(text)


if __name__ == "__main__":
    run_program(main)
