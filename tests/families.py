"""Which families of language models are trained correctly: `python tests/families.py [family ...]`.

For each family of family_models.py a tiny random model is trained by train.py, and every number that a run
reports is compared with that of the model's own class (family_reference.py). A cell of the table:

    ok                  every number agrees to 1e-4 (relative; log-probs and values of single tokens absolute)
    WRONG <what>        a number, a weight or a key that differs
    refused: <line>     exit code 2 and one line
    CRASH <line>        anything else; the last line of the output

sft           losses and gradient norms of updates 1 and 2; the second starts from the saved checkpoint
dpo, dpo_tied losses, gradient norm, summed log-probs; tied: head and embedding are one tensor
grpo          log-probs of every sampled token by the sampler and by the training forward, gradient norm; loss
              and KL of a second update from the same rollout
rm            scores, loss and gradient norm of update 2
ppo           the reward model of `rm` scores and starts the critic: scores, every value and log-prob,
              gradient norm of both networks
lora          losses of updates 1 and 2, the second and its gradient norm through peft's own loading
checkpointing as sft, with gradient_checkpointing and small micro-batches
router        a mixture of experts: its auxiliary loss, and the gradient norm with it at a weight of 1
reload        final/ has exactly the keys of its class and gives the logged held-out loss; no weight outside
              the text part has moved
ranks         sft and grpo on two processes report what they report on one
dry_run       --dry-run ends as training does, and says the same about rows

Cases of long rows and of bf16 products follow. A family that takes a package (Gemma 3n as published: timm) is
not built without it.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]

from family_models import FAMILIES  # noqa: E402
from family_runs import Family, prepare, write_data  # noqa: E402

CELLS = (
    "sft", "dpo", "dpo_tied", "grpo", "rm", "ppo", "lora", "checkpointing", "router", "reload", "ranks",
    "dry_run")
LONG = ("long", "mixed")           # rows of more than 64 tokens, alone and among rows of less than 32
CASES = {                          # what only some rows or precisions show: (family, what differs, cells)
    "qwen2_moe, window 32": ("qwen2_moe_window", dict(sliding_window=32), LONG),
    "phimoe, window 32": ("phimoe", dict(sliding_window=32, lm_head_bias=False), LONG),
    "mistral, window 32": ("mistral", dict(sliding_window=32), LONG),
    "phi3_longrope, 32 positions": ("phi3_longrope", {}, LONG),
    "deepseek_v32, 32 best": ("deepseek_v32", dict(index_topk=32), LONG),
    "llama4, chunks of 32": ("llama4_text", dict(attention_chunk_size=32, floor_scale=32), LONG),
    "gemma3n, no soft-cap": ("gemma3n_text", dict(final_logit_softcapping=1e4), LONG),
    "qwen3, bf16": ("qwen3", {}, ("bf16",)),
    "qwen3_5_text, bf16": ("qwen3_5_text", {}, ("bf16",)),
    "lfm2, bf16": ("lfm2", {}, ("bf16",)),
    "mamba2, bf16": ("mamba2", {}, ("bf16",)),
}


def tell(family: Family, names) -> bool:
    """Compute the cells of a family and print a line per different one; whether all are right."""
    since = time.monotonic()
    found = {name: family.cell(name) for name in names}
    kind = "not built" if isinstance(family.made, str) else family.made["class"]
    print(f"{family.folder.name} ({kind}, {time.monotonic() - since:.0f} s)")
    for cell in dict.fromkeys(found.values()):
        same = [name for name, other in found.items() if other == cell]
        if cell != "-":
            print(f"    {' '.join(same)}: {cell[:400]}")
    notices = {}
    for name in family.runs:
        for line in family.notices(name):
            notices.setdefault(line, name)
    for line, name in notices.items():
        print(f"    {name} said: {line}")
    sys.stdout.flush()
    return set(found.values()) <= {"ok", "-"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="family", help="default: all families, then the cases in CASES")
    parser.add_argument("--cells", help="default: " + ",".join(CELLS))
    parser.add_argument("--out", help="an empty directory for models and runs; default: a temporary one")
    options = parser.parse_args()
    prepare()
    data = Path(options.out or tempfile.mkdtemp(prefix="families-")).resolve()
    data.mkdir(exist_ok=True)
    write_data(data)
    names = options.names or [*FAMILIES, *CASES]
    right = []
    for title in names:
        name, changed, cells = CASES.get(title, (title, {}, CELLS))
        if options.cells:
            cells = options.cells.split(",")
        if tell(Family(name, data, changed, title), cells):
            right.append(title)
    cases = CASES.keys() & names
    if cases:
        print(f"\n{len(cases.intersection(right))} of {len(cases)} cases of long rows and of bf16 are right")
    families = FAMILIES.keys() & names
    print(f"\n{len(families.intersection(right))} of {len(families)} families are right in every cell")
    sys.exit(len(right) < len(names))


if __name__ == "__main__":
    main()
