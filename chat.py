"""Talk to a model: `python chat.py runs/tiny-dpo`, or through a pipe: `echo "Tom has 3 pens. How many?" | python chat.py MODEL`.

MODEL is a run (its final model, else its newest whole checkpoint), a model directory or a hub name. One line is one turn; an
empty line starts a new conversation. Without a chat template every line is completed as plain text.
"""
import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from data.errors import UserError
from data.tokenise import Tokeniser, stop_ids
from engine.checkpoint import model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = model_path(args.model, lambda text: print(text, file=sys.stderr))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=None).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{args.model} is neither a run, a model directory nor reachable on the hub; fix: check the name") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.seed is not None:
        torch.manual_seed(args.seed)
    tokeniser, stops = Tokeniser(tokenizer), stop_ids(tokenizer)
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": 1.0, "top_k": 0}
    interactive, messages = sys.stdin.isatty(), []
    while True:
        print("> " if interactive else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            break
        if not (text := line.rstrip("\n")).strip():
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        ids = torch.tensor([tokeniser.prompt_ids(messages if tokenizer.chat_template else text)], device=model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, eos_token_id=stops,
                                pad_token_id=stops[0], streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                                **sampling)
        messages.append({"role": "assistant", "content": tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(0)
