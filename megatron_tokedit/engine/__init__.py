"""The one room that touches megatron-core: process groups, model, optimizer, step, checkpoints, inference.

Importing it silences what megatron-core and torch's checkpoint code warn of on import and while saving
(no apex, names that will change): nothing that a user can act on. What matters about the machine,
``engine.preflight`` says.
"""

import warnings

warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")
