"""Llama-3-8B, pre-trained further on biomedicine, finance and math: on the original and on the edited text.

    python examples/paper/llama3_8b.py --model Meta-Llama-3-8B \
        --biomed biomed.jsonl.gz --finance finance.jsonl.gz          # on 8 GPUs of 80 GB
    python examples/paper/llama3_8b.py --smoke                       # a toy, on two CPU ranks with TP2

As olmo_1b.py, with this model as the prior: 16 GB in bfloat16, so each GPU edits with a copy of its own (on
smaller GPUs add ``--prior-tensor-parallel`` and 2 to ``prior_flags`` below). Trainings run with tensor
parallel 2 and data parallel 4; llama3_8b.yaml has the rest. The paper reports accuracies for two domains:
biomedicine 54.13 base, 56.04 original, 56.48 edited; finance 70.37, 71.40, 72.24.
"""

from study import Model, run

LLAMA3_8B = Model(
    name="llama3_8b",
    family="llama",
    config="llama3_8b.yaml",
    prior_flags=("--prior-dtype", "bfloat16", "--prior-batch-tokens", 8192),
)

if __name__ == "__main__":
    run(LLAMA3_8B, __doc__)
