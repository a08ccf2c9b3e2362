"""The chat template that a model was taught goes with it, in both directions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import conversion_cases as cases
import pytest

from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.testing.models import tiny_llama
from megatron_tokedit.tokenizers import ChatTemplate, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "generation"))
TULU = (ROOT / "megatron_tokedit/tokenizers/chat_templates/tulu.jinja").read_text()
BOTH = "\n" + (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TALK = [
    {"role": "user", "content": "Where does it rise?"},
    {"role": "assistant", "content": "In the hills."},
    {"role": "user", "content": "And then?"},
]


def save(folder: Path, tokenizer: str, state: dict, output: Path) -> None:
    import generation_cases

    generation_cases.save_checkpoint(str(folder), tiny_llama(), tokenizer, more=state, vocab_size=420)
    code, shown = cases.convert("--input", folder, "--output", output)
    assert code == 0, shown


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "byte level"])
@pytest.mark.parametrize("source", [TULU, BOTH])
def test_from_a_checkpoint(ranks, tmp_path: Path, tokenizer: str, source: str) -> None:
    """transformers writes the text that the model was taught, and gives it the same ids."""
    import generation_cases
    from transformers import AutoTokenizer

    folder, output = tmp_path / "run", tmp_path / "hf"
    state = {"chat_template": source, "chat_template_name": "given"}
    ranks.run(save, folder, tokenizer, state, output, world_size=1)
    trained = load_tokenizer(*generation_cases.TOKENIZERS[tokenizer])
    text = ChatTemplate("given", source, trained.special_tokens).text(TALK, prompts=True)
    written = AutoTokenizer.from_pretrained(output)
    assert written.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == text
    if (tokenizer, source) == ("sentencepiece", BOTH):
        assert "<s>" in text, "which is not what the folder's tokenizer calls BOS: documents follow EOD"
    else:
        assert (output / "chat_template.jinja").read_text() == source
    ids = written.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert ids == trained.encode_chat(text, []).ids_T.tolist()


def test_from_a_published_model_and_back(ranks, tmp_path: Path) -> None:
    published = cases.write_published(tmp_path / "hf", "llama")
    settings = json.loads((published / "tokenizer_config.json").read_text())
    (published / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TULU}))
    made, back = tmp_path / "made", tmp_path / "back"
    calls = [("--input", published, "--output", made), ("--input", made, "--output", back)]
    assert [code for code, _ in ranks.run(cases.convert_all, calls, world_size=1)[0]] == [0, 0]
    state = checkpoint_folder.read_json(checkpoint_folder.require(made), "state.json")
    assert (state["chat_template"], state["chat_template_name"]) == (TULU, "tokenizer")
    assert (back / "chat_template.jinja").read_text() == TULU
    assert "chat_template" not in json.loads((back / "tokenizer_config.json").read_text())
    assert load_tokenizer("HuggingFaceTokenizer", str(back)).chat_template == TULU


def test_without_one_there_is_none(ranks, tmp_path: Path) -> None:
    ranks.run(save, tmp_path / "run", "sentencepiece", {}, tmp_path / "hf", world_size=1)
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
