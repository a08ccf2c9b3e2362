"""This project's models as one of lm-eval's: its three kinds of requests, answered by a :class:`TaskModel`.

Invariant: what is answered is what lm-eval's own model ``hf`` answers for the same weights, to float
rounding; requests that it would fail at with an assertion are refused with a message.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_tokedit.errors import DataFormatError
from megatron_tokedit.evaluation.tasks.answers import AnswerLog, key_of
from megatron_tokedit.evaluation.tasks.continuations import Answer, score_pairs
from megatron_tokedit.evaluation.tasks.encoding import Pair
from megatron_tokedit.evaluation.tasks.model import TaskModel
from megatron_tokedit.evaluation.tasks.shares import ALONE, Shares
from megatron_tokedit.evaluation.tasks.writing import WriteRequest, answer_of, settings_of
from megatron_tokedit.generation import GenerationSettings, Prompt
from megatron_tokedit.log import get_logger

logger = get_logger(__name__)

_FORWARDS_AT_ONCE = 8
"""So many batches are scored before their answers are kept."""
OnRequests = Callable[[str, int, int], None]
"""Told (kind of request, how many are to be answered, how many of them were just now); 0 at the start."""


class ProjectLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """An lm-eval model over a checkpoint or a Hugging Face folder.

    Args:
        model: the loaded model.
        answers: where answers are kept, and found.
        seed: of texts that are drawn.
        shares: the processes that share the documents.
        on_requests: told how requests go.
    """

    def __init__(
        self,
        model: TaskModel,
        *,
        answers: AnswerLog,
        seed: int = 1234,
        shares: Shares = ALONE,
        on_requests: OnRequests | None = None,
    ) -> None:
        super().__init__()
        self._model, self._answers, self._seed = model, answers, seed
        self._rank, self._world_size, self._device = shares.rank, shares.count, "cpu"
        self._shares, self._on_requests = shares, on_requests
        self._stderr = sys.stderr  # lm-eval runs with another one

    def all_gather(self, tensor: Any) -> Any:
        """Every process's tensor, stacked, in all of them."""
        return self._shares.gather_tensors(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every process's object, in process ``dst``."""
        gathered = self._shares.gather(obj)
        return gathered if self._rank == dst else None

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        """See lm-eval.

        Raises:
            DataFormatError: a continuation without tokens, or with more than the model takes.
        """
        pairs = self._model.encoder.encode_pairs([request.args for request in requests])
        limit = self._model.max_positions
        for request, pair in zip(requests, pairs, strict=True):
            if pair is None:
                raise DataFormatError(
                    f"task {request.task_name}, document {request.doc_id}: the continuation "
                    f"{request.args[1]!r} has no tokens of its own behind the context "
                    f"{request.args[0][-40:]!r}, so it has no probability; mend the task's data"
                )
            if len(pair.continuation) > limit:
                raise DataFormatError(
                    f"task {request.task_name}, document {request.doc_id}: a continuation of "
                    f"{len(pair.continuation)} tokens: the model is given {limit} at most; leave this "
                    "document out, or score the text as loglikelihood_rolling"
                )
        known = [pair for pair in pairs if pair is not None]
        num_cut = sum(len(pair.context) + len(pair.continuation) > limit + 1 for pair in known)
        if num_cut:
            with contextlib.redirect_stderr(self._stderr):
                logger.warning(
                    "%d of %d contexts are too long for the model's %d positions and lose their beginning",
                    num_cut, len(known), limit,
                )  # fmt: skip
        return self._score(known, "loglikelihood")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """See lm-eval."""
        pairs: list[Pair] = []
        counts = []
        for ids in self._model.encoder.encode([request.args[0] for request in requests]):
            windows = get_rolling_token_windows(
                token_list=list(ids),
                prefix_token=self._model.encoder.prefix_id,
                max_seq_len=self._model.max_positions,
                context_len=1,
            )
            cut = [make_disjoint_window(window) for window in windows]
            pairs += [Pair(tuple(context), tuple(continuation)) for context, continuation in cut]
            counts.append(len(cut))
        answers = iter(self._score(pairs, "loglikelihood_rolling"))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval."""
        model = self._model
        contexts = model.encoder.encode([request.args[0] for request in requests])
        seen: Counter[tuple[tuple[int, ...], GenerationSettings]] = Counter()
        wanted = []
        for request, ids in zip(requests, contexts, strict=True):
            settings = settings_of(
                request.args[1],
                max_positions=model.max_positions,
                batch_tokens=model.batch_tokens,
                seed=self._seed,
                task=str(request.task_name),
            )
            kept = (ids or (model.encoder.prefix_id,))[-(model.max_positions - settings.max_new_tokens) :]
            sample = 0 if settings.is_greedy else seen[kept, settings]
            seen[kept, settings] += 1
            wanted.append(WriteRequest(kept, settings, sample))
        return self._write(wanted)

    def _score(self, pairs: Sequence[Pair], kind: str) -> list[Answer]:
        """The answers for pairs; those that are known already are not asked for."""
        keys = [key_of("score", pair.context, pair.continuation) for pair in pairs]
        missing = self._missing(keys)
        self._tell(kind, len(missing), 0)

        def keep(found: list[tuple[int, Answer]]) -> None:
            self._answers.add([(keys[missing[i]], answer) for i, answer in found])
            self._tell(kind, len(missing), len(found))

        with contextlib.redirect_stderr(self._stderr):
            score_pairs(
                self._model.scorer,
                [pairs[i] for i in missing],
                max_positions=self._model.max_positions,
                tokens_at_once=_FORWARDS_AT_ONCE * self._model.batch_tokens,
                on_answers=keep,
            )
        answers: list[Any] = [self._answers.get(key) for key in keys]
        return [(float(value), bool(is_greedy)) for value, is_greedy in answers]

    def _write(self, wanted: Sequence[WriteRequest]) -> list[str]:
        """The texts that are wanted; those that are known already are not written."""
        keys = [
            key_of("write", want.context, repr(replace(want.settings, batch_rows=1)), [want.sample])
            for want in wanted
        ]
        missing = self._missing(keys)
        self._tell("generate_until", len(missing), 0)
        with contextlib.redirect_stderr(self._stderr):
            for settings in dict.fromkeys(wanted[i].settings for i in missing):
                alike = [i for i in missing if wanted[i].settings == settings]
                self._write_alike(alike, wanted, keys, len(missing))
        return [str(self._answers.get(key)) for key in keys]

    def _write_alike(
        self, places: Sequence[int], wanted: Sequence[WriteRequest], keys: Sequence[str], total: int
    ) -> None:
        """Write texts of the same settings, the longest contexts first.

        A text that ended at a stop text which its ids, decoded at once, do not have (a byte in a run that is
        no UTF-8) is written again without an early end.
        """
        settings = wanted[places[0]].settings
        to_the_end = replace(settings, stop_texts=())
        ordered, rounds = sorted(places, key=lambda i: -len(wanted[i].context)), [settings, to_the_end]
        for how in rounds:
            prompts = [
                Prompt(wanted[i].context, range(wanted[i].sample, wanted[i].sample + 1)) for i in ordered
            ]
            again = []
            for i, completion in zip(ordered, self._model.write(prompts, how), strict=True):
                text, is_cut = answer_of(completion, self._model.encoder, settings)
                if completion.finish == "stop" and not is_cut:
                    again.append(i)
                    continue
                self._answers.add([(keys[i], text)])
                self._tell("generate_until", total, 1)
            if not (ordered := again):
                return

    def _missing(self, keys: Sequence[str]) -> list[int]:
        """Where the questions that have no answer yet stand first."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        return sorted(i for key, i in first.items() if self._answers.get(key) is None)

    def _tell(self, kind: str, total: int, number: int) -> None:
        if self._on_requests is not None:
            self._on_requests(kind, total, number)
