"""Makes tokenizer.model, a LLaMA tokenizer in small, and what sentencepiece itself makes of some texts (expected.json).

pip install sentencepiece && python python_tests/data/tokenizer/make.py
"""

import io
import json
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
CORPUS = HERE.parent / "reference_vectors" / "README.md"
TEXTS = [
    "",
    " ",
    "Hello world",
    " leading space",
    "two  spaces and a trailing one ",
    "\nWhat is written on the red sign?",
    "line\nline\n\nline",
    "tab\there",
    "1234567890",
    "caf\u00e9, na\u00efve, \u00fcber",
    "\u6587\u5b57",
    "\U0001f642 smile",
    "\u2581 a block",
    "'quoted' \"text\" (and) [brackets] {too}",
    "A chat between a curious user and an artificial intelligence assistant. USER: ",
]

if __name__ == "__main__":
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (HERE / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    cases = [
        {"text": text, "ids": processor.encode(text), "decoded": processor.decode(processor.encode(text))}
        for text in TEXTS
    ]
    (HERE / "expected.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
