"""OLMo-1B, pre-trained further on biomedicine, finance and math: on the original and on the edited text.

    python examples/paper/olmo_1b.py --model OLMo-1B-hf \
        --biomed biomed.jsonl.gz --finance finance.jsonl.gz --math math.jsonl.gz     # on 8 GPUs
    python examples/paper/olmo_1b.py --smoke                                         # a toy, on a CPU

For each domain: some documents are held out, the others tokenized, and edited with OLMo-1B as the prior;
OLMo-1B goes on for one epoch of the original and, from the same checkpoint, of the edited text; both come
back as Hugging Face folders and are compared on the held-out documents. The last lines name all files.

The paper's corpora are raw texts of Instruction Pre-Training (arXiv 2406.14491); the authors' folder names
suggest a billion tokens a domain. It reports accuracies (biomedicine 36.63 base, 38.83 original, 40.89
edited; finance 46.22, 47.92, 50.21; math 16.23, 16.26, 16.59); --tasks and --include-path measure such.
Scripts of its repository name Llama-3-8B-Instruct as a prior; here the prior is the model itself.
olmo_1b.yaml says where its settings come from.
"""

from study import Model, run

OLMO_1B = Model(name="olmo_1b", family="olmo", config="olmo_1b.yaml")

if __name__ == "__main__":
    run(OLMO_1B, __doc__)
