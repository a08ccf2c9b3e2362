"""``inspect_dataset.py show``: what a dataset is made of, or the text of its documents.

Invariant: the summary reads the index and the manifest only, so it is quick on a dataset of any size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tokedit.cli.inspect_files import (
    add_tokenizer_arguments,
    document_indices,
    sizes_on_disk,
    tokenizer_of,
)
from megatron_tokedit.cli.inspect_text import (
    ADDED,
    BOLD,
    FAINT,
    PLAIN,
    Piece,
    Screen,
    add_colour_argument,
    printable,
    screen,
    span_texts,
    wrapped,
)
from megatron_tokedit.dataset import (
    CHANGED,
    DROPPED,
    INSERTED,
    ConversationRecord,
    IndexedDataset,
    Journal,
    JournalEntries,
    Manifest,
    read_manifest,
)
from megatron_tokedit.dataset.journal_format import JOURNAL_SUFFIX, edited_positions
from megatron_tokedit.dataset.loss_mask import has_loss_mask, open_loss_mask
from megatron_tokedit.edit.rules import rule_in_words
from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.tokenizers import Tokenizer

_CHUNK_ITEMS = 1 << 20
_EXACT_LENGTHS = 1 << 16
_BAR_CHARACTERS = 40
_LABEL_CHARACTERS = 12


def add_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``show``."""
    parser.add_argument(
        "--document", nargs="+", type=int, metavar="I", help="show the text of these; -1 is the last"
    )
    parser.add_argument("--tokens", action="store_true", help="with --document: a line a token")
    add_colour_argument(parser)
    add_tokenizer_arguments(parser)


def show(arguments: argparse.Namespace) -> None:
    """Print a summary, or documents.

    Raises:
        DataFormatError: the dataset is missing or damaged, or there is no such document.
    """
    dataset = IndexedDataset(arguments.prefix)
    dataset.refuse_truncated()
    manifest = read_manifest(arguments.prefix)
    documents = document_indices(arguments.document, dataset.num_documents)
    on = screen(arguments.color)
    if documents is None:
        print("\n".join(_summary(dataset, manifest, on)))
        return
    tokenizer = tokenizer_of(arguments, manifest)
    journal = _journal_of(dataset)
    loss_mask = open_loss_mask(dataset) if has_loss_mask(dataset.prefix) else None
    for index in documents:
        entries = journal.entries(index) if journal else None
        learned = [part.astype(bool) for part in loss_mask.document(index)] if loss_mask else None
        print("\n".join(_document(dataset, index, tokenizer, entries, learned, arguments.tokens, on)))


def _journal_of(dataset: IndexedDataset) -> Journal | None:
    """The journal beside a dataset, if there is one."""
    if JOURNAL_SUFFIX not in sizes_on_disk(dataset.prefix):
        return None
    journal = Journal(f"{dataset.prefix}{JOURNAL_SUFFIX}")
    if journal.num_documents != dataset.num_documents:
        raise DataFormatError(
            f"{journal.path}: is for {journal.num_documents} documents, the dataset has "
            f"{dataset.num_documents}; they do not belong together"
        )
    return journal


def _summary(dataset: IndexedDataset, manifest: Manifest | None, on: Screen) -> Iterator[str]:
    yield on.paint(BOLD, dataset.prefix)
    yield _line("documents", f"{dataset.num_documents:,} in {dataset.num_sequences:,} sequences")
    yield _line("tokens", f"{dataset.num_tokens:,}, {dataset.dtype.name}")
    sizes = sizes_on_disk(dataset.prefix)
    yield _line("on disk", ", ".join(f"{suffix} {_in_bytes(size)}" for suffix, size in sizes.items()))
    if manifest is None:
        yield _line("manifest", "none: Megatron-LM's own, or of unknown origin")
    else:
        yield from _origin(manifest)
    yield from _lengths(dataset, on)


def _line(label: str, text: str) -> str:
    return f"  {label:{_LABEL_CHARACTERS}}{text}"


def _in_bytes(number: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def _origin(manifest: Manifest) -> Iterator[str]:
    """What the manifest says."""
    inputs = ", ".join(record.path for record in manifest.inputs[:3])
    more = f" and {manifest.num_input_files - 3:,} more" if manifest.num_input_files > 3 else ""
    yield _line("made from", f"{inputs}{more}; key {manifest.json_key!r}")
    yield _line("tokenizer", _tokenizer_in_words(manifest.tokenizer.model_dump()))
    yield _line("", f"{'with' if manifest.append_eod else 'without'} end-of-document ids")
    if manifest.prior_tokenizer is not None:
        yield _line(
            "edited with", f"{_tokenizer_in_words(manifest.prior_tokenizer.model_dump())}, then re-encoded"
        )
    if manifest.conversation is not None:
        yield from _conversations_in_words(manifest.conversation, manifest.counts)
    if manifest.prior is not None:
        yield _line("prior", _prior_in_words(manifest.prior))
    for number, text in enumerate(edit_in_words(manifest.edit)):
        yield _line("" if number else "edit", text)
    for number, text in enumerate(_counts_in_words(manifest.counts)):
        yield _line("" if number else "counts", text)


def _conversations_in_words(record: ConversationRecord, counts: Mapping[str, int]) -> Iterator[str]:
    """How conversations were rendered, and how much of them counts in the loss."""
    limit = (
        f"up to {record.max_tokens:,} tokens, else {record.too_long}" if record.max_tokens else "any length"
    )
    yield _line("template", f"{record.chat_template_name}; conversations of {limit}")
    learned, tokens = counts.get("num_loss_tokens", 0), counts.get("num_tokens", 0)
    yield _line("loss mask", f"{learned:,} tokens count in the loss ({learned / max(tokens, 1):.2%})")


def _tokenizer_in_words(record: Mapping[str, Any]) -> str:
    return f"{record['type']} {record['model']}, {record['vocab_size']:,} ids"


def _prior_in_words(prior: Mapping[str, Any]) -> str:
    parts = [
        f"{prior.get('path', '?')}",
        *(str(prior[name]) for name in ("dtype", "device") if name in prior),
    ]
    if "context_tokens" in prior and "overlap_tokens" in prior:
        parts.append(
            f"windows of {prior['context_tokens']:,} tokens, {prior['overlap_tokens']:,} of them context"
        )
    return ", ".join(parts)


_SETTINGS_IN_WORDS = (
    "strategy",
    "rules",
    "sampler",
    "top_k",
    "top_p",
    "temperature",
    "generation",
    "generations",
)


def edit_in_words(edit: Mapping[str, Any] | None) -> Iterator[str]:
    """The edit settings of a manifest, a line each."""
    if edit is None:
        yield "none"
        return
    if "parts" in edit:
        for part in edit["parts"]:
            yield f"{part.get('num_documents', '?')} documents: {'; '.join(edit_in_words(part.get('edit')))}"
        return
    rules = [rule_in_words(rule) for rule in edit.get("rules") or ()]
    yield ": ".join(filter(None, (edit.get("strategy"), ", ".join(rules))))
    if edit.get("sampler"):
        knobs = {"k": edit.get("top_k"), "p": edit.get("top_p"), "temperature": edit.get("temperature")}
        given = ", ".join(f"{name} = {value}" for name, value in knobs.items() if value is not None)
        yield f"drawn by {edit['sampler']}: {given}"
    if edit.get("generations", 1) > 1:
        yield f"generation {edit.get('generation')} of {edit['generations']}"
    others = {
        name: value
        for name, value in edit.items()
        if name not in _SETTINGS_IN_WORDS and value not in (None, False)
    }
    if others:
        yield ", ".join(f"{name} {value}" for name, value in others.items())


def _counts_in_words(counts: Mapping[str, int]) -> Iterator[str]:
    """What the job counted, with shares."""
    tokens = counts.get("num_tokens_in", 0)
    read = counts.get("num_documents_in")
    if read is not None:
        lost = {
            "bad": "num_bad_lines",
            "dropped": "num_documents_dropped",
            "left unedited": "num_documents_unedited",
        }
        parts = [f"{counts[name]:,} {word}" for word, name in lost.items() if counts.get(name)]
        yield ", ".join([f"{read:,} documents read", *parts])
    what = "response tokens" if "num_loss_tokens" in counts else "tokens"
    if tokens:
        for word in ("eligible", "resampled", "changed", "dropped"):
            number = counts.get(f"num_{word}_tokens", 0)
            yield f"{number:>13,} {word:10}{number / tokens:8.2%} of {tokens:,} {what} that came in"


def _lengths(dataset: IndexedDataset, on: Screen) -> Iterator[str]:
    """How long the documents are: a few numbers and bars, one for each doubling."""
    if not dataset.num_documents:
        return
    doublings = np.zeros(64, np.int64)
    exact = np.zeros(_EXACT_LENGTHS, np.int64)
    longest, shortest = 0, np.iinfo(np.int64).max
    for lengths in _document_lengths(dataset):
        longest, shortest = max(longest, int(lengths.max())), min(shortest, int(lengths.min()))
        doublings += np.bincount(_doubling(lengths), minlength=64)
        exact += np.bincount(np.minimum(lengths, _EXACT_LENGTHS - 1), minlength=_EXACT_LENGTHS)
    median = int(np.searchsorted(np.cumsum(exact), (dataset.num_documents + 1) // 2))
    half = f"{median:,}" if median < _EXACT_LENGTHS - 1 else f"over {median:,}"
    mean = dataset.num_tokens / dataset.num_documents
    yield _line(
        "lengths", f"{shortest:,} to {longest:,} tokens a document, half have up to {half}, mean {mean:,.1f}"
    )
    used = np.flatnonzero(doublings)
    for doubling in range(used[0], used[-1] + 1):
        count = int(doublings[doubling])
        low, high = (1 << doubling - 1, (1 << doubling) - 1) if doubling else (0, 0)
        name = f"{low:,}-{high:,}" if high > low else f"{low:,}"
        bar = "#" * -(-count * _BAR_CHARACTERS // int(doublings.max()))
        yield f"    {name:>19}{count:>13,}  {on.paint(FAINT, bar)}".rstrip()


def _document_lengths(dataset: IndexedDataset) -> Iterator[npt.NDArray[np.int64]]:
    """Tokens of each document, in chunks."""
    for first in range(0, dataset.num_documents, _CHUNK_ITEMS):
        ends = dataset.document_ends[first : first + _CHUNK_ITEMS + 1]
        if ends.min() < 0 or ends.max() > dataset.num_sequences:
            raise DataFormatError(f"{dataset.prefix}.idx: document ends outside the dataset; it is damaged")
        lengths = np.diff(dataset.token_offsets(ends))
        if (lengths < 0).any():
            raise DataFormatError(f"{dataset.prefix}.idx: a document of negative length; it is damaged")
        yield lengths


def _doubling(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    return np.frexp(lengths.astype(np.float64))[1].astype(np.int64)


def _document(
    dataset: IndexedDataset,
    index: int,
    tokenizer: Tokenizer | None,
    entries: JournalEntries | None,
    learned: Sequence[npt.NDArray[np.bool_]] | None,
    as_tokens: bool,
    on: Screen,
) -> Iterator[str]:
    """A document as lines: a header, then its sequences; ``learned``: what of them counts in the loss."""
    sequences = dataset.document(index)
    edited = _new_tokens(sum(map(len, sequences)), entries)
    yield (
        on.paint(BOLD, f"document {index} of {dataset.num_documents:,}")
        + f": {_header(sequences, entries, on)}"
        + (f"; {sum(int(part.sum()) for part in learned):,} count in the loss" if learned else "")
    )
    start = 0
    for number, ids in enumerate(sequences):
        if len(sequences) > 1:
            yield on.paint(FAINT, f"sequence {number}")
        is_new = edited[start : start + len(ids)]
        is_learned = learned[number] if learned else None
        lines = _token_lines(tokenizer, ids, is_new, is_learned, start) if as_tokens else None
        yield from lines or wrapped(_highlighted(tokenizer, ids, is_new, is_learned, on), on)
        start += len(ids)
    yield ""


def _header(sequences: Sequence[npt.NDArray[np.integer]], entries: JournalEntries | None, on: Screen) -> str:
    text = f"{sum(map(len, sequences)):,} tokens"
    if len(sequences) != 1:
        text += f" in {len(sequences)} sequences"
    if entries is None:
        return text
    names = {CHANGED: "changed", DROPPED: "dropped", INSERTED: "inserted"}
    counts = {name: int((entries.kinds == kind).sum()) for kind, name in names.items()}
    parts = [f"{count:,} {name}" for name, count in counts.items() if count]
    return f"{text}; {', '.join(parts) or 'unedited'}"


def _new_tokens(num_tokens: int, entries: JournalEntries | None) -> npt.NDArray[np.bool_]:
    """Which tokens of an edited document are not the original's, bool ``[T]``.

    Raises:
        DataFormatError: the journal names tokens that are not there.
    """
    is_new = np.zeros(num_tokens, bool)
    if entries is not None and len(entries.positions):
        places = edited_positions(entries)[entries.kinds != DROPPED]
        if len(places) and (places.min() < 0 or places.max() >= num_tokens):
            raise DataFormatError("the journal reaches beyond the document; they do not belong together")
        is_new[places] = True
    return is_new


def _highlighted(
    tokenizer: Tokenizer | None,
    ids: npt.NDArray[np.integer],
    is_new: npt.NDArray[np.bool_],
    is_learned: npt.NDArray[np.bool_] | None,
    on: Screen,
) -> Iterator[Piece]:
    """The text, new tokens in colour; without colours it is the text alone.

    What does not count in the loss is faint; without colours what does is between ``>>>`` and ``<<<``.
    """
    differs = np.diff(is_new) if on.colour else np.zeros(max(len(ids) - 1, 0), bool)
    if is_learned is not None:
        differs = differs | np.diff(is_learned)
    bounds = [0, *(np.flatnonzero(differs) + 1).tolist(), len(ids)]
    for begin, text in zip(bounds[:-1], span_texts(tokenizer, ids, bounds), strict=True):
        shown = printable(text)
        if is_learned is None or not len(ids):
            yield (ADDED if on.colour and is_new[begin] else PLAIN), shown
        elif on.colour:
            yield ADDED if is_new[begin] else PLAIN if is_learned[begin] else FAINT, shown
        else:
            yield PLAIN, f">>>{shown}<<<" if is_learned[begin] else shown


def _token_lines(
    tokenizer: Tokenizer | None,
    ids: npt.NDArray[np.integer],
    is_new: npt.NDArray[np.bool_],
    is_learned: npt.NDArray[np.bool_] | None,
    start: int,
) -> list[str]:
    """Position, id and text of every token; ``*`` marks one that is not the original's, ``|`` one that
    counts in the loss.
    """
    texts = span_texts(tokenizer, ids, range(len(ids) + 1)) if tokenizer else [""] * len(ids)
    marks = ["*" if new else " " for new in is_new.tolist()]
    if is_learned is not None:
        marks = [f"{mark}{'|' if each else ' '}" for mark, each in zip(marks, is_learned, strict=True)]
    return [
        f"{mark}{start + offset:>8} {id_:>8}  {repr(text) if tokenizer else ''}".rstrip()
        for offset, (id_, mark, text) in enumerate(zip(ids.tolist(), marks, texts, strict=True))
    ]
