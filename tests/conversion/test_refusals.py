"""What is wrong with an input is named, all of it at once, before anything is written."""

from __future__ import annotations

import json
import shutil
import threading
import time

import conversion_cases as cases
import pytest


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders that are sound, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        name: cases.write_published(folder / name, name)
        for name in ("llama", "llama-tied", "mistral", "qwen2")
    }


def copy(sources, target, name="llama", **config):
    """A sound folder, its ``config.json`` changed."""
    shutil.copytree(sources[name], target)
    content = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def refused(ranks, tmp_path, cases_by_name):
    """Convert every folder with its flags; the messages, after a look that nothing was written."""
    calls = [
        ("--input", folder, "--output", tmp_path / "out" / name, *flags)
        for name, (folder, flags) in cases_by_name.items()
    ]
    (results,) = ranks.run(cases.convert_all, calls, world_size=1)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    for (code, shown), call in zip(results, calls, strict=True):
        assert code == 1, (call, shown)
        assert shown.count("error: ") == 1
        assert "Traceback" not in shown
    return {
        name: shown.partition("error: ")[2] for name, (_, shown) in zip(cases_by_name, results, strict=True)
    }


def test_configurations(ranks, tmp_path, sources):
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.5, "original_max_position_embeddings": 32}
    other_llama3 = cases.LLAMA3 | {"low_freq_factor": 2.0, "original_max_position_embeddings": 4096}
    folders = {
        "unknown": copy(sources, tmp_path / "1", model_type="phi3"),
        "old-olmo": copy(sources, tmp_path / "2", model_type="hf_olmo"),
        "four": copy(
            sources,
            tmp_path / "3",
            hidden_act="gelu",
            attention_bias=True,
            mlp_bias=True,
            rope_parameters=yarn,
        ),
        "llama3": copy(sources, tmp_path / "4", rope_parameters=other_llama3, max_position_embeddings=8192),
        "quantized": copy(sources, tmp_path / "5", quantization_config={"quant_method": "gptq", "bits": 4}),
        "heads": copy(sources, tmp_path / "6", num_attention_heads=6),
        "window": copy(sources, tmp_path / "7", "mistral", sliding_window=16),
        "qwen-window": copy(
            sources, tmp_path / "8", "qwen2", use_sliding_window=True, sliding_window=16, layer_types=None
        ),
        "json": copy(sources, tmp_path / "9"),
        "none": copy(sources, tmp_path / "10"),
    }
    (folders["json"] / "config.json").write_text('{"model_type": "llama"')
    (folders["none"] / "config.json").unlink()
    shown = refused(ranks, tmp_path, {name: (folder, ()) for name, folder in folders.items()})
    assert "model_type 'phi3' is not known" in shown["unknown"]
    assert "converted are llama, mistral, gpt2, qwen2, qwen3, olmo, mixtral" in shown["unknown"]
    assert "allenai/OLMo-1B-hf" in shown["old-olmo"]
    assert "cannot be converted: 5 problems" in shown["four"]
    for fault in (
        "hidden_act: gelu is not computed here, expected silu",
        "attention_bias: true is not computed here, expected false",
        "mlp_bias: true",
        "rope_theta: 10000.5, expected a whole number",
        "rope_type: yarn is not computed here, but default, linear and llama3 are",
    ):
        assert fault in shown["four"]
    assert "low_freq_factor: 2.0, expected 1.0" in shown["llama3"]
    assert "original_max_position_embeddings: 4096, expected 8192" in shown["llama3"]
    assert "quantized weights are not converted" in shown["quantized"]
    assert "config.json" in shown["heads"]
    for name in ("window", "qwen-window"):
        assert "sliding_window: 16 tokens, fewer than the 64 of a text" in shown[name]
        assert "give --seq-length 16 or less" in shown[name]
    assert "is not a JSON object" in shown["json"]
    assert "neither a Hugging Face model folder" in shown["none"]


def test_tensors(ranks, tmp_path, sources):
    from safetensors.torch import save_file

    def change(target, name="llama", **changes):
        folder = copy(sources, target, name)
        tensors = cases.tensors_of(folder) | changes.get("add", {})
        kept = {key: tensor for key, tensor in tensors.items() if key not in changes.get("drop", ())}
        save_file({key: tensor.contiguous() for key, tensor in kept.items()}, folder / "model.safetensors")
        return folder

    import torch

    layer = "model.layers.1."
    shape = {f"{layer}mlp.down_proj.weight": torch.zeros(32, 63), f"{layer}mlp.extra.bias": torch.zeros(3)}
    folders = {
        "all": change(tmp_path / "1", add=shape, drop=(f"{layer}self_attn.k_proj.weight", "lm_head.weight")),
        "tied": change(
            tmp_path / "2", "llama-tied", add={"lm_head.weight": torch.ones(cases.VOCAB_SIZE, 32)}
        ),
        "dtype": change(tmp_path / "3", add={"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
        "truncated": copy(sources, tmp_path / "4"),
        "header": copy(sources, tmp_path / "5"),
        "text": copy(sources, tmp_path / "6"),
        "pickle": copy(sources, tmp_path / "7"),
        "nothing": copy(sources, tmp_path / "8"),
        "index": copy(sources, tmp_path / "9"),
        "list": copy(sources, tmp_path / "10"),
        "both": copy(sources, tmp_path / "11"),
    }
    file = "model.safetensors"
    content = (folders["truncated"] / file).read_bytes()
    (folders["truncated"] / file).write_bytes(content[:-100])
    (folders["header"] / file).write_bytes(content[:50])
    (folders["text"] / file).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    (folders["pickle"] / file).rename(folders["pickle"] / "pytorch_model.bin")
    (folders["nothing"] / file).unlink()
    places = {"model.norm.weight": file, "lm_head.weight": "model-2.safetensors", "model.gone.weight": file}
    (folders["index"] / f"{file}.index.json").write_text(json.dumps({"weight_map": places}))
    (folders["list"] / f"{file}.index.json").write_text("[]")
    shutil.copyfile(folders["both"] / file, folders["both"] / "model-1.safetensors")
    places = dict.fromkeys(cases.tensors_of(sources["llama"]), "model-1.safetensors")
    (folders["both"] / f"{file}.index.json").write_text(json.dumps({"weight_map": places}))
    shown = refused(ranks, tmp_path, {name: (folder, ()) for name, folder in folders.items()})
    assert "cannot be converted: 4 problems" in shown["all"]
    for fault in (
        f"tensor {layer}self_attn.k_proj.weight: missing",
        "tensor lm_head.weight: missing",
        f"tensor {layer}mlp.down_proj.weight: of shape [32, 63], expected [32, 64]",
        f"tensor {layer}mlp.extra.bias: surplus",
    ):
        assert fault in shown["all"]
    assert "lm_head.weight: differs from the embedding" in shown["tied"]
    assert "model.norm.weight: of torch.int8, expected float32, bfloat16 or float16" in shown["dtype"]
    assert f"truncated: {len(content) - 100} bytes, its header says {len(content)}" in shown["truncated"]
    assert "not a safetensors file, or its header is truncated" in shown["header"]
    assert "not a safetensors file" in shown["text"]
    assert "pytorch_model.bin, a pickle" in shown["pickle"]
    assert "holds neither model.safetensors nor model.safetensors.index.json" in shown["nothing"]
    assert "no tensor model.gone.weight, which model.safetensors.index.json has there" in shown["index"]
    assert "model-2.safetensors: cannot be read: No such file" in shown["index"]
    assert "not an index of safetensors files" in shown["list"]
    assert "cannot be converted: 1 problem" in shown["both"]
    assert "holds model.safetensors, which transformers would load, and" in shown["both"]


def test_tokenizers_layouts_and_flags(ranks, tmp_path, sources):
    source, bare = sources["llama"], copy(sources, tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    pieces = cases.DATA / "tiny_sentencepiece.model"
    shown = refused(
        ranks,
        tmp_path,
        {
            "bare": (bare, ()),
            "large": (source, ("--tokenizer-model", pieces, "--target-tensor-model-parallel-size", 3)),
            "pipeline": (source, ("--target-pipeline-model-parallel-size", 3)),
            "from": (source, ("--from", "megatron")),
            "to": (source, ("--to", "hf")),
            "half": (source, ("--dtype", "float16")),
            "long": (source, ("--seq-length", 65)),
            "zero": (source, ("--seq-length", 0)),
            "text": (source, ("--check", "--check-text", tmp_path / "none.txt")),
            "differs": (source, ("--check", "--check-tolerance", -1)),
            "no-input": (tmp_path / "none", ()),
        },
    )
    assert "holds no tokenizer" in shown["bare"]
    assert "has 340 ids, the model has 301: it is another model's" in shown["large"]
    assert "parallel.tensor_model_parallel_size" in shown["large"]
    assert "pipeline_model_parallel_size" in shown["pipeline"]
    assert "is of kind hf by its content" in shown["from"]
    assert "is of this kind already" in shown["to"]
    assert "a checkpoint is float32 or bfloat16" in shown["half"]
    assert "--seq-length 65: the model has 64 positions" in shown["long"]
    assert "expected 1 or more" in shown["zero"]
    assert "none.txt: cannot be read" in shown["text"]
    assert "the conversion was not kept" in shown["differs"]
    assert "no such folder" in shown["no-input"]


def test_a_window_that_texts_do_not_reach(ranks, tmp_path, sources):
    source = copy(sources, tmp_path / "source", "mistral", sliding_window=16)
    calls = [("--input", source, "--output", tmp_path / "made", "--seq-length", 16, "--check")]
    (((code, shown),),) = ranks.run(cases.convert_all, calls, world_size=1)
    assert code == 0, shown
    state = json.loads((tmp_path / "made" / "checkpoints" / "step_00000000" / "run_config.json").read_text())
    assert (state["model"]["seq_length"], state["model"]["max_position_embeddings"]) == (16, 16)


def test_old_folders(ranks, tmp_path, sources):
    """Names of the base model alone, buffers among the weights, and a tied output layer that is there."""
    import torch
    from safetensors.torch import save_file

    gpt2 = cases.write_published(tmp_path / "gpt2", "gpt2")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in cases.tensors_of(gpt2).items()}
    tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(4)}
    save_file(tensors, gpt2 / "model.safetensors")
    scaling = {"rope_type": "linear", "factor": 4.0}  # as transformers 4 has it
    tied = copy(sources, tmp_path / "tied", "llama-tied", rope_theta=50000.0, rope_scaling=scaling)
    config = json.loads((tied / "config.json").read_text())
    del config["rope_parameters"]
    (tied / "config.json").write_text(json.dumps(config))
    tensors = cases.tensors_of(tied)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tied / "model.safetensors")
    calls = [("--input", folder, "--output", f"{folder}-made", "--check") for folder in (gpt2, tied)]
    (results,) = ranks.run(cases.convert_all, calls, world_size=1)
    assert [code for code, _ in results] == [0, 0], results
    record = tmp_path / "tied-made" / "checkpoints" / "step_00000000" / "run_config.json"
    model = json.loads(record.read_text())["model"]
    assert (model["rotary_base"], model["seq_len_interpolation_factor"]) == (50000, 4.0)


def convert_on_a_full_disk(folder, source):
    """Files of 64 KiB at most, for both directions; then a disk on which one writing thread fails."""
    import resource

    from torch.distributed.checkpoint import filesystem

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made, shown = folder / "made", []
    assert cases.convert("--input", source, "--output", made)[0] == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        for origin in (source, made):
            shown.append(cases.convert("--input", origin, "--output", folder / "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    original, main = filesystem._write_item, threading.get_ident()

    def write_item(*arguments):
        if threading.get_ident() != main:
            raise OSError(28, "No space left on device")
        time.sleep(0.01)  # the other thread is to have its turn
        return original(*arguments)

    filesystem._write_item = write_item
    try:
        shown.append(cases.convert("--input", source, "--output", folder / "full"))
    finally:
        filesystem._write_item = original
    return shown, sorted(path.name for path in folder.iterdir())


def test_a_full_disk(ranks, tmp_path, sources):
    ((shown, names),) = ranks.run(convert_on_a_full_disk, tmp_path, sources["llama"], world_size=1)
    assert names == ["made"]
    assert [code for code, _ in shown] == [1, 1, 1], shown
    assert all(message.count("error: ") == 1 and "Traceback" not in message for _, message in shown), shown
    assert "cannot be written" in shown[0][1]
    assert "File too large" in shown[1][1]
    assert "a writing thread failed: [Errno 28] No space left on device" in shown[2][1]
    assert "tensors and objects were not written" in shown[2][1]


def damaged_checkpoints(folder, source):
    """Messages for a checkpoint whose record says another model, and for one that is cut short."""
    from megatron_tokedit.engine import checkpoint_folder

    made = folder / "made"
    assert cases.convert("--input", source, "--output", made)[0] == 0
    step = checkpoint_folder.require(made)
    record = checkpoint_folder.read_json(step, "run_config.json")

    def attempt(**changes):
        (step / "run_config.json").write_text(json.dumps({"model": record["model"] | changes}))
        files = {
            entry.name: entry.stat().st_size for entry in step.iterdir() if entry.name != "COMPLETE.json"
        }
        (step / "COMPLETE.json").write_text(json.dumps({"files": files}))
        return cases.convert("--input", made, "--output", folder / "back")

    shown = [
        attempt(share_embeddings_and_output_weights=True, ffn_hidden_size=60, family="qwen2"),
        attempt(num_layers=3),
        attempt(seq_length=64),
    ]
    shard = max(step.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + b"x" * (len(content) - len(content) // 2))
    shutil.rmtree(folder / "back")
    shown.append(cases.convert("--input", made, "--output", folder / "back"))
    shard.write_bytes(content[:-1])
    shown.append(cases.convert("--input", made, "--output", folder / "back"))
    return shown, (folder / "back").exists(), list(folder.glob("*.partial"))


def test_checkpoints(ranks, tmp_path, sources):
    ((shown, is_there, partial),) = ranks.run(damaged_checkpoints, tmp_path, sources["llama"], world_size=1)
    (other, fewer, _, garbled, cut) = shown
    assert [code for code, _ in shown] == [1, 1, 0, 1, 1]
    for fault in (
        "decoder.layers.self_attention.linear_qkv.bias: missing",
        "decoder.layers.mlp.linear_fc1.weight: of shape [4, 128, 32], expected [4, 120, 32]",
        "output_layer.weight: surplus",
    ):
        assert fault in other[1]
    assert "of shape [4, 32, 32], expected [3, 32, 32]" in fewer[1]
    assert "cannot be read" in garbled[1]
    assert "neither a Hugging Face model folder" in cut[1] or "has no complete checkpoint" in cut[1]
    assert not is_there
    assert not partial


def test_what_goes_wrong_on_the_way_back(ranks, tmp_path, sources):
    """Values that float16 cannot hold, heads that do not divide the width, broken generation settings."""
    import torch
    from safetensors.torch import save_file

    large = copy(sources, tmp_path / "large")
    tensors = cases.tensors_of(large)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": 20, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6}
    uneven = cases.write_published(tmp_path / "uneven", "mistral", num_hidden_layers=1, **sizes)
    broken = copy(sources, tmp_path / "broken")
    (broken / "generation_config.json").write_text("{")
    folders = (large, uneven, broken)
    calls = [("--input", folder, "--output", f"{folder}-made") for folder in folders]
    calls += [("--input", f"{folder}-made", "--output", f"{folder}-back") for folder in folders]
    calls += [("--input", f"{large}-made", "--output", tmp_path / "half", "--dtype", "float16")]
    ((*made, (back, _), (heads, no_model), (kept, warned), (half, shown)),) = ranks.run(
        cases.convert_all, calls, world_size=1
    )
    assert [code for code, _ in made] == [0, 0, 0], made
    assert (back, heads, kept, half) == (0, 1, 0, 1), (no_model, warned, shown)
    assert "no Hugging Face model computes this" in no_model
    assert "not a multiple of the number of attention heads" in no_model
    assert "generation_config.json: left out: " in warned
    assert json.loads((tmp_path / "broken-back" / "generation_config.json").read_text())["eos_token_id"] == 0
    assert "tensor model.norm.weight: has values up to 1e+05, which F16 cannot hold" in shown
    assert not (tmp_path / "half").exists()
    assert not list(tmp_path.glob("*.partial"))
    assert torch.equal(
        cases.tensors_of(tmp_path / "large-back")["model.norm.weight"], tensors["model.norm.weight"]
    )
