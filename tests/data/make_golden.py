"""Makes the small golden datasets in this folder: run it only to change them on purpose.

The bytes come from megatron-core's own ``IndexedDatasetBuilder`` and from the tokenizer libraries, in the
loop of Megatron-LM's ``tools/preprocess_data.py --append-eod``; no code of this package takes part. The
tokenizers are trained here once and stored, so that another version of a library cannot change them.
"""

import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
SENTENCES = [
    "A model that reads its own words forgets the words of others.",
    "The river rises in the hills and falls into the sea; nobody counts its stones.",
    "def add(a, b):\n    return a + b\n",
    "Caf\u00e9 na\u00efve \u4f60\u597d \U0001f600, 3.14159 and  two  spaces.",
]
DOCUMENTS: list[str | list[str]] = [
    SENTENCES[0],
    "",
    [SENTENCES[1], "", SENTENCES[2]],
    SENTENCES[3] + "\r\n\ttabbed",
    [],
    "it spells <|endoftext|> and </s> inside",
    " leading and trailing ",
    " ".join(SENTENCES) * 3,
]


def train_sentencepiece() -> None:
    model = io.BytesIO()  # model_prefix would write this machine's path into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<sep>"],
        pad_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (HERE / "tiny_sentencepiece.model").write_bytes(model.getvalue())


def train_byte_level_bpe() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    folder = HERE / "tiny_byte_level_bpe"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")


def write_golden(name: str, tokenize, vocab_size: int, eod: int) -> None:
    prefix = str(HERE / f"golden_{name}_text_document")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in DOCUMENTS:
        ids, lengths = [], []
        for sentence in document if isinstance(document, list) else [document]:
            sentence_ids = tokenize(sentence)
            if sentence_ids:
                ids += sentence_ids
                lengths.append(len(sentence_ids))
        if ids:
            ids.append(eod)
            lengths[-1] += 1
        builder.add_document(np.array(ids), lengths)
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    train_sentencepiece()
    train_byte_level_bpe()
    with open(HERE / "golden_corpus.jsonl", "w", encoding="utf-8") as file:
        for number, document in enumerate(DOCUMENTS):
            file.write(json.dumps({"id": number, "text": document}, ensure_ascii=number % 2 == 0) + "\n")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tiny_sentencepiece.model"))
    write_golden("sentencepiece", pieces.encode, pieces.get_piece_size(), pieces.eos_id())
    bpe = AutoTokenizer.from_pretrained(HERE / "tiny_byte_level_bpe")
    write_golden("byte_level_bpe", lambda text: bpe(text).input_ids, len(bpe), bpe.eos_token_id)
