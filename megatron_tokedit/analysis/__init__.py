"""What kind of text a corpus is, beside others: concentration, diversity, perplexity, selection; a report.

Invariant: every number is a sum or a hash-keyed sample over documents, so halves merge into the whole and the
number of processes changes nothing; numbers that depend on a corpus's size are compared at one size.
"""
