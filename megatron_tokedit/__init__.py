"""megatron_tokedit: train large language models on token-edited corpora with megatron-core."""

__version__ = "0.1.0"
