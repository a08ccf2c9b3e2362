"""One scoring contract over Hugging Face models and Megatron checkpoints, for priors and evaluations
alike.
"""

from megatron_tokedit.scoring.base import CandidateRequest, Scorer, TokenScores

__all__ = ["CandidateRequest", "Scorer", "TokenScores"]
