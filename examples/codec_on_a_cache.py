"""The codec alone, on a transformers cache: `python examples/codec_on_a_cache.py` in the repository, after setup.

Reads a document with the bundled model, compresses its KV at every level, and asks a question over what comes back.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from codec.api import KVCodec
from codec.profile import load_profile
from prefill.model import load_model

MODEL = Path(__file__).resolve().parent.parent / "model"
FACT = "The access code of Marigold is 4821."


def main() -> None:
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")
    document = f"{text[:1500]} {FACT} {text[1500:5000]}"
    ids = tokenizer("<|bos|>" + document, return_tensors="pt").input_ids
    question = tokenizer(" The access code of Marigold is", return_tensors="pt").input_ids

    cache = DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    codec = KVCodec(load_profile(MODEL / "profile.kvp"), rope=load_model(MODEL).rope_tables(0, ids.shape[1]))
    plain = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    print(f"{ids.shape[1]} tokens, {plain / 1e6:.2f} MB of KV")
    for level in codec.levels:
        blobs = codec.encode_cache(cache, level=level)
        size = sum(len(blob) for blob in blobs)
        again = codec.decode_cache(blobs, into=DynamicCache())
        prompt = torch.cat([ids, question], dim=1)
        with torch.inference_mode():
            out = model.generate(prompt, past_key_values=again, max_new_tokens=4, do_sample=False)
        answer = tokenizer.decode(out[0, prompt.shape[1] :])
        print(f"{level:<9} {size / 1e3:8.1f} kB  {plain / size:5.1f} x smaller  ->{answer!r}")


if __name__ == "__main__":
    main()
