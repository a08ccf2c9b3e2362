"""What a published folder says beside its weights' values comes back: ids, ends of texts, dtypes."""

from __future__ import annotations

import json

import conversion_cases as cases
import numpy as np
import pytest

from megatron_tokedit.engine import checkpoint_folder
from megatron_tokedit.tokenizers import load_tokenizer

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def change(file, *, remove=(), **settings):
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


def there_and_back(ranks, folder, source, *, gone=()):
    """Convert both ways; files of the tokenizer's folder that are gone before the way back."""
    made, back = folder / "made", folder / "back"
    ranks.run(convert_both_ways, source, made, back, gone, world_size=1)
    return made, back


def convert_both_ways(source, made, back, gone):
    code, shown = cases.convert("--input", source, "--output", made)
    assert code == 0, shown
    for name in gone:
        (made / "tokenizer" / name).unlink()
    code, shown = cases.convert("--input", made, "--output", back)
    assert code == 0, shown


def ids_of(folder):
    """As transformers reads a folder: those of its configuration, and those that end its texts."""
    import transformers

    readers = (transformers.AutoConfig, transformers.GenerationConfig)
    return [{name: getattr(kind.from_pretrained(folder), name) for name in IDS} for kind in readers]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", "as saved"), ("gpt2", "without generation"), ("mistral", "unnamed"), ("qwen2", "null")],
)
def test_token_ids(ranks, tmp_path, name, settings):
    source = cases.write_published(tmp_path / "source", name)
    if settings == "as saved":
        change(source / "generation_config.json", bos_token_id=7, temperature=0.6, do_sample=True)
    else:
        (source / "generation_config.json").unlink()
    if settings == "unnamed":  # transformers' default for the family is id 2, which is text here
        change(source / "config.json", remove=IDS)
    if settings == "null":
        change(source / "config.json", **dict.fromkeys(IDS))
    made, back = there_and_back(ranks, tmp_path, source)
    config, generation = ids_of(back)
    state = checkpoint_folder.read_json(checkpoint_folder.require(made), "state.json")
    if settings == "as saved":
        assert [config, generation] == ids_of(source)
        assert json.loads((back / "generation_config.json").read_text())["temperature"] == 0.6
    elif settings == "unnamed":
        tokenizer = load_tokenizer("HuggingFaceTokenizer", str(back))
        told = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
        assert config == generation == told
        assert state["stop_ids"] == []
    else:
        assert config == generation == ids_of_config(source)
        assert state["stop_ids"] == ([] if settings == "null" else [0])


def ids_of_config(folder):
    import transformers

    return {name: getattr(transformers.AutoConfig.from_pretrained(folder), name) for name in IDS}


def text_stops(folders):
    from megatron_tokedit.generation import load_text_model

    return [load_text_model(folder, device="cpu").stop_ids for folder in folders]


@pytest.mark.parametrize(
    ("generation", "config", "stops", "gone"),
    [
        ({"eos_token_id": [0, 5, 7]}, {}, [0, 5, 7], ()),
        ({"eos_token_id": [0, 5, 7]}, {}, [0, 5, 7], ("config.json", "generation_config.json")),
        ({"eos_token_id": 9}, {}, [9], ()),
        (None, {"eos_token_id": [0, 4]}, [0, 4], ("config.json",)),
    ],
)
def test_ends_of_texts(ranks, tmp_path, generation, config, stops, gone):
    """Also where the published model's settings do not lie beside the tokenizer any more."""
    source = cases.write_published(tmp_path / "source", "llama")
    change(source / "config.json", **config)
    if generation is None:
        (source / "generation_config.json").unlink()
    else:
        change(source / "generation_config.json", **generation)
    made, back = there_and_back(ranks, tmp_path, source, gone=gone)
    state = checkpoint_folder.read_json(checkpoint_folder.require(made), "state.json")
    assert state["stop_ids"] == stops
    (found,) = ranks.run(text_stops, (source, made, back), world_size=1)
    assert found == [{*stops, 0}] * 3  # 0 is the tokenizer's own
    ends = json.loads((back / "generation_config.json").read_text())["eos_token_id"]
    assert ends == (stops if stops[1:] else stops[0])


def test_damaged_generation_settings_are_told(ranks, tmp_path):
    source = cases.write_published(tmp_path / "source", "llama")
    (source / "generation_config.json").write_text("{")
    calls = [
        ("--input", source, "--output", tmp_path / "made"),
        ("--input", tmp_path / "made", "--output", tmp_path / "back"),
    ]
    (results,) = ranks.run(cases.convert_all, calls, world_size=1)
    for code, shown in results:
        assert code == 0, shown
        assert "generation_config.json: left out: " in shown
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == 0


def norms_in_float32(folder, name):
    """A bfloat16 folder whose norms have gains that bfloat16 cannot hold."""
    import torch
    from safetensors.torch import save_file

    source = cases.write_published(folder, name, dtype="bfloat16")
    tensors = cases.tensors_of(source)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        if "norm" in key or "ln_" in key:
            tensors[key] = tensor.float() + 1e-3 * torch.randn(tensor.shape, generator=generator)
            assert not torch.equal(tensors[key], tensors[key].bfloat16().float())
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def logprobs(folder, dtype):
    """By the scorer of either backend."""
    from megatron_tokedit.scoring.load import identify_prior, load_scorer, scoring_options

    identity = identify_prior(str(folder))
    options = scoring_options(identity, start_id=None, batch_tokens=256, logits_bytes=1 << 20)
    documents = [row.numpy().astype(np.int32) for row in cases.some_ids()]
    scores = load_scorer(identity, options, dtype=dtype, device="cpu").score(documents)
    return np.stack([score.logprobs_T[1:] for score in scores])


def own_logprobs(folder, dtype):
    """By transformers' model as it comes."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    norms = {
        parameter.dtype for name, parameter in model.named_parameters() if "norm" in name or "ln_" in name
    }
    ids = cases.some_ids()
    with torch.no_grad():
        rows = model(ids).logits[:, :-1].float().log_softmax(-1)
    return rows.gather(2, ids[:, 1:, None])[:, :, 0].numpy(), norms


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_norms_in_float32_within_bfloat16(ranks, tmp_path, name):
    """They stay float32 in the files, and are computed in what the model is, by all three alike."""
    import torch

    source = norms_in_float32(tmp_path / "source", name)
    made, back = there_and_back(ranks, tmp_path, source)
    before, after = cases.tensors_of(source), cases.tensors_of(back)
    assert {key: tensor.dtype for key, tensor in before.items()} == {
        key: tensor.dtype for key, tensor in after.items()
    }
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.15)):
        ((own, norms),) = ranks.run(own_logprobs, source, dtype, world_size=1)
        assert norms == {getattr(torch, dtype)}
        for folder in (source, made):
            (found,) = ranks.run(logprobs, folder, dtype, world_size=1)
            np.testing.assert_allclose(found, own, atol=tolerance)


def refusal_of_kept_optimizer(folder, made, dry_run):
    """What a continuation says that wants the optimizer of a converted checkpoint."""
    import contextlib
    import io

    import yaml

    from megatron_tokedit.cli.train import main

    sections = yaml.safe_load((made / "continue.yaml").read_text())
    sections["init_from"]["optimizer"] = "kept"
    sections |= {
        "run_dir": str(folder / "run"),
        "training": {"train_steps": 2, "micro_batch_size": 1, "global_batch_size": 1},
        "optimizer": {"lr": 1e-3},
        "data": {"train": [{"name": "a", "prefix": str(folder / "none")}]},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(sections))
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        code = main(["--config", str(config), *(["--dry-run"] if dry_run else [])])
    return code, shown.getvalue()


def test_a_converted_checkpoint_has_no_optimizer(ranks, tmp_path):
    source = cases.write_published(tmp_path / "source", "llama")
    made, _ = there_and_back(ranks, tmp_path, source)
    ((code, shown),) = ranks.run(refusal_of_kept_optimizer, tmp_path, made, True, world_size=1)
    assert code == 1
    assert "init_from.optimizer: kept, but" in shown
    assert "no optimizer state, only weights; set init_from.optimizer: fresh" in shown
    assert "Traceback" not in shown
