"""Imported once by the server that forks the processes of robust_helpers: what they would all do again is done here."""
import faulthandler
import gc
import tempfile

import helpers
from transformers import AutoModelForCausalLM, AutoTokenizer

with tempfile.TemporaryDirectory() as directory:
    AutoModelForCausalLM.from_pretrained(helpers.tiny_model(directory))    # builds tables that transformers caches
    AutoTokenizer.from_pretrained(directory)

faulthandler.enable()    # a process that is aborted by a library says where each of its threads was
gc.freeze()    # a garbage collection in a forked process would read, and copy, all that lies here
