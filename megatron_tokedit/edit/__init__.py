"""The method itself, pure numpy: rules, samplers, counter-based random numbers, mergeable statistics."""
