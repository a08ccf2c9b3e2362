"""``tools/generate.py``: what a checkpoint writes; prompts from the command line, a file, standard input or a
conversation, text on the terminal or JSON lines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from tqdm import tqdm

from megatron_tokedit import log
from megatron_tokedit.cli.generate_output import LinesFile, recorded_settings, refuse_output
from megatron_tokedit.cli.generate_prompts import read_prompts, samples_of
from megatron_tokedit.cli.generate_screen import Screen
from megatron_tokedit.cli.main import add_common_arguments, run_command
from megatron_tokedit.errors import ConfigError

if TYPE_CHECKING:
    from megatron_tokedit.generation import Chat, Completion, GenerationSettings, TextModel

logger = log.get_logger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Continue prompts with a checkpoint. Without --prompt and --prompt-file: standard input "
        "is one prompt, or, on a terminal, a conversation.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="run folder (its newest complete checkpoint), step folder, or Hugging Face model folder",
    )
    given = parser.add_argument_group("prompts").add_mutually_exclusive_group()
    given.add_argument("--prompt", nargs="+", metavar="TEXT", help='texts to continue; "" writes documents')
    given.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="FILE.jsonl: the value of --json-key of every line (with --chat also its messages); otherwise "
        "every line is a prompt",
    )
    given.add_argument(
        "--interactive", action="store_true", help="ask for prompts (default on a terminal without prompts)"
    )
    parser.add_argument("--json-key", default="prompt", metavar="KEY", help="default: prompt")
    parser.add_argument(
        "--no-document-start",
        dest="document_start",
        action="store_false",
        help="do not put in front of a prompt what stood before every document in training (EOD, or BOS): "
        "for texts from the middle of a document",
    )
    _add_chat(parser)
    _add_settings(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="write JSON lines; -: to standard output. The same command goes on where one was stopped",
    )
    output.add_argument("--overwrite", action="store_true", help="replace FILE.jsonl, or what is begun of it")
    output.add_argument("--logprobs", action="store_true", help="with the log-probability of every token")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time; default: 8")
    machine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="default: auto, bfloat16 on a GPU and float32 elsewhere",
    )
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    machine.add_argument("--tokenizer-type", metavar="TYPE", help="default: what the folder says")
    machine.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer lies now")
    add_common_arguments(parser)
    return parser


def _add_chat(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("talking to a fine-tuned model")
    group.add_argument(
        "--chat",
        action="store_true",
        help="prompts are messages (with FILE.jsonl also whole conversations), and the model replies",
    )
    group.add_argument("--system", metavar="TEXT", help="system message of conversations that have none")
    group.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="alpaca, chatml, llama3, tulu, or a Jinja file; default: the one that the model was taught",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "writing", "temperature, top-k and top-p apply in this order; by default the model's own distribution"
    )
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="0: greedy; default: 1",
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest with this probability")
    group.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts a prompt; default: 1")
    group.add_argument(
        "--first-sample", type=int, default=0, metavar="I", help="number of the first one, to go on with"
    )
    group.add_argument("--seed", type=int, default=1234, metavar="N", help="default: 1234")
    group.add_argument("--stop", nargs="+", default=(), metavar="TEXT", help="end before any of these")
    group.add_argument("--ignore-eod", action="store_true", help="go on behind the end of a document")


def _settings(arguments: argparse.Namespace) -> GenerationSettings:
    """Settings of the arguments.

    Raises:
        ConfigError: what cannot be honoured.
    """
    # imported here: `--help` and wrong usage should not wait for torch
    from megatron_tokedit.generation import GenerationSettings

    settings = GenerationSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_at_eod=not arguments.ignore_eod,
        stop_texts=tuple(arguments.stop),
        batch_rows=arguments.batch_size,
        logprobs=arguments.logprobs,
    )
    if arguments.num_samples < 1 or arguments.first_sample < 0:
        raise ConfigError("--num-samples: expected at least 1; --first-sample: at least 0")
    if arguments.first_sample + arguments.num_samples > 1 << 64:
        raise ConfigError("--first-sample: expected less than 2**64 with all samples")
    if settings.is_greedy and arguments.num_samples > 1:
        raise ConfigError("--num-samples: --temperature 0 writes the same text every time; give one of them")
    return settings


def record_of(completion: Completion, model: TextModel, chat: Chat | None = None) -> dict[str, Any]:
    """A line of ``--output``: ``text`` is the prompt with its continuation, as a document; of a chat
    ``messages`` is the conversation with the reply.
    """
    from megatron_tokedit.generation import ChatPrompt
    from megatron_tokedit.generation.text import token_texts

    prompt, record = completion.prompt, dict[str, Any]()
    if isinstance(prompt, ChatPrompt):
        assert chat is not None
        record["messages"] = [*prompt.messages, chat.reply(completion)]
        if prompt.tools:
            record["tools"] = prompt.tools
    else:
        record["text"] = prompt.text + completion.text
    record |= {
        "prompt": prompt.text,
        "completion": completion.text,
        "finish": completion.finish,
        "prompt_index": completion.prompt_index,
        "sample": completion.sample,
        "num_prompt_tokens": len(prompt.ids),
        "num_new_tokens": len(completion.ids),
    }
    if completion.logprobs is not None:
        record["ids"] = completion.ids
        record["tokens"] = token_texts(model.tokenizer, prompt.ids, completion.ids)
        record["logprobs"] = completion.logprobs
    return record


def _lines_file(
    model: TextModel, chat: Chat | None, settings: GenerationSettings, arguments: argparse.Namespace
) -> LinesFile | None:
    """The file to write, or to go on with; None: standard output."""
    if arguments.output == "-":
        return None
    from megatron_tokedit.generation.load import resolve_machine

    samples, machine = samples_of(arguments), resolve_machine(arguments.device, arguments.dtype)
    recorded = recorded_settings(
        model,
        settings,
        samples=samples,
        document_start=arguments.document_start,
        machine=" ".join(machine),
        chat_template=None if chat is None else chat.template.source,
    )
    return LinesFile(Path(arguments.output), recorded, samples, overwrite=arguments.overwrite)


def _write_lines(
    model: TextModel, chat: Chat | None, settings: GenerationSettings, arguments: argparse.Namespace
) -> Iterator[Completion]:
    """Continue all prompts, as JSON lines."""
    from megatron_tokedit.generation import generate

    prompts = read_prompts(model, chat, arguments)
    file = _lines_file(model, chat, settings, arguments)
    if file is None:
        for completion in generate(model, prompts, settings):
            sys.stdout.write(orjson.dumps(record_of(completion, model, chat)).decode() + "\n")
            sys.stdout.flush()
            yield completion
        return
    with file, tqdm(unit="text", disable=arguments.quiet or None) as bar:
        try:
            for completion in generate(model, file.remaining(prompts), settings):
                file.write(record_of(completion, model, chat))
                bar.update()
                yield completion
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(
                f"interrupted; {file.num_found + file.num_written} texts are in {file.partial}, and the same "
                "command goes on behind them"
            ) from error
        file.finish()
    logger.info("wrote %s", arguments.output)


def _write_all(
    model: TextModel, chat: Chat | None, settings: GenerationSettings, arguments: argparse.Namespace
) -> None:
    """Continue all prompts."""
    from megatron_tokedit.generation import generate

    if arguments.output is not None:
        shown = _write_lines(model, chat, settings, arguments)
    else:
        is_alone = arguments.num_samples == 1 and len(arguments.prompt or ()) < 2
        screen = Screen(
            model,
            samples_of(arguments),
            has_headings=not is_alone or arguments.prompt_file is not None,
            shows_prompts=chat is None,
        )
        on_text = screen.add if sys.stdout.isatty() else None
        shown = screen.show(generate(model, read_prompts(model, chat, arguments), settings, on_text=on_text))
    started, num_texts, num_tokens = time.monotonic(), 0, 0
    for completion in shown:
        num_texts += 1
        num_tokens += len(completion.ids)
    seconds = time.monotonic() - started
    rate = num_tokens / max(seconds, 1e-9)
    logger.info("%d texts, %d new tokens in %.1f s (%.0f a second)", num_texts, num_tokens, seconds, rate)


def _refuse_flags(parser: argparse.ArgumentParser, arguments: argparse.Namespace, converses: bool) -> None:
    """Refuse flags that contradict each other."""
    if converses and arguments.output is not None:
        parser.error("--output: a conversation is not written to a file; give --prompt or --prompt-file")
    if arguments.output in (None, "-") and arguments.overwrite:
        parser.error("--overwrite: there is no file to replace; give --output FILE.jsonl")
    if not arguments.chat:
        for flag, value in (("--system", arguments.system), ("--chat-template", arguments.chat_template)):
            if value is not None:
                parser.error(f"{flag}: has a meaning with --chat only")
        return
    if not arguments.document_start:
        parser.error("--no-document-start: with --chat the template says what a conversation begins with")
    if arguments.ignore_eod:
        parser.error("--ignore-eod: with --chat a reply ends where the template ends it")
    if converses and arguments.num_samples != 1:
        parser.error("--num-samples: a conversation goes on with one reply; give --prompt or --prompt-file")


def _run(argv: Sequence[str]) -> None:
    parser = _parser()
    arguments = parser.parse_args(argv)
    has_prompts = arguments.prompt is not None or arguments.prompt_file is not None
    if sys.stdin is None and not has_prompts:
        parser.error("standard input is closed; give --prompt or --prompt-file")
    converses = arguments.interactive or (not has_prompts and sys.stdin.isatty())
    _refuse_flags(parser, arguments, converses)
    settings = _settings(arguments)
    if arguments.output not in (None, "-"):
        refuse_output(Path(arguments.output), arguments.prompt_file, overwrite=arguments.overwrite)

    from megatron_tokedit.generation import load_text_model

    model = load_text_model(
        arguments.checkpoint,
        device=arguments.device,
        dtype=arguments.dtype,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
    )
    if arguments.chat:
        _chat(model, settings, arguments, converses)
    elif converses:
        from megatron_tokedit.cli.generate_talk import talk

        talk(model, settings, num_samples=arguments.num_samples, document_start=arguments.document_start)
    else:
        _write_all(model, None, settings, arguments)


def _chat(
    model: TextModel, settings: GenerationSettings, arguments: argparse.Namespace, converses: bool
) -> None:
    """Answer messages."""
    from megatron_tokedit.generation import open_chat

    chat = open_chat(model, arguments.chat_template)
    if converses:
        from megatron_tokedit.cli.generate_chat import converse

        converse(chat, settings, system=arguments.system)
    else:
        _write_all(chat.model, chat, chat.settings(settings), arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_run, argv)
