"""The manifest of datasets that are joined: what they must share, and what is added up.

Invariant: nothing is said of the whole that is not true of every part. Parts of different tokenizers, JSON
keys, dtypes or of different use of eod are refused; different edit settings are refused, or recorded part by
part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_tokedit.dataset.manifest import ConversationRecord, Manifest, shorten_inputs
from megatron_tokedit.dataset.writer import DatasetSummary
from megatron_tokedit.errors import DataFormatError

_SHARED_FIELDS = ("format_version", "json_key", "append_eod", "special_tokens_in_text", "dtype")
_EDIT_FIELDS = ("edit", "seed", "prior", "prior_tokenizer")


def check_mergeable(parts: Mapping[str, Manifest], *, allow_different_edits: bool) -> None:
    """Refuse parts that cannot be one dataset.

    Args:
        parts: prefix -> manifest, in order.
        allow_different_edits: take parts that were edited differently, or some not at all.

    Raises:
        DataFormatError: naming the two prefixes and every difference between them.
    """
    (first, reference), *others = parts.items()
    for prefix, manifest in others:
        differences = list(_differences(_identity(reference), _identity(manifest)))
        if differences:
            raise DataFormatError(
                f"{first} and {prefix} cannot be one dataset:\n  " + "\n  ".join(differences)
            )
        differences = list(_edit_differences(reference, manifest))
        if differences and not allow_different_edits:
            raise DataFormatError(
                f"{first} and {prefix} were edited differently:\n  "
                + "\n  ".join(differences)
                + "\nmerge parts of equal settings, or record those of each part with --allow-different-edits"
            )


def merge_manifests(
    parts: Sequence[Manifest],
    summary: DatasetSummary,
    edits_sha256: str | None,
    loss_mask: DatasetSummary | None = None,
) -> Manifest:
    """The manifest of parts that :func:`check_mergeable` let pass.

    Where they were edited differently, ``edit`` is ``{"parts": [...]}`` with the number of documents and the
    settings of every part, in order, and ``seed``, ``prior`` and ``prior_tokenizer`` are in there.

    Args:
        parts: their manifests, in order.
        summary: of the joined dataset.
        edits_sha256: of the joined journal, if there is one.
        loss_mask: summary of the joined loss mask, if there is one.
    """
    first = parts[0]
    checksums = {"bin": summary.bin_sha256, "idx": summary.idx_sha256}
    inputs, omitted = shorten_inputs(
        (record for part in parts for record in part.inputs),
        (part.omitted_inputs for part in parts if part.omitted_inputs is not None),
    )
    changes: dict[str, Any] = {
        "versions": _joined_versions([part.versions for part in parts]),
        "inputs": inputs,
        "omitted_inputs": omitted,
        "counts": _added_counts([part.counts for part in parts]) | summary.counts(),
        "checksums": checksums | ({"edits": edits_sha256} if edits_sha256 else {}),
    }
    if loss_mask is not None:
        changes["checksums"] |= {
            "loss_mask.bin": loss_mask.bin_sha256,
            "loss_mask.idx": loss_mask.idx_sha256,
        }
    if first.conversation is not None:
        changes["conversation"] = _joined_conversations(parts)
    if any(_edit_settings(part) != _edit_settings(first) for part in parts):
        changes |= dict.fromkeys(_EDIT_FIELDS, None)
        changes["edit"] = {"parts": [record for part in parts for record in _part_records(part)]}
    return first.model_copy(update=changes)


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What the parts must share."""
    shared = {name: getattr(manifest, name) for name in _SHARED_FIELDS}
    record = manifest.conversation
    shared["conversation.chat_template"] = record.chat_template if record else None
    return shared | {"tokenizer.fingerprint": manifest.tokenizer.fingerprint}


def _joined_conversations(parts: Sequence[Manifest]) -> ConversationRecord:
    """How the conversations of parts with one chat template were read; what differs is listed."""
    records = [part.conversation for part in parts if part.conversation is not None]
    limits = {record.max_tokens for record in records}
    return records[0].model_copy(
        update={
            "format": ", ".join(dict.fromkeys(record.format for record in records)),
            "keys": records[0].keys if all(each.keys == records[0].keys for each in records) else None,
            "max_tokens": None if None in limits else max(limit for limit in limits if limit is not None),
            "too_long": ", ".join(dict.fromkeys(record.too_long for record in records)),
        }
    )


def _edit_settings(manifest: Manifest) -> dict[str, Any]:
    """How a part was edited; where the prior lay does not matter."""
    settings: dict[str, Any] = manifest.model_dump(mode="json", include=set(_EDIT_FIELDS))
    for name in ("prior", "prior_tokenizer"):
        settings[name] = {
            key: value for key, value in (settings[name] or {}).items() if key not in ("path", "model")
        }
    return settings


def _edit_differences(first: Manifest, second: Manifest) -> Iterator[str]:
    if (first.edit is None) != (second.edit is None):
        yield "edit: " + " and ".join("none" if part.edit is None else "some" for part in (first, second))
    else:
        yield from _differences(_edit_settings(first), _edit_settings(second))


def _part_records(manifest: Manifest) -> list[dict[str, Any]]:
    """Number of documents and edit settings of a part, or of the parts that it was merged from."""
    if manifest.edit is not None and "parts" in manifest.edit:
        return list(manifest.edit["parts"])
    settings = manifest.model_dump(mode="json", include=set(_EDIT_FIELDS))
    return [{"num_documents": manifest.counts.get("num_documents")} | settings]


def _differences(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """``edit.top_k: 8 and 64`` for every value that differs between two nested mappings."""
    for key in dict.fromkeys([*first, *second]):
        left, right = first.get(key), second.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            yield from _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}: {_plain(left)} and {_plain(right)}"


def _plain(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _joined_versions(versions: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Package -> version, or all versions where the parts differ."""
    return {
        package: ", ".join(dict.fromkeys(each[package] for each in versions if package in each))
        for package in dict.fromkeys(name for each in versions for name in each)
    }


def _added_counts(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The sums of what every part counted."""
    return {
        name: sum(each[name] for each in counts) for name in counts[0] if all(name in each for each in counts)
    }
