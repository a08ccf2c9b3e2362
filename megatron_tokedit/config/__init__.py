"""Every setting of a run: sections, loading, checks, and the record of what really ran."""
