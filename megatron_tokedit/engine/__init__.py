"""The one room that touches megatron-core: process groups, model, optimizer, step, checkpoints, inference."""
