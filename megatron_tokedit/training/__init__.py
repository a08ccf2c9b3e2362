"""The training loop and what it keeps: state, metrics, resume checks, signals, throughput, estimates."""
