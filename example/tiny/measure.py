"""How often is a model right and in format on the held-out problems?

    python example/tiny/measure.py MODEL [--rows 500] [--seed 0]

Prints accuracy (right and in format) and the format rate, once sampled at temperature 1 and once greedy.
"""
import argparse
import json
import re
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
FORMAT = re.compile(r"<think>.*</think> <answer>.*</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")


def is_in_format(response):
    """The whole response is one `<think>…</think> <answer>…</answer>`."""
    return FORMAT.fullmatch(response.strip()) is not None and response.count("<think>") == response.count("<answer>") == 1


def is_right(response, answer):
    """In format, and the integer inside <answer> is `answer` (a string of digits)."""
    found = ANSWER.findall(response)
    return is_in_format(response) and bool(found) and int(found[-1]) == int(answer)


@torch.inference_mode()
def generate(model, tokenizer, prompts, sample, max_new_tokens=120, batch_size=100):
    """One response per prompt (a list of messages), as text without special tokens."""
    responses = []
    for start in range(0, len(prompts), batch_size):
        texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                 for prompt in prompts[start:start + batch_size]]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        # top_k and top_p are switched off so that a sample comes from the model's own distribution.
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens,
                                pad_token_id=tokenizer.pad_token_id, **options)
        responses += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
    return responses


def measure(model, tokenizer, rows, seed=0):
    """Shares of `rows` ({"prompt": messages, "answer": digits}): {"sampled": {"accuracy", "format"}, "greedy": {…}}."""
    model.eval()
    result = {}
    for name in ("sampled", "greedy"):
        torch.manual_seed(seed)
        responses = generate(model, tokenizer, [row["prompt"] for row in rows], sample=name == "sampled")
        result[name] = {
            "accuracy": sum(is_right(response, row["answer"]) for response, row in zip(responses, rows)) / len(rows),
            "format": sum(is_in_format(response) for response in responses) / len(rows)}
    return result


def read_rows(count, path=HERE / "eval-prompts.jsonl"):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for name, shares in measure(model, tokenizer, read_rows(args.rows), args.seed).items():
        print(f"{name:7}  accuracy {shares['accuracy']:.3f}  format {shares['format']:.3f}")


if __name__ == "__main__":
    main()
