"""Text <-> token ids: one protocol over sentencepiece models and Hugging Face tokenizers.

Invariant: the ids are Megatron-LM's for the same ``--tokenizer-type`` and ``--tokenizer-model``.
"""

from megatron_tokedit.tokenizers.base import PlacedIds, Tokenizer
from megatron_tokedit.tokenizers.chat_load import load_chat_template
from megatron_tokedit.tokenizers.chat_template import ChatTemplate, TemplateError
from megatron_tokedit.tokenizers.chat_turns import TurnEnd, control_pattern, encode_rendered, turn_end
from megatron_tokedit.tokenizers.document import append_eod, encode_document, encode_documents
from megatron_tokedit.tokenizers.load import TOKENIZER_TYPES, load_tokenizer, tokenizer_spec

__all__ = [
    "TOKENIZER_TYPES",
    "ChatTemplate",
    "PlacedIds",
    "TemplateError",
    "Tokenizer",
    "TurnEnd",
    "append_eod",
    "control_pattern",
    "encode_document",
    "encode_documents",
    "encode_rendered",
    "load_chat_template",
    "load_tokenizer",
    "tokenizer_spec",
    "turn_end",
]
