"""Text <-> token ids: one protocol over sentencepiece models and Hugging Face tokenizers.

Invariant: the ids are Megatron-LM's for the same ``--tokenizer-type`` and ``--tokenizer-model``.
"""

from megatron_tokedit.tokenizers.base import Tokenizer
from megatron_tokedit.tokenizers.document import append_eod, encode_document, encode_documents
from megatron_tokedit.tokenizers.load import TOKENIZER_TYPES, load_tokenizer, tokenizer_spec

__all__ = [
    "TOKENIZER_TYPES",
    "Tokenizer",
    "append_eod",
    "encode_document",
    "encode_documents",
    "load_tokenizer",
    "tokenizer_spec",
]
