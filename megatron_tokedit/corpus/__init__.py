"""Reading raw text: what is in the input files, how it is cut into work units, and the documents of a unit.

Invariant: every document of every input file is in exactly one unit, in file order, and whatever a unit
cannot read as a document is handed to the caller as a :class:`BadLine`, never dropped in silence.

Formats by suffix: ``.jsonl``, ``.ndjson`` and ``.json`` (one JSON object a line), ``.txt``, each also with
``.gz`` or ``.zst`` behind it, and ``.parquet``. A ``.txt`` file is cut wherever ``<|endoftext|>`` stands;
where that never occurs every line is a document. ``InputFile.format`` says which rule applied.
"""

from megatron_tokedit.corpus.conversations import Conversation, Message
from megatron_tokedit.corpus.document import BadLine, Document, InputFile, UnitPart, WorkUnit
from megatron_tokedit.corpus.inputs import expand_inputs
from megatron_tokedit.corpus.plan import DEFAULT_UNIT_BYTES, plan_units
from megatron_tokedit.corpus.read import ConversationLayout, read_unit
from megatron_tokedit.corpus.records import BadRecord

__all__ = [
    "DEFAULT_UNIT_BYTES",
    "BadLine",
    "BadRecord",
    "Conversation",
    "ConversationLayout",
    "Document",
    "InputFile",
    "Message",
    "UnitPart",
    "WorkUnit",
    "expand_inputs",
    "plan_units",
    "read_unit",
]
