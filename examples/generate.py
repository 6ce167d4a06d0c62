"""Let a saved model write: `python examples/generate.py [FOLDER]` after `linpass train`."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import linpass  # noqa: F401  the Auto classes know the Linformer from here on

folder = sys.argv[1] if len(sys.argv) > 1 else "./final_model"
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

# Prompts of different length: the tokenizer pads on the left, the model does not see the padding.
prompts = tokenizer(["An iterator is", "Return the number of elements that"], padding=True, return_tensors="pt")
set_seed(0)
for tokens in model.generate(**prompts, max_new_tokens=40, do_sample=True, temperature=0.8, top_k=50):
    print(tokenizer.decode(tokens, skip_special_tokens=True), end="\n\n")
