"""Writing text with a language model: prompts in, continuations out, in batches, one forward pass a token.

Invariant: what a prompt's sample is depends on the model, the settings, the prompt's ids and the sample's
number; not on what else is written, in which order or in how large batches (up to float rounding).
"""

from megatron_tokedit.generation.chat import Chat, ChatPrompt, open_chat
from megatron_tokedit.generation.generate import Completion, Prompt, generate
from megatron_tokedit.generation.load import TextModel, from_language_model, load_text_model
from megatron_tokedit.generation.settings import GenerationSettings

__all__ = [
    "Chat",
    "ChatPrompt",
    "Completion",
    "GenerationSettings",
    "Prompt",
    "TextModel",
    "from_language_model",
    "generate",
    "load_text_model",
    "open_chat",
]
